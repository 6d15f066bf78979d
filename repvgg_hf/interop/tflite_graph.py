"""A LiteRT file (`.tflite`) in memory, and the pass that turns quantize and dequantize operations in it into int8 ones.

PyTorch's integers arrive as float operations between QUANTIZE and DEQUANTIZE, which are right but slow. A convolution
or linear layer whose input, weight and output are integers that way becomes one operation of integers.
"""

from collections import defaultdict
from typing import Any

import numpy as np

from .extras import require

LAYERS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
_VERSIONS = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 4, "PAD": 2, "DEQUANTIZE": 5}  # that have int8


class TFLiteGraph:
    """The one subgraph of a LiteRT file: operations, and tensors by their index.

    Args:
        data (`bytes`): the file.

    Raises `ValueError` if it is none.
    """

    def __init__(self, data: bytes):
        self.schema = require("ai_edge_litert.schema_py_generated", extra="litert")
        if data[4:8] != b"TFL3":
            raise ValueError("This is no LiteRT file: it has not the letters TFL3 at byte 4.")
        self.model = self.schema.ModelT.InitFromObj(self.schema.Model.GetRootAsModel(bytearray(data), 0))
        (self.subgraph,) = self.model.subgraphs
        for buffer in self.model.buffers:  # of large files they lie behind the rest
            if buffer.data is None and buffer.size:
                buffer.data = np.frombuffer(data, np.uint8, buffer.size, buffer.offset)
            buffer.offset = buffer.size = 0
        self.kinds = {code: name for name, code in vars(self.schema.BuiltinOperator).items() if isinstance(code, int)}
        self.index()

    def index(self) -> None:
        """Find which operation makes each tensor, and which ones take it."""
        self.producers = {tensor: operation for operation in self.operations for tensor in operation.outputs}
        self.consumers = defaultdict(list)
        for operation in self.operations:
            for tensor in operation.inputs:
                self.consumers[tensor].append(operation)

    @property
    def operations(self) -> list[Any]:
        return self.subgraph.operators

    def kind(self, operation) -> str:
        """Return what an operation is, such as `"CONV_2D"`; `""` for `None`."""
        if operation is None:
            return ""
        code = self.model.operatorCodes[operation.opcodeIndex]
        return self.kinds[max(code.builtinCode, code.deprecatedBuiltinCode)]

    def producer(self, tensor: int, *kinds: str):
        """Return the operation that makes a `tensor` if it is of one of these kinds, else `None`."""
        operation = self.producers.get(tensor)
        return operation if self.kind(operation) in kinds else None

    def constant(self, tensor: int) -> np.ndarray | None:
        """Return the value of a constant tensor, `None` if it is none."""
        entry = self.subgraph.tensors[tensor]
        data = self.model.buffers[entry.buffer].data
        if data is None:
            return None
        types = self.schema.TensorType
        dtype = {types.FLOAT32: np.float32, types.INT8: np.int8, types.INT32: np.int32}[entry.type]
        return np.frombuffer(np.asarray(data, np.uint8).tobytes(), dtype).reshape(entry.shape)

    def grid(self, tensor: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the scales and zero points of a tensor of integers."""
        quantization = self.subgraph.tensors[tensor].quantization
        return np.asarray(quantization.scale, np.float32), np.asarray(quantization.zeroPoint)

    def add_tensor(self, name: str, like: int, value: np.ndarray | None = None, scale=None, zero=0, axis=0) -> int:
        """Add a tensor of integers, int8 of the shape of tensor `like`, or a constant `value`; returns its index."""
        tensor, buffer = self.schema.TensorT(), self.schema.BufferT()
        shape = self.subgraph.tensors[like].shape if value is None else value.shape
        tensor.name, tensor.shape, tensor.hasRank = name.encode(), np.array(shape, np.int32), True
        tensor.type = self.schema.TensorType.INT8 if value is None else _type_of(self.schema, value)
        if value is not None:
            buffer.data = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
        tensor.quantization = self.schema.QuantizationParametersT()
        tensor.quantization.scale = np.atleast_1d(np.asarray(scale, np.float32))
        tensor.quantization.zeroPoint = np.full(len(tensor.quantization.scale), zero, np.int64)
        tensor.quantization.quantizedDimension = axis
        tensor.buffer = len(self.model.buffers)
        self.model.buffers.append(buffer)
        self.subgraph.tensors.append(tensor)
        return len(self.subgraph.tensors) - 1

    def remove(self, *operations) -> None:
        """Take `operations` out of the graph."""
        gone = {id(operation) for operation in operations}
        self.subgraph.operators = [operation for operation in self.operations if id(operation) not in gone]
        self.index()

    def drop_unused(self) -> None:
        """Remove operations whose outputs nothing takes, and tensors and their values that nothing takes or makes."""
        while True:
            self.index()
            needed = {*self.consumers, *self.subgraph.outputs}
            kept = [operation for operation in self.operations if needed.intersection(operation.outputs)]
            if len(kept) == len(self.operations):
                break
            self.subgraph.operators = kept
        self._renumber(sorted({*needed, *self.producers, *self.subgraph.inputs} - {-1}))

    def _renumber(self, kept: list[int]) -> None:
        """Keep these tensors alone, and the buffers that hold their values; the first buffer is always an empty one."""
        numbers = {-1: -1} | {old: new for new, old in enumerate(kept)}
        self.subgraph.tensors = [self.subgraph.tensors[tensor] for tensor in kept]
        for holder in (self.subgraph, *self.operations):
            holder.inputs = [numbers[tensor] for tensor in holder.inputs]
            holder.outputs = [numbers[tensor] for tensor in holder.outputs]
        for signature in self.model.signatureDefs or []:
            for entry in (*signature.inputs, *signature.outputs):
                entry.tensorIndex = numbers[entry.tensorIndex]
        holders = [*self.subgraph.tensors, *(self.model.metadata or [])]
        buffers = sorted({0, *(holder.buffer for holder in holders)})
        for holder in holders:
            holder.buffer = buffers.index(holder.buffer)
        self.model.buffers = [self.model.buffers[buffer] for buffer in buffers]
        self.index()

    def to_bytes(self) -> bytes:
        for code in self.model.operatorCodes:
            kind = self.kinds[max(code.builtinCode, code.deprecatedBuiltinCode)]
            code.version = max(code.version, _VERSIONS.get(kind, 1))
        builder = require("flatbuffers", extra="litert").Builder(1024)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


def _type_of(schema, value: np.ndarray) -> int:
    return {np.dtype(np.int8): schema.TensorType.INT8, np.dtype(np.int32): schema.TensorType.INT32}[value.dtype]


def use_integers(graph: TFLiteGraph) -> list[str]:
    """Turn layers between DEQUANTIZE and QUANTIZE into operations of integers; returns the kinds of those that were.

    Others, whose output stays float, keep a float operation on an int8 weight that is dequantized once.
    """
    changed = []
    for layer in list(graph.operations):
        if graph.kind(layer) not in LAYERS or (weight := _integer_weight(graph, layer)) is None:
            continue
        integers = _integer_input(graph, layer) if _has_integer_output(graph, layer) else None
        if integers is None:
            _dequantize_weight(graph, layer, weight)
        else:
            _set_integers(graph, layer, integers, weight)
            changed.append(graph.kind(layer))
    graph.drop_unused()
    return changed


def _integer_weight(graph: TFLiteGraph, layer) -> int | None:
    """Add a layer's weight as an int8 constant, laid out as the layer takes it, if it is quantized in the graph."""
    dequantize, layouts = _weight_operations(graph, layer)
    quantize = dequantize and graph.producer(dequantize.inputs[0], "QUANTIZE")
    values = None if quantize is None else graph.constant(quantize.inputs[0])
    if values is None:
        return None
    scale, _ = graph.grid(quantize.outputs[0])
    ones = [1] * (values.ndim - 1)
    integers = np.rint(values / scale.reshape(-1, *ones)).astype(np.int8)
    channels = np.broadcast_to(np.arange(len(scale)).reshape(-1, *ones), values.shape)
    for operation in layouts:
        integers, channels = (_laid_out(graph, operation, array) for array in (integers, channels))
    axis = next((axis for axis in range(channels.ndim) if np.ptp(channels, axis=axis).any()), 0)
    name = graph.subgraph.tensors[quantize.inputs[0]].name.decode()
    return graph.add_tensor(f"{name}_int8", layer.inputs[1], integers, scale, axis=axis)


def _weight_operations(graph: TFLiteGraph, layer) -> tuple:
    """Return the DEQUANTIZE that a layer's weight comes from, if any, and what lays it out after that, in order."""
    tensor, layouts = layer.inputs[1], []
    while (operation := graph.producer(tensor, "TRANSPOSE", "RESHAPE")) is not None:
        layouts.insert(0, operation)
        tensor = operation.inputs[0]
    return graph.producer(tensor, "DEQUANTIZE"), layouts


def _laid_out(graph: TFLiteGraph, operation, array: np.ndarray) -> np.ndarray:
    if graph.kind(operation) == "TRANSPOSE":
        return array.transpose(graph.constant(operation.inputs[1]))
    return array.reshape(graph.subgraph.tensors[operation.outputs[0]].shape)


def _integer_input(graph: TFLiteGraph, layer) -> int | None:
    """Return the int8 tensor that a layer's input is dequantized from, padded as its input is, if there is one."""
    tensor = layer.inputs[0]
    pad = graph.producer(tensor, "PAD")
    dequantize = graph.producer(pad.inputs[0] if pad else tensor, "DEQUANTIZE")
    if dequantize is None:
        return None
    integers = dequantize.inputs[0]
    if pad is None:
        return integers
    if len(graph.consumers[tensor]) > 1:
        return None
    scale, zero = graph.grid(integers)
    padded = graph.add_tensor(f"{graph.subgraph.tensors[tensor].name.decode()}_int8", tensor, None, scale, zero[0])
    pad.inputs, pad.outputs = [integers, pad.inputs[1]], [padded]  # LiteRT pads integers with their zero point
    return padded


def _has_integer_output(graph: TFLiteGraph, layer) -> bool:
    """Tell whether all that takes the output of a layer rounds it to the same integers."""
    users = graph.consumers[layer.outputs[0]]
    if not users or any(graph.kind(user) != "QUANTIZE" for user in users):
        return False
    grids = {tuple(np.concatenate(graph.grid(user.outputs[0]))) for user in users}
    return len(grids) == 1


def _set_integers(graph: TFLiteGraph, layer, integers: int, weight: int) -> None:
    """Let a layer compute with integers, and put out what the QUANTIZE operations after it did."""
    bias = -1
    if len(layer.inputs) > 2 and layer.inputs[2] >= 0:
        (scale,), (weight_scale, _) = graph.grid(integers)[0], graph.grid(weight)
        step = scale * weight_scale
        value = np.rint(graph.constant(layer.inputs[2]) / step.astype(np.float64)).astype(np.int32)
        bias = graph.add_tensor(f"{graph.subgraph.tensors[layer.inputs[2]].name.decode()}_int32", 0, value, step)
    first, *others = graph.consumers[layer.outputs[0]]
    for other in others:  # each layer that takes the map rounds it for itself
        for user in graph.consumers[other.outputs[0]]:
            user.inputs = [first.outputs[0] if tensor == other.outputs[0] else tensor for tensor in user.inputs]
    layer.inputs, layer.outputs = [integers, weight, bias], [first.outputs[0]]
    graph.remove(first, *others)


def _dequantize_weight(graph: TFLiteGraph, layer, weight: int) -> None:
    """Let a float layer take an int8 constant that is dequantized, instead of a float one that is quantized before."""
    dequantize, layouts = _weight_operations(graph, layer)
    dequantize.inputs, dequantize.outputs = [weight], [layer.inputs[1]]
    graph.remove(*layouts)


__all__ = ["LAYERS", "TFLiteGraph", "use_integers"]
