"""Drawing figures for print and screen: accuracy against size, and the distribution of kernels. Needs matplotlib."""

import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from .kernels import kernel_histogram

# Okabe and Ito's colors, told apart by color-blind readers, without the yellow that vanishes on paper
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINE_STYLES = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1, 1.5)))  # the next one each time that the colors are used up
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "font.size": 9,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "repvgg_hf",  # ids, and so the file, are the same each time
}
# An SVG changes its colors where the reader's system is dark. Its background does, too: a page may be dark by itself.
DARK = """
@media (prefers-color-scheme: dark) {
  [style*="fill: #ffffff"] { fill: #0d1117 !important }
  [style*="stroke: #000000"] { stroke: #e6edf3 !important }
  [style*="fill: #000000"] { fill: #e6edf3 !important }
  [style*="stroke: #dddddd"] { stroke: #30363d !important }
  [style*="stroke: #666666"] { stroke: #9198a1 !important }
  [style*="stroke: #999999"] { stroke: #9198a1 !important }
  [style*="stroke: #0072b2"] { stroke: #56b4e9 !important }
  [style*="fill: #0072b2"] { fill: #56b4e9 !important }
  [style*="stroke: #56b4e9"] { stroke: #b3e0ff !important }
  [style*="fill: #56b4e9"] { fill: #b3e0ff !important }
  text { fill: #e6edf3 }
}
"""
X_AXES = {"bits": ("bits_per_weight", "stored bits per weight"), "bytes": ("bytes", "checkpoint size")}
FORMATS = ("png", "svg")
WIDTH = 5.6  # inches, at which text is still read on a telephone


def plot_accuracy(
    results: Sequence[Mapping],
    path: str | Path,
    x: str = "bits",
    lowest: float | None = None,
    title: str | None = None,
    formats: Sequence[str] = FORMATS,
) -> None:
    """Draw top-1 accuracy against size as `<path>.png` and `<path>.svg`, one line for each method.

    Args:
        results (`list[dict]`): a mapping for each model: `label` names its line, `top1` is in percent, and there are
            `bits_per_weight` and `bytes`, as `recipes/quantize.py` writes them. The one labeled `"float"` becomes a
            dashed horizontal line, and against bytes a point on it. A row that has a `mark`, such as `"recommended"`,
            gets a ring, which the legend explains.
        path (`str` or `Path`): the files' path without its suffix. The same results give the same bytes.
        x (`str`, defaults to `"bits"`): `"bits"` for the stored bits per weight, or `"bytes"` for the size of the
            checkpoint on a logarithmic axis.
        lowest (`float`, *optional*): where the axis of top-1 begins, in percent, to see the best from nearer; by
            default it shows everything.
        title (`str`, *optional*): title above the axes.
        formats (`list[str]`, defaults to `("png", "svg")`): which of the files to write.

    Raises `ValueError` naming the argument or row for bad input, `ImportError` without matplotlib.
    """
    matplotlib = import_matplotlib()
    if x not in X_AXES:
        raise ValueError(f"x must be one of {', '.join(X_AXES)}, got {x!r}.")
    key, x_label = X_AXES[x]
    lines = _lines(results, key)
    reference = lines.pop("float", None)
    if not lines:
        raise ValueError("results holds no quantized model: give the rows that recipes/quantize.py wrote.")
    highest = max(row["top1"] for row in results)
    if lowest is not None and not lowest < highest:
        raise ValueError(f"lowest must be below the best top-1, {highest}, got {lowest!r}.")

    with matplotlib.style.context(["default", STYLE]):
        height = max(3.8, 0.4 + 0.19 * len(lines))  # the legend has a line for each
        figure = matplotlib.figure.Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        if reference is not None:
            style = {"color": "#666666", "linestyle": "--", "linewidth": 1}
            axes.axhline(reference[0][1], label="float", gid="float", **style)
            if x == "bytes":  # an axis of 32 bits would leave no room for the others
                axes.plot(*reference[0], color="#666666", marker="*", markersize=8, gid="float-point", zorder=3)
        # in the legend as in the figure: the most accurate at the fewest bits on top
        for index, (label, points) in enumerate(sorted(lines.items(), key=lambda line: -line[1][0][1])):
            style = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}
            style["linestyle"] = LINE_STYLES[index // len(COLORS) % len(LINE_STYLES)]
            axes.plot(*zip(*points), label=_plain(label), gid=f"line-{index}", zorder=3, **style)
        for mark in dict.fromkeys(row["mark"] for row in results if "mark" in row):
            points = [(row[key], row["top1"]) for row in results if row.get("mark") == mark]
            style = {"color": "#000000", "linestyle": "", "marker": "o", "markersize": 11, "fillstyle": "none"}
            axes.plot(*zip(*points), label=_plain(mark), gid=f"mark-{mark}", zorder=4, **style)
        axes.set(xlabel=x_label, ylabel="top-1 (%)", title=title)
        if lowest is not None:
            axes.set_ylim(lowest, highest + 0.05 * (highest - lowest))
        if x == "bytes":
            _byte_axis(matplotlib, axes)
        else:
            axes.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(1))
        _add_legend(figure, axes)
        _save(figure, path, formats)


def _lines(results: Sequence[Mapping], key: str) -> dict[str, list[tuple[float, float]]]:
    """Return the points `(row[key], top1)` of each label, in ascending order of `row[key]`.

    Raises `ValueError` naming the row for a value that is missing or can't be drawn.
    """
    lines = {}
    for index, row in enumerate(results):
        missing = [name for name in ("label", "top1", key) if name not in row]
        if missing:
            raise ValueError(f"results[{index}] has no {missing[0]!r}: give the rows that recipes/quantize.py wrote.")
        size, top1 = row[key], row["top1"]
        if not (math.isfinite(size) and size > 0):
            raise ValueError(f"results[{index}] ({row['label']}) has {key}={size!r}, which must be positive.")
        if not 0 <= top1 <= 100:
            raise ValueError(f"results[{index}] ({row['label']}) has top1={top1!r}, which must be from 0 to 100.")
        lines.setdefault(row["label"], []).append((size, top1))
    return {label: sorted(points) for label, points in lines.items()}


def _byte_axis(matplotlib, axes) -> None:
    """Make the x axis logarithmic, with sizes in words also where it is shorter than a power of ten."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda size, _: _byte_text(size)))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())


def _byte_text(size: float) -> str:
    """Write a size with its unit, such as `1.5 MB`."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u), (1, "B"))
    return f"{size / unit:.3g} {name}"


def plot_kernel_histogram(
    kernels: Mapping[str, torch.Tensor | Iterable[torch.Tensor] | Mapping],
    path: str | Path,
    title: str | None = None,
    formats: Sequence[str] = FORMATS,
) -> None:
    """Draw how the entries of some kernels are distributed as `<path>.png` and `<path>.svg`, on a logarithmic axis.

    A normal distribution of as many entries as the first name has is drawn for comparison.

    Args:
        kernels (`dict`): by name, such as `"BN"` and `"OABN"`, a kernel or several of any shape, whose entries
            [`~repvgg_hf.analysis.kernel_histogram`] counts, or what it returned.
        path (`str` or `Path`): the files' path without its suffix. The same kernels give the same bytes.
        title (`str`, *optional*): title above the axes.
        formats (`list[str]`, defaults to `("png", "svg")`): which of the files to write.

    Raises `ValueError` naming the kernels for no or constant or non-finite entries, `ImportError` without matplotlib.
    """
    matplotlib = import_matplotlib()
    if not kernels:
        raise ValueError("kernels is empty: give a kernel or a list of them for each name.")
    histograms = {
        name: entry if isinstance(entry, Mapping) else kernel_histogram(entry, name) for name, entry in kernels.items()
    }
    widths = {histogram["bin_width"] for histogram in histograms.values()}
    if len(widths) > 1:
        raise ValueError(f"The histograms have bins of different widths ({widths}): count all of them anew.")
    first = min(histogram["first"] for histogram in histograms.values())
    last = max(histogram["first"] + len(histogram["counts"]) for histogram in histograms.values())
    edges = widths.pop() * torch.arange(first, last + 1, dtype=torch.float64)

    with matplotlib.style.context(["default", STYLE]):
        figure = matplotlib.figure.Figure(figsize=(WIDTH, 3.2), layout="constrained")
        axes = figure.subplots()
        for index, (name, histogram) in enumerate(histograms.items()):
            before = histogram["first"] - first
            counts = [0] * before + histogram["counts"]
            counts += [0] * (last - first - len(counts))
            style = {"color": COLORS[index % len(COLORS)], "linestyle": LINE_STYLES[index % len(LINE_STYLES)]}
            label = _plain(f"{name}, largest {histogram['largest']:.0f}")
            axes.stairs(counts, edges.tolist(), baseline=None, label=label, gid=f"line-{index}", **style)
        normal = torch.special.ndtr(edges).diff() * sum(next(iter(histograms.values()))["counts"])
        axes.stairs(
            normal.tolist(), edges.tolist(), baseline=None, color="#999999", linestyle=":", label="normal distribution"
        )
        axes.set(xlabel="entry in standard deviations of its kernel", ylabel="entries", title=title)
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)  # a single entry is seen
        _add_legend(figure, axes)
        _save(figure, path, formats)


def _plain(label: str) -> str:
    """Return a label that is shown as it is: no formula between dollars, and not hidden for its first character."""
    return label.lstrip("_").replace("$", r"\$")


def _add_legend(figure, axes) -> None:
    """Add a legend below the axes, which keep the whole width, or beside them if there are many short lines."""
    labels = axes.get_legend_handles_labels()[1]
    longest = max(map(len, labels))
    place = {"loc": "outside lower center", "ncols": 2 if longest < 30 else 1}
    if len(labels) > 6:
        place = {"loc": "outside right upper"}
    figure.legend(frameon=False, handlelength=3, **place)


def import_matplotlib():
    """Import matplotlib without `pyplot`, which would choose a backend for the whole process; returns the module.

    Raises `ImportError` that says what to install.
    """
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.style
        import matplotlib.ticker
    except ImportError as error:
        raise ImportError("Plots need matplotlib: `pip install 'repvgg-hf[plot]'`.") from error
    return matplotlib


def _save(figure, path: str | Path, formats: Sequence[str]) -> None:
    """Write the files through temporary ones, without what would differ from day to day.

    Raises `ValueError` for a path with a suffix or an unknown format.
    """
    path = Path(path)
    if path.suffix.lower() in (".png", ".svg"):
        raise ValueError(f"path is {str(path)!r}: leave out the suffix, formats={list(formats)} are written.")
    if unknown := set(formats) - set(FORMATS):
        raise ValueError(f"formats may be {', '.join(FORMATS)}, got {', '.join(map(repr, unknown))}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    for name in formats:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=name, dpi=200, metadata=metadata[name])
        content = buffer.getvalue()
        if name == "svg":
            content = content.replace(b"<defs>", b"<style>" + DARK.encode() + b"</style>\n <defs>", 1)
        temporary = path.with_name(f"{path.name}.{name}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path.with_name(f"{path.name}.{name}"))
