"""The tables of the study `whole`, from the cells' files alone: accuracies over seeds, and their paired differences."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from scipy.stats import t as student

TITLES = {"cifar10": "CIFAR-10", "tiny_imagenet": "Tiny-ImageNet"}
CALIBRATED = "k-means, tensor and scale, calibrated"
PER_CHANNEL = "k-means, channel, + bias correction"
TUNED = "k-means, channel, tuned"
SHARED_BITS = "mixed precision"
MIXED = f"{SHARED_BITS}, tuned, target 2.1"
SWITCHES = "ClusterQAT, all switches"
SHARED_OUT = "ClusterQAT, bits shared out, target"
FURTHER = "float, further epochs"
ACTIVATIONS = "ClusterQAT, W4A8"  # apart from W4A8 after training
# percentage points that a quantized network may lose on average: by task, and by bits or line
PTQ_BARS = {
    "cifar10": {(CALIBRATED, 8): 0.0, (CALIBRATED, 4): 0.1, (TUNED, 3): 0.3, (TUNED, 2): 1.5, (MIXED, None): 1.5},
    "tiny_imagenet": {(CALIBRATED, 4): 0.5},
}
QAT_BARS = {"cifar10": {4: 0.0, 3: 0.1, 2: 0.7, 1: 2.5}, "tiny_imagenet": {4: 0.3, 3: 0.8, 2: 3.0}}
W4A8_BAR = 0.2
MAIN = {"cifar10": "OABN", "tiny_imagenet": "OABN, k 24"}  # a bound of 6 leaves wide layers' identities little


@dataclass(frozen=True)
class Row:
    """One network's accuracy: `line` at so many `bits`, and the bits that a weight takes in the file.

    `base` is the float network's accuracy where the same run has measured it.
    """

    task: str
    norm: str
    seed: int
    line: str
    bits: int | None
    activation_bits: int | None
    stored: float
    top1: float
    library: str | None = None  # another one, whose method the line is
    base: float | None = None


@dataclass(frozen=True)
class Difference:
    """Paired differences over seeds, in percentage points: their mean, and half of the 95 % interval of the mean.

    The interval is Student's; one seed has none.
    """

    mean: float
    half: float | None
    seeds: int

    @classmethod
    def of(cls, values: list[float]) -> "Difference":
        count = len(values)
        half = None
        if count > 1:
            half = student.ppf(0.975, count - 1) * statistics.stdev(values) / count**0.5
        return cls(statistics.mean(values), half, count)

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" + (f" ± {self.half:.2f}" if self.half is not None else " (one seed)")

    def verdict(self, bar: float) -> str:
        """Tell whether a drop, which is negative, is within the `bar`.

        "holds" if its mean is, or of a bar of 0 if the interval includes 0; "partly" if the interval reaches the bar.
        """
        reach = self.mean + (self.half or 0.0)
        if self.mean >= -bar or (bar == 0 and reach >= 0):
            return "holds"
        return "partly" if reach >= -bar else "not"


def rows_of(records: Iterable[dict], split: str) -> list[Row]:
    """Return every accuracy on the `split` that the cells hold."""
    rows = []
    for record in records:
        if record.get("split") != split:
            continue
        where, result = (record["task"], record["norm"], record["seed"]), record["result"]
        if record["kind"] in ("ptq", "more"):
            for row in next(iter(result["models"].values())).values():
                if record["kind"] == "more" and row["line"] == "float":  # in the first ones, too
                    continue
                line = (*where, row["line"], row["bits"], row["activation_bits"])
                rows.append(Row(*line, row["bits_per_weight"], row["top1"], row.get("library")))
        elif record["kind"] == "qat":
            stages = {row["stage"]: row for row in result["results"]}
            line = (*where, record["line"], record["bits"], record.get("activation_bits"))
            packed, base = stages["packed"], stages["float"]["top1"]
            rows.append(Row(*line, packed["bits_per_weight"], packed["top1"], base=base))
        elif record["kind"] == "further":
            rows.append(Row(*where, FURTHER, 32, None, 32.0, result["eval_top1"]))
    return rows


def drops(rows: list[Row], task: str, norm: str, line: str, bits: int | None, base: str = "float") -> list[float]:
    """Return the accuracy of a line less that of `base`, for each seed that has both.

    That of "float" is the run's own, if it has measured it: in float32, while others may evaluate in mixed precision.
    """
    of = {row.seed: row.top1 for row in rows if (row.task, row.norm, row.line) == (task, norm, base)}
    found = [row for row in rows if (row.task, row.norm, row.line, row.bits) == (task, norm, line, bits)]
    if base == "float":
        of |= {row.seed: row.base for row in found if row.base is not None}
    return [row.top1 - of[row.seed] for row in found if row.seed in of]


def bars(rows: list[Row], keep: Callable[[str], bool]) -> list[str]:
    """Return the table of what the lines to `keep` were to reach."""
    lines = ["| network | weights | may lose | against float | after further epochs | verdict |", "|" + "---|" * 6]
    wanted = [(task, line, bits, bar) for task, by_line in PTQ_BARS.items() for (line, bits), bar in by_line.items()]
    wanted += [(task, SWITCHES, bits, bar) for task, by_bits in QAT_BARS.items() for bits, bar in by_bits.items()]
    for task, by_bits in QAT_BARS.items():
        shared_out = [(f"{SHARED_OUT} {target}", bits) for target, bits in ((2.1, 2), (1.2, 1)) if bits in by_bits]
        wanted += [(task, line, None, by_bits[bits]) for line, bits in shared_out]
    wanted += [("cifar10", ACTIVATIONS, 4, W4A8_BAR)]
    for task, line, bits, bar in wanted:
        if not keep(line):
            continue
        against = drops(rows, task, MAIN[task], line, bits)
        if against:
            drop = Difference.of(against)
            further = drops(rows, task, MAIN[task], line, bits, FURTHER)
            beside = str(Difference.of(further)) if further and "ClusterQAT" in line else ""
            title = line if bits is None else f"{line}, {bits} bit"
            cells = (TITLES[task], title, f"{bar:.1f}", str(drop), beside, drop.verdict(bar))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def table(rows: list[Row], task: str, norm: str, keep: Callable[[Row], bool]) -> list[str]:
    """Return a table of lines against bits: the mean over seeds, and the standard deviation."""
    rows = [row for row in rows if (row.task, row.norm) == (task, norm) and keep(row)]
    if not rows:
        return []
    bits = sorted({row.bits for row in rows if row.bits is not None}, reverse=True)
    head = " | ".join(f"{count} bit" for count in bits)
    lines = ["", f"| {TITLES[task]}, {norm} | {head} |", "|---|" + "---|" * len(bits)]
    for line in dict.fromkeys(row.line for row in rows):
        cells = [[row.top1 for row in rows if (row.line, row.bits) == (line, count)] for count in bits]
        lines.append(f"| {line} | {' | '.join(map(spread, cells))} |")
    return lines


def summary(rows: list[Row], task: str = "cifar10") -> str:
    """Return a short table for the README: mean accuracies, batch norm beside OABN, trainings last.

    A mean of fewer networks than there are says of how many.
    """
    rows = [row for row in rows if row.task == task and row.activation_bits is None and row.library is None]
    norms = ("BN", MAIN[task])
    networks = [len({row.seed for row in rows if row.norm == norm}) for norm in norms]
    heads = [f"{count} with {norm}" for count, norm in zip(networks, norms)]
    lines = [f"| {TITLES[task]}, networks: | {' | '.join(heads)} |", "|---|---|---|"]
    trained = {row.line for row in rows if row.base is not None} | {FURTHER}
    for line in sorted(dict.fromkeys(row.line for row in rows if row.norm == norms[1]), key=trained.__contains__):
        bits = sorted({row.bits for row in rows if row.line == line and row.bits is not None}, reverse=True)
        widths = f", {' / '.join(map(str, bits))} bits" if bits not in ([], [32]) else ""
        cells = []
        for norm, count in zip(norms, networks):
            found = [
                [row.top1 for row in rows if (row.norm, row.line, row.bits) == (norm, line, b)] for b in bits or [None]
            ]
            cells.append(" / ".join(_mean_of(values, count) for values in found if values))
        lines.append(f"| {line}{widths} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean_of(values: list[float], networks: int) -> str:
    return f"{statistics.mean(values):.1f}" + (f" (of {len(values)})" if len(values) < networks else "")


def shared_out(rows: list[Row], task: str, norm: str) -> list[str]:
    """Return the table of lines whose layers have bits of their own: what a weight takes, and the mean accuracy."""
    rows = [row for row in rows if (row.task, row.norm) == (task, norm) and row.bits is None]
    if not rows:
        return []
    lines = ["", f"| {TITLES[task]}, {norm}: bits shared out | stored bits | top-1 |", "|---|---|---|"]
    for line in dict.fromkeys(row.line for row in rows):
        of_line = [row for row in rows if row.line == line]
        stored = statistics.mean(row.stored for row in of_line)
        lines.append(f"| {line} | {stored:.2f} | {spread([row.top1 for row in of_line])} |")
    return lines


def spread(values: list[float]) -> str:
    """Return the mean over seeds with the standard deviation, the empty string for no value."""
    if not values:
        return ""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def kurtoses(records: Iterable[dict], split: str) -> dict[tuple, dict[str, list[float]]]:
    """Return the kurtosis of each 4-dimensional kernel, of `branches` and `fused`, by (task, norm, seed)."""
    found = {}
    for record in records:
        if record.get("kind") == "ptq" and record["split"] == split:
            tails = next(iter(record["result"]["models"].values()))["float"]["kernels"]
            found[record["task"], record["norm"], record["seed"]] = {
                part: [kernel["kurtosis"] for kernel in tails[part] if len(kernel["shape"]) == 4]
                for part in ("branches", "fused")
            }
    return found


def kernels(records: Iterable[dict], split: str) -> list[str]:
    """Return the table of the kernels' kurtosis, before and after fusing."""
    lines = ["| network | kurtosis of the branches | of the fused kernels |", "|---|---|---|"]
    for (task, norm, seed), tails in kurtoses(records, split).items():
        cells = [f"{statistics.median(values):.1f}, at most {max(values):.0f}" for values in tails.values()]
        lines.append(f"| {TITLES[task]}, {norm}, seed {seed} | {' | '.join(cells)} |")
    return lines


def norms(rows: list[Row]) -> list[str]:
    """Return the table of what OABN costs in float: every kind of it less batch norm, paired by seed."""
    lines = ["| network | top-1 in float | less batch norm's |", "|---|---|---|"]
    floats = [row for row in rows if row.line == "float"]
    for task, norm in dict.fromkeys((row.task, row.norm) for row in floats):
        own = {row.seed: row.top1 for row in floats if (row.task, row.norm) == (task, norm)}
        plain = {row.seed: row.top1 for row in floats if (row.task, row.norm) == (task, "BN")}
        paired = [own[seed] - plain[seed] for seed in own if seed in plain and norm != "BN"]
        difference = str(Difference.of(paired)) if paired else ""
        lines.append(f"| {TITLES[task]}, {norm} | {spread(list(own.values()))} | {difference} |")
    return lines


def frontier(rows: list[Row], task: str, norm: str) -> list[str]:
    """Return the table of other libraries' points against ours at the same stored bits, interpolated.

    Both are without labels, and of the networks that the libraries were measured on.
    """
    rows = [row for row in rows if (row.task, row.norm) == (task, norm)]
    seeds = {row.seed for row in rows if row.library is not None}
    means: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.seed in seeds and row.activation_bits is None and row.line != "float":
            means.setdefault((row.line, row.bits), []).append(row)
    points = [
        (found[0], statistics.mean(row.stored for row in found), statistics.mean(row.top1 for row in found))
        for found in means.values()
    ]
    best = (CALIBRATED, PER_CHANNEL, TUNED)
    without_labels = [point for point in points if point[0].line in best or point[0].line.startswith(SHARED_BITS)]
    ours = best_at_most([(stored, top1) for _, stored, top1 in without_labels])
    theirs = [(row.line, stored, top1) for row, stored, top1 in points if row.library is not None]
    lines = []
    for line, stored, top1 in sorted(theirs, key=lambda point: point[1]):
        own = interpolated(ours, stored)
        if own is not None:
            lines.append(f"| {line} | {stored:.2f} | {top1:.2f} | {own:.2f} | {own - top1:+.2f} |")
    if not lines:
        return []
    head = f"| {TITLES[task]}, {norm}: other libraries | stored bits | top-1 | ours there | difference |"
    return ["", head, "|---|---|---|---|---|", *lines]


def best_at_most(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other one beats with as few bits, by their bits."""
    kept: list[tuple[float, float]] = []
    for stored, top1 in sorted(points):
        if not kept or top1 > kept[-1][1]:
            kept.append((stored, top1))
    return kept


def interpolated(points: list[tuple[float, float]], stored: float) -> float | None:
    """Return the accuracy between points at so many stored bits; `None` below the first."""
    if not points or stored < points[0][0]:
        return None
    for (low, first), (high, second) in zip(points, points[1:]):
        if low <= stored <= high:
            return first + (second - first) * (stored - low) / (high - low)
    return points[-1][1]


def overhead(records: Iterable[dict]) -> list[str]:
    """Return the tables of what a step with quantized weights takes, of what one with float weights does."""
    lines: list[str] = []
    for record in records:
        for run in record["result"]["runs"] if record.get("kind") == "overhead" else ():
            lines += ["", f"| {run['setting']} | against | ratio |", "|---|---|---|"]
            lines += [f"| {ratio['name']} | {ratio['peer']} | {ratio['ratio']:.2f} |" for ratio in run["ratios"]]
    return lines[1:]


def hours(records: Iterable[dict]) -> list[str]:
    """Return the table of the wall time of each kind of cell."""
    seconds: dict[str, list[float]] = {}
    for record in records:
        seconds.setdefault(record.get("kind", "data"), []).append(record["seconds"])
    lines = ["| cells | number | hours |", "|---|---|---|"]
    return lines + [f"| {kind} | {len(found)} | {sum(found) / 3600:.2f} |" for kind, found in seconds.items()]
