"""One codebook for many channels, and a scale for each of them, fitted together.

`sum importance * (w - scale * codebook[code])^2` is minimized in turn over the codebook, a one-dimensional k-means of
`w / scale`, over the scales, among many candidates and each with its own codes, and over both by least squares for
given codes. With the channels sorted, no step needs to look at the weights again.
"""

import functools

import torch

from .kmeans import candidate_cuts, kmeans_1d, mirrored
from .grids import best_integers
from .sorted_groups import SortedGroups

TINY = 1e-30  # scale of an all-zero channel: it decodes to nothing, whatever the codebook, and weighs nothing in it
INT8_MAX = 127
POINTS, POINTS_A_CHANNEL = 2**16, 48  # that stand for a group's weights where its codebook is made, and least number
NORMS = (2, 8)  # powers whose means the scales start from: the typical magnitude, and nearly the largest
COARSE = tuple(4.0 ** (i / 12) for i in range(-12, 13))  # factors that a scale is searched among,
FINE = tuple(1 + i / 64 for i in range(-4, 5))  # and then around the best
SHARES = (1.0, 0.75, 0.5, 0.35, 0.25)  # of the codebook's range that int8 covers at first, the finer the smaller
MANY_ENTRIES = 32
ROUNDS, INTEGER_ROUNDS = 1, 2
LEAST_SQUARES_STEPS = 5

Fit = tuple[torch.Tensor, torch.Tensor]  # codebook [groups, k] and scale [out]


def fit_channel_scale(
    rows: torch.Tensor,
    k: int,
    groups: int,
    dtype: torch.dtype,
    importance: torch.Tensor | None = None,
    preserve_zero: bool = False,
    symmetric: bool = False,
) -> Fit:
    """Ascending codebooks `[groups, k]` and positive scales `[out]` with a small squared error on `rows` `[out, n]`.

    Args:
        rows: float32 `[out, n]`.
        k: entries of a codebook.
        groups: number of codebooks; each is for `out / groups` consecutive channels.
        dtype: that will store the codebook, whose entries are numbers of it, optimized as such: up to about 1, integers
            from -127 to 127 for int8 (`k` at most 255 then).
        importance: `[out, n]` of each weight, not negative; `None` for equal ones.
        preserve_zero, symmetric: as in [`kmeans_1d`].

    Returns float32 tensors.
    """
    if symmetric:
        codebook, scale = fit_channel_scale(rows.abs(), k // 2, groups, dtype, importance, preserve_zero)
        return mirrored(codebook), scale
    channels = ScaledChannels(rows, k, groups, importance, preserve_zero)
    if groups == len(rows):  # a channel alone: its scale changes nothing
        codebook = kmeans_1d(rows, k, importance, preserve_zero)
        fit = codebook, torch.ones_like(codebook[:, 0])
    else:
        fit = channels.fit()
    codebook, scale = channels.normalized(*fit)
    if dtype == torch.int8:
        codebook, scale = channels.fit_integers(codebook, scale)
    elif dtype != torch.float32:
        codebook, scale = channels.least_squares(codebook.to(dtype).float(), scale, dtype)
    return codebook, scale.clamp_min(TINY)


class ScaledChannels:
    """Channels that share codebooks, sorted for fitting these and the scales; arguments as of [`fit_channel_scale`]."""

    def __init__(self, rows, k: int, groups: int, importance=None, preserve_zero: bool = False):
        self.channels = SortedGroups(rows, importance)
        self.groups, self.k, self.preserve_zero = groups, k, preserve_zero
        self.lowest_integer = -INT8_MAX if rows.min() < 0 else 0
        count = max(POINTS_A_CHANNEL, POINTS * groups // len(rows))
        mass, first = self.channels.moments(candidate_cuts(self.channels, count))
        self.points = first / mass.clamp_min(1e-300) + self.channels.center  # float64 [out, points]
        self.point_mass = mass

    def starts(self) -> torch.Tensor:
        """Scales `[starts, out]` to start from: means of powers of a channel's magnitudes, and the same for all."""
        largest = self.points.abs().amax(dim=1)
        relative = self.points.abs() / largest.clamp_min(TINY)[:, None]
        mass = self.point_mass / self.point_mass.sum(dim=1, keepdim=True).clamp_min(1e-300)
        starts = [largest * (mass * relative.pow(p)).sum(dim=1).pow(1 / p) for p in NORMS]
        starts.append(self.to_channels(self.sum_groups(largest)))
        return torch.where(largest > TINY, torch.stack(starts), TINY).clamp_min(TINY).float()

    def fit(self) -> Fit:
        """The best codebook and scale from several starts."""
        starts = self.starts()
        fits = [self.settled(self.best_codebooks(start[None])[0], start) for start in starts]
        best = functools.reduce(self.better, fits)
        for _ in range(ROUNDS):
            best = self.better(best, self.settled(self.best_codebooks(best[1][None])[0], best[1]))
        return best

    def fit_integers(self, codebook: torch.Tensor, scale: torch.Tensor) -> Fit:
        """Integers for a `codebook` of entries up to 1, and the scale for them."""
        fits = []
        for share in SHARES:
            rounded = (codebook * (INT8_MAX / share)).round().clamp(-INT8_MAX, INT8_MAX)
            fits.append((rounded, self.search_scale(rounded, scale * (share / INT8_MAX), FINE)))
        best = functools.reduce(self.better, fits)
        starts = [best[1]]
        if self.k >= MANY_ENTRIES:  # nearly every integer has a code: the scale for all of them
            every = torch.arange(self.lowest_integer, INT8_MAX + 1, dtype=scale.dtype, device=scale.device)
            every = every.expand(self.groups, -1)
            starts.append(self.search_scale(every, self.search_scale(every, best[1], COARSE), FINE))
        for scale in starts:
            for _ in range(INTEGER_ROUNDS):
                integers = self.best_integers(scale)
                scale = self.best_scale(integers, self.search_scale(integers, scale, FINE))
                best = self.better(best, (integers, scale))
        return best

    def settled(self, codebook: torch.Tensor, scale: torch.Tensor) -> Fit:
        """The scale for a codebook by search, then both by least squares."""
        scale = self.search_scale(codebook, scale, COARSE)
        scale = self.search_scale(codebook, scale, FINE)
        return self.least_squares(codebook, scale, torch.float32)

    def better(self, fit: Fit, other: Fit) -> Fit:
        """For each group the one of two with the smaller error."""
        is_better = self.sum_groups(self.error(*other)) < self.sum_groups(self.error(*fit))
        codebook = torch.where(is_better[:, None], other[0], fit[0])
        return codebook, torch.where(self.to_channels(is_better), other[1], fit[1])

    def best_codebooks(self, scales: torch.Tensor) -> torch.Tensor:
        """The codebooks `[scales, groups, k]` with the least error of the points for `scales` `[scales, out]`."""
        values = (self.points / scales[:, :, None]).view(len(scales) * self.groups, -1)
        weights = (self.point_mass * scales.double().square()[:, :, None]).view(len(scales) * self.groups, -1)
        weights = weights / weights.amax(dim=1, keepdim=True).clamp_min(1e-300)  # for float32
        codebooks = kmeans_1d(values, self.k, weights, self.preserve_zero)
        return codebooks.view(len(scales), self.groups, self.k)

    def best_integers(self, scale: torch.Tensor) -> torch.Tensor:
        """The integers `[groups, k]` with the least error for given scales."""
        borders = torch.arange(2 * self.lowest_integer, 2 * INT8_MAX + 1, device=scale.device) / 2
        cuts = torch.searchsorted(self.channels.values, borders * scale[:, None], right=True)
        mass, first = (self.sum_groups(part) for part in self.entry_moments(self.channels.closed(cuts), scale))
        return best_integers(mass, first, self.lowest_integer, self.k, self.preserve_zero)

    def search_scale(self, codebook: torch.Tensor, scale: torch.Tensor, factors: tuple[float, ...]) -> torch.Tensor:
        """The best of the scale's multiples by `factors`, each with its own codes."""
        scales = scale[:, None] * torch.tensor(factors, device=scale.device)
        best = self.channels.errors(self.to_channels(codebook), scales).argmin(dim=1, keepdim=True)
        return scales.gather(1, best)[:, 0]

    def least_squares(self, codebook: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> Fit:
        """Alternating least squares of the codebook, rounded to `dtype`, and the scale; the error never grows."""
        for _ in range(LEAST_SQUARES_STEPS):
            mass, first = (self.sum_groups(part) for part in self.entry_moments(self.cuts(codebook, scale), scale))
            fitted = torch.where(mass > 0, first / mass.clamp_min(1e-300), codebook.double()).to(dtype).float()
            if self.preserve_zero:
                fitted.scatter_(1, codebook.abs().argmin(dim=1, keepdim=True), 0.0)
            codebook = fitted.sort(dim=1).values
            scale = self.best_scale(codebook, scale)
        return codebook, scale

    def best_scale(self, codebook: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The scale with the least squared error for the present codes; the present one where none is positive."""
        mass, first = self.entry_moments(self.cuts(codebook, scale), torch.ones_like(scale))
        entries = self.to_channels(codebook).double()
        fitted = (first * entries).sum(dim=1) / (mass * entries.square()).sum(dim=1).clamp_min(1e-300)
        return torch.where(fitted > 0, fitted.float(), scale)

    def normalized(self, codebook: torch.Tensor, scale: torch.Tensor) -> Fit:
        """The same with entries up to 1, far from where float16 ends."""
        unit = codebook.abs().amax(dim=1)
        unit = torch.where(unit > 0, unit, 1.0)
        return codebook / unit[:, None], scale * self.to_channels(unit)

    def error(self, codebook: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Of the channels with the nearest entries, float64 `[out]`."""
        return self.channels.error(self.to_channels(codebook) * scale[:, None])

    def cuts(self, codebook: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Where the intervals of the entries begin and end in the sorted channels, `[out, k + 1]`."""
        return self.channels.cuts(self.to_channels(codebook) * scale[:, None])

    def entry_moments(self, cuts: torch.Tensor, scale: torch.Tensor) -> Fit:
        """Mass and first moment about 0 of `w / scale` between the cuts, in units of its error, float64 `[out, k]`."""
        mass, first = self.channels.moments(cuts)
        scale = scale.double()[:, None]
        return mass * scale.square(), (first + self.channels.center * mass) * scale

    def to_channels(self, of_groups: torch.Tensor) -> torch.Tensor:
        """`[groups, ...]` repeated for every channel of a group, `[out, ...]`."""
        return of_groups.repeat_interleave(len(self.points) // self.groups, dim=0)

    def sum_groups(self, of_channels: torch.Tensor) -> torch.Tensor:
        """The sum over the channels of a group of `[out, ...]`, `[groups, ...]`."""
        return of_channels.view(self.groups, -1, *of_channels.shape[1:]).sum(dim=1)
