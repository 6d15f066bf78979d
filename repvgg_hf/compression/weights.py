"""Turning one weight tensor into codes, codebook and scale."""

from dataclasses import dataclass

import torch

from ..quantization_cluster import CODEBOOK_DTYPES, ClusterConfig
from .clustering import SortedGroups, assign, kmeans_1d

CHANNEL_SCALE_STEPS = 10
RANGE_CANDIDATES = 100


@dataclass
class QuantizedWeight:
    """`scale[o] * codebook[group(o)][codes[o]]`: uint8 codes `[out, ...]`, codebook `[groups, 2**bits]`, scale `[out]`."""

    codes: torch.Tensor
    codebook: torch.Tensor
    scale: torch.Tensor | None

    def decoded(self) -> torch.Tensor:
        """The float32 weight, by the same operations as a [`ClusterLayer`]'s."""
        return lookup(self.codes, self.codebook.float(), self.scale)


def lookup(codes: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Codes `[out, ...]` to the weight they stand for."""
    groups = codebook.shape[0]
    if groups == 1:
        weight = codebook[0].index_select(0, codes.reshape(-1).int())
    else:
        weight = codebook.gather(1, codes.reshape(groups, -1).long())
    return scale_channels(weight.view(codes.shape), scale)


def scale_channels(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """`weight` `[out, ...]` times `scale` `[out]`, or `weight` itself for `None`."""
    return weight if scale is None else weight * scale.view(-1, *[1] * (weight.dim() - 1))


def nearest(weight: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Codes of the entries nearest to `weight` `[out, ...]`, uint8 of its shape."""
    normalised = scale_channels(weight, None if scale is None else scale.reciprocal())
    return assign(normalised.reshape(codebook.shape[0], -1), codebook).view(weight.shape)


def quantize_weight(weight: torch.Tensor, bits: int, groups: int, config: ClusterConfig) -> QuantizedWeight:
    """Quantise a finite `weight` `[out, ...]` with `groups` codebooks of `2**bits` entries.

    Raises `ValueError` if an entry of the codebook does not fit its dtype.
    """
    weight = weight.detach().float()
    fit = fit_uniform if config.method == "uniform" else fit_clusters
    codebook, scale = fit(weight, 2**bits, groups, config)
    dtype = CODEBOOK_DTYPES[config.codebook_dtype]
    stored = codebook.to(dtype)
    if not stored.isfinite().all():
        raise ValueError(
            f"a codebook entry of {codebook.abs().max().item():.3g} does not fit {config.codebook_dtype}: set "
            "channel_scale=True or codebook_dtype='float32'."
        )
    return QuantizedWeight(nearest(weight, stored.float(), scale), stored, scale)


def fit_clusters(weight: torch.Tensor, k: int, groups: int, config: ClusterConfig):
    """k-means codebooks `[groups, k]` and, if wanted, channel scales `[out]` fitted with them."""
    if not config.channel_scale:
        return kmeans_1d(weight.reshape(groups, -1), k), None
    rows = weight.reshape(weight.shape[0], -1)  # [out, weights a channel]
    scale = rows.square().mean(dim=1).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    importance = scale.square()[:, None].expand_as(rows).reshape(groups, -1)
    codebook = kmeans_1d((rows / scale[:, None]).reshape(groups, -1), k, importance)
    codebook, scale = refine_channel_scale(rows, codebook, scale, CHANNEL_SCALE_STEPS)
    if config.codebook_dtype == "int8":
        unit = codebook.abs().amax(dim=1).clamp_min(1e-30) / 127  # [groups]
        codebook = (codebook / unit[:, None]).round()
        scale = scale * unit.repeat_interleave(scale.numel() // groups)
        scale = fit_scale(rows, nearest(rows, codebook, scale), codebook, scale)
    return codebook, scale


def refine_channel_scale(rows: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor, steps: int):
    """Alternating least squares of codes, codebook and scale on `rows` `[out, n]`; the error never grows."""
    for _ in range(steps):
        codes = nearest(rows, codebook, scale)
        codebook = segment_means(rows, codes, codebook, scale).sort(dim=1).values
        scale = fit_scale(rows, nearest(rows, codebook, scale), codebook, scale)
    return codebook, scale


def segment_means(rows: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor | None):
    """The codebook with the least squared error for given `codes`; entries that no code uses keep their value."""
    groups, k = codebook.shape
    scale = torch.ones(rows.shape[0], device=rows.device) if scale is None else scale
    group = torch.arange(rows.shape[0], device=rows.device) * groups // rows.shape[0]
    index = (codes.reshape(rows.shape).long() + group[:, None] * k).view(-1)
    # the least squares entry of sum_i (w_i - s_i c)^2
    numerator = torch.bincount(index, (rows * scale[:, None]).reshape(-1), groups * k)
    denominator = torch.bincount(index, scale.square()[:, None].expand_as(rows).reshape(-1), groups * k)
    means = torch.where(denominator > 0, numerator / denominator.clamp_min(1e-30), codebook.reshape(-1))
    return means.view(groups, k).to(codebook.dtype)


def fit_scale(rows: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The scale with the least squared error for given codes and codebook; the present one where none is positive."""
    entries = lookup(codes.reshape(rows.shape), codebook, None)
    fitted = (rows * entries).sum(dim=1) / entries.square().sum(dim=1).clamp_min(1e-30)
    return torch.where(fitted > 0, fitted, scale)


def fit_uniform(weight: torch.Tensor, k: int, groups: int, config: ClusterConfig):
    """Evenly spaced codebooks `[groups, k]` and, with `channel_scale`, integers in them and a step for each channel.

    The symmetric grid is `step * (-k/2 .. k/2 - 1)`, for k = 2 `step * (-1, 1)`; the affine one goes from low to high.
    `"mse"` searches the step, or both ends in turn, for the least squared error.
    """
    if config.symmetric:
        grid = torch.arange(k, device=weight.device, dtype=torch.float32) - k // 2 if k > 2 else torch.tensor([-1.0, 1.0])
        grid = grid.to(weight.device)
        sets = SortedGroups(weight.reshape(weight.shape[0] if config.channel_scale else groups, -1))
        largest = sets.values.abs().amax(dim=1)
        step = torch.where(largest > 0, largest, 1.0) / grid[-1].clamp_min(1)
        if config.range_method == "mse":
            step = search_range(sets, step, step * 0.01, lambda step: step[:, None] * grid)
        if config.channel_scale:
            return grid.repeat(groups, 1), step
        return step[:, None] * grid, None
    sets = SortedGroups(weight.reshape(groups, -1))
    low, high = sets.values[:, 0], sets.values[:, -1]
    fractions = torch.linspace(0, 1, k, device=weight.device)

    def grid_between(low, high):
        return low[:, None] + (high - low)[:, None] * fractions

    if config.range_method == "mse":
        middle = sets.means(sets.cuts(low[:, None]), low[:, None])[:, 0]
        for _ in range(3):
            low = search_range(sets, low, middle, lambda low: grid_between(low, high))  # noqa: B023
            high = search_range(sets, high, middle, lambda high: grid_between(low, high))  # noqa: B023
    return grid_between(low, high), None


def search_range(sets: SortedGroups, start: torch.Tensor, end: torch.Tensor, codebook_of) -> torch.Tensor:
    """For each group the value from `start` to just before `end` whose codebook has the least error.

    The candidates approach `end` geometrically, then once more finely around the best.
    """
    ratios = torch.logspace(0, -2, RANGE_CANDIDATES, device=start.device)
    fine = torch.linspace(0.955, 1.045, 31, device=start.device)
    best, ratio = sets.error(codebook_of(start)), torch.ones_like(start)
    for candidates in (ratios[:, None].expand(-1, len(start)), fine[:, None]):
        around = torch.ones_like(ratio) if candidates.shape[1] > 1 else ratio
        for candidate in (candidates * around).clamp_max(1):
            error = sets.error(codebook_of(end + (start - end) * candidate))
            ratio = torch.where(error < best, candidate, ratio)
            best = torch.minimum(error, best)
    return end + (start - end) * ratio
