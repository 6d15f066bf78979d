"""Sorted values with prefix sums: the mass and the mean of any interval cost no more than looking up its ends.

*Cuts* are positions in the order, and neighboring ones enclose an interval. All fitting in this folder builds on them:
k-means, grids, uniform ranges, channel scales.
"""

import numpy as np
import torch
from torch.nn.functional import pad

HISTOGRAM_VALUES = 2**17  # more values in a group are counted into bins: quicker than sorting them, and much smaller
COARSE_BINS, FINE_BINS = 2**12, 2**16
LEAST_BINS = 2**12  # values that fill fewer are sorted after all
CHUNK_VALUES = 2**17  # of temporaries, which bounds the memory and lets them stay in a cache


class SortedGroups:
    """Groups of values in ascending order, with prefix sums of their mass and first moment.

    In ascending order a cluster is an interval, so these sums give any cluster's mass and mean in constant time. A
    group of more than `HISTOGRAM_VALUES` values becomes the means of some 2**16 bins.

    Args:
        values: `[groups, n]`, any float dtype.
        weights: `[groups, n]`, the importance of each value, not negative; `None` for equal ones.

    Attributes:
        values: float32 `[groups, points]`.
        mass, first: float64 `[groups, points + 1]`, prefix sums; `first` is about `center`, float64 `[groups, 1]`.
        second: float64 `[groups]`, the second moment about `center` of all values.
    """

    def __init__(self, values: torch.Tensor, weights: torch.Tensor | None = None):
        values = values.detach().float()
        weights = None if weights is None else weights.detach().float()
        # float64 and centered: a cluster's error is a difference of large sums
        low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)  # aminmax is not vectorized
        # of the range and not the mean, which PyTorch takes of a float64 copy of all
        self.center = (low.double() + high) / 2
        points = None
        if values.shape[1] > HISTOGRAM_VALUES:
            points = _histogram(values, weights, self.center, low, high)
        if points is None:
            points = _sorted(values, weights, self.center)
        self.values, self.mass, self.first, self.second = points

    def rows(self, index: torch.Tensor | slice) -> "SortedGroups":
        """Return some of the groups, by their indices."""
        part = object.__new__(SortedGroups)
        for name in ("values", "mass", "first", "second", "center"):
            setattr(part, name, getattr(self, name)[index])
        return part

    def split(self, size: int) -> list["SortedGroups"]:
        """Return the groups in parts of at most `size`."""
        return [self.rows(slice(start, start + size)) for start in range(0, len(self.values), size)]

    def from_median(self) -> "SortedGroups":
        """Return the same groups with sums that start at the median value and are about it.

        Then the differences between sums in the bulk of the values keep their digits beside far outliers.
        """
        part = self.rows(slice(None))
        middle = self.values.shape[1] // 2
        part.center = self.values[:, middle : middle + 1].double()
        moments = (self.values - part.center) * self.mass.diff(dim=1)
        below = moments[:, :middle].flip(1).cumsum(dim=1).flip(1).neg()
        part.first = torch.cat([below, pad(moments[:, middle:].cumsum(dim=1), (1, 0))], dim=1)
        part.second = (moments * (self.values - part.center)).sum(dim=1)
        return part

    def cuts(self, codebook: torch.Tensor) -> torch.Tensor:
        """Return the cuts `[groups, k + 1]` between what is nearest to each entry of an ascending `codebook`."""
        middles = (codebook[:, 1:] + codebook[:, :-1]) / 2
        return self.closed(torch.searchsorted(self.values, middles.contiguous(), right=True))

    def closed(self, inner: torch.Tensor) -> torch.Tensor:
        """Add the two ends to `inner` cuts `[groups, k - 1]`: `[groups, k + 1]`."""
        return pad(pad(inner, (1, 0)), (0, 1), value=self.values.shape[1])

    def moments(self, cuts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mass and first moment about `center` between `cuts` `[groups, k + 1]`, each float64 `[groups, k]`."""
        return self.mass.gather(1, cuts).diff(dim=1), self.first.gather(1, cuts).diff(dim=1)

    def means(self, cuts: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
        """Return the mean of each interval, float32 `[groups, k]`; for one without mass, what `empty` has there."""
        mass, first = self.moments(cuts)
        return torch.where(mass > 0, first / mass.clamp_min(1e-300) + self.center, empty.double()).float()

    def entry_moments(self, codebooks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the [`moments`] of what is nearest to each entry of ascending `codebooks` `[groups, candidates, k]`.

        A value in the middle goes to the lower entry.
        """
        middles = (codebooks[:, :, 1:] + codebooks[:, :, :-1]) / 2
        inner = torch.searchsorted(self.values, middles.flatten(1), right=True).view(middles.shape)
        cuts = self.closed(inner).flatten(1)
        shape = (*codebooks.shape[:2], -1)
        return tuple(prefix.gather(1, cuts).view(shape).diff(dim=2) for prefix in (self.mass, self.first))

    def errors(self, entries: torch.Tensor, factors: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
        """Return the [`error`] of every codebook `entries * factor + offset`, float64 `[groups, candidates]`.

        `entries` is `[groups, k]` or `[1, k]`, ascending; `factors` (positive) and `offsets` `[groups, candidates]`.
        """
        chunk = max(1, CHUNK_VALUES // 2 // (len(factors) * entries.shape[1]))
        errors = []
        for start in range(0, factors.shape[1], chunk):
            codebooks = entries[:, None, :] * factors[:, start : start + chunk, None]
            if offsets is not None:
                codebooks += offsets[:, start : start + chunk, None]
            mass, first = self.entry_moments(codebooks)
            entry = codebooks - self.center[:, :, None]
            errors.append(self.second[:, None] + (entry * (entry * mass - 2 * first)).sum(dim=2))
        return torch.cat(errors, dim=1).clamp_min_(0)

    def error(self, codebook: torch.Tensor) -> torch.Tensor:
        """Return each group's weighted sum of squared distances from an ascending `codebook` `[groups, k]`, float64."""
        return self.errors(codebook, torch.ones_like(self.values[:, :1]))[:, 0]


def ascending(rows: torch.Tensor) -> torch.Tensor:
    """Sort every row of `rows`. NumPy needs a sixth of the time of PyTorch, which makes an index as well."""
    if rows.device.type == "cpu":
        return torch.from_numpy(np.sort(rows.numpy(), axis=1))
    return rows.sort(dim=1).values


def ascending_pairs(values: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort every row of the float32 `values`, and the float32 `weights`, not negative, along with them.

    Both travel in one integer, the value in its upper half: quicker than gathering, and equal values have an order.
    """
    order = _ordered(values.view(torch.int32)).long() << 32
    pairs = ascending(order | weights.abs().view(torch.int32).long())
    return _ordered((pairs >> 32).int()).view(torch.float32), pairs.int().view(torch.float32)


def _ordered(bits: torch.Tensor) -> torch.Tensor:
    """Turn the bits of float32 numbers into integers of the same order, and back: negative ones are inverted."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _sorted(values, weights, center):
    """Make `values`, `mass`, `first` and `second` of [`SortedGroups`] with every value as a point."""
    number, n = values.shape
    ordered = torch.empty_like(values)
    first = values.new_zeros(number, n + 1, dtype=torch.float64)
    second = first.new_empty(number)
    if weights is None:
        mass = torch.arange(n + 1, dtype=torch.float64, device=values.device).expand(number, -1)
    else:
        mass = torch.zeros_like(first)
    step = max(1, CHUNK_VALUES // n)
    for start in range(0, number, step):
        rows = slice(start, start + step)
        if weights is None:
            ordered[rows] = ascending(values[rows])
            centered = moment = ordered[rows] - center[rows]
        else:
            ordered[rows], weight = ascending_pairs(values[rows], weights[rows])
            mass[rows, 1:] = weight.cumsum(dim=1, dtype=torch.float64)
            centered = ordered[rows] - center[rows]
            moment = centered * weight
        first[rows, 1:] = moment.cumsum(dim=1)
        second[rows] = (moment * centered).sum(dim=1)
    return ordered, mass, first, second


def _histogram(values, weights, center, low, high):
    """Make `values`, `mass`, `first` and `second` of [`SortedGroups`] with bins as points; `None` if few are in use.

    A first pass counts into even bins. Each is then divided as finely as the best quantizer with many entries would
    (Panter and Dite 1951), the cube root of its mass, so that narrow peaks and long tails are both resolved.
    """
    number, n = values.shape
    scale = COARSE_BINS * (1 - 1e-6) / (high - low).clamp_min(1e-37)
    group = torch.arange(number, dtype=torch.int32, device=values.device)[:, None]
    width = 2 * CHUNK_VALUES // number
    columns = [slice(start, start + width) for start in range(0, n, width)]

    def weight(part):
        return None if weights is None else weights[:, part].reshape(-1).double()

    coarse = torch.zeros(number * COARSE_BINS, dtype=torch.float64, device=values.device)
    for part in columns:
        bins = ((values[:, part] - low) * scale).int() + group * COARSE_BINS
        coarse += torch.bincount(bins.view(-1), weight(part), len(coarse))

    share = coarse.view(number, -1).pow(1 / 3)
    divisions = 1 + (FINE_BINS * share / share.sum(dim=1, keepdim=True).clamp_min(1e-300)).floor()
    total = COARSE_BINS + FINE_BINS + 1
    base = (divisions.cumsum(dim=1) - divisions + total * group).int().view(-1)
    divisions = divisions.float().view(-1)
    mass = torch.zeros(number * total, dtype=torch.float64, device=values.device)
    first, second = torch.zeros_like(mass), torch.zeros_like(center[:, 0])
    for part in columns:
        position = (values[:, part] - low) * scale
        bins = position.int()
        within = (position - bins).view(-1)
        bins = (bins + group * COARSE_BINS).view(-1)
        bins = base.index_select(0, bins) + (within * divisions.index_select(0, bins)).int()
        centered = values[:, part] - center
        moment = centered if weights is None else centered * weights[:, part]
        mass += torch.bincount(bins, weight(part), len(mass))
        first += torch.bincount(bins, moment.reshape(-1), len(mass))
        second += (moment * centered).sum(dim=1)

    mass, first = mass.view(number, total), first.view(number, total)
    if (mass > 0).sum(dim=1).min() < LEAST_BINS:
        return None
    means = (first / mass.clamp_min(1e-300) + center).float()
    # an empty bin repeats the one before it
    points = torch.where(mass > 0, means, low).cummax(dim=1).values
    return points, pad(mass.cumsum(dim=1), (1, 0)), pad(first.cumsum(dim=1), (1, 0)), second
