"""Circular padding by operators that every engine has.

PyTorch exports it as `Pad` with the mode `wrap`, which OpenVINO does not read, and which ONNX has since opset 19 only.
"""

from typing import Any

import numpy as np

from ..extras import require
from .graph import GraphWriter, refill, remove_unused


def write_out_circular_padding(model: Any) -> None:
    """Replace each such `Pad` in an `onnx.ModelProto` by slices of both ends, joined to its input."""
    graph = model.graph
    taken = {value for node in graph.node for value in [*node.input, *node.output]}
    writer = GraphWriter(taken | {value.name for value in graph.input}, prefix="circular_")
    for node in graph.node:
        pads = _circular_pads(model, node)
        if pads is None:
            writer.nodes.append(node)
        else:
            _join_ends(writer, node.input[0], node.output[0], pads)
    if len(writer.nodes) > len(graph.node):
        refill(graph.node, writer.nodes)
        graph.initializer.extend(writer.initializers.values())
        remove_unused(graph)


def _circular_pads(model: Any, node: Any) -> list[tuple[int, int, int]] | None:
    """Return (axis, before, after) of the padded axes of a node, or `None` if it is to stay."""
    numpy_helper = require("onnx", extra="onnx").numpy_helper
    if node.op_type != "Pad" or not any(entry.name == "mode" and entry.s == b"wrap" for entry in node.attribute):
        return None
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    constants |= {
        other.output[0]: entry.t
        for other in model.graph.node
        for entry in other.attribute
        if other.op_type == "Constant" and entry.name == "value"
    }
    if node.input[1] not in constants or (len(node.input) > 3 and node.input[3]):
        return None
    before, after = numpy_helper.to_array(constants[node.input[1]]).reshape(2, -1).tolist()
    pads = [(axis, *pair) for axis, pair in enumerate(zip(before, after)) if any(pair)]
    return pads if pads and min(before + after) >= 0 else None


def _join_ends(writer: GraphWriter, x: str, output: str, pads: list[tuple[int, int, int]]) -> None:
    for axis, before, after in pads:
        parts = [x]
        if before:
            parts.insert(0, _slice(writer, x, axis, -before, np.iinfo(np.int64).max))
        if after:
            parts.append(_slice(writer, x, axis, 0, after))
        x = writer.add("Concat", parts, output if axis == pads[-1][0] else None, axis=axis)


def _slice(writer: GraphWriter, x: str, axis: int, start: int, end: int) -> str:
    return writer.add("Slice", [x, *(writer.shared(np.array([value], np.int64)) for value in (start, end, axis))])


__all__ = ["write_out_circular_padding"]
