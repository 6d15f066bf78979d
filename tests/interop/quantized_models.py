"""Quantized networks of several shapes for the tests of ONNX files, and what runs these."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

import repvgg_hf
from repvgg_hf import RepVGGConfig, RepVGGForImageClassification

CONFIG = {"stem_hidden_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "strides": [2, 2], "groups": 2}


def images(count: int = 16, height: int = 32, width: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def quantized(model: nn.Module, bits: int = 4, size: int = 32, **options) -> nn.Module:
    """Quantize a fused float `model` on random images, with activation bits unless told otherwise."""
    options = {"activation_bits": 8} | options
    calibration = [images(8, size, size)] if options["activation_bits"] else None
    return repvgg_hf.quantize(model.eval(), bits=bits, calibration=calibration, **options).eval()


def with_statistics(model: nn.Module) -> nn.Module:
    """Give batch norms what training might leave in them."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 2)
            norm.bias.data.normal_(0, 0.25)
    return model.eval()


def repvgg(config: RepVGGConfig, bits: int = 4, model_class=RepVGGForImageClassification, **options) -> nn.Module:
    """Return a quantized RepVGG; `options` are of its quantization."""
    return quantized(with_statistics(model_class(config)).reparameterize(), bits, **options)


def small_repvgg(bits: int = 4, model_class=RepVGGForImageClassification, fields=(), **options) -> nn.Module:
    """Return a quantized RepVGG of six layers, two of them grouped; `fields` are of its configuration."""
    return repvgg(RepVGGConfig(**(CONFIG | {"num_labels": 5} | dict(fields))), bits, model_class, **options)


def session(path: Path, optimized: Path | None = None, optimize: bool = True):
    """Load a file into ONNX Runtime on one thread; the graph that it makes of it is written to `optimized`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # it warns that an optimized graph is for this machine only
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path: Path, pixel_values: torch.Tensor, **options) -> dict[str, np.ndarray]:
    """Return the outputs of a file in ONNX Runtime, by name."""
    loaded = session(path, **options)
    names = [output.name for output in loaded.get_outputs()]
    return dict(zip(names, loaded.run(None, {"pixel_values": pixel_values.numpy()})))


def operators(path: Path, folder: Path) -> Counter:
    """Count the operators of the graph that ONNX Runtime makes of a file, when it has fused what it can."""
    import onnx

    session(path, folder / "optimized.onnx")
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def error(actual: np.ndarray, expected: torch.Tensor) -> float:
    """Return the largest difference in standard deviations of what is expected."""
    assert actual.shape == tuple(expected.shape)
    return (abs(actual - expected.numpy()).max() / expected.std()).item()


def assert_same(actual: np.ndarray, expected: torch.Tensor) -> None:
    """Assert that nearly all outputs are the same, to a float sum's rounding, and the others close.

    These have a value on the border between two integers somewhere. Where a weight or scale is another, all differ.
    """
    assert actual.shape == tuple(expected.shape)
    differences = abs(actual - expected.numpy()) / expected.std().item()
    assert (differences < 1e-5).mean() > 0.7
    assert differences.max() < 0.1
