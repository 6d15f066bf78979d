"""Codebooks by k-means, of a whole weight tensor: with or without channel scales, in the dtype that stores them."""

import torch

from ...runtime.cluster_layers import CODEBOOK_DTYPES
from ...runtime.quantization_cluster import ClusterConfig
from .channel_scale import fit_channel_scale
from .codes import TINY
from .kmeans import kmeans_1d
from .uniform import best_range, largest_of, symmetric_integers


def fit_clusters(
    rows: torch.Tensor, k: int, groups: int, config: ClusterConfig, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fit codebooks to a weight by one-dimensional k-means: the `fit` of the method `"cluster"`.

    Args:
        rows: float32 `[out, n]`.
        k: entries of a codebook.
        groups: number of codebooks; each is for `out / groups` consecutive rows.
        config: its `codebook_dtype`, `channel_scale` and `reduce_range` say what kind of codebook.
        importance: `[out, n]`, of each weight, not negative; `None` for equal ones.

    Returns the ascending codebooks `[groups, k]`, float32, whose entries are numbers of `codebook_dtype`, and the
    channel scales `[out]` that were fitted with them, or `None`.
    """
    dtype = CODEBOOK_DTYPES[config.codebook_dtype]
    if not config.channel_scale:
        weights = None if importance is None else importance.reshape(groups, -1)
        return kmeans_1d(rows.reshape(groups, -1), k, weights, dtype), None
    largest = config.largest_integer(k.bit_length() - 1)
    if dtype == torch.int8 and k > 2 * largest:  # every integer has a code: nothing to cluster
        integers = symmetric_integers(k, rows.device, largest_of(config, k))
        _, step = best_range(rows, integers, affine=False, importance=importance)
        return integers.repeat(groups, 1), step.clamp_min(TINY)
    return fit_channel_scale(rows, k, groups, dtype, importance, largest)
