"""Quantizing with calibration data, layer by layer on what the quantized layers before put out.

*Calibration* is choosing codes, codebooks and input ranges for what the layers see and put out on some hundred
examples, instead of for the weights alone.
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn
from transformers.utils import logging

from ...runtime.cluster_layers import fake_quantize
from ...runtime.layer_swaps import convertible_layers
from ...runtime.logs import get_logger
from ...runtime.quantization_cluster import ClusterConfig
from ..layers import QuantizedLayer, quantize_layer, require_finite
from .activation_ranges import RangeObserver
from .activation_store import ActivationStore
from .blocks import is_chain, quantizable
from .config import CalibrationConfig
from .data import CalibrationData
from .gptq import compensated_weight
from .graph import LayerRun, record_run
from .graph_statistics import statistics_in_order
from .mixed_precision import choose_bits, measure_block_costs, measure_costs
from .outputs import require_finite_outputs
from .sensitivity import diagonal_fisher
from .statistics import InputStatistics

logger = get_logger(__name__)


@torch.no_grad()
def calibrate(
    model: nn.Module, config: ClusterConfig, data: CalibrationData, options: CalibrationConfig
) -> tuple[ClusterConfig, dict[str, QuantizedLayer]]:
    """Quantize a fused float32 `model` in eval mode with calibration data; its own layers are not changed.

    A model that is a chain of blocks and says so (`calibration_blocks()`) is gone through block by block; any other
    network runs again for the layers that come next, and is looked at by hooks.

    Returns `config` with the bits that `target_bits_per_weight` chose, and each quantized layer by name. Raises
    `ValueError` naming the layer if its inputs are all zero, or not finite. A layer that does not run on this data is
    quantized for its weights alone, with a warning; with `activation_bits` that is a `ValueError`.
    """
    layers = convertible_layers(model, config)
    for name, layer in layers.items():
        require_finite(name, layer)
    blocks = _chain_of(model, data)
    by_blocks = blocks is not None and options.order == "sequential"
    runs = {} if by_blocks else record_run(model, layers, data.first(2)[0])
    running = layers if by_blocks else {name: layer for name, layer in layers.items() if name in runs}
    idle = [name for name in layers if name not in running]
    _accept_idle(idle, config)
    if options.target_bits_per_weight is not None:
        if blocks is None:
            costs = measure_costs(model, running, data, config)
        else:
            costs = measure_block_costs(blocks, data, config)
        config = choose_bits(costs, layers, config, options.target_bits_per_weight)
    fisher = diagonal_fisher(model, data, list(running)) if options.sensitivity == "fisher" else {}

    found = {}
    if by_blocks:
        source = _statistics_of_blocks(blocks, data, config, options)
    else:
        source = _statistics_of_graph(model, runs, data, config, options)
    for name, layer, statistics in source:
        found[name] = calibrate_layer(name, layer, layers[name], statistics, fisher.get(name), config, options)
    for name in idle:
        found[name] = QuantizedLayer(quantize_layer(name, layers[name], config))
    return config, found


def _chain_of(model: nn.Module, data: CalibrationData) -> dict[str, nn.Module] | None:
    """Return the blocks of a model that is a chain of them, else `None`."""
    if not hasattr(model, "calibration_blocks"):
        return None
    images = data.images[0][:2]
    require_finite_outputs(model, model(images))
    blocks = model.calibration_blocks()
    if is_chain(model, blocks, images):
        return blocks
    logger.warning(
        "%s does not compute what its blocks do one after the other, as if it was changed: it is calibrated as any "
        "other network is, which takes longer.",
        type(model).__name__,
    )
    return None


def _accept_idle(names: list[str], config: ClusterConfig) -> None:
    """Warn of layers that don't run on the calibration data.

    Raises `ValueError` if the range of their inputs is wanted.
    """
    if not names:
        return
    described = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    if config.activation_bits is not None:
        raise ValueError(
            f"No calibration data reaches {described}, and activation_bits needs the range of their inputs: give data "
            "that does, or name them in modules_to_not_convert."
        )
    logger.warning(
        "No calibration data reaches %s: quantized for the weights alone. To leave them float name them in "
        "modules_to_not_convert.",
        described,
    )


def _statistics_of_blocks(
    float_blocks: dict[str, nn.Module], data: CalibrationData, config: ClusterConfig, options: CalibrationConfig
) -> Iterator[tuple[str, nn.Module, InputStatistics]]:
    """Yield (name, layer of the quantized network, statistics of its inputs), going through a chain of blocks."""
    blocks = copy.deepcopy(float_blocks)
    limit = options.activation_memory * 2**30 / 2
    inputs, float_inputs = ActivationStore(data.images, limit), ActivationStore(data.images, limit)
    for block_name, block in logging.tqdm(blocks.items(), desc="Calibration"):
        float_block = float_blocks[block_name]
        pairs = zip(quantizable(block_name, block), quantizable(block_name, float_block))
        for (name, layer), (_, float_layer) in list(pairs):
            if config.converts(name):
                observer = None if config.activation_bits is None else RangeObserver()
                statistics = InputStatistics.collect(
                    block, layer, inputs, float_block, float_layer, float_inputs, observer
                )
                yield name, layer, statistics
        for index in range(len(inputs)):  # in place: the activations of two blocks don't fit beside each other
            inputs[index], float_inputs[index] = block(inputs[index]), float_block(float_inputs[index])


def _statistics_of_graph(
    model: nn.Module,
    runs: dict[str, LayerRun],
    data: CalibrationData,
    config: ClusterConfig,
    options: CalibrationConfig,
) -> Iterator[tuple[str, nn.Module, InputStatistics]]:
    """Yield (name, layer of the quantized network, statistics of its inputs) for any network."""
    quantized = copy.deepcopy(model)
    observe = config.activation_bits is not None
    for name, statistics in statistics_in_order(model, quantized, runs, data, options, observe):
        yield name, quantized.get_submodule(name), statistics


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
            "extreme values in the layers before it and in the calibration data."
        )
    if options.error_compensation:
        if not statistics.moments.any():
            raise ValueError(
                f"The inputs of {name!r} are zero for all calibration images: use other images, name the layer in "
                "modules_to_not_convert, or set error_compensation=False."
            )
        quantized = compensated_weight(weight, quantized, statistics.moments, config, options.damping)
    decoded = quantized.decoded()
    # new parameters: the old ones may be those of another layer, too, whose turn has not come
    kept = decoded.contiguous(memory_format=torch.channels_last) if decoded.dim() == 4 else decoded
    layer.weight = nn.Parameter(kept, requires_grad=False)
    if options.bias_correction and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias + statistics.mean_error(weight, decoded), requires_grad=False)
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

    def rounded(module, args, kwargs):
        args = args or tuple(kwargs.values())
        return (fake_quantize(args[0], scale, zero_point, bits),), {}

    layer.register_forward_pre_hook(rounded, with_kwargs=True)
