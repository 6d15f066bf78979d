"""Where quantization-aware training starts: after post-training quantization, with calibration data or without."""

import copy

import torch
from torch import nn

from ...runtime.quantization_cluster import ClusterConfig
from ...runtime.reparameterization import ReparamConv2d
from .calibrate import CalibratedLayer, CalibrationOptions, calibrate
from .data import CalibrationData
from ..layers import quantize_layer

KERNEL_FITS = 4  # the OABN bound depends on the dense kernel, which is changed to fit


def quantized_start(
    model, layers: dict[str, nn.Module], config: ClusterConfig, calibration, options: dict
) -> tuple[dict[str, CalibratedLayer], ClusterConfig]:
    """Post-training quantization of a float `model` whose fused layers are `layers`; nothing is changed.

    `options` are those of [`CalibrationOptions`]. Returns the quantized layers, and the configuration with all choices
    made. Raises `ValueError` for what needs calibration data if there is none.
    """
    if calibration is None:
        for name in [*options, *(["activation_bits"] if config.activation_bits is not None else [])]:
            raise ValueError(
                f"{name} needs calibration data: pass calibration=, a DataLoader or dataset of a few hundred images."
            )
        return plain_start(layers, config), config
    options = CalibrationOptions(**options)
    float_model = copy.deepcopy(model).float().eval().reparameterize()
    data = CalibrationData(calibration, options.calibration_batch_size, float_model.device)
    return calibrate(float_model, config, data, options)


def plain_start(layers: dict[str, nn.Module], config: ClusterConfig) -> dict[str, CalibratedLayer]:
    """Post-training quantization of the fused `layers` for the least weight error."""
    chosen = {name: layer for name, layer in layers.items() if config.converts(name)}
    return {name: CalibratedLayer(quantize_layer(name, layer, config)) for name, layer in chosen.items()}


@torch.no_grad()
def move_to(layer: nn.Module, kernel: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Change the parameters of `layer` so that its equivalent kernel and bias are these.

    Of branches the dense convolution and its batch norm's bias are changed. A channel in which that convolution counts
    for nothing, with a batch norm weight near zero, keeps its kernel.
    """
    if not isinstance(layer, ReparamConv2d):
        layer.weight.copy_(kernel)
        if bias is not None:
            layer.bias.copy_(bias)
        return
    dense = layer.branches[layer.dense_names[0]]
    for _ in range(KERNEL_FITS):
        scale = dense.norm.weight / (dense.norm.running_var + dense.norm.eps).sqrt()
        counts = scale.abs() > 1e-3 * scale.abs().mean()
        step = (kernel - layer.equivalent()[0]) / torch.where(counts, scale, 1.0).view(-1, 1, 1, 1)
        dense.conv.weight.add_(step * counts.view(-1, 1, 1, 1))
    if bias is not None:
        dense.norm.bias.add_(bias - layer.equivalent()[1])
