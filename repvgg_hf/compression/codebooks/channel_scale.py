"""Fitting one codebook for many channels together with a scale for each of them (a *channel scale*).

`sum importance * (w - scale * codebook[code])^2` is minimized in turn over the codebook, a one-dimensional k-means of
`w / scale`, over the scales, among many candidates and each with its own codes, and over both by least squares for
given codes. With the channels sorted, no step needs to look at the weights again.
"""

import functools

import torch

from ...runtime.quantization_cluster import LARGEST_INT8
from .codes import TINY
from .grids import best_integers
from .kmeans import candidate_cuts, kmeans_1d
from .sorted_groups import SortedGroups

POINTS, POINTS_PER_CHANNEL = 2**16, 48  # what stands for a group's weights where its codebook is made, at least
NORMS = (2, 8)  # powers whose means the scales start from: the typical magnitude, and nearly the largest
COARSE = tuple(4.0 ** (i / 12) for i in range(-12, 13))  # factors that a scale is searched among,
FINE = tuple(1 + i / 64 for i in range(-4, 5))  # and then around the best
SHARES = (1.0, 0.75, 0.5, 0.35, 0.25)  # of the codebook's range that int8 covers at first, the finer the smaller
MANY_ENTRIES = 32
ROUNDS, INTEGER_ROUNDS = 1, 2
LEAST_SQUARES_STEPS = 5

CodebookAndScale = tuple[torch.Tensor, torch.Tensor]  # [groups, k] and [out]


def fit_channel_scale(
    rows: torch.Tensor,
    k: int,
    groups: int,
    dtype: torch.dtype,
    importance: torch.Tensor | None = None,
    largest: int = LARGEST_INT8,
) -> CodebookAndScale:
    """Fit codebooks and channel scales together for a small squared error of the weights.

    Args:
        rows: float32 `[out, n]`.
        k: entries of a codebook.
        groups: number of codebooks; each is for `out / groups` consecutive channels.
        dtype: the one that will store the codebook, whose entries are numbers of it, optimized as such: up to about 1,
            or integers for int8.
        importance: `[out, n]`, of each weight, not negative; `None` for equal ones.
        largest: magnitude of the integers of an int8 codebook (`k` at most `2 * largest` then).

    Returns ascending codebooks `[groups, k]` and positive scales `[out]`, both float32.
    """
    channels = ScaledChannels(rows, k, groups, importance, largest)
    if groups == len(rows):  # a channel alone: its scale changes nothing
        codebook = kmeans_1d(rows, k, importance)
        scale = torch.ones_like(codebook[:, 0])
    else:
        codebook, scale = channels.fit()
    codebook, scale = channels.normalized(codebook, scale)
    if dtype == torch.int8:
        codebook, scale = channels.fit_integers(codebook, scale)
    elif dtype != torch.float32:
        codebook, scale = channels.least_squares(codebook.to(dtype).float(), scale, dtype)
    return codebook, scale.clamp_min(TINY)


class ScaledChannels:
    """Channels that share codebooks, sorted so that fitting these and the scales looks at no weight twice.

    The arguments are those of [`fit_channel_scale`].
    """

    def __init__(
        self,
        rows: torch.Tensor,
        k: int,
        groups: int,
        importance: torch.Tensor | None = None,
        largest: int = LARGEST_INT8,
    ):
        self.channels = SortedGroups(rows, importance)
        self.groups, self.k = groups, k
        self.largest_integer = largest
        self.lowest_integer = -largest if rows.min() < 0 else 0
        count = max(POINTS_PER_CHANNEL, POINTS * groups // len(rows))
        mass, first = self.channels.moments(candidate_cuts(self.channels, count))
        self.points = first / mass.clamp_min(1e-300) + self.channels.center  # float64 [out, points]
        self.point_mass = mass

    def starts(self) -> torch.Tensor:
        """Return scales to start from, `[starts, out]`: means of powers of a channel's magnitudes, and one for all."""
        largest = self.points.abs().amax(dim=1)
        relative = self.points.abs() / largest.clamp_min(TINY)[:, None]
        mass = self.point_mass / self.point_mass.sum(dim=1, keepdim=True).clamp_min(1e-300)
        starts = [largest * (mass * relative.pow(p)).sum(dim=1).pow(1 / p) for p in NORMS]
        starts.append(self.to_channels(self.sum_groups(largest)))
        return torch.where(largest > TINY, torch.stack(starts), TINY).clamp_min(TINY).float()

    def fit(self) -> CodebookAndScale:
        """Find the best codebook and scale from several starts."""
        found = [self.improved(self.best_codebook(start), start) for start in self.starts()]
        best = functools.reduce(self.better, found)
        for _ in range(ROUNDS):
            best = self.better(best, self.improved(self.best_codebook(best[1]), best[1]))
        return best

    def fit_integers(self, codebook: torch.Tensor, scale: torch.Tensor) -> CodebookAndScale:
        """Find integers for a `codebook` of entries up to 1, and the scale for them."""
        found, largest = [], self.largest_integer
        for share in SHARES:
            rounded = (codebook * (largest / share)).round().clamp(-largest, largest)
            found.append((rounded, self.search_scale(rounded, scale * (share / largest), FINE)))
        best = functools.reduce(self.better, found)
        starts = [best[1]]
        if self.k >= MANY_ENTRIES:  # nearly every integer has a code: the scale for all of them
            every = torch.arange(self.lowest_integer, largest + 1, dtype=scale.dtype, device=scale.device)
            every = every.expand(self.groups, -1)
            starts.append(self.search_scale(every, self.search_scale(every, best[1], COARSE), FINE))
        for scale in starts:
            for _ in range(INTEGER_ROUNDS):
                integers = self.best_integers(scale)
                scale = self.best_scale(integers, self.search_scale(integers, scale, FINE))
                best = self.better(best, (integers, scale))
        return best

    def improved(self, codebook: torch.Tensor, scale: torch.Tensor) -> CodebookAndScale:
        """Search the scale for a codebook, then improve both by least squares."""
        scale = self.search_scale(codebook, scale, COARSE)
        scale = self.search_scale(codebook, scale, FINE)
        return self.least_squares(codebook, scale, torch.float32)

    def better(self, one: CodebookAndScale, other: CodebookAndScale) -> CodebookAndScale:
        """Choose for each group the one of two with the smaller error."""
        other_is_better = self.sum_groups(self.error(*other)) < self.sum_groups(self.error(*one))
        codebook = torch.where(other_is_better[:, None], other[0], one[0])
        return codebook, torch.where(self.to_channels(other_is_better), other[1], one[1])

    def best_codebook(self, scale: torch.Tensor) -> torch.Tensor:
        """Find the codebook `[groups, k]` with the least error of the points for a given scale `[out]`."""
        values = (self.points / scale[:, None]).view(self.groups, -1)
        weights = (self.point_mass * scale.double().square()[:, None]).view(self.groups, -1)
        weights = weights / weights.amax(dim=1, keepdim=True).clamp_min(1e-300)  # for float32
        return kmeans_1d(values, self.k, weights)

    def best_integers(self, scale: torch.Tensor) -> torch.Tensor:
        """Find the integers `[groups, k]` with the least error for a given scale `[out]`."""
        ends = 2 * self.lowest_integer, 2 * self.largest_integer + 1
        borders = torch.arange(*ends, dtype=scale.dtype, device=scale.device) / 2
        cuts = torch.searchsorted(self.channels.values, borders * scale[:, None], right=True)
        mass, first = (self.sum_groups(part) for part in self.entry_moments(self.channels.closed(cuts), scale))
        return best_integers(mass, first, self.lowest_integer, self.k)

    def search_scale(self, codebook: torch.Tensor, scale: torch.Tensor, factors: tuple[float, ...]) -> torch.Tensor:
        """Find the best of the scale's multiples by `factors`, each with its own codes, `[out]`."""
        scales = scale[:, None] * scale.new_tensor(factors)
        best = self.channels.errors(self.to_channels(codebook), scales).argmin(dim=1, keepdim=True)
        return scales.gather(1, best)[:, 0]

    def least_squares(self, codebook: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> CodebookAndScale:
        """Alternate least squares of the codebook, rounded to `dtype`, and of the scale; the error never grows."""
        for _ in range(LEAST_SQUARES_STEPS):
            mass, first = (self.sum_groups(part) for part in self.entry_moments(self.cuts(codebook, scale), scale))
            fitted = torch.where(mass > 0, first / mass.clamp_min(1e-300), codebook.double()).to(dtype).float()
            codebook = fitted.sort(dim=1).values
            scale = self.best_scale(codebook, scale)
        return codebook, scale

    def best_scale(self, codebook: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Fit the scale to the present codes by least squares; where it is not positive, the present one stays."""
        mass, first = self.entry_moments(self.cuts(codebook, scale), torch.ones_like(scale))
        entries = self.to_channels(codebook).double()
        fitted = (first * entries).sum(dim=1) / (mass * entries.square()).sum(dim=1).clamp_min(1e-300)
        return torch.where(fitted > 0, fitted.float(), scale)

    def normalized(self, codebook: torch.Tensor, scale: torch.Tensor) -> CodebookAndScale:
        """Move the entries' size into the scale: they reach up to 1, far from where float16 ends."""
        unit = codebook.abs().amax(dim=1)
        unit = torch.where(unit > 0, unit, 1.0)
        return codebook / unit[:, None], scale * self.to_channels(unit)

    def error(self, codebook: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return the squared error of each channel with the nearest entries, float64 `[out]`."""
        return self.channels.error(self.to_channels(codebook) * scale[:, None])

    def cuts(self, codebook: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return the cuts `[out, k + 1]` between what is nearest to each entry in the sorted channels."""
        return self.channels.cuts(self.to_channels(codebook) * scale[:, None])

    def entry_moments(self, cuts: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mass and first moment about 0 of `w / scale` between the cuts, both float64 `[out, k]`.

        A weight has the mass `scale**2`, so that squared errors are those of `w`.
        """
        mass, first = self.channels.moments(cuts)
        scale = scale.double()[:, None]
        return mass * scale.square(), (first + self.channels.center * mass) * scale

    def to_channels(self, of_groups: torch.Tensor) -> torch.Tensor:
        """Repeat `[groups, ...]` for every channel of a group, `[out, ...]`."""
        return of_groups.repeat_interleave(len(self.points) // self.groups, dim=0)

    def sum_groups(self, of_channels: torch.Tensor) -> torch.Tensor:
        """Sum `[out, ...]` over the channels of each group, `[groups, ...]`."""
        return of_channels.view(self.groups, -1, *of_channels.shape[1:]).sum(dim=1)
