"""Other libraries' quantization of a fused RepVGG, measured by the same evaluation as ours.

Imports the package, no recipe. A library is imported only when it is asked for: `pip install 'repvgg-hf[peers]'`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import nn

# the module here that wraps a library, and what it needs installed
PEERS = {
    "coremltools": ("coremltools_methods", ("coremltools",)),
    "nncf": ("nncf_methods", ("nncf", "openvino")),
    "onnxruntime": ("onnxruntime_methods", ("onnx", "onnxruntime", "onnxscript")),
}


@dataclass
class PeerMethod:
    """One way of a library to quantize.

    Args:
        label: its name in tables and figures.
        bits: of a weight, that it can do.
        quantize: `(fused float model, bits, batches [batch, 3, height, width])` -> `(model, bytes)`: a new model that
            computes with the quantized weights, and what codes, tables, scales and zero points take in the library's
            own format. Biases stay float and are not counted.
        calibrated: whether it looks at the batches.
        activation_bits: of the layers' inputs; `None` if these stay float.
    """

    label: str
    bits: tuple[int, ...]
    quantize: Callable[[nn.Module, int, list[torch.Tensor]], tuple[nn.Module, int]]
    calibrated: bool = False
    activation_bits: int | None = None


class Logits(nn.Module):
    """The model with tensors only going in and out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


def peer_methods(name: str) -> list[PeerMethod]:
    """All methods of a library. Raises `ValueError` for an unknown one, `ImportError` if it isn't installed."""
    if name not in PEERS:
        raise ValueError(f"--peers must be of {', '.join(PEERS)}, got {name!r}.")
    module, packages = PEERS[name]
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            raise ImportError(f"Comparing with {name} needs it: `pip install {' '.join(packages)}`.") from error
    return import_module(f"{__name__}.{module}").METHODS
