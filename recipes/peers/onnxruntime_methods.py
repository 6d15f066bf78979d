"""ONNX Runtime 1.32: its static post-training quantization, int8 weights per channel and int8 activations.

As its documentation shows it: the exported model is prepared by `quant_pre_process`, then `quantize_static` finds the
ranges of activations on images and writes pairs of QuantizeLinear and DequantizeLinear. What is measured is ONNX
Runtime's own session with that file.
"""

import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from repvgg_hf.recipes.peers import Logits, PeerMethod

IMAGES = "pixel_values"


class Batches(CalibrationDataReader):
    """Gives batches of images to the calibration, one at a time."""

    def __init__(self, batches: list[torch.Tensor]):
        self.batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {IMAGES: batch.numpy()}


class Session(nn.Module):
    """A file as a model: ONNX Runtime computes the logits.

    Args:
        path: the ONNX file, which is read at once.
    """

    def __init__(self, path: str):
        super().__init__()
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None):
        logits = torch.from_numpy(self.session.run(None, {IMAGES: pixel_values.cpu().numpy()})[0])
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


def quantize(model: nn.Module, bits: int, batches: list[torch.Tensor]) -> tuple[nn.Module, int]:
    """`quantize_static` on a fused float model, calibrated on the batches."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported, prepared, quantized = (str(Path(folder, f"{name}.onnx")) for name in ("float", "prepared", "int8"))
        program = torch.onnx.export(
            Logits(model).eval(),
            (batches[0][:2],),
            dynamo=True,
            input_names=[IMAGES],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        onnx.save(program.model_proto, exported)
        quant_pre_process(exported, prepared)
        quantize_static(prepared, quantized, Batches(batches), per_channel=True)
        return Session(quantized), stored_bytes(quantized)


def stored_bytes(path: str) -> int:
    """Return what int8 weights take in a file, with a float32 scale and an int8 zero point for each channel."""
    constants = {constant.name: constant for constant in onnx.load(path).graph.initializer}
    total = 0
    for name, constant in constants.items():
        if constant.data_type == onnx.TensorProto.INT8 and len(constant.dims) > 1:
            parts = (name, *(name.removesuffix("_quantized") + end for end in ("_scale", "_zero_point")))
            total += sum(onnx.numpy_helper.to_array(constants[part]).nbytes for part in parts)
    return total


METHODS = [PeerMethod("onnxruntime static", (8,), quantize, calibrated=True, activation_bits=8)]
