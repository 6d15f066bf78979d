"""Biases as multiples of what an integer more of a product stands for, so that a layer computes with integers alone.

The products of quantized inputs and int8 weights are multiples of the *step* `input_scale * weight_scale[o]` of their
output channel, and int32 holds their sums exactly. A bias that is such a multiple, too, is added in int32 as well: then
all engines get the same sum, as none has to round it.
"""

from dataclasses import replace

import torch

from .codes import encode
from .weights import QuantizedWeight

LARGEST = 2.0**30  # steps of a bias: beside it int32 has room for the sum of the products
SMALLEST_STEP = torch.finfo(torch.float32).tiny  # smaller numbers have fewer digits


def round_to_steps(bias: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Round a `bias` `[out]` to multiples of the positive, float32 `step` `[out]`; returns float32."""
    return (bias.float() / step).round() * step


def settle_bias(
    weight: QuantizedWeight, bias: torch.Tensor | None, input_scale: float
) -> tuple[QuantizedWeight, torch.Tensor | None]:
    """Return the weight and bias of a layer whose input has that scale, with the bias a multiple of its steps.

    Where the weight is so small beside the bias that int32 does not hold it in steps, as in a channel that is all zero,
    the channel's scale grows, and its weights take the codes that are then the nearest. A layer whose codebook holds
    no integers stays as it is, and so does a bias of `None`.
    """
    if bias is None or weight.codebook.dtype != torch.int8 or weight.scale is None:
        return weight, bias
    input_scale = torch.tensor(input_scale, dtype=torch.float32, device=weight.scale.device)
    least = (bias.float().abs() / LARGEST).clamp_min(SMALLEST_STEP)
    small = weight.scale * input_scale < least
    if small.any():
        scale = torch.where(small, (least.double() / input_scale.double()).float(), weight.scale)
        rows = weight.decoded().flatten(1)
        codes = encode(rows, weight.codebook.float(), scale).view(weight.codes.shape)
        kept = small.view(-1, *[1] * (codes.dim() - 1))
        weight = replace(weight, codes=torch.where(kept, codes, weight.codes), scale=scale)
    return weight, round_to_steps(bias, input_scale * weight.scale)
