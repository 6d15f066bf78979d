"""Measuring things side by side, so that a ratio survives a noisy machine."""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class BenchmarkArguments:
    """Options of every benchmark."""

    repeats: int = field(default=15, metadata={"help": "Times that each side is measured."})
    seconds: float = field(
        default=0.1, metadata={"help": "Least seconds of one measurement: quick calls are repeated."}
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of all that is random: weights, images, and the order of the sides."}
    )
    device: str | None = field(
        default=None, metadata={"help": "Where to run, such as cpu; by default the accelerator if there is one."}
    )
    output_json: str | None = field(
        default=None, metadata={"help": "File for the figures, by default outputs/benchmarks/<name>.json."}
    )

    def __post_init__(self):
        if self.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {self.repeats}.")
        if self.device is None:
            self.device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """Let PyTorch compute with so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize() -> None:
    """Wait for the accelerator, if there is one: its kernels run after the call that queues them returned."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def time_calls(function: Callable, calls: int) -> float:
    """The seconds per call of `function`."""
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    return (time.perf_counter() - start) / calls


def time_alternately(functions: dict[str, Callable], args: BenchmarkArguments) -> dict[str, list[float]]:
    """The seconds per call of each function, `args.repeats` times; they take turns, so that noise hits them all.

    Every turn has another order: a function also pays for the caches and the heap that the one before it left.
    """
    for function in functions.values():
        function()  # lazy initialization, caches
    quickest = min(time_calls(function, 1) for function in functions.values())
    calls = max(1, math.ceil(args.seconds / quickest))
    times = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(args.seed).shuffle
    for _ in range(args.repeats):
        shuffle(order)
        for name in order:
            times[name].append(time_calls(functions[name], calls))
    return times


def compare(
    setting: str, unit: str, values: dict[str, list[float]], ratios: list[tuple[str, str, float | None]]
) -> dict:
    """The record of one run: the values of each side and, for each `(name, peer, bar)`, the ratio of their medians.

    `bar` is the largest ratio that we accept, `None` where there is no promise. `quartiles` are those of the ratios
    within each turn: a bar that lies between them is neither met nor missed, measure longer.
    """
    medians = {name: statistics.median(samples) for name, samples in values.items()}
    lines = []
    for name, peer, bar in ratios:
        pairs = [sample / other for sample, other in zip(values[name], values[peer])]
        quartiles = statistics.quantiles(pairs, n=4, method="inclusive")[::2] if len(pairs) > 1 else pairs * 2
        ratio = medians[name] / medians[peer]
        lines.append({"name": name, "peer": peer, "ratio": ratio, "quartiles": quartiles, "bar": bar})
    return {"setting": setting, "unit": unit, "medians": medians, "values": values, "ratios": lines}
