"""Putting fake quantizers into a model, reading what they learned, taking them out again."""

import dataclasses
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ...runtime.layer_swaps import choose_fast_path, last_map_of
from ...runtime.new_layers import NewLayer, is_outside_base, warn_of_new_layers
from ...runtime.quantization_cluster import ClusterConfig
from ...runtime.reparameterization import ReparamConv2d
from ..codebooks.weights import QuantizedWeight, quantize_weight
from .callback import figure_of
from .config import QATConfig
from .fake_quantize import FakeQuantize
from .inputs import InputFakeQuantize
from .layers import QAT_CLASSES, kernel_shape, make_float_layer, make_qat_layer, qat_layers


def fake_quantizers(model: nn.Module) -> dict[str, FakeQuantize]:
    """The fake quantizers of a model, by the name of the layer whose kernel they quantize."""
    return {name: layer.weight_fake_quant for name, layer in qat_layers(model).items()}


def described(model: nn.Module) -> str:
    """How a prepared `model` is quantized, for messages."""
    config, _ = model.qat_settings
    return f"method={config.method!r}, bits={config.bits}"


def trained_input_ranges(model: nn.Module) -> dict[str, tuple[float, int]]:
    """(scale, zero point) of the quantized inputs of a model, by the name of the layer that takes them."""
    layers = qat_layers(model).items()
    return {name: layer.input_fake_quant.range() for name, layer in layers if layer.input_fake_quant is not None}


def trained_output_ranges(model: nn.Module) -> dict[str, tuple[float, int]]:
    """(scale, zero point) of the quantized outputs of a model, by the name of the layer that makes them."""
    layers = qat_layers(model).items()
    return {name: layer.output_fake_quant.range() for name, layer in layers if layer.output_fake_quant is not None}


def add_quantizers(
    model: nn.Module,
    weights: dict[str, QuantizedWeight],
    input_ranges: dict[str, tuple[float, int]],
    output_ranges: dict[str, tuple[float, int]],
    config: ClusterConfig,
    qat_config: QATConfig,
) -> None:
    """Make layers of a float `model` compute with quantized weights while their parameters train.

    Args:
        model: any network. How it was prepared is then in its `qat_settings`, `(config, qat_config)`, and for its
            checkpoints, if it has a `config` as Transformers' models do, in its `config.qat_config`.
        weights: the quantized weight that training starts at, by the name of the layer.
        input_ranges: (scale, zero point) at which the range of a layer's input starts, by the name of the layer; for
            all of these layers with `config.activation_bits`, else empty.
        output_ranges: the same for the layers whose output is rounded, too.
        config: how weights and inputs are quantized.
        qat_config: how they train.
    """
    make = config.quantization_method.fake_quantizer
    quantizers = {name: make(weight, config, qat_config) for name, weight in weights.items()}
    inputs, outputs = (
        {name: InputFakeQuantize(config.activation_bits, *start) for name, start in ranges.items()}
        for ranges in (input_ranges, output_ranges)
    )
    layers = {name: model.get_submodule(name) for name in quantizers}
    for name, layer in layers.items():
        _require_qat_class(name, layer)
    for name, layer in layers.items():
        make_qat_layer(layer, quantizers[name], inputs.get(name), outputs.get(name))
        quantizers[name].first_kernel = figure_of(layer.kernel())
    choose_fast_path(model, False)
    _remember_settings(model, config, qat_config)


def _remember_settings(model: nn.Module, config: ClusterConfig, qat_config: QATConfig) -> None:
    """Keep how `model` is prepared, in itself and for its checkpoints."""
    if isinstance(model, PreTrainedModel) and not hasattr(type(model.config), "qat_config"):
        _keep_names(model)
    model.qat_settings = config, qat_config
    if isinstance(getattr(model, "config", None), PretrainedConfig):
        model.config.qat_config = {"quantization": config.to_dict(), "training": dataclasses.asdict(qat_config)}


def _keep_names(model: PreTrainedModel) -> None:
    """Make Transformers save a prepared `model` under the names of its modules.

    Of some networks (ViT, RT-DETR) it writes other names, which loading translates and resuming by `Trainer` does not:
    the weights of such a checkpoint would be left out with a warning.
    """
    if not hasattr(model, "names_of_float_files"):
        model.names_of_float_files = getattr(model, "_weight_conversions", None)
    model._weight_conversions = []


def _forget_settings(model: nn.Module) -> None:
    """Undo [`_remember_settings`]: a configuration that has no such field by itself does not keep one."""
    model.qat_settings = None
    if hasattr(model, "names_of_float_files"):
        model._weight_conversions = model.names_of_float_files
        del model.names_of_float_files
    settings = getattr(model, "config", None)
    if hasattr(type(settings), "qat_config"):
        settings.qat_config = None
    elif hasattr(settings, "qat_config"):
        del settings.qat_config


def _require_qat_class(name: str, layer: nn.Module) -> None:
    """Raise `ValueError` naming a layer that can't be trained quantized, as its class is not known."""
    if type(layer) not in QAT_CLASSES:
        known = ", ".join(known.__name__ for known in QAT_CLASSES)
        raise ValueError(
            f"{name!r} is a {type(layer).__module__}.{type(layer).__qualname__}, and quantization-aware training knows "
            f"{known} of this package and of torch: import repvgg_hf before loading the model, without "
            "trust_remote_code, or name the layer in modules_to_not_convert."
        )


def remove_fake_quantizers(model: nn.Module) -> None:
    """Make a model compute with its float kernels again, and forget how it was prepared."""
    for layer in qat_layers(model).values():
        make_float_layer(layer)
    choose_fast_path(model, True)
    _forget_settings(model)


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
        inputs = {} if config.activation_bits is None else dict.fromkeys(layers, (1.0, 0))
        last_map = last_map_of(model) if config.quantize_last_map else None
        outputs = {} if last_map is None else {last_map.layer: (1.0, 0)}
        add_quantizers(model, weights, inputs, outputs, config, qat_config)


def settle_qat(model, source, missing: Iterable[str], mismatched: Iterable[tuple]) -> None:
    """Prepare anew what a checkpoint gave a restored `model` no or other tensors for: a head for other classes.

    Codebooks are found for the new weights; the range of the inputs stays as it was trained. A head that the checkpoint
    lacks altogether has no such range, and stays float if `activation_bits` asks for one.

    Args:
        model: restored by [`restore_qat`], its checkpoint loaded.
        source: the folder or repository of the checkpoint, for messages.
        missing: the keys of tensors that the checkpoint lacks.
        mismatched: `(key, stored shape, model's shape)` of those that it has in another size.

    Raises `ValueError` for a layer that is there in parts: its codebook would be memory with arbitrary contents.
    """
    stored = {key: shape for key, shape, _ in mismatched}
    prepared, left_float = {}, {}
    for name, layer in qat_layers(model).items():
        keys = {f"{name}.{key}" for key in layer.state_dict()}
        absent = keys & set(missing)
        other = sorted(keys & stored.keys(), key=lambda key: ("_fake_quant." in key, key))
        if absent == keys and is_outside_base(model, name):
            chosen = prepared if layer.input_fake_quant is None else left_float
            chosen[name] = NewLayer(kernel_shape(layer)[0], None)
        elif absent:
            raise ValueError(
                f"{min(absent)} ({len(absent)} tensors of this layer) is not in {source}, a checkpoint of "
                "quantization-aware training by its config.json: a file is damaged or of another model. Save or "
                "download it again; for float weights remove qat_config from config.json, then call prepare_qat()."
            )
        elif other and "_fake_quant." in other[0]:
            raise ValueError(
                f"{other[0]} is {list(stored[other[0]])} in {source}, and its weights are of the model's size: it was "
                "trained with other bits or another granularity than qat_config in config.json says. Save or download "
                "both again."
            )
        elif other:
            prepared[name] = NewLayer(kernel_shape(layer)[0], stored[other[0]][0])
    for name in prepared:
        _prepare_anew(model, name)
    for name in left_float:
        make_float_layer(model.get_submodule(name))
    config, qat_config = model.qat_settings
    config.modules_to_not_convert += list(left_float)
    _remember_settings(model, config, qat_config)
    warn_of_new_layers(source, prepared, "is prepared anew for quantization-aware training")
    warn_of_new_layers(source, left_float, "stays float (modules_to_not_convert), as its input has no range")


@torch.no_grad()
def _prepare_anew(model, name: str) -> None:
    """Give the layer called `name` a fake quantizer for its present weight; that of its input stays."""
    config, qat_config = model.qat_settings
    layer = model.get_submodule(name)
    kernel, inputs, outputs = layer.kernel(), layer.input_fake_quant, layer.output_fake_quant
    weight = quantize_weight(kernel, config.bits_of(name), config.groups_of(name, kernel.shape[0]), config)
    make_float_layer(layer)
    make_qat_layer(layer, config.quantization_method.fake_quantizer(weight, config, qat_config), inputs, outputs)


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
    codebook = torch.empty(config.groups_of(name, shape[0]), 2 ** config.bits_of(name), dtype=torch.float32)
    scale = torch.empty(shape[0], dtype=torch.float32) if config.channel_scale else None
    return QuantizedWeight(torch.empty(shape, dtype=torch.uint8), codebook, scale)
