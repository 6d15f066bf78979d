"""Turning one weight tensor into codes, codebook and scale."""

from dataclasses import dataclass

import torch

from ..quantization_cluster import CODEBOOK_DTYPES, ClusterConfig
from .clustering import SortedGroups, assign, kmeans_1d

CHANNEL_SCALE_STEPS = 10
RANGE_CANDIDATES = 100
TINY = 1e-30  # scale of an all-zero channel: it decodes to nothing, whatever the codebook, and weighs nothing in it


@dataclass
class QuantizedWeight:
    """uint8 `codes` `[out, ...]`, `codebook` `[groups, 2**bits]` and `scale` `[out]` of the weight
    `scale[o] * codebook[group(o)][codes[o, ...]]`.
    """

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


def quantize_weight(
    weight: torch.Tensor, bits: int, groups: int, config: ClusterConfig, importance: torch.Tensor | None = None
) -> QuantizedWeight:
    """Quantise a finite `weight` `[out, ...]` with `groups` codebooks of `2**bits` entries.

    `importance` `[out, ...]`, not negative, is what each weight's squared error counts; `None` for all alike.

    Raises `ValueError` if an entry of the codebook does not fit its dtype.
    """
    weight = weight.detach().float()
    fit = fit_uniform if config.method == "uniform" else fit_clusters
    codebook, scale = fit(weight, 2**bits, groups, config, importance)
    dtype = CODEBOOK_DTYPES[config.codebook_dtype]
    stored = codebook.to(dtype)
    if not stored.isfinite().all():
        raise ValueError(
            f"a codebook entry of {codebook.abs().max().item():.3g} does not fit {config.codebook_dtype}: set "
            "channel_scale=True or codebook_dtype='float32'."
        )
    return QuantizedWeight(nearest(weight, stored.float(), scale), stored, scale)


def fit_clusters(weight: torch.Tensor, k: int, groups: int, config: ClusterConfig, importance=None):
    """k-means codebooks `[groups, k]` and, if wanted, channel scales `[out]` fitted with them."""
    if not config.channel_scale:
        return kmeans_1d(weight.reshape(groups, -1), k, _grouped(importance, groups)), None
    rows = weight.reshape(weight.shape[0], -1)  # [out, weights a channel]
    importance = _grouped(importance, len(rows))
    if config.codebook_dtype == "int8" and k == 256:
        return fit_symmetric_grid(rows, k, groups, True, importance)  # every integer has a code: nothing to cluster
    codebook, scale = start_channel_scale(rows, k, groups, importance)
    codebook, scale = refine_channel_scale(rows, codebook, scale, CHANNEL_SCALE_STEPS, importance)
    # entries up to 1, far from where float16 ends; up to 127 for int8
    unit = codebook.abs().amax(dim=1)  # [groups]
    unit = torch.where(unit > 0, unit, 1.0) / (127 if config.codebook_dtype == "int8" else 1)
    codebook = codebook / unit[:, None]
    scale = (scale * unit.repeat_interleave(len(rows) // groups)).clamp_min(TINY)
    if config.codebook_dtype == "int8":
        codebook = codebook.round()
        scale = fit_scale(rows, nearest(rows, codebook, scale), codebook, scale, importance)
    return codebook, scale


def _grouped(importance: torch.Tensor | None, groups: int) -> torch.Tensor | None:
    return None if importance is None else importance.float().reshape(groups, -1)


def start_channel_scale(rows: torch.Tensor, k: int, groups: int, importance: torch.Tensor | None = None):
    """Codebooks for `rows` `[out, n]` over their root mean squares, or for the rows as they are if that fits better.

    The root mean square makes channels alike, unless it hangs on a few outliers that only some of them have.
    """
    deviation = rows.square().mean(dim=1).sqrt().clamp_min(TINY)
    scales = [deviation, torch.where(deviation > TINY, 1.0, TINY)]
    if groups == len(rows):  # a channel alone: its scale changes nothing
        scales = scales[:1]
    codebooks, errors = [], []
    for scale in scales:
        mass = scale.square()[:, None].expand_as(rows) * (1 if importance is None else importance)
        codebook = kmeans_1d((rows / scale[:, None]).reshape(groups, -1), k, mass.reshape(groups, -1))
        decoded = lookup(nearest(rows, codebook, scale), codebook, scale)
        error = (decoded - rows).square() * (1 if importance is None else importance)
        errors.append(error.reshape(groups, -1).sum(dim=1))
        codebooks.append(codebook)
    best = torch.stack(errors).argmin(dim=0)  # [groups]
    codebook = torch.stack(codebooks)[best, torch.arange(groups, device=rows.device)]
    best = best.repeat_interleave(len(rows) // groups)
    return codebook, torch.stack(scales)[best, torch.arange(len(rows), device=rows.device)]


def refine_channel_scale(rows, codebook: torch.Tensor, scale: torch.Tensor, steps: int, importance=None):
    """Alternating least squares of codes, codebook and scale on `rows` `[out, n]`; the error never grows."""
    for _ in range(steps):
        codes = nearest(rows, codebook, scale)
        codebook = segment_means(rows, codes, codebook, scale, importance).sort(dim=1).values
        scale = fit_scale(rows, nearest(rows, codebook, scale), codebook, scale, importance)
    return codebook, scale


def segment_means(rows, codes, codebook: torch.Tensor, scale: torch.Tensor | None, importance=None) -> torch.Tensor:
    """The codebook with the least squared error for given `codes`; entries that no code uses keep their value."""
    groups, k = codebook.shape
    scale = torch.ones(rows.shape[0], device=rows.device) if scale is None else scale
    group = torch.arange(rows.shape[0], device=rows.device) * groups // rows.shape[0]
    index = (codes.reshape(rows.shape).long() + group[:, None] * k).view(-1)
    # the least squares entry of sum_i (w_i - s_i c)^2; in float64, as a GPU adds in any order and ranks should agree
    scale = scale.double()[:, None]
    mass = 1 if importance is None else importance
    numerator = torch.bincount(index, (rows * scale * mass).reshape(-1), groups * k)
    denominator = torch.bincount(index, (scale.square().expand_as(rows) * mass).reshape(-1), groups * k)
    means = torch.where(denominator > 0, numerator / denominator.clamp_min(1e-300), codebook.reshape(-1).double())
    return means.view(groups, k).to(codebook.dtype)


def fit_scale(rows, codes, codebook: torch.Tensor, scale: torch.Tensor, importance=None) -> torch.Tensor:
    """The scale with the least squared error for given codes and codebook; the present one where none is positive."""
    entries = lookup(codes.reshape(rows.shape), codebook, None)
    weighted = entries if importance is None else entries * importance
    fitted = (rows * weighted).sum(dim=1) / (entries * weighted).sum(dim=1).clamp_min(1e-30)
    return torch.where(fitted > 0, fitted, scale)


def fit_symmetric_grid(sets_of_weights: torch.Tensor, k: int, groups: int, search: bool, importance=None):
    """`groups` times the integers `-k/2 .. k/2 - 1` (for k = 2: -1 and 1), and a step for each set in `[sets, n]`.

    The step takes in every weight, or with `search` it has the least squared error.
    """
    grid = torch.arange(k, dtype=torch.float32) - k // 2 if k > 2 else torch.tensor([-1.0, 1.0])
    grid = grid.to(sets_of_weights.device)
    sets = SortedGroups(sets_of_weights, importance)
    step = sets.values.abs().amax(dim=1).clamp_min(TINY) / grid[-1]
    if search:
        step = step * search_ratio(sets, lambda ratio: (step * ratio)[:, None] * grid, torch.ones_like(step))
    return grid.repeat(groups, 1), step


def fit_uniform(weight: torch.Tensor, k: int, groups: int, config: ClusterConfig, importance=None):
    """Evenly spaced codebooks `[groups, k]` and, with `channel_scale`, integers in them and a step for each channel.

    The symmetric grid is that of [`fit_symmetric_grid`]; the affine one goes from low to high. `"mse"` searches the
    step, or both ends in turn, for the least squared error.
    """
    search = config.range_method == "mse"
    if config.symmetric and config.channel_scale:
        return fit_symmetric_grid(
            weight.reshape(weight.shape[0], -1), k, groups, search, _grouped(importance, len(weight))
        )
    if config.symmetric:
        grid, step = fit_symmetric_grid(weight.reshape(groups, -1), k, groups, search, _grouped(importance, groups))
        return grid * step[:, None], None
    sets = SortedGroups(weight.reshape(groups, -1), _grouped(importance, groups))
    low, high = sets.values[:, 0], sets.values[:, -1]
    fractions = torch.linspace(0, 1, k, device=weight.device)
    middle = sets.centre[:, 0].float()

    def grid(low_ratio, high_ratio):
        first, last = torch.lerp(middle, low, low_ratio), torch.lerp(middle, high, high_ratio)
        return first[:, None] + (last - first)[:, None] * fractions

    low_ratio = high_ratio = torch.ones_like(low)
    if search:
        low_ratio = high_ratio = search_ratio(sets, lambda ratio: grid(ratio, ratio), low_ratio)
        for _ in range(3):
            low_ratio = search_ratio(sets, lambda ratio: grid(ratio, high_ratio), low_ratio)  # noqa: B023
            high_ratio = search_ratio(sets, lambda ratio: grid(low_ratio, ratio), high_ratio)  # noqa: B023
    return grid(low_ratio, high_ratio), None


def search_ratio(sets: SortedGroups, codebook_of, ratio: torch.Tensor) -> torch.Tensor:
    """For each set the ratio from 0.01 to 1 whose codebook has the least error; it is no worse than the given `ratio`.

    The candidates are spaced geometrically, then once more finely around the best.
    """
    best = sets.error(codebook_of(ratio))
    coarse = torch.logspace(0, -2, RANGE_CANDIDATES, device=ratio.device)
    fine = torch.linspace(0.955, 1.045, 31, device=ratio.device)
    for factors in (coarse, fine):
        centre = ratio if factors is fine else torch.ones_like(ratio)
        for factor in factors:
            candidate = (centre * factor).clamp_max(1)
            error = sets.error(codebook_of(candidate))
            ratio = torch.where(error < best, candidate, ratio)
            best = torch.minimum(error, best)
    return ratio
