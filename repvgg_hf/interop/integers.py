"""The integers that a quantized model computes with: one description, from which every engine's file is made.

A layer's input is `input_scale * (q - input_zero_point)` with unsigned integers q, its weight `weight_scale[o] * w`
with int8 w. So a product of both is a multiple of `bias_scale[o] = input_scale * weight_scale[o]`, and so is the bias:
sums of products and biases are exact in int32.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..compression.qat.layers import qat_layers
from ..runtime.cluster_layers import ClusterLayer, cluster_layers
from ..runtime.quantization_cluster import LARGEST_REDUCED

# How far, relative to its size in steps, a bias may be from an integer: float32 has rounded the product of that and the
# step to 24 bits.
ON_GRID = 2.0**-23


@dataclass(frozen=True)
class IntegerLayer:
    """The integers of one quantized layer.

    Attributes:
        name (`str`): its name in the model.
        layer ([`ClusterLayer`]): the layer itself, for its geometry: stride, padding, groups, padding mode.
        bits (`int`): bits of a code.
        codes (`torch.Tensor`): uint8, of the weight's shape, each the index of an entry of the codebook.
        codebook (`torch.Tensor`): int8 `[codebooks, 2**bits]`, ascending; each is for `out / codebooks` consecutive
            output channels.
        weight (`torch.Tensor`): int8, of the weight's shape: the entries that the codes select.
        weight_scale (`torch.Tensor`): float32 `[out]`.
        bias (`torch.Tensor`, *optional*): int32 `[out]`, in units of `bias_scale`.
        input_scale (`float`), input_zero_point (`int`): of the input, whose integers are `0 .. 2**activation_bits - 1`.
        activation_bits (`int`): bits of the input's integers, and of the output's.
        output_scale (`float`, *optional*), output_zero_point (`int`, *optional*): the same of the output, if that is
            rounded too, as the last feature map is.
    """

    name: str
    layer: ClusterLayer
    bits: int
    codes: torch.Tensor
    codebook: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None
    input_scale: float
    input_zero_point: int
    activation_bits: int
    output_scale: float | None
    output_zero_point: int | None

    @property
    def bias_scale(self) -> torch.Tensor:
        """What an integer more of the bias stands for, float32 `[out]`: the product of the input's and the weight's."""
        return bias_scale(self.layer)


def bias_scale(layer: ClusterLayer) -> torch.Tensor:
    """Return the steps of a layer's bias, float32 `[out]`."""
    return layer.input_scale * layer.weight_scale


@torch.no_grad()
def integer_layers(model: nn.Module) -> dict[str, IntegerLayer]:
    """Return the integers of every quantized layer of `model`, by name, in the model's order.

    Raises `ValueError`, with the fix, for a model that has none: one that is not quantized or being trained, or that
    has float codebooks, no activation bits, or a bias that is no multiple of its step. Layers that stayed float
    (`modules_to_not_convert`) are not among them.

    Example:
    ```python
    >>> from repvgg_hf.interop.integers import integer_layers

    >>> model.quantize(bits=4, activation_bits=8, calibration=images)
    >>> integer_layers(model)["classifier"].weight.dtype
    torch.int8
    ```"""
    if qat_layers(model):
        raise ValueError(
            f"{type(model).__name__} is being trained quantized, and its integers are not settled: call quantize() "
            "without arguments, which freezes what was trained."
        )
    layers = cluster_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} is not quantized: call quantize(activation_bits=8, calibration=...) first, with a "
            "few hundred images."
        )
    for name, layer in layers.items():
        _require_integers(name, layer)
    return {name: _integers_of(name, layer) for name, layer in layers.items()}


def runs_exactly_without_vnni(layers: dict[str, IntegerLayer]) -> bool:
    """Tell whether all weights are within +-63 (`reduce_range`), so that every CPU computes the same.

    Those without VNNI instructions add the products of two uint8 inputs and int8 weights in 16 bits, and saturate.
    """
    return all(layer.weight.int().abs().max().item() <= LARGEST_REDUCED for layer in layers.values())


def _require_integers(name: str, layer: ClusterLayer) -> None:
    """Raise `ValueError` naming the layer if it does not compute with integers."""
    again = "quantize the float model again with activation_bits=8 and calibration=, which makes them integers."
    if layer.weight_codes.is_meta:
        raise ValueError(f"{name!r} is offloaded: load the model without device_map, or with device_map='cpu'.")
    if layer.weight_codebook.dtype != torch.int8 or layer.weight_scale is None:
        dtype = str(layer.weight_codebook.dtype).removeprefix("torch.")
        raise ValueError(
            f"The codebook of {name!r} is {dtype}, and engines compute with int8: {again} (codebook_dtype='int8' is "
            "the default then.)"
        )
    if layer.activation_bits is None:
        raise ValueError(f"The input of {name!r} is not quantized (activation_bits=None): {again}")


def _integers_of(name: str, layer: ClusterLayer) -> IntegerLayer:
    codes, codebook = layer.codes(), layer.weight_codebook
    out, groups = codes.shape[0], codebook.shape[0]
    of_channel = torch.arange(out, device=codes.device) * groups // out
    weight = codebook[of_channel].gather(1, codes.reshape(out, -1).long()).view(codes.shape)
    output_scale = getattr(layer, "output_scale", None)
    return IntegerLayer(
        name=name,
        layer=layer,
        bits=layer.bits,
        codes=codes,
        codebook=codebook,
        weight=weight,
        weight_scale=layer.weight_scale,
        bias=None if layer.bias is None else _integer_bias(name, layer),
        input_scale=layer.input_scale.item(),
        input_zero_point=int(layer.input_zero_point.item()),
        activation_bits=layer.activation_bits,
        output_scale=None if output_scale is None else output_scale.item(),
        output_zero_point=None if output_scale is None else int(layer.output_zero_point.item()),
    )


def _integer_bias(name: str, layer: ClusterLayer) -> torch.Tensor:
    """Return the bias in its steps, int32 `[out]`; raises `ValueError` if it is no multiple of them."""
    steps = layer.bias.double() / bias_scale(layer).double()
    integers = steps.round()
    off = (steps - integers).abs() > ON_GRID * integers.abs().clamp_min(1)
    if off.any():
        raise ValueError(
            f"{off.sum().item()} of the {len(steps)} biases of {name!r} are no multiples of input_scale * "
            "weight_scale, in which engines add them up (channel "
            f"{off.int().argmax().item()}: {steps[off][0].item():.3f} steps): they were changed after quantizing, or "
            "stored in half precision. Quantize the float model again in float32, and save that."
        )
    if integers.abs().max() >= 2**31:
        raise ValueError(f"A bias of {name!r} is {integers.abs().max().item():.3g} steps, more than int32 holds.")
    return integers.int()


__all__ = ["IntegerLayer", "bias_scale", "integer_layers", "runs_exactly_without_vnni"]
