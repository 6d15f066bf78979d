"""The report of the study `whole`: its questions, each with a verdict, tables and a figure, from the cells' files."""

import statistics
from pathlib import Path

from repvgg_hf.analysis.plots import plot_accuracy
from repvgg_hf.recipes.studies.whole_tables import (
    CALIBRATED,
    FURTHER,
    MAIN,
    MIXED,
    SHARED_OUT,
    SWITCHES,
    TITLES,
    TUNED,
    Difference,
    Row,
    bars,
    frontier,
    hours,
    kernels,
    kurtoses,
    norms,
    overhead,
    rows_of,
    shared_out,
    table,
)
from repvgg_hf.training.report import write_json

BELOW = 10.0  # percentage points that the figure shows below the best network: further down all is lost


def write_report(records: list[dict], folder: Path, split: str) -> str:
    """Write `report.md` into the study's `folder`, with figures and the rows as `report.json`; returns the text."""
    rows = rows_of(records, split)
    images = "held-out training images, on which choices are made" if split == "validation" else "test images"
    text = [f"# What holds, on {images}", "", "Percent or percentage points; ± over seeds: the standard deviation"]
    text += ["of an accuracy, the 95 % interval (Student's) of the mean of a paired difference."]
    for title, section in (
        ("Does fusing make outliers, does OABN remove them, and does it cost accuracy in float?", branches),
        ("What do other bounds cost, and give?", thresholds),
        ("What remains after training, without labels?", after_training),
        ("What remains where the training sees quantized weights?", in_training),
        ("What does such a training cost?", cost),
    ):
        found = section(rows, records, split)
        text += ["", f"## {title}", "", *(found or ["Not measured."])]
    text += ["", "## Time", "", *hours(records)]
    for task in dict.fromkeys(row.task for row in rows):
        points = figure_rows(rows, task)
        if any(point["label"] != "float" for point in points):
            lowest = max(point["top1"] for point in points) - BELOW
            plot_accuracy(points, folder / f"report-{task}", lowest=lowest, title=TITLES[task])
            text += ["", f"![Accuracy against stored bits, {TITLES[task]}](report-{task}.svg)"]
    page = "\n".join(text) + "\n"
    (folder / "report.md").write_text(page, encoding="utf-8")
    write_json(folder / "report.json", {"split": split, "rows": [vars(row) for row in rows]})
    return page


def branches(rows: list[Row], records: list[dict], split: str) -> list[str]:
    """What fusing does to the kernels, and what OABN costs.

    Fusing makes outliers if the median kernel of each network with batch norm has more than twice its branches'
    kurtosis, and OABN removes them if the largest kurtosis of each network with it is at most twice its branches'.
    """
    tails = kurtoses(records, split)
    if not tails:
        return []
    plain = [found for (_, norm, _), found in tails.items() if norm == "BN"]
    bounded = [found for (task, norm, _), found in tails.items() if norm == MAIN[task]]
    text = []
    if plain:
        ratios = [statistics.median(found["fused"]) / statistics.median(found["branches"]) for found in plain]
        text.append(f"- Fusing makes outliers: {share([ratio > 2 for ratio in ratios])}.")
    if bounded:
        ratios = [max(found["fused"]) / max(found["branches"]) for found in bounded]
        text.append(f"- OABN removes them: {share([ratio <= 2 for ratio in ratios])}.")
    for task in dict.fromkeys(row.task for row in rows):
        own, base = (
            {row.seed: row.top1 for row in rows if (row.task, row.norm, row.line) == (task, norm, "float")}
            for norm in (MAIN[task], "BN")
        )
        paired = [own[seed] - base[seed] for seed in own if seed in base]
        if paired:
            difference = Difference.of(paired)
            text.append(f"- It costs nothing in float on {TITLES[task]}: {difference.verdict(0.0)} ({difference}).")
    return [*text, "", *kernels(records, split), "", *norms(rows)]


def share(held: list[bool]) -> str:
    """Return the verdict on what is so in each network, or in some."""
    verdict = "holds" if all(held) else "partly" if any(held) else "not"
    return f"{verdict} ({sum(held)} of {len(held)} networks)"


def thresholds(rows: list[Row], records: list[dict], split: str) -> list[str]:
    """Networks with other bounds: their accuracy in float is in the table above, here it is quantized."""
    text: list[str] = []
    for task, norm in dict.fromkeys((row.task, row.norm) for row in rows):
        if norm not in ("BN", MAIN[task]):
            text += table(rows, task, norm, lambda row: row.activation_bits is None)
    return text[1:]


def after_training(rows: list[Row], records: list[dict], split: str) -> list[str]:
    """What was to be reached without labels, then all lines, other libraries' against ours."""
    trained = trained_lines(records)
    of_it = [row for row in rows if row.line not in trained]
    text = [*bars(rows, lambda line: line not in trained)]
    for task, norm in main_networks(rows):
        plain = [row for row in of_it if row.bits is not None]
        text += table(plain, task, norm, lambda row: row.activation_bits is None)
        text += shared_out(of_it, task, norm)
        text += table(of_it, task, norm, lambda row: row.activation_bits is not None)
        text += frontier(rows, task, norm)
    return text


def in_training(rows: list[Row], records: list[dict], split: str) -> list[str]:
    """What was to be reached by trainings with quantized weights, then all of them."""
    trained = trained_lines(records)
    if not any(row.line in trained for row in rows):
        return []
    text = [*bars(rows, lambda line: line in trained)]
    for task, norm in main_networks(rows):
        text += table(rows, task, norm, lambda row: row.line in trained and row.bits is not None)
        text += shared_out([row for row in rows if row.line in trained], task, norm)
    return text


def cost(rows: list[Row], records: list[dict], split: str) -> list[str]:
    """Time and memory of a step."""
    return overhead(records)


def trained_lines(records: list[dict]) -> set[str]:
    """The lines of trainings that go on from a float network."""
    return {record["line"] for record in records if record.get("kind") == "qat"} | {FURTHER}


def main_networks(rows: list[Row]) -> list[tuple[str, str]]:
    """(task, norm) of the networks that all lines are of."""
    found = dict.fromkeys((row.task, row.norm) for row in rows)
    return [(task, norm) for task, norm in found if norm in ("BN", MAIN[task])]


def figure_rows(rows: list[Row], task: str) -> list[dict]:
    """Return what the figure shows of the main network: means over seeds; targets of a method are one line."""
    shown = ["float", "uniform, channel", "k-means, tensor and scale", CALIBRATED, TUNED, SWITCHES, "uniform (LSQ)"]
    shown += [line.partition(", target")[0] for line in (MIXED, SHARED_OUT)]
    points: dict[tuple, list[Row]] = {}
    for row in rows:
        main = (row.task, row.norm) == (task, MAIN[task])
        if main and row.activation_bits is None and label_of(row) in shown:
            points.setdefault((row.line, row.bits), []).append(row)
    return [
        {
            "label": label_of(found[0]),
            "top1": statistics.mean(row.top1 for row in found),
            "bits_per_weight": statistics.mean(row.stored for row in found),
        }
        for found in points.values()
    ]


def label_of(row: Row) -> str:
    """Return what a point is called in the figure."""
    return row.line if row.bits is not None else row.line.partition(", target")[0]


__all__ = ["write_report"]
