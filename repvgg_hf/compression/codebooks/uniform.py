"""Ranges of evenly spaced codebooks: those that take in every weight, or those with the least squared error."""

import torch

from .sorted_groups import SortedGroups

TINY = 1e-30  # least step
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


def symmetric_integers(k: int, device: torch.device | None = None) -> torch.Tensor:
    """`-k/2 .. k/2 - 1`, but -1 and 1 for `k = 2`; float32 `[k]`."""
    if k == 2:
        return torch.tensor([-1.0, 1.0], device=device)
    return torch.arange(-(k // 2), k // 2, dtype=torch.float32, device=device)


def whole_range(values: torch.Tensor, integers: torch.Tensor, affine: bool) -> Range:
    """From the least to the largest of `values` `[sets, n]`, or from zero as far as the largest magnitude; `[sets]`."""
    low, high = values.aminmax(dim=1)
    if not affine:
        return torch.zeros_like(low), torch.maximum(-low, high).clamp_min(TINY) / integers[-1]
    step = (high - low) / (len(integers) - 1)
    return low - step * integers[0], step


def best_range(
    values: torch.Tensor, integers: torch.Tensor, affine: bool, importance: torch.Tensor | None = None
) -> Range:
    """The range of the codebook `offset + step * integers` with the least squared error on each set of `values`.

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
        candidates = stretched(sets, best, integers, torch.tensor(factors, device=values.device))
        best = _best(sets, candidates, integers, count)
        for _ in range(LEAST_SQUARES_STEPS):
            best = _least_squares(sets, best, integers, affine)
    best = _best(sets, tuple(torch.cat(parts, dim=1) for parts in zip(best, whole)), integers, 1)
    return best[0][:, 0], best[1][:, 0]


def _best(sets: SortedGroups, ranges: Range, integers: torch.Tensor, count: int) -> Range:
    """The `count` ranges with the least error, of `[sets, ranges]`."""
    offsets, steps = ranges
    best = sets.errors(integers[None], steps, offsets).topk(min(count, steps.shape[1]), dim=1, largest=False).indices
    return offsets.gather(1, best), steps.gather(1, best)


def _stretched_steps(sets: SortedGroups, ranges: Range, integers: torch.Tensor, factors: torch.Tensor) -> Range:
    """Every multiple of the steps."""
    steps = (ranges[1][:, :, None] * factors).flatten(1)
    return torch.zeros_like(steps), steps


def _stretched_ends(sets: SortedGroups, ranges: Range, integers: torch.Tensor, factors: torch.Tensor) -> Range:
    """Every combination of multiples of the distances of the two ends from the mean."""
    mean = sets.center.float()[:, :, None]
    low, high = (ranges[0] + ranges[1] * integers[end] for end in (0, -1))  # [sets, ranges]
    low = (mean + (low[:, :, None] - mean) * factors)[:, :, :, None]
    high = (mean + (high[:, :, None] - mean) * factors)[:, :, None, :]
    steps = (high - low) / (len(integers) - 1)
    return (low - steps * integers[0]).flatten(1), steps.flatten(1)


def _least_squares(sets: SortedGroups, ranges: Range, integers: torch.Tensor, affine: bool) -> Range:
    """The best ranges for the codes that the nearest entries have, `[sets, candidates]`."""
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
