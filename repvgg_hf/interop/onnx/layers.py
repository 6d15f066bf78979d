"""The nodes of one quantized layer in an ONNX graph: with integers (Q and DQ around it), or with a decoded weight.

Q is QuantizeLinear and DQ is DequantizeLinear. An engine computes DQ, convolution, Q with integers if it finds all
three. Where no Q follows, ONNX Runtime would dequantize the weight in every call: there it is decoded by Cast and Mul,
which are computed once, when the file is loaded.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ...runtime.cluster_layers import ClusterConv, ClusterLayer
from ..integers import IntegerLayer
from .graph import GraphWriter
from .placeholders import conv_pads
from .weights import packed_weight


@dataclass(frozen=True)
class LayerStyle:
    """How layers are written.

    Attributes:
        packed (`bool`): weights are packed codes, instead of int8.
        signed (`bool`): inputs are int8, instead of uint8.
        float_bias (`bool`): biases are float, instead of int32 and DQ.
    """

    packed: bool
    signed: bool = False
    float_bias: bool = False


@dataclass(frozen=True)
class Grid:
    """The integers that a value is rounded to, as a graph says it.

    Attributes:
        scale (`float`), zero_point (`int`): of unsigned integers.
        lowest (`int`), highest (`int`): bounds of these.
        signed (`bool`): the graph has them in int8, 128 less.
    """

    scale: float
    zero_point: int
    lowest: int
    highest: int
    signed: bool

    @property
    def shift(self) -> int:
        return 128 if self.signed else 0

    def clamped(self, low: float, high: float) -> "Grid":
        """Return the grid of what is clamped from `low` to `high`, which is the same before and after rounding."""
        with np.errstate(over="ignore"):
            bounds = np.rint(np.array([low, high], np.float32) / np.float32(self.scale)) + self.zero_point
        lowest, highest = (int(bound) for bound in np.clip(bounds, self.lowest, self.highest))
        return replace(self, lowest=lowest, highest=highest)

    def round(self, graph: GraphWriter, x: str, name: str, output: str | None = None) -> str:
        """Add Q and DQ of `x`, whose constants are called `name`; returns the result's name, the same for the same."""
        dtype = np.int8 if self.signed else np.uint8
        constants = [
            graph.constant(f"{name}_scale", np.float32(self.scale)),
            graph.constant(f"{name}_zero_point", dtype(self.zero_point - self.shift)),
        ]
        if (x, self) not in graph.made:
            integers = graph.add("QuantizeLinear", [x, *constants])
            bounds = {0: self.lowest, 255: self.highest}  # Q itself clamps to those of its dtype
            if any(bound != own for own, bound in bounds.items()):
                clip = [
                    graph.shared(np.array(bound - self.shift, dtype)) if bound != own else ""
                    for own, bound in bounds.items()
                ]
                integers = graph.add("Clip", [integers, *clip])
            graph.made[x, self] = graph.add("DequantizeLinear", [integers, *constants], output)
        return graph.made[x, self]


def input_grid(layer: IntegerLayer, style: LayerStyle) -> Grid:
    return Grid(layer.input_scale, layer.input_zero_point, 0, 2**layer.activation_bits - 1, style.signed)


def output_grid(layer: IntegerLayer, style: LayerStyle) -> Grid | None:
    if layer.output_scale is None:
        return None
    return Grid(layer.output_scale, layer.output_zero_point, 0, 2**layer.activation_bits - 1, style.signed)


def add_integer_layer(
    graph: GraphWriter,
    layer: IntegerLayer,
    style: LayerStyle,
    x: str,
    grid: Grid,
    output: str,
    rank: int,
    in_integers: bool,
) -> None:
    """Add a layer with rounded input, and output if that has a range.

    Args:
        x (`str`), output (`str`): names of its input and output.
        grid ([`Grid`]): what the input is rounded to.
        rank (`int`): number of dimensions of the input.
        in_integers (`bool`): an engine can compute it with integers, as a Q follows or it is no convolution.
    """
    name, geometry = layer.name, layer.layer
    x = grid.round(graph, x, f"{name}.input")
    if in_integers:
        transposed = not isinstance(geometry, ClusterConv) and rank != 2
        weight, bias = _dequantized_weight(graph, layer, style, transposed), _bias(graph, layer, style)
    else:
        weight, bias = _float_weight(graph, layer, style), _float_bias(graph, name, geometry)
    rounded = output_grid(layer, style)
    y = _apply(graph, geometry, [x, weight, *([bias] if bias else [])], None if rounded else output, name, rank)
    if rounded is not None:
        rounded.round(graph, y, f"{name}.output", output)


def add_float_layer(graph: GraphWriter, name: str, layer: ClusterLayer, x: str, output: str, rank: int) -> None:
    """Add a layer that decodes its weight from any codebook, and rounds no input."""
    weight = f"{name}.weight"
    if weight not in graph.made:
        codes, codebook = layer.codes().cpu().numpy(), layer.weight_codebook.cpu().numpy()
        scale = layer.weight_scale
        entries = weight if codebook.dtype == np.float32 and scale is None else f"{weight}_entries"
        packed_weight(graph, name, codes, codebook, entries)
        if codebook.dtype != np.float32:
            entries = graph.cast(entries, "float32", weight if scale is None else None)
        if scale is not None:
            graph.add("Mul", [entries, _column(graph, name, scale, codes.ndim)], weight)
        graph.made[weight] = weight
    linear = not isinstance(layer, ClusterConv) and rank != 2
    operand = _once(graph, (weight, "transposed"), "Transpose", [weight], perm=[1, 0]) if linear else weight
    bias = _float_bias(graph, name, layer)
    _apply(graph, layer, [x, operand, *([bias] if bias else [])], output, name, rank)


def _apply(graph: GraphWriter, layer: ClusterLayer, inputs: list[str], output: str | None, name: str, rank: int) -> str:
    """Add the convolution or product of `inputs`: input, weight, and bias if there is one."""
    if isinstance(layer, ClusterConv):
        geometry: dict[str, Any] = {
            "kernel_shape": list(layer.kernel_size),
            "strides": list(layer.stride),
            "dilations": list(layer.dilation),
            "pads": conv_pads(layer),
            "group": layer.groups,
        }
        return graph.add("Conv", inputs, output, name, **geometry)
    if rank == 2:
        return graph.add("Gemm", inputs, output, name, transB=1)
    if len(inputs) == 2:
        return graph.add("MatMul", inputs, output, name)
    return graph.add("Add", [graph.add("MatMul", inputs[:2], name=name), inputs[2]], output)


def _once(graph: GraphWriter, key: Any, operator: str, inputs: list[str], **attributes) -> str:
    """Add a node unless there is one under that key; returns its output's name."""
    if key not in graph.made:
        graph.made[key] = graph.add(operator, inputs, **attributes)
    return graph.made[key]


def _weight_int8(graph: GraphWriter, layer: IntegerLayer, style: LayerStyle) -> str:
    name = f"{layer.name}.weight_int8"
    if name not in graph.made:
        if style.packed:
            packed_weight(graph, layer.name, layer.codes.cpu().numpy(), layer.codebook.cpu().numpy(), name)
        else:
            graph.constant(name, layer.weight.cpu().numpy())
        graph.made[name] = name
    return name


def _dequantized_weight(graph: GraphWriter, layer: IntegerLayer, style: LayerStyle, transposed: bool) -> str:
    key = (layer.name, "dequantized", transposed)
    if key not in graph.made:
        weight, axis = _weight_int8(graph, layer, style), 0
        if transposed:
            weight, axis = graph.add("Transpose", [weight], perm=[1, 0]), 1
        scale = graph.constant(f"{layer.name}.weight_scale", layer.weight_scale.cpu().numpy())
        zero_point = graph.shared(np.zeros(len(layer.weight), np.int8))
        graph.made[key] = graph.add("DequantizeLinear", [weight, scale, zero_point], axis=axis)
    return graph.made[key]


def _float_weight(graph: GraphWriter, layer: IntegerLayer, style: LayerStyle) -> str:
    key = f"{layer.name}.weight"
    if key not in graph.made:
        entries = graph.cast(_weight_int8(graph, layer, style), "float32")
        scale = _column(graph, layer.name, layer.weight_scale, layer.weight.dim())
        graph.made[key] = graph.add("Mul", [entries, scale], key)
    return graph.made[key]


def _column(graph: GraphWriter, name: str, scale: torch.Tensor, dimensions: int) -> str:
    """Add the scales of the output channels, in a shape that a weight can be multiplied by."""
    constant = graph.constant(f"{name}.weight_scale", scale.cpu().numpy())
    shape = graph.shared(np.array([-1, *[1] * (dimensions - 1)], np.int64))
    return _once(graph, (constant, "column"), "Reshape", [constant, shape])


def _bias(graph: GraphWriter, layer: IntegerLayer, style: LayerStyle) -> str | None:
    """Add the bias of a layer that computes with integers: int32, and DQ with the product of both scales."""
    if layer.bias is None or style.float_bias:
        return _float_bias(graph, layer.name, layer.layer)
    key = (layer.name, "bias")
    if key not in graph.made:
        # a product in the graph, computed when the file is loaded, is four bytes per channel less in it
        scales = [f"{layer.name}.input_scale", f"{layer.name}.weight_scale"]
        integers = graph.constant(f"{layer.name}.bias_int32", layer.bias.cpu().numpy())
        graph.made[key] = graph.add("DequantizeLinear", [integers, graph.add("Mul", scales)], axis=0)
    return graph.made[key]


def _float_bias(graph: GraphWriter, name: str, layer: ClusterLayer) -> str | None:
    if layer.bias is None:
        return None
    return graph.constant(f"{name}.bias", layer.bias.detach().float().cpu().numpy())


__all__ = ["Grid", "LayerStyle", "add_float_layer", "add_integer_layer", "input_grid", "output_grid"]
