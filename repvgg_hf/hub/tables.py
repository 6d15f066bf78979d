"""Markdown tables of a card. A column or table whose figures nobody measured is left out."""

import statistics

from ..runtime.quantization_methods import METHODS
from .results import GRANULARITIES, KernelResult, LatencyResult, ModelResult


def cell(text: str) -> str:
    """Escape `text` so that Markdown and HTML show it as it is, on one line."""
    text = " ".join(text.split())
    for character in "\\`*_[]<>|#":
        text = text.replace(character, f"\\{character}")
    return text


def code_block(code: str, language: str) -> str:
    """Return a fenced code block, whose fence is longer than any in `code`."""
    fence = "```"
    while fence in code:
        fence += "`"
    return f"{fence}{language}\n{code}\n{fence}"


def details(title: str, content: str) -> str:
    """Return Markdown that a click on its title shows."""
    return f"<details><summary>{title}</summary>\n\n{content}\n\n</details>"


def folded(command: str, width: int = 80) -> str:
    """Break a command into lines of about `width`, before options. One with quotes stays: a break may change it."""
    if "'" in command or '"' in command:
        return command
    lines, options = [], command.split(" --")
    for part in [options[0], *("--" + option for option in options[1:])]:
        if lines and len(lines[-1]) + len(part) < width:
            lines[-1] += " " + part
        else:
            lines.append(part)
    return " \\\n    ".join(lines)


TEXT = (
    "weights",
    "codebooks",
    "found by",
    "model",
    "engine",
    "file",
    "device",
)  # headings of columns that hold no figures


def table(headings: list[str], rows: list[list[str]], bold: int | None = None) -> str:
    """Return a table with text to the left, figures to the right and row `bold` in bold, without empty columns."""
    columns = [index for index in range(len(headings)) if index == 0 or any(row[index] for row in rows)]
    lines = ["| " + " | ".join(headings[index] for index in columns) + " |"]
    lines.append("|" + "|".join("---" if index == 0 or headings[index] in TEXT else "---:" for index in columns) + "|")
    for number, row in enumerate(rows):
        entries = [f"**{row[index]}**" if number == bold and row[index] else row[index] for index in columns]
        lines.append("| " + " | ".join(entries) + " |")
    return "\n".join(lines)


def quantity(value: int) -> str:
    """Write a number with four significant places and a prefix: `1.361 G`."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g} {prefix}"
    return str(value)


def file_size(size: int) -> str:
    """Write a size in bytes with three significant places and a unit: `75.5 kB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} B"


def spread(values: list[float | None], digits: int = 2) -> str:
    """Write the mean and, for several seeds, the standard deviation; nothing if a value is missing."""
    if None in values:
        return ""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def by_model(models: list[ModelResult]) -> dict[str, list[ModelResult]]:
    """Group measurements by model, one for each seed: float first, then by bits from many to few."""
    groups = {}
    for result in sorted(models, key=lambda result: -result.bits):
        groups.setdefault(result.model, []).append(result)
    return groups


def granularity_in_words(granularity: str | None, channel_scale: bool) -> str:
    """Say which weights share a codebook, such as `per tensor with channel scale`; nothing for float weights."""
    if granularity is None:
        return ""
    return GRANULARITIES[granularity] + (" with channel scale" if channel_scale else "")


def drop_against_float(rows: list[ModelResult], floats: dict[int, float]) -> list[float | None]:
    """Subtract each top-1 from the one of the float model with the same seed; `None` where there is none."""
    return [floats[row.seed] - row.top1 if row.seed in floats else None for row in rows]


def models_table(models: list[ModelResult], published: str) -> str:
    """Return the table of bits, accuracy and size, with all seeds of a model in one line."""
    floats = {row.seed: row.top1 for row in models if not row.quantized}
    headings = ["weights", "codebooks", "found by", "bits", "activation bits", "top-1", "accuracy drop", "top-5"]
    headings += ["cross-entropy", "bytes on disk", "bits per weight", "seeds"]
    lines, bold = [], None
    for name, rows in by_model(models).items():
        first = rows[0]
        bold = len(lines) if name == published else bold
        lines.append(
            [
                cell(first.method),
                granularity_in_words(first.granularity, first.channel_scale),
                cell(first.training or ""),
                str(first.bits),
                str(first.activation_bits or ""),
                spread([row.top1 for row in rows]),
                spread(drop_against_float(rows, floats)) if first.quantized else "",
                spread([row.top5 for row in rows]),
                spread([row.loss for row in rows], 4),
                f"{statistics.fmean(row.bytes for row in rows):,.0f}",
                f"{statistics.fmean(row.bits_per_weight for row in rows):.2f}",
                str(len(rows)),
            ]
        )
    return table(headings, lines, bold)


def methods_table(models: list[ModelResult]) -> str:
    """Return the table of top-1 by method, where several were measured with the same bits and made in the same way.

    Whether a channel scale belongs to a codebook is a default of the method, so it is left out of "the same way". Of
    a method that was measured with and without one, the more accurate model is shown.
    """
    accuracies = {}  # top-1 by seed, by place in the table and method
    for rows in by_model(models).values():
        first, top1 = rows[0], [row.top1 for row in rows]
        granularity = granularity_in_words(first.granularity, channel_scale=False)
        place = (granularity or "-", cell(first.training or ""), str(first.bits), str(first.activation_bits or ""))
        methods = accuracies.setdefault(place, {})
        methods[first.method] = max(methods.get(first.method, top1), top1, key=statistics.fmean)
    compared = {place: methods for place, methods in accuracies.items() if len(methods) > 1}
    if not compared:
        return ""
    lines = [
        [*place, *(spread(methods[name]) if name in methods else "" for name in METHODS)]
        for place, methods in compared.items()
    ]
    headings = ["codebooks", "found by", "bits", "activation bits", *METHODS]
    return table(headings, lines)


def kernels_table(before: list[KernelResult], after: list[KernelResult]) -> str:
    """Return the table of the tails of the convolution kernels, before and after fusing."""
    parts = []
    for title, kernels in (("before fusing (3x3 branch)", before), ("after fusing", after)):
        kernels = [kernel for kernel in kernels if len(kernel.shape) == 4]
        if kernels:
            entries = [title]
            for key in ("kurtosis", "max_over_std"):
                values = sorted(getattr(kernel, key) for kernel in kernels)
                entries += [f"{statistics.median(values):.1f}", f"{values[-1]:.1f}"]
            parts.append(entries)
    if not parts:
        return ""
    headings = ["kernels", "kurtosis, median", "kurtosis, largest", "max / std, median", "max / std, largest"]
    note = "Kurtosis is 3 for a normal distribution; outliers raise it, and they stretch the range of few bits."
    return f"### Outliers in the kernels\n\n{details('Kurtosis and range', table(headings, parts))}\n\n{note}"


def latency_table(latency: list[LatencyResult]) -> str:
    """Return the table of measured times."""
    if not latency:
        return ""
    rows = [
        [cell(row.setting), cell(row.model), cell(row.engine), cell(row.device), f"{row.median_ms:.3g}"]
        for row in latency
    ]
    return f"### Latency\n\n{table(['setting', 'model', 'engine', 'device', 'median, ms'], rows)}"
