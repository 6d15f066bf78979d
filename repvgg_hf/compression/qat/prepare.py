"""Quantization-aware training: the model computes with the quantized equivalent kernels while its parameters train."""

import contextlib
import dataclasses

import torch
import torch.distributed as distributed
from torch import nn
from transformers import TrainerCallback

from ...runtime.quantization_cluster import CODEBOOK_DTYPES, ClusterConfig
from ...runtime.reparameterization import ReparamConv2d
from .fake_quantize import ClusterFakeQuantize, FakeQuantize
from .inputs import InputFakeQuantize
from ..layers import fused_layers, resolve_config, split_options
from .oscillation import OscillationFreezing
from .layers import (
    QAT_CLASSES,
    QATReparamConv2d,
    add_fake_quantizers,
    kernel_shape,
    qat_layers,
    restore_float_layers,
)
from .config import QATOptions
from ..ptq.starting import CalibrationOptions, move_to, quantized_start
from .uniform import UniformFakeQuantize
from ..codebooks.weights import QuantizedWeight


def fake_quantizers(model: nn.Module) -> dict[str, FakeQuantize]:
    """The fake quantizers of a model, by the name of the layer whose kernel they quantize."""
    return {name: layer.weight_fake_quant for name, layer in qat_layers(model).items()}


def trained_input_ranges(model: nn.Module) -> dict[str, tuple[float, int]]:
    """(scale, zero point) of the quantized inputs of a model, by the name of the layer that takes them."""
    layers = qat_layers(model)
    return {
        name: layer.input_fake_quant.range() for name, layer in layers.items() if "input_fake_quant" in layer._modules
    }


def remove_fake_quantizers(model: nn.Module) -> None:
    """Make the model compute with its float kernels again, and forget how it was prepared."""
    restore_float_layers(model)
    model.config.qat_config = None


@torch.no_grad()
def prepare_qat(model, method: str | ClusterConfig = "cluster", bits: int | None = None, calibration=None, **options):
    """Make `model` compute with quantized weights while its parameters train, in place; returns it.

    Args:
        model: a float model, with branches or fused.
        method: `"cluster"`, `"uniform"` (LSQ) or a whole `ClusterConfig`.
        bits: 1 to 8, default 4.
        calibration: images, as for `quantize`: training then starts from calibrated post-training quantization.
        options: further arguments of `ClusterConfig`, [`QATOptions`] and, with `calibration`, `CalibrationOptions`.

    Everything is computed first: an error leaves `model` unchanged. Raises `ValueError` for a quantized or prepared
    model, bad options, weights that aren't finite, or `activation_bits` without calibration images.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError("The model holds packed codes, which don't train: call model.dequantize() first.")
    if fake_quantizers(model):
        raise ValueError(
            f"The model is prepared for QAT already, with {_described(model.qat_config)}: train it, or call quantize() "
            "to freeze it. For other bits use set_bits(), or prepare the float model anew."
        )
    qat_options, calibration_options, options = split_options(options, QATOptions, CalibrationOptions)
    qat_options = QATOptions(**qat_options)
    config = resolve_config(method, bits, options)
    _, layers = fused_layers(model)
    config.check_names(list(layers))
    start, config = quantized_start(model, layers, config, calibration, calibration_options)
    fake = {name: make_fake_quantizer(layer.weight, config, qat_options) for name, layer in start.items()}
    for name, quantized in start.items():
        layer = model.get_submodule(name)
        if calibration is not None:
            kernel = quantized.weight.decoded() if qat_options.start == "decoded" else layers[name].weight
            move_to(layer, kernel, quantized.bias)
        inputs = _input_quantizer(quantized.input_range, config, qat_options)
        add_fake_quantizers(layer, fake[name], inputs, qat_options.batch_norm_every)
    describe(model, config, qat_options)
    return model


def restore_qat(model, settings: dict) -> None:
    """Prepare a `model` on the meta device as `config.qat_config` says, for the weights of a checkpoint to be loaded.

    A model that was prepared as part of another one, under other names, is prepared again.
    """
    if fake_quantizers(model):
        restore_float_layers(model)
    config, options = ClusterConfig(**settings["quantization"]), QATOptions(**settings["options"])
    blocks = [name for name, module in model.named_modules() if isinstance(module, ReparamConv2d)]
    for name, layer in list(model.named_modules()):
        if type(layer) in QAT_CLASSES and config.converts(name) and not any(name.startswith(f"{b}.") for b in blocks):
            shape = kernel_shape(layer)
            groups, k = config.groups_of(name, shape[0]), 2 ** config.bits_of(name)
            with torch.device("meta"):
                scale = torch.empty(shape[0]) if config.channel_scale else None
                weight = QuantizedWeight(torch.empty(shape, dtype=torch.uint8), torch.empty(groups, k), scale)
                input_range = None if config.activation_bits is None else (1.0, 0)
                fake = make_fake_quantizer(weight, config, options)
                fake.known_steps = None
                inputs = _input_quantizer(input_range, config, options)
            add_fake_quantizers(layer, fake, inputs, options.batch_norm_every)
    describe(model, config, options)


def _described(config: ClusterConfig) -> str:
    return f"method={config.method!r}, bits={config.bits}"


def describe(model, config: ClusterConfig, options: QATOptions) -> None:
    """Note how `model` is prepared, on itself and in what becomes its config.json."""
    model.qat_config, model.qat_options = config, options
    model.config.qat_config = {"quantization": config.to_dict(), "options": dataclasses.asdict(options)}


def make_fake_quantizer(weight: QuantizedWeight, config: ClusterConfig, options: QATOptions) -> FakeQuantize:
    """The fake quantizer that starts at a layer's quantized `weight`."""
    freezing = None
    if options.freeze_threshold is not None:
        freezing = OscillationFreezing(weight.codes, options.freeze_threshold, options.freeze_momentum)
    dtype = CODEBOOK_DTYPES[config.codebook_dtype]
    if config.method == "uniform":
        return UniformFakeQuantize(weight, dtype, config.symmetric, options.update_every, freezing, options.blend_steps)
    return ClusterFakeQuantize(
        weight, dtype, options.codebook_update, options.momentum, options.update_every,
        config.symmetric, config.preserve_zero, freezing, options.blend_steps,
    )  # fmt: skip


def _input_quantizer(input_range, config: ClusterConfig, options: QATOptions) -> InputFakeQuantize | None:
    if input_range is None:
        return None
    return InputFakeQuantize(
        config.activation_bits, *input_range, options.activation_update, options.activation_momentum
    )


@torch.no_grad()
def update_codebooks(model: nn.Module) -> None:
    """Move what is to be moved after an optimizer step. Call it once after each one, on every rank.

    Kernels that `fully_shard` (FSDP) has spread over the ranks are gathered for it. FSDP takes contiguous parameters
    only: call `model.to(memory_format=torch.contiguous_format)` after `prepare_qat`. Leave the codebooks to k-means
    there, so that they are no parameters.
    """
    layers = qat_layers(model)
    due = any(layer.weight_fake_quant.is_due() for layer in layers.values())
    with _gathered(_sharded_modules(model) if due else []):
        for layer in layers.values():
            if isinstance(layer, QATReparamConv2d) and layer.estimates_statistics:
                _average_statistics(layer)
            layer.weight_fake_quant.step(layer.kernel)
            if isinstance(layer, QATReparamConv2d):
                layer.choose_statistics()


@contextlib.contextmanager
def _gathered(sharded: list[nn.Module]):
    """Every rank has all parameters of the `sharded` modules."""
    try:
        for module in sharded:
            module.unshard()
        yield
    finally:
        for module in sharded:
            module.reshard()


def _sharded_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` whose parameters are spread over the ranks."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _average_statistics(block: ReparamConv2d) -> None:
    """Each rank has the statistics of its own images: give all the mean."""
    if distributed.is_available() and distributed.is_initialized():
        for name, buffer in block.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                distributed.all_reduce(buffer.div_(distributed.get_world_size()))


def check_gradients(model: nn.Module, step: int) -> None:
    """Raise `RuntimeError` naming the step and the layer if a gradient is NaN or infinite.

    Before the optimizer uses it: the parameters are then still good.
    """
    named = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
    if named and not nn.utils.get_total_norm([gradient for _, gradient in named]).isfinite():
        raise diverged(model, step)


def diverged(model: nn.Module, step: int) -> RuntimeError:
    """The error that names where the gradients of `model` are not finite, to be raised."""
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    where = f"of {names[0]} and {len(names) - 1} other parameters" if names else "as a whole"
    return RuntimeError(
        f"The gradients {where} are NaN or infinite in optimizer step {step}: lower the learning rate, or go on from "
        "an earlier checkpoint. This step was not taken, checkpoints before it are good."
    )


class QATCallback(TrainerCallback):
    """Moves the codebooks after every optimizer step of a `Trainer`, and stops it with a `RuntimeError` if it diverges.

    (With fp16 a loss scaler skips steps whose gradients are too large: there nothing is checked.)
    """

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not args.fp16:
            check_gradients(model, state.global_step + 1)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        update_codebooks(model)


__all__ = [
    "QAT_CLASSES",
    "ClusterFakeQuantize",
    "QATCallback",
    "check_gradients",
    "fake_quantizers",
    "prepare_qat",
    "remove_fake_quantizers",
    "restore_qat",
    "trained_input_ranges",
    "update_codebooks",
]
