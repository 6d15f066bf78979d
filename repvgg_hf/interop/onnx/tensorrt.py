"""TensorRT's rules for quantized ONNX files, and what in a file breaks them.

It takes quantization that a file says by QuantizeLinear and DequantizeLinear, in int8 with the zero point 0 everywhere:
inputs with a constant scale, weights as int8 constants that are dequantized, biases float. It is not run here, so that
the rules are checked, and the file in ONNX Runtime.
"""

import os
from typing import Any

import numpy as np

from ..extras import require
from ..integers import IntegerLayer

_INTEGER_OPERATORS = {"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "DynamicQuantizeLinear"}
ZERO = 128  # the zero point of int8_symmetric, as it is stored: of unsigned integers


def require_tensorrt_layers(layers: dict[str, IntegerLayer]) -> None:
    """Raise `ValueError` naming the layer whose integers are not those of int8 with the zero point 0."""
    for name, layer in layers.items():
        ends = {"input": layer.input_zero_point}
        if layer.output_scale is not None:
            ends["output"] = layer.output_zero_point
        for end, zero_point in ends.items():
            if layer.activation_bits != 8 or zero_point != ZERO:
                raise ValueError(
                    f"The {end} of {name!r} has {layer.activation_bits} bits and the zero point {zero_point - ZERO} in "
                    "int8, and TensorRT takes 8 and 0: quantize the float model with activation_bits=8, "
                    "activation_scheme='int8_symmetric'."
                )


def tensorrt_problems(model: Any) -> list[str]:
    """Return what breaks TensorRT's rules in an ONNX file, a sentence each; empty if nothing does.

    Args:
        model (`str`, `Path` or `onnx.ModelProto`): the file.

    Example:
    ```python
    >>> from repvgg_hf.interop.onnx import tensorrt_problems

    >>> tensorrt_problems("my-model/onnx/model_int8_tensorrt.onnx")
    []
    ```"""
    onnx = require("onnx", extra="onnx")
    proto = onnx.load(model) if isinstance(model, (str, os.PathLike)) else model
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    makers = {output: node for node in proto.graph.node for output in node.output}
    problems = []
    for node in proto.graph.node:
        where = f"{node.op_type} {node.name or node.output[0]}"
        if node.domain:
            problems.append(f"{where} is of the domain {node.domain}, which is not ONNX's.")
        if node.op_type in _INTEGER_OPERATORS:
            problems.append(f"{where} computes with integers itself; only QuantizeLinear and DequantizeLinear may.")
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            problems += [f"{where}: {problem}" for problem in _grid_problems(node, constants, onnx)]
        if node.op_type == "DequantizeLinear":
            problems += [f"{where}: {problem}" for problem in _source_problems(node, constants, makers, onnx)]
        if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 and node.input[2] not in constants:
            problems.append(f"{where} has a computed bias ({node.input[2]}), which must be a float constant.")
    return problems


def require_tensorrt_rule(proto: Any) -> None:
    """Raise `ValueError` with all that breaks TensorRT's rules in an `onnx.ModelProto`."""
    problems = tensorrt_problems(proto)
    if problems:
        raise ValueError(
            "The file breaks TensorRT's rules, so that it is not written: leave tensorrt=True out, or change the "
            f"model. {' '.join(problems)}"
        )


def _grid_problems(node: Any, constants: dict, onnx: Any) -> list[str]:
    if len(node.input) < 3 or any(name not in constants for name in node.input[1:3]):
        return ["its scale and zero point must be constants."]
    scale, zero_point = (onnx.numpy_helper.to_array(constants[name]) for name in node.input[1:3])
    problems = []
    if zero_point.dtype != np.int8 or zero_point.any():
        largest = np.abs(zero_point.astype(np.int64)).max()
        problems.append(f"its zero point is {zero_point.dtype} of up to {largest}, and must be int8 and 0.")
    if not (scale > 0).all() or scale.dtype != np.float32:
        problems.append("its scale must be positive, in float32.")
    return problems


def _source_problems(node: Any, constants: dict, makers: dict, onnx: Any) -> list[str]:
    """What is dequantized must be a constant, or what a QuantizeLinear with the same scale has just made."""
    source = node.input[0]
    if source in constants:
        kind = constants[source].data_type
        return [] if kind == onnx.TensorProto.INT8 else ["it dequantizes a constant that is not int8, such as a bias."]
    maker = makers.get(source)
    if maker is None or maker.op_type != "QuantizeLinear" or maker.input[1:] != node.input[1:]:
        return ["what it dequantizes must come from a QuantizeLinear with the same scale, or be an int8 constant."]
    return []


__all__ = ["ZERO", "require_tensorrt_layers", "require_tensorrt_rule", "tensorrt_problems"]
