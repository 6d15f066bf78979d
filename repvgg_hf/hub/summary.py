"""The top of a card: one line of what was won and lost, and the table of the family that a model belongs to."""

import statistics

from ..analysis.uncertainty import wilson_interval
from .results import EngineResult, ModelResult, Results
from .tables import by_model, cell, drop_against_float, file_size, spread, table

# what models share that differ in bits alone
MADE_ALIKE = ("method", "granularity", "channel_scale", "training", "activation_bits")

UNBROKEN = "\N{NO-BREAK SPACE}"  # on a telephone, too, a figure stays on one line


def family_of(results: Results, published: str) -> dict[str, list[ModelResult]]:
    """Return the published model's measurements, those of models that differ from it in bits alone, and of the float.

    They are by name, float first and then by bits from many to few.
    """
    shown = results.select(published)[0]
    return {
        name: rows
        for name, rows in by_model(results.models).items()
        if name == published
        or not rows[0].quantized
        or all(getattr(rows[0], key) == getattr(shown, key) for key in MADE_ALIKE)
    }


def headline(results: Results, published: str) -> str:
    """Return the line such as "82.4 → 81.8 % top-1, 7.9 x smaller", of what was measured and no more."""
    rows = results.select(published)
    floats = [row for row in results.models if not row.quantized and row.seed in {row.seed for row in rows}]
    top1, size = (statistics.fmean(getattr(row, key) for row in rows) for key in ("top1", "bytes"))
    if not rows[0].quantized or not floats:
        parts = [f"{top1:.1f} % top-1", file_size(round(size))]
    else:
        before, float_size = (statistics.fmean(getattr(row, key) for row in floats) for key in ("top1", "bytes"))
        parts = [f"{before:.1f} → {top1:.1f} % top-1", f"{float_size / size:.1f} x smaller ({file_size(round(size))})"]
        parts += speedup(results.engines, published, {row.model for row in floats})
    return f"**{', '.join(parts)}**"


def speedup(engines: list[EngineResult], published: str, floats: set[str]) -> list[str]:
    """Return how much faster the published model is than float on the same engine and device, the best of them.

    The list is empty if no engine was timed with both.
    """
    timed = [row for row in engines if row.milliseconds is not None and row.device is not None]
    ratios = {
        before.milliseconds / row.milliseconds: row
        for row in timed
        for before in timed
        if row.model == published
        and before.model in floats
        and (row.engine, row.device) == (before.engine, before.device)
    }
    if not ratios:
        return []
    best = max(ratios)
    text = f"{best:.1f} x faster" if best >= 1 else f"{1 / best:.1f} x slower"
    return [f"{text} on {cell(ratios[best].engine)} ({cell(ratios[best].device)})"]


def family_table(results: Results, published: str, links: dict[str, str]) -> str:
    """Return the table of bits, size and accuracy of a family, with the published model in bold.

    Bits are linked to the `links`, addresses by model. A family of one model is in the line above already.
    """
    family = family_of(results, published)
    if not results.select(published)[0].quantized:  # float has no kin, but in a family that is published together
        family = {name: rows for name, rows in by_model(results.models).items() if name in family or name in links}
    if len(family) < 2:
        return ""
    floats = {row.seed: row.top1 for row in results.models if not row.quantized}
    lines, bold = [], None
    for name, rows in family.items():
        bold = len(lines) if name == published else bold
        bits = f"{rows[0].bits:g}" if rows[0].quantized else "float"
        if name == published:
            bits += " (this)"
        elif name in links:
            bits = f"[{bits}]({links[name]})"
        lines.append(
            [
                bits,
                file_size(round(statistics.fmean(row.bytes for row in rows))),
                accuracy_with_error(rows),
                spread(drop_against_float(rows, floats), 1) if rows[0].quantized else "",
            ]
        )
    lines = [[entry.replace(" ", UNBROKEN) for entry in line] for line in lines]
    several = len(results.select(published)) > 1
    meaning = "the standard deviation between seeds" if several else "half of the 95 % interval for so many images"
    shown = table(["bits", "size", "top-1, %", "accuracy drop"], lines, bold)
    return f"{shown}\n\n± is {meaning}."


def accuracy_with_error(rows: list[ModelResult]) -> str:
    """Write the mean top-1 of a model's measurements, and how sure it is."""
    if len(rows) > 1:
        return spread([row.top1 for row in rows], 1)
    low, high = wilson_interval(rows[0].top1 / 100 * rows[0].images, rows[0].images)
    return f"{rows[0].top1:.1f} ± {(high - low) / 2:.1f}"
