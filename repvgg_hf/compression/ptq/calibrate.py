"""Quantizing with calibration data, layer by layer on what the quantized layers before put out.

*Calibration* is choosing codes, codebooks and input ranges for what the layers see and put out on some hundred
examples, instead of for the weights alone.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from transformers.utils import logging

from ...runtime.cluster_layers import fake_quantize
from ...runtime.layer_swaps import LastMap, convertible_layers
from ...runtime.logs import get_logger
from ...runtime.quantization_cluster import ClusterConfig
from ..codebooks.bias import settle_bias
from ..layers import QuantizedLayer, quantize_layer, require_finite
from .activation_ranges import RangeObserver
from .activation_store import ActivationStore
from .blocks import is_chain, quantizable
from .config import CalibrationConfig
from .data import CalibrationData
from .gptq import compensated_weight
from .graph import LayerRun, record_run
from .graph_statistics import statistics_in_order
from .hooks import every_layer_runs, round_input, round_output
from .input_ranges import chosen_range, observe_last_map
from .mixed_precision import choose_bits, measure_block_costs, measure_costs
from .outputs import require_finite_outputs
from .sensitivity import diagonal_fisher
from .statistics import InputStatistics
from .tuning import tune

logger = get_logger(__name__)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    config: ClusterConfig,
    data: CalibrationData,
    options: CalibrationConfig,
    last_map: LastMap | None = None,
) -> tuple[ClusterConfig, dict[str, QuantizedLayer]]:
    """Quantize a fused float32 `model` in eval mode with calibration data; its own layers are not changed.

    A model that is a chain of blocks and says so (`calibration_blocks()`) is gone through block by block; any other
    network runs again for the layers that come next, and is looked at by hooks. The `last_map`, if given, is rounded
    before the layers that follow see it.

    Returns `config` with the bits that `target_bits_per_weight` chose, and each quantized layer by name. Raises
    `ValueError` naming the layer if its inputs are all zero, or not finite. A layer that does not run on this data is
    quantized for its weights alone, with a warning; with `activation_bits` that is a `ValueError`.
    """
    layers, blocks = _finite_layers(model, config), _chain_of(model, data)
    by_blocks = blocks is not None and options.order == "sequential"
    runs = {} if by_blocks else record_run(model, layers, data.first(2)[0])
    running = layers if by_blocks else {name: layer for name, layer in layers.items() if name in runs}
    idle = [name for name in layers if name not in running]
    _accept_idle(idle, config)
    if options.target_bits_per_weight is not None:
        costs = _costs_of_bits(model, running, blocks, data, config)
        config = choose_bits(costs, layers, config, options.target_bits_per_weight)
    fisher = diagonal_fisher(model, data, list(running)) if options.sensitivity == "fisher" else {}

    found = {}
    if by_blocks:
        source = _statistics_of_blocks(blocks, data, config, options)
    else:
        source = _statistics_of_graph(model, runs, data, config, options)
    for name, layer, statistics, run in source:
        found[name] = calibrate_layer(name, layer, layers[name], statistics, fisher.get(name), config, options)
        if last_map is not None and name == last_map.layer:
            found[name].output_range = calibrate_output(layer, run, last_map, config, options)
    for name in idle:
        found[name] = QuantizedLayer(quantize_layer(name, layers[name], config))
    return config, tune(model, found, config, data, options, last_map) if options.tuning_steps else found


@torch.no_grad()
def share_out_bits(model: nn.Module, config: ClusterConfig, data: CalibrationData, target: float) -> ClusterConfig:
    """Return `config` with the bits of each layer of a fused float32 `model` that lose least, at `target` stored bits.

    Raises what [`calibrate`] does for weights and data, and `ValueError` for a target that can't be met.
    """
    layers, blocks = _finite_layers(model, config), _chain_of(model, data)
    runs = record_run(model, layers, data.first(2)[0]) if blocks is None else layers
    running = {name: layer for name, layer in layers.items() if name in runs}
    return choose_bits(_costs_of_bits(model, running, blocks, data, config), layers, config, target)


def _costs_of_bits(
    model: nn.Module,
    layers: dict[str, nn.Module],
    blocks: dict[str, nn.Module] | None,
    data: CalibrationData,
    config: ClusterConfig,
) -> dict[str, dict[int, float]]:
    """Return what each choice of bits costs, of the `layers` that run, or of those in a chain of `blocks`."""
    if blocks is None:
        return measure_costs(model, layers, data, config)
    return measure_block_costs(blocks, data, config)


def _finite_layers(model: nn.Module, config: ClusterConfig) -> dict[str, nn.Module]:
    """Return the layers to quantize, by name, whose weights are all finite."""
    layers = convertible_layers(model, config)
    for name, layer in layers.items():
        require_finite(name, layer)
    return layers


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


# the layer's name, the layer of the quantized network, the statistics of its inputs, and what runs it on all data
ToCalibrate = tuple[str, nn.Module, InputStatistics, Callable[[], None]]


def _statistics_of_blocks(
    float_blocks: dict[str, nn.Module], data: CalibrationData, config: ClusterConfig, options: CalibrationConfig
) -> Iterator[ToCalibrate]:
    """Yield the layers to calibrate, going through a chain of blocks."""
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
                yield name, layer, statistics, partial(_run_block, block, inputs)
        for index in range(len(inputs)):  # in place: the activations of two blocks don't fit beside each other
            inputs[index], float_inputs[index] = block(inputs[index]), float_block(float_inputs[index])


def _run_block(block: nn.Module, inputs: ActivationStore) -> None:
    for x in inputs:
        block(x)


def _statistics_of_graph(
    model: nn.Module,
    runs: dict[str, LayerRun],
    data: CalibrationData,
    config: ClusterConfig,
    options: CalibrationConfig,
) -> Iterator[ToCalibrate]:
    """Yield the layers to calibrate of any network."""
    quantized = copy.deepcopy(model)

    def run():
        with every_layer_runs():
            for batch in data.batches:
                batch.run(quantized)

    observe = config.activation_bits is not None
    for name, statistics in statistics_in_order(model, quantized, runs, data, options, observe):
        yield name, quantized.get_submodule(name), statistics, run


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
    bias = layer.bias
    if options.bias_correction:
        # Quantized weights vary less, most of all with few bits. With the mean kept, too, few values would pass a ReLU
        # that passes few of the float model's, fewer with each layer: a network of 12 layers put out nothing any more.
        quantized = quantized.times(statistics.spread_ratio(weight, quantized.decoded()))
    if options.bias_correction and bias is not None:
        bias = bias + statistics.mean_error(weight, quantized.decoded())
    input_range = None
    if config.activation_bits is not None:
        input_range = chosen_range(statistics.observer, config, options)
        quantized, bias = settle_bias(quantized, bias, input_range[0])
        round_input(layer, _rounding(layer, *input_range, config.activation_bits))
    decoded = quantized.decoded()
    # new parameters: the old ones may be those of another layer, too, whose turn has not come
    kept = decoded.contiguous(memory_format=torch.channels_last) if decoded.dim() == 4 else decoded
    layer.weight = nn.Parameter(kept, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return QuantizedLayer(quantized, layer.bias, input_range)


def calibrate_output(
    layer: nn.Module, run: Callable[[], None], last_map: LastMap, config: ClusterConfig, options: CalibrationConfig
) -> tuple[float, int]:
    """Find the range of what the quantized `layer` puts out while all data `run`, and make it round to that."""
    observer = RangeObserver()
    hook = observe_last_map(observer, layer, last_map)
    run()
    hook.remove()
    output_range = chosen_range(observer, config, options)
    round_output(layer, _rounding(layer, *output_range, config.activation_bits))
    return output_range


def _rounding(layer: nn.Module, scale: float, zero_point: int, bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the rounding to integers of `bits`, with scale and zero point where `layer` is."""
    device = layer.weight.device
    scale = torch.tensor(scale, dtype=torch.float32, device=device)
    zero_point = torch.tensor(zero_point, dtype=torch.uint8, device=device)
    return lambda x: fake_quantize(x, scale, zero_point, bits)
