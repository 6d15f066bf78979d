"""A training's report as one image, for which it needs matplotlib."""

import textwrap
import warnings
from pathlib import Path

import numpy as np

from repvgg_hf.analysis.plots import COLORS, STYLE, import_matplotlib
from repvgg_hf.training.run_report import RunReport

COLUMNS = 6  # of pictures
LONGEST = 18  # characters of a name


def draw_report(report: RunReport, path: Path) -> None:
    """Draw curves, confusion matrix and the worst pictures as the PNG `path`; the same report gives the same bytes.

    Characters that matplotlib's font lacks are boxes there.

    Raises `ImportError` without matplotlib.
    """
    matplotlib = import_matplotlib()
    rows = -(-len(report.worst) // COLUMNS)
    size = max(3.0, min(6.0, 1.2 + 0.42 * len(report.classes)))
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = matplotlib.figure.Figure(figsize=(10, 2.6 + size + 1.9 * rows), layout="constrained")
        parts = figure.subfigures(2 + bool(rows), 1, height_ratios=[2.6, size, 1.9 * rows][: 2 + bool(rows)])
        figure.suptitle(textwrap.fill(report.sentence.replace("$", r"\$"), 110), fontsize=10)
        _draw_course(report, parts[0].subplots(1, 2))
        _draw_matrix(report, parts[1].subplots())
        if rows:
            _draw_worst(report, parts[2].subplots(rows, COLUMNS, squeeze=False))
        temporary = path.with_name(f"{path.name}.tmp")
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    temporary.replace(path)


def _draw_course(report: RunReport, axes) -> None:
    for place, (field, title) in enumerate((("loss", "training loss"), ("top1", "validation accuracy (%)"))):
        points = [(point.epoch, getattr(point, field)) for point in report.course if getattr(point, field) is not None]
        if points:
            axes[place].plot(*zip(*points), color=COLORS[place], marker="o")
        axes[place].set(title=title, xlabel="epoch")


def _draw_matrix(report: RunReport, axes) -> None:
    shares = report.matrix / np.maximum(1, report.matrix.sum(1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(report.matrix):
        color = "white" if shares[row, column] > 0.6 else "black"
        axes.text(column, row, report.matrix[row, column], ha="center", va="center", color=color)
    names, places = [_short(name) for name in report.classes], range(len(report.classes))
    axes.set_xticks(places, names, rotation=45 if len(names) > 4 else 0, ha="right" if len(names) > 4 else "center")
    axes.set_yticks(places, names)
    title = "what is taken for what"
    if len(names) < report.all_classes:
        title += f" (the {len(names)} of {report.all_classes} classes that are confused most)"
    axes.set(title=title, xlabel="taken for", ylabel="is")
    axes.grid(False)


def _draw_worst(report: RunReport, axes) -> None:
    for one in axes.flat:
        one.axis("off")
    for one, guess in zip(axes.flat, report.worst):
        one.imshow(guess.image)
        title = f"{_short(guess.label)}\ntaken for {_short(guess.guess)}, {guess.confidence:.0%}"
        one.set_title(title, fontsize=8)


def _short(name: str) -> str:
    name = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
    return name.replace("$", r"\$")
