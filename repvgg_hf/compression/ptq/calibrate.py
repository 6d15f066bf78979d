"""Quantizing with calibration data, block by block on what the quantized blocks before put out.

*Calibration* is choosing codes, codebooks and input ranges for what the layers see and put out on some hundred images,
instead of for the weights alone.
"""

import copy

import torch
from torch import nn
from transformers.utils import logging

from ...runtime.cluster_layers import fake_quantize
from ...runtime.quantization_cluster import ClusterConfig
from ..layers import QuantizedLayer, quantize_layer, require_finite
from .activation_ranges import RangeObserver
from .activation_store import ActivationStore
from .blocks import check_chain, quantizable
from .config import CalibrationConfig
from .data import CalibrationData
from .gptq import compensated_weight
from .mixed_precision import choose_bits
from .sensitivity import diagonal_fisher
from .statistics import InputStatistics


def calibrate(
    model: nn.Module, config: ClusterConfig, data: CalibrationData, options: CalibrationConfig
) -> tuple[ClusterConfig, dict[str, QuantizedLayer]]:
    """Quantize a fused float32 `model` with calibration data; its own layers are not changed.

    Returns `config` with the bits that `target_bits_per_weight` chose, and each quantized layer by name. Raises
    `ValueError` naming the layer if its inputs are all zero.
    """
    float_blocks = model.calibration_blocks()
    layers = [layer for block in float_blocks.items() for layer in quantizable(*block) if config.converts(layer[0])]
    for name, layer in layers:
        require_finite(name, layer)
    check_chain(model, float_blocks, data.batches[0][:2])
    names = [name for name, _ in layers]
    if options.target_bits_per_weight is not None:
        config = choose_bits(float_blocks, data, config, options.target_bits_per_weight)
    fisher = diagonal_fisher(model, data, names) if options.sensitivity == "fisher" else {}

    blocks = copy.deepcopy(float_blocks)
    limit = options.activation_memory * 2**30 / 2
    inputs, float_inputs = ActivationStore(data.batches, limit), ActivationStore(data.batches, limit)
    layers = {}
    for block_name, block in logging.tqdm(blocks.items(), desc="Calibration"):
        float_block = float_blocks[block_name]
        pairs = zip(quantizable(block_name, block), quantizable(block_name, float_block))
        for (name, layer), (_, float_layer) in list(pairs):
            if config.converts(name):
                observer = None if config.activation_bits is None else RangeObserver()
                statistics = InputStatistics.collect(
                    block, layer, inputs, float_block, float_layer, float_inputs, observer
                )
                layers[name] = calibrate_layer(name, layer, float_layer, statistics, fisher.get(name), config, options)
        for index in range(len(inputs)):  # in place: the activations of two blocks don't fit beside each other
            inputs[index], float_inputs[index] = block(inputs[index]), float_block(float_inputs[index])
    return config, layers


def calibrate_layer(
    name: str,
    layer: nn.Module,
    float_layer: nn.Module,
    statistics: InputStatistics,
    fisher: torch.Tensor | None,
    config: ClusterConfig,
    options: CalibrationConfig,
) -> QuantizedLayer:
    """Quantize `layer` of the quantized network, and make it compute with the result."""
    weight = float_layer.weight
    quantized = quantize_layer(name, float_layer, config, fisher)
    if not statistics.moments.isfinite().all():
        raise ValueError(
            f"The inputs of {name!r} are NaN, infinite or so large that their squares overflow float32: look for "
            "extreme values in the layers before it and in the images."
        )
    if options.error_compensation:
        if not statistics.moments.any():
            raise ValueError(
                f"The inputs of {name!r} are zero for all calibration images: use other images, name the layer in "
                "modules_to_not_convert, or set error_compensation=False."
            )
        quantized = compensated_weight(weight, quantized, statistics.moments, config, options.damping)
    decoded = quantized.decoded()
    layer.weight.data = decoded.contiguous(memory_format=torch.channels_last) if decoded.dim() == 4 else decoded
    if options.bias_correction and layer.bias is not None:
        layer.bias.data += statistics.mean_error(weight, decoded)
    input_range = None
    if config.activation_bits is not None:
        input_range = statistics.observer.quantization(config.activation_bits, options.activation_range)
        quantize_input(layer, *input_range, config.activation_bits)
    return QuantizedLayer(quantized, layer.bias, input_range)


def quantize_input(layer: nn.Module, scale: float, zero_point: int, bits: int) -> None:
    """Make `layer` compute with its input rounded to `bits`, as a `ClusterLayer` will."""
    device = layer.weight.device
    scale = torch.tensor(scale, dtype=torch.float32, device=device)
    zero_point = torch.tensor(zero_point, dtype=torch.uint8, device=device)
    layer.register_forward_pre_hook(lambda module, args: (fake_quantize(args[0], scale, zero_point, bits), *args[1:]))
