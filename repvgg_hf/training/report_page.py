"""A training's report as one HTML page that needs no other file, for wide and narrow, light and dark screens."""

import base64
import html
import io
import math
from collections.abc import Sequence

from repvgg_hf.training.run_report import Guess, RunReport

STYLE = """
:root { color-scheme: light dark; --text: #1c2126; --soft: #5b6670; --line: #d5dade; --back: #fff; --card: #f5f7f8;
  --blue: #0072b2; --orange: #c2500a; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6eaed; --soft: #a3adb5; --line: #3a434b; --back: #14181b; --card: #1e2429; --blue: #56b4e9;
    --orange: #f0964b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 20px 16px 48px; max-width: 1040px; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5em; line-height: 1.25; margin: 0 0 .4em; }
h2 { font-size: 1.15em; margin: 2em 0 .5em; }
h3 { font-size: 1em; font-weight: 500; margin: 1.2em 0 .5em; }
p { margin: .4em 0; } .soft { color: var(--soft); font-size: .9em; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 16px; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg .grid { stroke: var(--line); } svg .curve { fill: none; stroke: var(--blue); stroke-width: 2; }
svg circle { fill: var(--blue); } svg .title { fill: var(--text); font-size: 14px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: 6px 10px; border: 1px solid var(--line); text-align: right; font-weight: 400; }
thead th { text-align: center; vertical-align: bottom; color: var(--soft); }
.many thead th { writing-mode: vertical-rl; text-align: left; padding: 8px 4px; max-height: 11em; }
td { white-space: nowrap; } .many td { padding: 5px 6px; min-width: 2.2em; text-align: center; }
table { overflow-wrap: normal; } .many tbody th { padding: 4px 8px; font-size: .9em; }
.right { background: color-mix(in srgb, var(--blue) calc(var(--share) * 60%), transparent); }
.wrong { background: color-mix(in srgb, var(--orange) calc(var(--share) * 80%), transparent); }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(144px, 1fr)); gap: 12px; }
figure { margin: 0; padding: 8px; background: var(--card); border-radius: 8px; }
figure img { width: 100%; height: 128px; object-fit: contain; display: block; }
figcaption { font-size: .875em; line-height: 1.35; margin-top: 6px; } figcaption b { color: var(--orange); }
"""
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 360, 220, 44, 34, 30  # of a curve's drawing


def page_of(report: RunReport) -> str:
    """Return the page of a report."""
    parts = [f"<h1>{html.escape(report.sentence)}</h1>"]
    parts += [f'<p class="soft">{html.escape(fact)}</p>' for fact in report.facts]
    parts += ["<h2>Course of the training</h2>", f'<div class="curves">{"".join(_curves(report))}</div>']
    parts += ["<h2>What is taken for what</h2>", *_matrix(report)]
    parts += ["<h2>Most confused classes</h2>", *_pairs(report)]
    parts += ["<h2>Worst pictures</h2>", *_worst(report)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Report of a training</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _curves(report: RunReport) -> list[str]:
    loss = [(point.epoch, point.loss) for point in report.course if point.loss is not None]
    top1 = [(point.epoch, point.top1) for point in report.course if point.top1 is not None]
    drawn = [_curve("Training loss", loss, None)] if loss else []
    return drawn + ([_curve("Validation accuracy (%)", top1, 100.0)] if top1 else [])


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers that span `low` to `high`, both within them."""
    span = max(high - low, 0.01 * max(1.0, abs(high)))
    power = 10 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * count >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    first -= first == last  # a single value
    return [round(step * place, 10) for place in range(first, last + 1)]


def _curve(title: str, points: Sequence[tuple[float, float]], most: float | None) -> str:
    """Return a line through `points` (epoch, value) as an SVG; `most` is the largest value that there can be."""
    values = [value for _, value in points]
    down = ticks(min(values), max(values))
    down = [value for value in down if most is None or value <= most]
    across = [value for value in ticks(0, points[-1][0]) if value <= points[-1][0] * 1.001]
    end = max(points[-1][0], 1e-9)

    def x(epoch: float) -> str:
        return f"{LEFT + (WIDTH - LEFT - 10) * epoch / end:.1f}"

    def y(value: float) -> str:
        share = (value - down[0]) / ((down[-1] - down[0]) or 1)
        return f"{HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share:.1f}"

    lines = [f'<text class="title" x="{LEFT}" y="16">{html.escape(title)}</text>']
    for value in down:
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 10}" y1="{y(value)}" y2="{y(value)}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{float(y(value)) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for epoch in across:
        lines.append(f'<text x="{x(epoch)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{epoch:g}</text>')
    lines.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 3}" text-anchor="middle">epoch</text>')
    lines.append(f'<polyline class="curve" points="{" ".join(f"{x(a)},{y(b)}" for a, b in points)}"/>')
    lines += [f'<circle cx="{x(a)}" cy="{y(b)}" r="3"><title>epoch {a:g}: {b:.4g}</title></circle>' for a, b in points]
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(lines)}</svg>'


def _matrix(report: RunReport) -> list[str]:
    names, rows = [html.escape(name) for name in report.classes], report.matrix.tolist()
    note = "Rows are what a picture shows, columns what it is taken for."
    if len(names) < report.all_classes:
        note += f" Of {report.all_classes} classes these are confused most; pictures taken for others are left out."
    body = []
    for place, (name, counts) in enumerate(zip(names, rows)):
        total = max(1, sum(counts))
        cells = (
            f'<td class="{("wrong", "right")[column == place]}" style="--share:{count / total:.3f}">{count or ""}</td>'
            for column, count in enumerate(counts)
        )
        body.append(f"<tr><th>{name}</th>{''.join(cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in names)
    kind = ' class="many"' if len(names) > 4 else ""
    table = f"<table{kind}><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return [f'<p class="soft">{note}</p>', f'<div class="scroll">{table}</div>']


def _pairs(report: RunReport) -> list[str]:
    if not report.pairs:
        return ["<p>None: all validation images are right.</p>"]
    parts = []
    for pair in report.pairs:
        label, guess = html.escape(pair.label), html.escape(pair.guess)
        parts.append(f"<h3>{label} taken for {guess}: {pair.count} of {pair.images}</h3>")
        parts.append(_pictures(pair.guesses))
    return parts


def _worst(report: RunReport) -> list[str]:
    if not report.worst:
        return ["<p>None: all validation images are right.</p>"]
    note = "Wrong, and the most certain of it. Look whether they are in the right folder."
    return [f'<p class="soft">{note}</p>', _pictures(report.worst)]


def _pictures(guesses: Sequence[Guess]) -> str:
    return f'<div class="pictures">{"".join(map(_figure, guesses))}</div>'


def _figure(guess: Guess) -> str:
    file = io.BytesIO()
    guess.image.save(file, format="JPEG", quality=85)
    label, name = html.escape(guess.label), html.escape(guess.guess)
    place = f'<br><span class="soft">{html.escape(guess.file)}</span>' if guess.file else ""
    return (
        f'<figure><img alt="{label}" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'
        f"<figcaption>{label}, taken for <b>{name}</b> ({guess.confidence:.0%}){place}</figcaption></figure>"
    )
