"""Post-training quantization with calibration data, block by block on what the quantized blocks before put out."""

import copy
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.utils import logging

from ...runtime.packing import packed_size
from ...runtime.quantization_cluster import CODEBOOK_DTYPES, ClusterConfig
from .activation_ranges import RangeObserver
from .mixed_precision import allocate_bits
from .data import CalibrationData, block_chain, patches, quantizable
from .gptq import compensated_weight
from ..qat.inputs import InputFakeQuantize
from ..layers import quantize_layer
from .sensitivity import diagonal_fisher, measure_costs, run
from .activation_store import Spool
from .tuning import tune_network
from ..codebooks.weights import QuantizedWeight

SENSITIVITIES = ("none", "second_moment", "fisher")
DEFAULT_TUNING_STEPS = 200
ACTIVATION_RANGES = ("minmax", "percentile", "mse", "entropy")


@dataclass
class CalibrationOptions:
    """How calibration data is used; the keyword arguments of `quantize(calibration=...)`.

    Args:
        calibration_batch_size: images a batch, if the data holds single examples.
        sensitivity: what a weight's error counts in clustering: `"none"` (all alike), `"second_moment"` of the input
            that it multiplies, or `"fisher"`, the squared gradient of the loss (SqueezeLLM, arXiv 2306.07629). Error
            compensation starts from there and makes up for it: of use mostly without that.
        error_compensation: choose codes and codebooks for the layer's output error (GPTQ with a codebook).
        bias_correction: move biases so that every layer's mean output is the float model's (arXiv 1906.04721).
        tuning_steps: steps of training on the float model's outputs at the end; 0 for none. `None` takes 200 where it
            was measured to help, with a layer of 1 bit or activations of fewer than 8, else none.
        target_bits_per_weight: choose each layer's bits so that the whole model stores this many on average, codebooks
            and scales included; `bits` is then only the default for what comes later.
        activation_range: with `activation_bits`, how an input's range is chosen: `"minmax"`, `"percentile"`, `"mse"` or
            `"entropy"`.
        damping: added to the second moments' diagonal, as a share of its mean.
        activation_memory: GiB for what a block puts out for all images, in both models; what is more goes to a
            temporary folder, which changes nothing but the time.
        seed: of the order of images in tuning.
    """

    calibration_batch_size: int = 64
    sensitivity: str = "none"
    error_compensation: bool = True
    bias_correction: bool = True
    tuning_steps: int | None = None
    target_bits_per_weight: float | None = None
    activation_range: str = "mse"
    damping: float = 0.01
    activation_memory: float = 4.0
    seed: int = 0

    def __post_init__(self):
        for name, choices in {"sensitivity": SENSITIVITIES, "activation_range": ACTIVATION_RANGES}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for name in ("error_compensation", "bias_correction"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        for name, least in {"calibration_batch_size": 1, "tuning_steps": 0}.items():
            value = getattr(self, name)
            if (type(value) is not int or value < least) and (name, value) != ("tuning_steps", None):
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
        if not isinstance(self.damping, (int, float)) or not self.damping > 0:
            raise ValueError(f"damping must be a positive number, got {self.damping!r}.")
        if not isinstance(self.activation_memory, (int, float)) or not self.activation_memory >= 0:
            raise ValueError(f"activation_memory must be a number of GiB, at least 0, got {self.activation_memory!r}.")
        target = self.target_bits_per_weight
        if target is not None and not (isinstance(target, (int, float)) and 1 <= target <= 8):
            raise ValueError(
                f"target_bits_per_weight must be from 1 to 8, got {target!r}: a code has at least one bit."
            )


@dataclass
class CalibratedLayer:
    """What becomes of a layer: its weight, its bias if that changes, its input's scale and zero point if quantized."""

    weight: QuantizedWeight
    bias: torch.Tensor | None = None
    input_range: tuple[float, int] | None = None


class _Captured(Exception):
    """Ends a forward pass at the layer whose inputs are wanted."""


def layer_input(block: nn.Module, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What `layer` gets when `block` runs on `x`."""
    captured = []

    def capture(module, args):
        captured.append(args[0])
        raise _Captured

    handle = layer.register_forward_pre_hook(capture)
    try:
        block(x)
    except _Captured:
        return captured[0]
    finally:
        handle.remove()
    raise RuntimeError(f"The forward pass of {type(block).__name__} does not run its {layer}.")


@dataclass
class InputStatistics:
    """Of a layer's inputs over the calibration data, as [`patches`]: second moments `[G, d, d]` and means `[G, d]`,
    also of the float model's inputs, and the range if it is wanted.
    """

    moments: torch.Tensor
    mean: torch.Tensor
    float_mean: torch.Tensor
    observer: RangeObserver | None

    @classmethod
    def collect(cls, block, layer, inputs, float_block, float_layer, float_inputs, observer=None):
        """From the inputs of a quantized `block` and of the same block in the float model."""
        moments = mean = float_mean = positions = 0
        for x, float_x in zip(inputs, float_inputs):
            x, float_x = layer_input(block, layer, x), layer_input(float_block, float_layer, float_x)
            if observer is not None:
                observer.update(x)
            for columns, float_columns in zip(patches(layer, x), patches(layer, float_x)):
                moments = moments + columns @ columns.mT
                mean, float_mean = mean + columns.sum(dim=2), float_mean + float_columns.sum(dim=2)
                positions += columns.shape[2]
        return cls(moments / positions, mean / positions, float_mean / positions, observer)

    def mean_error(self, weight: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
        """By how much the float layer's mean output is above the quantized one's, `[out]`."""
        groups, width = self.mean.shape
        wanted = weight.reshape(groups, -1, width) @ self.float_mean[:, :, None]
        return (wanted - quantized.reshape(groups, -1, width) @ self.mean[:, :, None]).reshape(-1)


def calibrate(model: nn.Module, config: ClusterConfig, data: CalibrationData, options: CalibrationOptions):
    """Quantize a fused float32 `model` with calibration data; its own layers are not changed.

    Returns `(layers, config)`: a [`CalibratedLayer`] for each quantized layer, by name, and `config` with the bits that
    `target_bits_per_weight` chose. Raises `ValueError` naming the layer if its inputs are all zero.
    """
    float_blocks = block_chain(model)
    check_chain(model, float_blocks, data)
    names = [name for block in float_blocks.items() for name, _ in quantizable(*block) if config.converts(name)]
    if options.target_bits_per_weight is not None:
        config = choose_bits(float_blocks, data, config, options.target_bits_per_weight)
    fisher = diagonal_fisher(model, data, names) if options.sensitivity == "fisher" else {}

    blocks = copy.deepcopy(float_blocks)
    limit = options.activation_memory * 2**30 / 2
    inputs, float_inputs = Spool(data.batches, limit), Spool(data.batches, limit)
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
    steps = options.tuning_steps
    if steps is None:
        coarse = (config.activation_bits or 8) < 8 or min(map(config.bits_of, layers), default=8) == 1
        steps = DEFAULT_TUNING_STEPS if coarse else 0
    if steps:
        tuned = {name: layer for block in blocks.items() for name, layer in quantizable(*block) if name in layers}
        weights = {name: layer.weight for name, layer in layers.items()}
        weights = tune_network(blocks, float_blocks, weights, tuned, data, config, steps, options.seed)
        for name, weight in weights.items():
            layers[name] = replace(layers[name], weight=weight, bias=tuned[name].bias)
    return layers, config


def check_chain(model: nn.Module, blocks: dict[str, nn.Module], data: CalibrationData) -> None:
    """Raise `ValueError` if running the `blocks` one after the other is not what `model` does."""
    images = data.batches[0][:2]
    outputs = model(images)
    outputs = outputs.logits if "logits" in outputs else outputs[0][-1] if "feature_maps" in outputs else outputs[0]
    if not torch.allclose(run(blocks.values(), images), outputs, rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"{type(model).__name__} is no plain chain of RepVGG layers, which calibration needs: quantize it without "
            "calibration data."
        )


def calibrate_layer(name, layer, float_layer, statistics, fisher, config, options) -> CalibratedLayer:
    """Quantize `layer` of the quantized network, and make it compute with the result."""
    weight = float_layer.weight
    importance = fisher
    if options.sensitivity == "second_moment":
        diagonal = statistics.moments.diagonal(dim1=1, dim2=2)  # [G, d]
        importance = diagonal.repeat_interleave(len(weight) // len(diagonal), dim=0).view_as(weight)
    quantized = quantize_layer(name, float_layer, config, importance)
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
    return CalibratedLayer(quantized, layer.bias, input_range)


def quantize_input(layer: nn.Module, scale: float, zero_point: int, bits: int) -> None:
    """Make `layer` compute with its input rounded to `bits`, as a `ClusterLayer` will."""
    quantize = InputFakeQuantize(bits, scale, zero_point).requires_grad_(False).to(layer.weight.device)
    layer.register_forward_pre_hook(lambda module, args: (quantize(args[0]), *args[1:]))


def choose_bits(blocks, data: CalibrationData, config: ClusterConfig, target: float) -> ClusterConfig:
    """`config` with `bits_overrides` for the least loss at `target` stored bits a weight."""
    costs = measure_costs(blocks, data, config, list(range(1, 9)))
    shapes = {name: layer.weight.shape for block in blocks.items() for name, layer in quantizable(*block)}
    sizes = {name: {bits: stored_bits(name, shapes[name], bits, config) for bits in costs[name]} for name in costs}
    weights = sum(shapes[name].numel() for name in sizes)
    try:
        allocation = allocate_bits(sizes, costs, int(target * weights))
    except ValueError as error:
        raise ValueError(
            f"target_bits_per_weight={target} can't be met with {config.granularity} codebooks ({error}, {weights} "
            "weights): raise it, or store less beside the codes with granularity='per_tensor'."
        ) from error
    config = copy.deepcopy(config)
    config.bits_overrides = allocation
    return config


def stored_bits(name: str, shape: torch.Size, bits: int, config: ClusterConfig) -> int:
    """Bits of a layer's codes, codebooks and scales in the checkpoint."""
    codebooks = config.groups_of(name, shape[0]) * 2**bits * 8 * CODEBOOK_DTYPES[config.codebook_dtype].itemsize
    return 8 * packed_size(shape.numel(), bits) + codebooks + 32 * shape[0] * config.channel_scale
