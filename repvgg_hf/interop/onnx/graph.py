"""Writing ONNX graphs: nodes and constants with short names, and what exporters leave in a file that nobody reads."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..extras import require


class GraphWriter:
    """Collects nodes and initializers.

    Args:
        taken (iterable of `str`): names of values that are in the graph already.
        prefix (`str`): of new names.

    Attributes:
        nodes (`list[onnx.NodeProto]`): in the order in which they were added.
        initializers (`dict[str, onnx.TensorProto]`): by name.
        made (`dict`): names of values that several layers ask for, by what they are.
    """

    def __init__(self, taken: Iterable[str] = (), prefix: str = ""):
        self.onnx = require("onnx", extra="onnx")
        self.nodes, self.initializers, self.made = [], {}, {}
        self._names: set[str] = set()
        self._taken, self._prefix, self._numbers = set(taken), prefix, itertools.count()

    def constant(self, name: str, array: np.ndarray) -> str:
        """Add an initializer; returns its name. One that is there already under that name is kept."""
        if name not in self.initializers:
            self.initializers[name] = self.onnx.numpy_helper.from_array(np.asarray(array), name)
        return name

    def shared(self, array: np.ndarray) -> str:
        """Add an initializer that others with the same content share, such as a shape; returns its name."""
        array = np.asarray(array)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self.made:
            self.made[key] = self.constant(f"{self._prefix}constant_{len(self.made)}", array)
        return self.made[key]

    def add(self, operator: str, inputs: Sequence[str], output: str | None = None, name: str = "", **attributes) -> str:
        """Add a node with one output; returns the output's name, a new one unless it is given.

        `name` is the node's, if it is the first of that name: a layer may run several times.
        """
        if output is None:
            output = next(name for number in self._numbers if (name := f"{self._prefix}v{number}") not in self._taken)
        name = "" if name in self._names else name
        self._names.add(name)
        self.nodes.append(self.onnx.helper.make_node(operator, inputs, [output], name=name, **attributes))
        return output

    def cast(self, value: str, dtype: str, output: str | None = None) -> str:
        """Add a node that converts `value` to a dtype named as NumPy names it; returns the output's name."""
        return self.add("Cast", [value], output, to=self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def consumers(graph: Any) -> dict[str, list]:
    """Return the nodes that read each value of an `onnx.GraphProto`."""
    found: dict[str, list] = {}
    for node in graph.node:
        for value in node.input:
            found.setdefault(value, []).append(node)
    return found


def strip(model: Any) -> None:
    """Remove from an `onnx.ModelProto` what the exporter writes for debugging: for each node a stack trace and more.

    It is most of what such a file has besides weights: some kilobytes per node.
    """
    graph = model.graph
    for part in [graph, *graph.node, *graph.input, *graph.output, *graph.initializer]:
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for node in graph.node:
        node.ClearField("name")
    graph.ClearField("value_info")
    model.ClearField("metadata_props")
    model.ClearField("doc_string")


def remove_unused(graph: Any) -> None:
    """Remove the nodes and initializers of an `onnx.GraphProto` whose values nothing reads."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(_reads(node))
    initializers = [tensor for tensor in graph.initializer if tensor.name in needed]
    refill(graph.node, kept[::-1])
    refill(graph.initializer, initializers)


def refill(field: Any, values: list) -> None:
    """Replace the entries of a repeated field."""
    del field[:]
    field.extend(values)


def _reads(node: Any) -> set[str]:
    """Return the names of the values that a node reads, in its subgraphs too."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            names.update(*(_reads(inner) for inner in graph.node), {output.name for output in graph.output})
    return names - {""}


__all__ = ["GraphWriter", "consumers", "refill", "remove_unused", "strip"]
