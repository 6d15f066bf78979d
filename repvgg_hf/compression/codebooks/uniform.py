"""Evenly spaced codebooks, the usual integer quantization: `offset + step * integers`.

A *range* is the offset and the step of such a codebook: one that takes in every weight ("minmax"), or the one with the
least squared error ("mse"). It is *affine* if it has an offset; without one, zero is an entry (symmetric).
"""

import torch

from ...runtime.quantization_cluster import LARGEST_INT8, ClusterConfig
from .codes import TINY
from .sorted_groups import SortedGroups

# Factors by which ranges are stretched, at first the one that takes in every weight, then the best so far.
STEPS = (
    tuple(1.1 * 300.0 ** (-i / 47) for i in range(48)),
    tuple(1 + i / 64 for i in range(-4, 5)),
    tuple(1 + i / 256 for i in range(-3, 4)),
    tuple(1 + i / 1024 for i in range(-3, 4)),
)
ENDS = (  # of an affine range, either end for itself
    tuple(64.0 ** (-i / 15) for i in range(16)),
    (0.88, 0.94, 1.0, 1.06, 1.13),
    (0.96, 0.98, 1.0, 1.02, 1.04),
    (0.99, 0.995, 1.0, 1.005, 1.01),
)
SURVIVORS = (24, 12, 6, 6)  # ranges that go into the next round
LEAST_SQUARES_STEPS = 4  # in each of them

Range = tuple[torch.Tensor, torch.Tensor]  # offsets and steps of the codebooks `offset + step * integers`


def fit_uniform(
    rows: torch.Tensor, k: int, groups: int, config: ClusterConfig, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fit evenly spaced codebooks to a weight: the `fit` of the method `"uniform"`.

    Args:
        rows: float32 `[out, n]`.
        k: entries of a codebook.
        groups: number of codebooks; each is for `out / groups` consecutive rows.
        config: its `symmetric`, `range_method` and `channel_scale` say what kind of codebook.
        importance: `[out, n]`, of each weight, not negative; `None` for equal ones.

    Returns the ascending codebooks `[groups, k]`, float32, and the scale. With `channel_scale` the codebooks are
    integers, and a channel's step is its scale `[out]`; else the scale is `None`.
    """
    affine = not config.symmetric
    integers = torch.arange(k, dtype=torch.float32, device=rows.device)
    if not affine:
        integers = symmetric_integers(k, rows.device, largest_of(config, k))
    sets = len(rows) if config.channel_scale else groups
    values = rows.reshape(sets, -1)
    if config.range_method == "mse":
        weights = None if importance is None else importance.reshape(sets, -1)
        offset, step = best_range(values, integers, affine, weights)
    else:
        offset, step = whole_range(values, integers, affine)
    if config.channel_scale:
        return integers.repeat(groups, 1), step.clamp_min(TINY)
    return offset[:, None] + step[:, None] * integers, None


def largest_of(config: ClusterConfig, k: int) -> int | None:
    """Return the largest magnitude of the integers of a codebook with `k` entries; `None` if they end where `k` does.

    They are stored as such only in an int8 codebook.
    """
    bits = k.bit_length() - 1
    largest = config.largest_integer(bits)
    return largest if config.codebook_dtype == "int8" and largest < LARGEST_INT8 else None


def symmetric_integers(k: int, device: torch.device | None = None, largest: int | None = None) -> torch.Tensor:
    """Return the integers of a symmetric codebook, `-k/2 .. k/2 - 1`, but -1 and 1 for `k = 2`; float32 `[k]`.

    With a `largest` magnitude what is beyond is that: the entry comes several times, and its codes but one are unused.
    """
    if k == 2:
        return torch.tensor([-1.0, 1.0], dtype=torch.float32, device=device)
    integers = torch.arange(-(k // 2), k // 2, dtype=torch.float32, device=device)
    return integers if largest is None else integers.clamp(-largest, largest)


def whole_range(values: torch.Tensor, integers: torch.Tensor, affine: bool) -> Range:
    """Return the range that takes in all of `values` `[sets, n]`: offset and step, float32 `[sets]`.

    It goes from the least to the largest value, or, if it is not affine, as far from zero as the largest magnitude.
    """
    low, high = values.aminmax(dim=1)
    if not affine:
        return torch.zeros_like(low), torch.maximum(-low, high).clamp_min(TINY) / integers[-1]
    step = (high - low) / (len(integers) - 1)
    return low - step * integers[0], step


def best_range(
    values: torch.Tensor, integers: torch.Tensor, affine: bool, importance: torch.Tensor | None = None
) -> Range:
    """Find the range of the codebook `offset + step * integers` with the least squared error on each set of values.

    The error has many local minima. So many candidates are tried, then more around the best of them, and the best of
    these are improved by alternating least squares.

    Args:
        values: float32 `[sets, n]`.
        integers: ascending, float32 `[k]`.
        affine: whether there is an offset; else it is 0.
        importance: of each value, `[sets, n]`, not negative; `None` for equal ones.

    Returns offset and step, float32 `[sets]`; they are no worse than those of [`whole_range`].
    """
    sets = SortedGroups(values, importance)
    whole = tuple(part[:, None] for part in whole_range(values, integers, affine))
    best = whole  # [sets, candidates]
    for factors, count in zip(ENDS if affine else STEPS, SURVIVORS):
        stretched = _stretched_ends if affine else _stretched_steps
        candidates = stretched(sets, best, integers, values.new_tensor(factors))
        best = _best(sets, candidates, integers, count)
        for _ in range(LEAST_SQUARES_STEPS):
            best = _least_squares(sets, best, integers, affine)
    best = _best(sets, tuple(torch.cat(parts, dim=1) for parts in zip(best, whole)), integers, 1)
    return best[0][:, 0], best[1][:, 0]


def _best(sets: SortedGroups, ranges: Range, integers: torch.Tensor, count: int) -> Range:
    """Choose the `count` ranges with the least error, of `[sets, ranges]`."""
    offsets, steps = ranges
    best = sets.errors(integers[None], steps, offsets).topk(min(count, steps.shape[1]), dim=1, largest=False).indices
    return offsets.gather(1, best), steps.gather(1, best)


def _stretched_steps(sets: SortedGroups, ranges: Range, integers: torch.Tensor, factors: torch.Tensor) -> Range:
    """Return ranges without offset with every multiple of the steps, `[sets, ranges * factors]`."""
    steps = (ranges[1][:, :, None] * factors).flatten(1)
    return torch.zeros_like(steps), steps


def _stretched_ends(sets: SortedGroups, ranges: Range, integers: torch.Tensor, factors: torch.Tensor) -> Range:
    """Return ranges whose two ends lie at all multiples of their distances from the mean, `[sets, candidates]`."""
    mean = sets.center.float()[:, :, None]
    low, high = (ranges[0] + ranges[1] * integers[end] for end in (0, -1))  # [sets, ranges]
    low = (mean + (low[:, :, None] - mean) * factors)[:, :, :, None]
    high = (mean + (high[:, :, None] - mean) * factors)[:, :, None, :]
    steps = (high - low) / (len(integers) - 1)
    return (low - steps * integers[0]).flatten(1), steps.flatten(1)


def _least_squares(sets: SortedGroups, ranges: Range, integers: torch.Tensor, affine: bool) -> Range:
    """Fit each of the ranges `[sets, candidates]` by least squares to the codes that its nearest entries give."""
    offsets, steps = ranges
    mass, first = sets.entry_moments(offsets[:, :, None] + steps[:, :, None] * integers)
    first = first + sets.center[:, :, None] * mass
    total = mass.sum(dim=2, keepdim=True).clamp_min(1e-300)
    integers = integers.double()
    # the regression of the values on their integers, through zero or not
    mean = (mass * integers).sum(dim=2, keepdim=True) / total if affine else torch.zeros_like(total)
    value = first.sum(dim=2, keepdim=True) / total if affine else torch.zeros_like(total)
    centered = integers - mean
    variance = (mass * centered.square()).sum(dim=2)
    slope = (centered * (first - value * mass)).sum(dim=2) / variance.clamp_min(1e-300)
    usable = (variance > 0) & (slope > 0)
    offset = (value - slope[:, :, None] * mean)[:, :, 0]
    return torch.where(usable, offset.float(), offsets), torch.where(usable, slope.float(), steps)
