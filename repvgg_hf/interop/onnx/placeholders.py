"""Stand-ins of quantized layers in a graph that PyTorch exports: one node each, which the exporter then writes out."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...runtime.cluster_layers import ClusterConv, ClusterLayer, cluster_layers

DOMAIN = "repvgg_hf.placeholder"  # of their nodes, none of which is in a finished file
_GEOMETRY = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "pads",
    "in_features", "out_features",
)  # fmt: skip


class Placeholder(nn.Module):
    """Stands for a quantized layer, of which it knows the name and the shape of the output."""

    def __init__(self, name: str, layer: ClusterLayer):
        super().__init__()
        self.name, self.is_conv = name, isinstance(layer, ClusterConv)
        for key in _GEOMETRY:
            if hasattr(layer, key):
                setattr(self, key, getattr(layer, key))
        # models ask for the dtype of a weight; this one has no entries
        self.register_buffer("weight", torch.empty(0), persistent=False)
        self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_conv and self.padding_mode != "zeros":
            x = F.pad(x, self.pads, self.padding_mode)
        found, expected = (x.shape[1], self.in_channels) if self.is_conv else (x.shape[-1], self.in_features)
        if found != expected:  # so that a size that the layer asks for can't pass as dynamic
            raise ValueError(f"{self.name!r} takes {expected} channels or features, got {found}.")
        shape = self.conv_shape(x.shape) if self.is_conv else (*x.shape[:-1], self.out_features)
        attributes: dict[str, Any] = {"layer": self.name, "rank": x.dim()}
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::Layer", (x,), attributes, dtype=torch.float32, shape=shape, version=1
        )

    def conv_shape(self, shape: torch.Size) -> tuple:
        """Return the shape of a convolution's output, from that of its padded or unpadded input."""
        sizes, pads = [], conv_pads(self)
        for i, size in enumerate(shape[2:]):
            covered = self.dilation[i] * (self.kernel_size[i] - 1) + 1
            sizes.append((size + pads[i] + pads[i + len(pads) // 2] - covered) // self.stride[i] + 1)
        return (shape[0], self.out_channels, *sizes)


def conv_pads(layer: Any) -> list[int]:
    """Return the zeros that a convolution itself pads with: before each dimension, then after each, as ONNX says it."""
    dimensions = len(layer.kernel_size)
    if layer.padding_mode != "zeros":
        return [0] * 2 * dimensions
    pairs = [layer.pads[2 * i : 2 * i + 2] for i in reversed(range(dimensions))]  # `F.pad` has the last one first
    return [pair[side] for side in (0, 1) for pair in pairs]


class NamedOutputs(nn.Module):
    """Returns a tuple of the tensors that a model returns; after the first call `names` has their names."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.names = model, []

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tensors = named_tensors(self.model(pixel_values))
        self.names = list(tensors)
        return tuple(tensors.values())


def named_tensors(outputs: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a model's output by name.

    A single tensor is called `logits`. Of a model that has `logits`, these and its `pred_...` are what counts; of
    another one, all: those of a tuple are numbered, as in `feature_maps_0`.
    """
    if isinstance(outputs, torch.Tensor):
        return {"logits": outputs}
    if isinstance(outputs, dict) and "logits" in outputs:
        outputs = {key: value for key, value in outputs.items() if key == "logits" or key.startswith("pred_")}
    return dict(_walk("", outputs))


def _walk(prefix: str, value: Any):
    if isinstance(value, torch.Tensor):
        yield prefix or "output", value
    elif isinstance(value, (dict, list, tuple)):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in entries:
            own = str(key) if isinstance(value, dict) else f"{prefix and f'{prefix}_' or 'output_'}{key}"
            yield from _walk(own, entry)


def with_placeholders(model: nn.Module) -> NamedOutputs:
    """Return a copy of `model`, in evaluation and float32, with placeholders for its quantized layers."""
    # what stands in `memo` is not copied but taken from there, wherever the model has it
    memo = {id(layer): Placeholder(name, layer) for name, layer in cluster_layers(model).items()}
    return NamedOutputs(nn.Module.float(copy.deepcopy(model, memo).eval()))


__all__ = ["DOMAIN", "NamedOutputs", "Placeholder", "conv_pads", "named_tensors", "with_placeholders"]
