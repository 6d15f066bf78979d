"""Quantizing one weight tensor: what it becomes (codes, codebook, scale), and the steps that all methods share."""

from dataclasses import dataclass, replace

import torch

from ...runtime.cluster_layers import CODEBOOK_DTYPES
from ...runtime.quantization_cluster import ClusterConfig
from .codes import decode, encode, from_rows, to_rows

SMALLEST = 1e-15  # of the largest magnitude, if not all is zero: the squares of smaller ones vanish in float32
UNIMPORTANT = 1e-6  # of a channel without importance beside others: it gets a scale all the same


@dataclass
class QuantizedWeight:
    """A weight as it is stored: `scale[o] * codebook[group(o)][codes[o, ...]]`.

    Args:
        codes: uint8 `[out, ...]`, each the index of an entry of the codebook.
        codebook: `[groups, 2**bits]`, ascending, float16, float32 or int8; each is for `out / groups` consecutive
            output channels.
        scale: float32 `[out]`, one more factor for each output channel, or `None`.
    """

    codes: torch.Tensor
    codebook: torch.Tensor
    scale: torch.Tensor | None

    def decoded(self) -> torch.Tensor:
        """Return the weight, float32 `[out, ...]`, as a [`ClusterLayer`] decodes it."""
        return decode(self.codes, self.codebook, self.scale)

    def with_codebook(self, codebook: torch.Tensor) -> "QuantizedWeight":
        """Return the weight with other values `[groups, 2**bits]` for its codes, put in ascending order."""
        rank = codebook.argsort(dim=1).argsort(dim=1)  # where each entry goes
        codes = decode(self.codes, rank.float()).to(torch.uint8)
        return replace(self, codes=codes, codebook=codebook.sort(dim=1).values.to(self.codebook.dtype))

    def times(self, factor: torch.Tensor) -> "QuantizedWeight":
        """Return the weight with each output channel multiplied by its positive `factor` `[out]`, where that is stored.

        That is in the scale or in a codebook of the channel's own; without these the weight is returned as it is.
        """
        if self.scale is not None:
            return replace(self, scale=self.scale * factor)
        if len(self.codebook) != len(factor):
            return self
        return replace(self, codebook=(self.codebook.float() * factor[:, None]).to(self.codebook.dtype))


def quantize_weight(
    weight: torch.Tensor, bits: int, groups: int, config: ClusterConfig, importance: torch.Tensor | None = None
) -> QuantizedWeight:
    """Quantize a weight so that `sum importance * (weight - decoded)^2` is small; every code is of the nearest entry.

    Args:
        weight: finite, `[out, ...]`, any float dtype.
        bits: of a code, 1 to 8.
        groups: number of codebooks, of `2**bits` entries; each is for `out / groups` consecutive channels.
        config: how to quantize; its `bits` and granularity are not looked at.
        importance: of each weight, `[out, ...]` or `[1, ...]`, finite and not negative; `None` for equal importance,
            which also a group has in which nothing is important.

    Raises `ValueError` if the codebook's dtype or the scale can't represent weights so large or small, or if the
    importance is not as said.

    Example:
    ```python
    >>> import torch
    >>> from repvgg_hf import ClusterConfig
    >>> from repvgg_hf.compression.codebooks.weights import quantize_weight

    >>> quantized = quantize_weight(torch.randn(16, 8, 3, 3), bits=4, groups=1, config=ClusterConfig(bits=4))
    >>> quantized.codes.shape, quantized.codebook.shape, quantized.scale.shape
    (torch.Size([16, 8, 3, 3]), torch.Size([1, 16]), torch.Size([16]))
    ```"""
    weight = weight.detach().float()
    largest = weight.abs().max().item()
    if 0 < largest < SMALLEST:
        raise ValueError(
            f"its weights are at most {largest:.3g}, and squares of less than {SMALLEST:.0e} vanish in float32: set "
            "such weights to zero, or name the layer in modules_to_not_convert."
        )
    rows = _rows_in_memory(weight)
    if importance is not None:
        importance = _importance_of_rows(importance, weight, groups)
    codebook, scale = config.quantization_method.fit(rows, 2**bits, groups, config, importance)
    stored = codebook.to(CODEBOOK_DTYPES[config.codebook_dtype])
    if not stored.isfinite().all():
        raise ValueError(
            f"weights of up to {largest:.3g} need a codebook entry that does not fit "
            f"{config.codebook_dtype}: set channel_scale=True or codebook_dtype='float32'."
        )
    if stored.dtype == torch.float16 and scale is None and 0 < largest < torch.finfo(torch.float16).tiny:
        raise ValueError(
            f"its weights are at most {largest:.3g}, and float16 keeps few or no digits of numbers below "
            f"{torch.finfo(torch.float16).tiny:.2g}: set channel_scale=True or codebook_dtype='float32'."
        )
    codes = encode(rows, stored.float(), scale)
    codes = codes.view(weight.shape) if weight.is_contiguous() else from_rows(codes, weight.shape).contiguous()
    return QuantizedWeight(codes, stored, scale)


def _rows_in_memory(weight: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """Return `weight` `[out, ...]` as `[out, n]`, in the order in which `like`, default itself, lies in memory.

    It is a view, also of the kernel of a fused convolution, whose channels are last.
    """
    return weight.flatten(1) if (weight if like is None else like).is_contiguous() else to_rows(weight)


def _importance_of_rows(importance: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Return the `importance` of [`quantize_weight`] as float32 `[out, n]`, up to 1 in each of the groups.

    The order is that of [`_rows_in_memory`].
    """
    out = weight.shape[0]
    shape = tuple(importance.shape)
    if shape[1:] != tuple(weight.shape[1:]) or shape[0] not in (1, out):
        raise ValueError(f"importance must have shape {tuple(weight.shape)} or 1 in place of {out}, got {shape}.")
    importance = importance.detach().float()
    if not (importance.isfinite().all() and (importance >= 0).all()):
        raise ValueError("importance has NaN, infinite or negative entries: it must be finite and not negative.")
    importance = _rows_in_memory(importance.expand(weight.shape), weight).reshape(groups, -1)
    largest = importance.amax(dim=1, keepdim=True)
    importance = torch.where(largest > 0, importance / largest, 1.0).view(out, -1)
    ignored = importance.amax(dim=1, keepdim=True) == 0
    return importance.masked_fill(ignored, UNIMPORTANT)
