"""Drawing the figures of a card from its results alone, so that they can be drawn again from `card.json`."""

import statistics
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from ..analysis.plots import import_matplotlib, plot_accuracy, plot_kernel_histogram
from .results import Results
from .tables import by_model, granularity_in_words

CAPTIONS = {
    "accuracy": "Top-1 accuracy against the bytes of the checkpoint, a line for each way to quantize.",
    "kernels": "How the entries of the convolution kernels are distributed. A codebook has to reach the outermost one.",
}


def figure_paths(results: Results | None, repo_id: str) -> dict[str, str]:
    """Return the path in the repository of each figure that `results` has the measurements for, by kind."""
    if results is None:
        return {}
    quantized = {result.model for result in results.models if result.quantized}
    kinds = {"accuracy": len(quantized) > 1, "kernels": bool(results.histograms)}
    # with the repository's name: committed cards of several models share a folder
    return {kind: f"plots/{repo_id.rpartition('/')[2]}-{kind}.svg" for kind, there in kinds.items() if there}


def draw_figures(
    results: Results | None,
    repo_id: str,
    folder: Path,
    only: Iterable[str] | None = None,
    published: str | None = None,
) -> dict[str, str]:
    """Draw the figures of `results` below `folder`, with a ring around `published`; returns captions by path there.

    With `only`, figures whose paths are not in it are left out. Without matplotlib `ImportError` is raised, which names
    the choices.
    """
    paths = figure_paths(results, repo_id)
    paths = {kind: path for kind, path in paths.items() if only is None or path in only}
    if paths:
        try:
            import_matplotlib()
        except ImportError as error:
            raise ImportError(
                f"{error} Or leave the figures out of the card: draw_plots=False, on the command line "
                "`--draw_plots False`."
            ) from error
    for kind, path in paths.items():
        drawn = folder / path.removesuffix(".svg")
        if kind == "accuracy":
            plot_accuracy(accuracy_rows(results, published), drawn, x="bytes", formats=["svg"])
        else:
            histograms = {entry.name: asdict(entry) for entry in results.histograms}
            plot_kernel_histogram(histograms, drawn, formats=["svg"])
    return {path: CAPTIONS[kind] for kind, path in paths.items()}


def accuracy_rows(results: Results, published: str | None = None) -> list[dict]:
    """Return a point for each model, averaged over seeds, as [`~repvgg_hf.analysis.plots.plot_accuracy`] takes them."""
    rows = []
    for measurements in by_model(results.models).values():
        first = measurements[0]
        granularity = granularity_in_words(first.granularity, first.channel_scale)
        activations = f"{first.activation_bits}-bit activations" if first.activation_bits else ""
        row = {"label": ", ".join(filter(None, [first.method, granularity, activations, first.training]))}
        for key in ("top1", "bytes"):
            row[key] = statistics.fmean(getattr(measurement, key) for measurement in measurements)
        rows.append(row | ({"mark": "published"} if first.model == published else {}))
    return rows
