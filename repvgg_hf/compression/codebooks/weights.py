"""Turning one weight tensor into codes, codebook and scale."""

from dataclasses import dataclass

import torch

from ...runtime.quantization_cluster import CODEBOOK_DTYPES, ClusterConfig
from .channel_scale import TINY, fit_channel_scale
from .kmeans import kmeans_1d
from .codes import from_rows, nearest_codes, to_rows
from .uniform import best_range, symmetric_integers, whole_range

UNIMPORTANT = 1e-6  # of a channel without importance beside others: it gets a scale all the same


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
    """Codes of the entries nearest to `weight` `[out, ...]`, uint8 of its shape; the codebook has `2**bits` entries."""
    codes = nearest_codes(rows_in_memory(weight), codebook, scale)
    return (codes.view(weight.shape) if weight.is_contiguous() else from_rows(codes, weight.shape)).contiguous()


def rows_in_memory(weight: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """`weight` `[out, ...]` as `[out, n]`, in the order in which `like`, default itself, lies in memory.

    A view, also of the kernel of a fused convolution, whose channels are last.
    """
    return weight.flatten(1) if (weight if like is None else like).is_contiguous() else to_rows(weight)


def quantize_weight(
    weight: torch.Tensor, bits: int, groups: int, config: ClusterConfig, importance: torch.Tensor | None = None
) -> QuantizedWeight:
    """Quantize a weight so that `sum importance * (weight - decoded)^2` is small; every entry is the nearest one.

    Args:
        weight: finite, `[out, ...]`, any float dtype.
        bits: of a code, 1 to 8.
        groups: number of codebooks, of `2**bits` entries; each is for `out / groups` consecutive channels.
        config: how to quantize; its `bits` and granularity are not looked at.
        importance: of each weight, `[out, ...]` or `[1, ...]`, finite and not negative; `None` for equal importance,
            which also a group has in which nothing is important.

    Raises `ValueError` if an entry of the codebook does not fit its dtype, or if the importance is not as said.
    """
    weight = weight.detach().float()
    rows = rows_in_memory(weight)
    if importance is not None:
        importance = importance_of_rows(importance, weight, groups)
    if config.method == "uniform":
        codebook, scale = fit_uniform(rows, 2**bits, groups, config, importance)
    else:
        codebook, scale = fit_clusters(rows, 2**bits, groups, config, importance)
    stored = codebook.to(CODEBOOK_DTYPES[config.codebook_dtype])
    if not stored.isfinite().all():
        raise ValueError(
            f"weights of up to {weight.abs().max().item():.3g} need a codebook entry that does not fit "
            f"{config.codebook_dtype}: set channel_scale=True or codebook_dtype='float32'."
        )
    return QuantizedWeight(nearest(weight, stored.float(), scale), stored, scale)


def importance_of_rows(importance: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
    """`importance` as float32 `[out, n]`, in the order of [`rows_in_memory`], up to 1 in each of `groups` groups.

    See [`quantize_weight`].
    """
    out = weight.shape[0]
    shape = tuple(importance.shape)
    if shape[1:] != tuple(weight.shape[1:]) or shape[0] not in (1, out):
        raise ValueError(f"importance must have shape {tuple(weight.shape)} or 1 in place of {out}, got {shape}.")
    importance = importance.detach().float()
    if not (importance.isfinite().all() and (importance >= 0).all()):
        raise ValueError("importance has NaN, infinite or negative entries: it must be finite and not negative.")
    importance = rows_in_memory(importance.expand(weight.shape), weight).reshape(groups, -1)
    largest = importance.amax(dim=1, keepdim=True)
    importance = torch.where(largest > 0, importance / largest, 1.0).view(out, -1)
    ignored = importance.amax(dim=1, keepdim=True) == 0
    return importance.masked_fill(ignored, UNIMPORTANT)


def fit_clusters(rows: torch.Tensor, k: int, groups: int, config: ClusterConfig, importance: torch.Tensor | None):
    """k-means codebooks `[groups, k]` for `rows` `[out, n]`, and channel scales `[out]` fitted with them or `None`."""
    dtype, options = CODEBOOK_DTYPES[config.codebook_dtype], (config.preserve_zero, config.symmetric)
    if config.symmetric and config.preserve_zero and k == 2:
        raise ValueError("1 bit holds no symmetric codebook with a zero: set preserve_zero=False or more bits.")
    if not config.channel_scale:
        weights = None if importance is None else importance.reshape(groups, -1)
        return kmeans_1d(rows.reshape(groups, -1), k, weights, *options, dtype), None
    if dtype == torch.int8 and k == 256 and not config.symmetric:  # every integer has a code: nothing to cluster
        integers = symmetric_integers(k, rows.device)
        return integers.repeat(groups, 1), best_range(rows, integers, False, importance)[1].clamp_min(TINY)
    return fit_channel_scale(rows, k, groups, dtype, importance, *options)


def fit_uniform(rows: torch.Tensor, k: int, groups: int, config: ClusterConfig, importance: torch.Tensor | None):
    """Evenly spaced codebooks `[groups, k]` for `rows` `[out, n]`.

    With `channel_scale` they are integers, and a channel's step is its scale `[out]`; else the scale is `None`.
    """
    integers = torch.arange(k, dtype=torch.float32, device=rows.device)
    if config.symmetric:
        integers = symmetric_integers(k, rows.device)
    sets = len(rows) if config.channel_scale else groups
    values = rows.reshape(sets, -1)
    if config.range_method == "mse":
        weights = None if importance is None else importance.reshape(sets, -1)
        offset, step = best_range(values, integers, not config.symmetric, weights)
    else:
        offset, step = whole_range(values, integers, not config.symmetric)
    if config.channel_scale:
        return integers.repeat(groups, 1), step.clamp_min(TINY)
    return offset[:, None] + step[:, None] * integers, None
