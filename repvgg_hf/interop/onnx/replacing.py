"""From placeholders in an exported graph to the nodes of quantized layers."""

import math
from typing import Any

from ...runtime.cluster_layers import ClusterConv, ClusterLayer
from ..extras import require
from ..integers import IntegerLayer
from .graph import GraphWriter, consumers, refill, remove_unused
from .layers import Grid, LayerStyle, add_float_layer, add_integer_layer, input_grid, output_grid
from .placeholders import DOMAIN

_PASSED = {"Clip", "Flatten", "Identity", "MaxPool", "Relu", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}


def replace_placeholders(model: Any, add_layer: Any) -> None:
    """Put nodes in the place of each placeholder in an `onnx.ModelProto`.

    `add_layer(graph, name, x, output, rank)` adds those of the layer called `name` to a [`GraphWriter`].
    """
    graph = model.graph
    taken = {value for node in graph.node for value in [*node.input, *node.output]}
    writer = GraphWriter(taken | {value.name for value in graph.input})
    for node in graph.node:
        if node.domain == DOMAIN:
            add_layer(writer, layer_of(node), node.input[0], node.output[0], _attribute(node, "rank").i)
        else:
            writer.nodes.append(node)
    refill(graph.node, writer.nodes)
    graph.initializer.extend(writer.initializers.values())
    refill(model.opset_import, [entry for entry in model.opset_import if entry.domain != DOMAIN])


def write_integers(model: Any, layers: dict[str, IntegerLayer], style: LayerStyle, by_rule: bool) -> None:
    """Write the layers with integers.

    `by_rule` keeps every clamp before a rounding and dequantizes every weight, as TensorRT wants it. Else the graph is
    arranged so that ONNX Runtime computes with integers where that is possible, and with the very same weights where it
    is not.
    """
    graph = model.graph
    grids = {node.output[0]: input_grid(layers[layer_of(node)], style) for node in graph.node if node.domain == DOMAIN}
    if not by_rule:
        _clamp_by_rounding(graph, grids)
    placeholders = [node for node in graph.node if node.domain == DOMAIN]
    readers = consumers(graph)
    in_integers = {
        node.output[0]: by_rule
        or not isinstance(layers[layer_of(node)].layer, ClusterConv)
        or layers[layer_of(node)].output_scale is not None
        or _is_rounded_next(node.output[0], readers, grids)
        for node in placeholders
    }

    def add_layer(writer: GraphWriter, name: str, x: str, output: str, rank: int) -> None:
        add_integer_layer(writer, layers[name], style, x, grids[output], output, rank, in_integers[output])

    not_negative = {
        node.output[0]
        for node in placeholders
        if (grid := output_grid(layers[layer_of(node)], style)) and grid.zero_point == grid.lowest
    }
    replace_placeholders(model, add_layer)
    _bypass_relus(graph, not_negative)
    remove_unused(graph)


def write_floats(model: Any, layers: dict[str, ClusterLayer]) -> None:
    """Write the layers with weights that the graph decodes, and inputs as they are."""

    def add_layer(graph: GraphWriter, name: str, x: str, output: str, rank: int) -> None:
        add_float_layer(graph, name, layers[name], x, output, rank)

    replace_placeholders(model, add_layer)
    remove_unused(model.graph)


def layer_of(node: Any) -> str:
    """Return the name of the layer that a placeholder stands for."""
    return _attribute(node, "layer").s.decode()


def _attribute(node: Any, name: str) -> Any:
    return next(attribute for attribute in node.attribute if attribute.name == name)


def _clamp_by_rounding(graph: Any, grids: dict[str, Grid]) -> None:
    """Let each rounding of an input do what a ReLU or Clip before it does, by the bounds of its integers.

    A convolution is followed by its rounding then, which is what ONNX Runtime looks for. So it is with a MaxPool in
    between, which commutes with both.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    readers, outputs = consumers(graph), {output.name for output in graph.output}
    for node in [node for node in graph.node if node.domain == DOMAIN]:
        reader, rounded = node, [node]
        pool = makers.get(node.input[0])
        if pool is not None and pool.op_type == "MaxPool" and pool.output[0] not in outputs:
            of_pool = readers[pool.output[0]]
            if all(other.domain == DOMAIN for other in of_pool):
                reader, rounded = pool, of_pool
        while (bounds := _clamp_of(makers.get(reader.input[0]), constants)) is not None:
            for other in rounded:
                grids[other.output[0]] = grids[other.output[0]].clamped(*bounds)
            reader.input[0] = makers[reader.input[0]].input[0]
    remove_unused(graph)  # of the clamps those that nothing else reads


def _clamp_of(node: Any, constants: dict[str, Any]) -> tuple[float, float] | None:
    """Return the bounds that a node clamps to, `None` if it does something else."""
    if node is None or node.op_type not in ("Relu", "Clip"):
        return None
    if node.op_type == "Relu":
        return 0.0, math.inf
    bounds = [*node.input[1:], "", ""][:2]
    if any(name and name not in constants for name in bounds):
        return None
    to_array = require("onnx", extra="onnx").numpy_helper.to_array
    low, high = (
        float(to_array(constants[name])) if name else default for name, default in zip(bounds, (-math.inf, math.inf))
    )
    return low, high


def _is_rounded_next(value: str, readers: dict[str, list], grids: dict[str, Grid]) -> bool:
    """Tell whether rounding is what comes next after a convolution, behind what ONNX Runtime moves a rounding across.

    It then quantizes a float weight anew, by scales of its own. So the weight has to be dequantized integers there,
    even if they can't be fused, as the convolution's output is one of the model's besides.
    """
    following = readers.get(value, [])
    if following and all(reader.domain == DOMAIN for reader in following):
        return len({grids[reader.output[0]] for reader in following}) == 1
    if len(following) == 1 and following[0].op_type in _PASSED:
        return _is_rounded_next(following[0].output[0], readers, grids)
    return False


def _bypass_relus(graph: Any, not_negative: set[str]) -> None:
    """Let what reads the ReLU of a value without negative numbers read that value."""
    outputs = {output.name for output in graph.output}
    same = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Relu" and node.input[0] in not_negative and node.output[0] not in outputs
    }
    for node in graph.node:
        for i, value in enumerate(node.input):
            node.input[i] = same.get(value, value)


__all__ = ["layer_of", "replace_placeholders", "write_floats", "write_integers"]
