"""A quantized model as a PyTorch module of quantize and dequantize operations, which engines turn into integer kernels.

The operations are those of `torch.ops.quantized_decomposed`, as PyTorch's own quantization makes them, with the
checkpoint's integers and scales in them.
"""

import copy
import importlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..runtime.cluster_layers import ClusterConv, ClusterConv1d
from ..runtime.layer_swaps import all_names
from .arguments import require_model
from .integers import IntegerLayer, integer_layers

WEIGHT_FORMS = ("folded", "unfolded", "float")


class QDQ(nn.Module):
    """Rounds its input to a grid of integers and back, by one quantize and one dequantize operation.

    Args:
        scale (`float`), zero_point (`int`): of the grid, whose integers are `0 .. 2**bits - 1`.
        bits (`int`): bits of the integers.
        signed (`bool`): say it in int8, whose integers are those minus 128.
    """

    def __init__(self, scale: float, zero_point: int, bits: int, signed: bool):
        super().__init__()
        shift = 128 if signed else 0
        self.scale, self.zero_point = scale, zero_point - shift
        self.low, self.high = -shift, 2**bits - 1 - shift
        self.dtype = torch.int8 if signed else torch.uint8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        operations, grid = (
            torch.ops.quantized_decomposed,
            (self.scale, self.zero_point, self.low, self.high, self.dtype),
        )
        return operations.dequantize_per_tensor.default(operations.quantize_per_tensor.default(x, *grid), *grid)

    def extra_repr(self) -> str:
        return f"scale={self.scale:.6g}, zero_point={self.zero_point}, {self.low} .. {self.high}"


class QDQLayer(nn.Module):
    """A convolution or linear layer whose input and weight, and output if it has a range, are integers dequantized.

    Args:
        integers ([`IntegerLayer`]): what it computes with.
        signed (`bool`): inputs and outputs are int8 instead of uint8.
        weight (`str`): `"folded"`, `"unfolded"` or `"float"`, see [`to_qdq`].
    """

    def __init__(self, integers: IntegerLayer, signed: bool, weight: str):
        super().__init__()
        layer, dense = integers.layer, integers.weight.contiguous()
        self.form = weight
        self.input = QDQ(integers.input_scale, integers.input_zero_point, integers.activation_bits, signed)
        self.output = None
        if integers.output_scale is not None:
            self.output = QDQ(integers.output_scale, integers.output_zero_point, integers.activation_bits, signed)
        if weight == "folded":
            self.register_buffer("weight_int8", dense)
        else:
            scale = integers.weight_scale.view(-1, *[1] * (dense.dim() - 1))
            self.weight = nn.Parameter(dense.float() * scale, requires_grad=False)
        if weight != "float":
            self.register_buffer("weight_scale", integers.weight_scale.clone())
            self.register_buffer("weight_zero_point", torch.zeros(len(dense), dtype=torch.int64, device=dense.device))
        self.lowest = min(-127, int(dense.min()))
        self.bias = None
        if integers.bias is not None:
            exact = integers.bias.double() * integers.bias_scale.double()
            self.bias = nn.Parameter(exact.float(), requires_grad=False)
        self.convolve = None
        if isinstance(layer, ClusterConv):
            self.convolve = F.conv1d if isinstance(layer, ClusterConv1d) else F.conv2d
            self.stride, self.padding, self.dilation, self.groups = (
                layer.stride, layer.padding, layer.dilation, layer.groups,
            )  # fmt: skip
            self.padding_mode, self.pads = layer.padding_mode, layer.pads

    def dense_weight(self) -> torch.Tensor:
        """Return the float weight, by the operations that its form asks for."""
        if self.form == "float":
            return self.weight
        operations = torch.ops.quantized_decomposed
        grid = (self.weight_scale, self.weight_zero_point, 0, self.lowest, 127, torch.int8)
        folded = self.form == "folded"
        integers = self.weight_int8 if folded else operations.quantize_per_channel.default(self.weight, *grid)
        return operations.dequantize_per_channel.default(integers, *grid)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.convolve is not None and self.padding_mode != "zeros":
            circular = self.padding_mode == "circular"
            x = pad_circularly(x, self.pads) if circular else F.pad(x, self.pads, self.padding_mode)
        x, weight = self.input(x), self.dense_weight()
        if self.convolve is None:
            y = F.linear(x, weight, self.bias)
        else:
            padding = self.padding if self.padding_mode == "zeros" else 0
            y = self.convolve(x, weight, self.bias, self.stride, padding, self.dilation, self.groups)
        return y if self.output is None else self.output(y)


def pad_circularly(x: torch.Tensor, pads: Sequence[int]) -> torch.Tensor:
    """Do what `F.pad(x, pads, "circular")` does by slices, which engines such as Core ML take."""
    for index in range(len(pads) // 2):  # the last dimension first
        (before, after), dimension = pads[2 * index : 2 * index + 2], -1 - index
        parts = [x]
        if before:
            parts.insert(0, x.narrow(dimension, x.shape[dimension] - before, before))
        if after:
            parts.append(x.narrow(dimension, 0, after))
        x = torch.cat(parts, dimension)
    return x


class LogitsOnly(nn.Module):
    """Returns the logits of a model that returns more than a tensor; what has none is returned as it is."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor):
        outputs = self.model(pixel_values)
        return getattr(outputs, "logits", outputs)


def to_qdq(model: nn.Module, *, signed: bool = False, weight: str = "folded", head: str | None = None) -> nn.Module:
    """Return a copy of a quantized model that computes by `quantized_decomposed` operations, in evaluation.

    It takes the model's first input, such as `pixel_values`, and returns the logits, or what the model returns if it
    has none. Layers that stayed float stay so.

    Args:
        model (`nn.Module`): any quantized network with activation bits, see [`integer_layers`], which says what it
            raises for others.
        signed (`bool`, defaults to `False`): inputs are int8 instead of uint8, with the zero point 128 less.
        weight (`str`, defaults to `"folded"`): `"folded"`: int8 constants, dequantized; `"unfolded"`: float constants,
            quantized and dequantized; `"float"`: float constants.
        head (`str`, *optional*): the same of linear layers, if they are to be another.

    Example:
    ```python
    >>> from repvgg_hf.interop.qdq import to_qdq

    >>> program = torch.export.export(to_qdq(model), (images,))
    ```"""
    require_model(model)
    for name, form in (("weight", weight), ("head", head or weight)):
        if form not in WEIGHT_FORMS:
            raise ValueError(f"{name} must be one of {', '.join(WEIGHT_FORMS)}, got {form!r}.")
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # makes the operations known
    layers, copied = integer_layers(model), copy.deepcopy(model).eval()
    names = all_names(copied)
    for name, integers in layers.items():
        layer = copied.get_submodule(name)
        form = weight if isinstance(layer, ClusterConv) else head or weight
        swapped = QDQLayer(integers, signed, form)
        for other in names[layer]:
            copied.set_submodule(other, swapped)
    return LogitsOnly(nn.Module.float(copied)).eval()  # Transformers' models refuse `.float()` when they are quantized


__all__ = ["LogitsOnly", "QDQ", "QDQLayer", "WEIGHT_FORMS", "pad_circularly", "to_qdq"]
