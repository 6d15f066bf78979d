"""Reading back what an ONNX file computes with: the weights, after its own nodes have unpacked them."""

import os

import numpy as np

from ..extras import require


def read_onnx_weights(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return the weights of the quantized layers in a file of [`export_onnx`], by the layers' names.

    They are int8 in a packed or int8 file, and float32 in a float one. ONNX's reference evaluator computes them, not an
    engine. Raises `ValueError` for a file that has none.

    Example:
    ```python
    >>> from repvgg_hf.interop.integers import integer_layers
    >>> from repvgg_hf.interop.onnx import read_onnx_weights

    >>> weights = read_onnx_weights("my-model-w4/onnx/model_q4.onnx")
    >>> all((weights[name] == layer.weight.numpy()).all() for name, layer in integer_layers(model).items())
    True
    ```"""
    onnx = require("onnx", extra="onnx")
    reference = require("onnx.reference", extra="onnx")
    proto = onnx.load(path)
    graph = proto.graph
    values = {tensor.name for tensor in graph.initializer} | {name for node in graph.node for name in node.output}
    names = sorted(name for name in values if name.endswith(".weight_int8"))
    layers = {name.removesuffix("_int8") for name in names}
    decoded = {name for name in values if name.endswith(".weight") and f"{name}_codes" in values}
    names += sorted(decoded - layers)  # a layer with integers may decode them, too; the others stayed float
    if not names:
        raise ValueError(f"{path} has no weights that export_onnx wrote: give a file of a quantized model.")
    outputs = {name: name.removesuffix("_int8").removesuffix(".weight") for name in names}
    part = onnx.helper.make_graph(
        _needed_nodes(graph, names), "weights", [],
        [onnx.helper.make_empty_tensor_value_info(name) for name in names], list(graph.initializer),
    )  # fmt: skip
    model = onnx.helper.make_model(part, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    found = reference.ReferenceEvaluator(model).run(None, {})
    return {outputs[name]: np.asarray(array) for name, array in zip(names, found)}


def _needed_nodes(graph, names: list[str]) -> list:
    """Return the nodes that compute the values called `names`, in the graph's order."""
    needed, nodes = set(names), []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(node.input)
    return nodes[::-1]


__all__ = ["read_onnx_weights"]
