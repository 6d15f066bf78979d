"""Putting fake quantizers into a model, reading what they learned, taking them out again."""

import dataclasses

import torch
from torch import nn

from ...runtime.quantization_cluster import ClusterConfig
from ...runtime.reparameterization import ReparamConv2d
from ..codebooks.weights import QuantizedWeight
from .config import QATConfig
from .fake_quantize import FakeQuantize
from .inputs import InputFakeQuantize
from .layers import QAT_CLASSES, kernel_shape, make_float_layer, make_qat_layer, qat_layers


def fake_quantizers(model: nn.Module) -> dict[str, FakeQuantize]:
    """The fake quantizers of a model, by the name of the layer whose kernel they quantize."""
    return {name: layer.weight_fake_quant for name, layer in qat_layers(model).items()}


def described(model) -> str:
    """How a prepared `model` is quantized, for messages."""
    config, _ = model.qat_settings
    return f"method={config.method!r}, bits={config.bits}"


def trained_input_ranges(model: nn.Module) -> dict[str, tuple[float, int]]:
    """(scale, zero point) of the quantized inputs of a model, by the name of the layer that takes them."""
    layers = qat_layers(model).items()
    return {name: layer.input_fake_quant.range() for name, layer in layers if layer.input_fake_quant is not None}


def add_quantizers(
    model,
    weights: dict[str, QuantizedWeight],
    input_ranges: dict[str, tuple[float, int]],
    config: ClusterConfig,
    qat_config: QATConfig,
) -> None:
    """Make layers of a float `model` compute with quantized weights while their parameters train.

    Args:
        model: how it was prepared is then in its `qat_settings`, `(config, qat_config)`, and for its checkpoints in its
            `config.qat_config`.
        weights: the quantized weight that training starts at, by the name of the layer.
        input_ranges: (scale, zero point) at which the range of a layer's input starts, by the name of the layer; for
            all of these layers with `config.activation_bits`, else empty.
        config: how weights and inputs are quantized.
        qat_config: how they train.
    """
    make = config.quantization_method.fake_quantizer
    quantizers = {name: make(weight, config, qat_config) for name, weight in weights.items()}
    inputs = {name: InputFakeQuantize(config.activation_bits, *start) for name, start in input_ranges.items()}
    layers = {name: model.get_submodule(name) for name in quantizers}
    for name, layer in layers.items():
        _require_qat_class(name, layer)
    for name, layer in layers.items():
        make_qat_layer(layer, quantizers[name], inputs.get(name))
    model.qat_settings = config, qat_config
    model.config.qat_config = {"quantization": config.to_dict(), "training": dataclasses.asdict(qat_config)}


def _require_qat_class(name: str, layer: nn.Module) -> None:
    """Raise `ValueError` naming a layer that can't be trained quantized, as its class is not known."""
    if type(layer) not in QAT_CLASSES:
        known = ", ".join(known.__name__ for known in QAT_CLASSES)
        raise ValueError(
            f"{name!r} is a {type(layer).__module__}.{type(layer).__qualname__}, and quantization-aware training knows "
            f"{known} of this package and of torch: import repvgg_hf before loading the model, without "
            "trust_remote_code, or name the layer in modules_to_not_convert."
        )


def remove_fake_quantizers(model) -> None:
    """Make a model compute with its float kernels again, and forget how it was prepared."""
    for layer in qat_layers(model).values():
        make_float_layer(layer)
    model.qat_settings = model.config.qat_config = None


def restore_qat(model, settings: dict) -> None:
    """Prepare a `model` on the meta device as `settings`, its `config.qat_config`, say, to load a checkpoint into it.

    A model that was prepared as part of another one, where its layers have other names, is prepared again. Raises
    `ValueError` for settings that are unknown or missing.
    """
    config, qat_config = _parse_settings(settings)
    remove_fake_quantizers(model)
    layers = {name: layer for name, layer in _float_layers(model).items() if config.converts(name)}
    with torch.device("meta"):
        weights = {name: _empty_weight(name, kernel_shape(layer), config) for name, layer in layers.items()}
        ranges = {} if config.activation_bits is None else dict.fromkeys(layers, (1.0, 0))
        add_quantizers(model, weights, ranges, config, qat_config)


def _parse_settings(settings: dict) -> tuple[ClusterConfig, QATConfig]:
    """The configurations in the `qat_config` of a checkpoint's config.json."""
    try:
        if settings.keys() != {"quantization", "training"}:
            raise TypeError(f"it has {', '.join(settings) or 'nothing'}, and quantization and training are expected.")
        return ClusterConfig.from_dict(settings["quantization"]), QATConfig(**settings["training"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"qat_config in config.json can't be used: {error} Load the checkpoint with the version of repvgg-hf that "
            "trained it, or prepare a float checkpoint with prepare_qat()."
        ) from error


def _float_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a float `model` that can be quantized: blocks of branches, and what is outside of them."""
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ReparamConv2d))
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in QAT_CLASSES and not name.startswith(blocks)
    }


def _empty_weight(name: str, shape: tuple[int, ...], config: ClusterConfig) -> QuantizedWeight:
    """A quantized weight of the form that `config` gives the layer called `name`, without values."""
    codebook = torch.empty(config.groups_of(name, shape[0]), 2 ** config.bits_of(name))
    scale = torch.empty(shape[0]) if config.channel_scale else None
    return QuantizedWeight(torch.empty(shape, dtype=torch.uint8), codebook, scale)
