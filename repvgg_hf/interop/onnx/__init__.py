"""ONNX files of quantized models: codes that stay packed, integers that engines compute with, any topology."""

from .exporting import export_onnx
from .reading import read_onnx_weights
from .tensorrt import tensorrt_problems

__all__ = ["export_onnx", "read_onnx_weights", "tensorrt_problems"]
