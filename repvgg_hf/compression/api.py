"""Quantizing a model, and preparing one for quantization-aware training.

Both compute everything first and change the model at the end, so that an error leaves it as it was.
"""

import copy
import dataclasses
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from ..networks.oabn import settle_outlier_bounds
from ..runtime.cluster_layers import cluster_layers
from ..runtime.layer_swaps import (
    all_names,
    convertible_layers,
    dequantize_layers,
    replace_with_cluster_layers,
    warn_of_half_biases,
)
from ..runtime.logs import get_logger
from ..runtime.marker import has_own_code
from ..runtime.options import unknown_option
from ..runtime.quantization_cluster import ClusterConfig, QuantizationOptions
from ..runtime.quantization_methods import METHODS
from ..runtime.tensors import require_bare
from .codebooks.bias import settle_bias
from .layers import (
    QuantizedLayer,
    fused_layers,
    quantize_layers,
    require_finite,
    settle_last_map,
    warn_of_float_layers,
)
from .ptq.calibrate import calibrate, share_out_bits
from .ptq.config import CalibrationConfig, check_use_in_training, check_use_of_ranges
from .ptq.data import CalibrationData
from .ptq.equalize import equalize
from .ptq.input_ranges import observe_ranges
from .qat.callback import warn_of_unmoved_codebooks
from .qat.config import QATConfig, check_qat_options
from .qat.prepare import (
    add_quantizers,
    described,
    fake_quantizers,
    remove_fake_quantizers,
    trained_input_ranges,
    trained_output_ranges,
)

logger = get_logger(__name__)


@torch.no_grad()
def quantize(model, method=None, bits=None, *, calibration=None, calibration_config=None, **options):
    """Replace the weights of `model` by codes and a codebook, in place; returns the model, which may be any network.

    Quantized are its plain `nn.Linear`, `nn.Conv1d` and `nn.Conv2d` layers; a warning names other layers with a weight
    matrix, which stay float. A layer that has several names is quantized once, and ones that share a weight are stored
    separately. Blocks of branches of this package are fused first; those of other networks by `repvgg_hf.fuse` before.

    The arguments are those of a RepVGG's method, which `help(repvgg_hf.RepVGGForImageClassification.quantize)` lists;
    `options` are the fields of [`ClusterConfig`]: granularity, group_size, channel_scale, codebook_dtype,
    reduce_range, bits_overrides, modules_to_not_convert, symmetric, range_method, decode, activation_bits,
    activation_scheme, quantize_last_map. After [`prepare_qat`] call it without: the trained codebooks are kept as they
    are.

    A model of Transformers is then saved with `save_pretrained` and loaded with `from_pretrained`, other modules with
    [`save_quantized`] and [`load_quantized`]. There is no code to put beside the checkpoint of a network that is not
    of this package: it can be loaded only where `repvgg_hf` is installed and imported.

    The RepVGG backbone of a detector may be quantized on its own, and is saved and loaded as a part of it, if it is
    made from the `backbone_config` of the whole. A part that is not of this package can't: quantize the whole, with the
    rest in `modules_to_not_convert`.

    Raises `ValueError` for a model that is quantized already (also by another library), that has weights which are
    not in memory, not finite or not there yet (lazy layers), that was loaded from a checkpoint of quantization-aware
    training without what it trained, or that has nothing to quantize, and for bad options; `TypeError` for an unknown
    option. The model is then unchanged.

    Example:
    ```python
    >>> import repvgg_hf
    >>> from torch import nn

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(8, 4, 1))
    >>> repvgg_hf.quantize(model, bits=4, bits_overrides={"0": 8})[2]
    ClusterConv2d(weight=[4, 8, 1, 1], bits=4, codebooks=1 x float16, channel_scale)
    ```"""
    _require_float(model, "is quantized already: quantize the float model, or call {} first")
    trained = fake_quantizers(model)
    if trained and any(given is not None for given in (method, bits, calibration, calibration_config, *options)):
        raise ValueError(
            "The model was prepared for QAT, which fixed how it is quantized: call quantize() without arguments."
        )
    if trained:
        warn_of_unmoved_codebooks(model)
    else:
        _refuse_lost_training(model)
    settle_outlier_bounds(model)
    fused, layers = fused_layers(model)
    if fused:
        logger.info("Fusing the branches of %d blocks before quantizing.", len(fused))
    if trained:
        config, quantized = model.qat_settings[0], _trained_layers(model, layers, trained)
    else:
        config = resolve_config(method, bits, options)
        _settle_names(config, model, layers)
        config, quantized = _post_training(model, layers, config, calibration, calibration_config)
    config.fused_structure = getattr(model, "fused_structure", None) or None
    if trained:
        remove_fake_quantizers(model)
    _put_fused(model, fused)
    warn_of_float_layers(model)
    replace = getattr(model, "replace_with_cluster_layers", None) or partial(replace_with_cluster_layers, model)
    for name, layer in replace(config).items():
        layer.set_codes(quantized[name].weight.codes, quantized[name].weight.codebook, quantized[name].weight.scale)
        if quantized[name].bias is not None:
            layer.bias.copy_(quantized[name].bias)
        if quantized[name].input_range is not None:
            layer.set_input_range(*quantized[name].input_range)
        if quantized[name].output_range is not None:
            layer.set_output_range(*quantized[name].output_range)
    _mark_quantized(model, config)
    warn_of_half_biases(model)
    return model


@torch.no_grad()
def prepare_qat(
    model, method=None, bits=None, *, calibration=None, calibration_config=None, qat_config=None, **options
):
    """Make `model` compute with quantized weights while its parameters train, in place; returns the model.

    It may be any network, of which [`quantize`] says what is quantized, and what `options` there are. The arguments are
    those of a RepVGG's method, which `help(repvgg_hf.RepVGGForImageClassification.prepare_qat)` lists. Codebooks start
    where quantization without data would put them: starting from calibrated ones was measured to make training worse.
    """
    _require_float(model, "holds packed codes, which don't train: call {} first")
    if fake_quantizers(model):
        raise ValueError(
            f"The model is prepared for QAT already, with {described(model)}: train it, or call quantize() to freeze "
            "it. For other bits prepare the float model anew."
        )
    config = resolve_config(method, bits, options)
    _require_data(config, calibration, calibration_config)
    qat_config = _checked(qat_config, QATConfig, "qat_config")
    check_qat_options(config, qat_config)
    calibration_config = _checked(calibration_config, CalibrationConfig, "calibration_config")
    check_use_in_training(calibration_config, calibration is not None, config.activation_bits is not None)
    _, layers = fused_layers(model)
    _settle_names(config, model, layers)
    last_map = settle_last_map(model, layers, config)
    if calibration is not None:
        float_model, data = _float_model_and_data(model, calibration, calibration_config)
    if calibration_config.target_bits_per_weight is not None:
        config = share_out_bits(float_model, config, data, calibration_config.target_bits_per_weight)
    start = {name: layer.weight for name, layer in quantize_layers(layers, config).items()}
    inputs, outputs = {}, {}
    if config.activation_bits is not None:
        inputs, outputs = observe_ranges(float_model, list(start), data, config, calibration_config, last_map)
    warn_of_float_layers(model)
    add_quantizers(model, start, inputs, outputs, config, qat_config)
    return model


def dequantize(model, dtype=None):
    """Make a quantized `model` a float one with the decoded weights, in place; returns the model, which may be any.

    The rounding of activations (`activation_bits`) is dropped with the layers that did it. The float model has the
    present dtype, or `dtype`. A part that was quantized on its own, such as the backbone of a detector, is float then,
    too. Raises `ValueError` for a model that has nothing quantized or is offloaded.

    Example:
    ```python
    >>> import repvgg_hf
    >>> from torch import nn

    >>> model = repvgg_hf.quantize(nn.Sequential(nn.Linear(8, 4)), bits=3)
    >>> repvgg_hf.dequantize(model)
    Sequential(
      (0): Linear(in_features=8, out_features=4, bias=True)
    )
    ```"""
    require_bare(model)
    if not cluster_layers(model):
        raise ValueError(f"{type(model).__name__} has no quantized layer: it is float already.")
    if getattr(model, "hf_quantizer", None) is not None:
        return model.dequantize(dtype)
    dequantize_layers(model)
    for module in model.modules():
        if getattr(module, "hf_quantizer", None) is not None:
            module.hf_quantizer.remove_quantization_config(module)
        elif getattr(module, "is_quantized", None):
            module.is_quantized = False
            del module.quantization_config
    return model if dtype is None else model.to(dtype)


def _require_float(model, problem: str) -> None:
    """Raise `ValueError` for a `model` that is quantized, by this package, with the `problem`, or by another."""
    require_bare(model)
    config = getattr(model, "quantization_config", None) or getattr(
        getattr(model, "config", None), "quantization_config", None
    )
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    method = getattr(method, "value", method)
    if method not in (None, "cluster"):
        raise ValueError(
            f"The model is quantized with {method!r}, by another library: load the float model that it was made from."
        )
    if getattr(model, "is_quantized", False) or cluster_layers(model):
        call = "model.dequantize()" if hasattr(model, "dequantize") else "repvgg_hf.dequantize(model)"
        raise ValueError(f"The model {problem.format(call)}.")


def _refuse_lost_training(model) -> None:
    """Raise `ValueError` for a float `model` from a checkpoint of quantization-aware training.

    Transformers makes other models than this package's from their classes alone, which know no fake quantizers: what
    these have learned is in the checkpoint, and is left out.
    """
    settings = getattr(getattr(model, "config", None), "qat_config", None)
    if settings:
        raise ValueError(
            "The model is from a checkpoint of quantization-aware training, and from_pretrained() left out what its "
            "codebooks have learned. To freeze that, prepare it as for training and load the checkpoint's tensors: "
            "repvgg_hf.prepare_qat(model, ...), model.load_state_dict(safetensors.torch.load_file(file)), "
            f"repvgg_hf.quantize(model). It was prepared with {settings!r:.300}. To quantize its float weights anew, "
            "set model.config.qat_config to None, or remove it from config.json."
        )


def _settle_names(config, model, layers):
    """Check the names in `config`, and write those of layers with several names as the first of these.

    Raises `ValueError` for one that is of no layer.
    """
    names = {several[0]: several for several in all_names(model).values()}
    config.check_names([name for first in layers for name in names[first]])
    for first, *others in (names[first] for first in layers):
        for other in others:
            if config.converts(first) and not config.converts(other):
                config.modules_to_not_convert.append(first)
            if config.bits_of(other) not in (config.bits, config.bits_of(first)):
                config.bits_overrides[first] = config.bits_of(other)


def _put_fused(model, fused: dict[str, nn.Module]) -> None:
    """Put the `fused` convolutions in the place of their blocks, and say so in the configurations they belong to."""
    for name, layer in fused.items():
        model.set_submodule(name, layer)
    for module in model.modules():
        if has_own_code(module):
            module.config.deploy = True


def resolve_config(method: str | ClusterConfig | None, bits: int | None, options: dict) -> ClusterConfig:
    """Return the [`ClusterConfig`] that the arguments of `quantize` and `prepare_qat` describe.

    Raises `TypeError` for an option that it does not have, with the place where it may belong.
    """
    if isinstance(method, str) or method is None:
        known = [field.name for field in dataclasses.fields(QuantizationOptions)]
        for name in options:
            for owner, argument in ((CalibrationConfig, "calibration_config"), (QATConfig, "qat_config")):
                if name in [field.name for field in dataclasses.fields(owner)]:
                    raise TypeError(f"{name} is an option of {argument}: pass {argument}={owner.__name__}({name}=...).")
            if name not in known:
                raise TypeError(unknown_option(name, known, "Quantization"))
        return ClusterConfig(method=method or "cluster", bits=4 if bits is None else bits, **options)
    if not hasattr(method, "bits_of"):
        raise ValueError(f"method must be {' or '.join(map(repr, METHODS))}, or a ClusterConfig, got {method!r}.")
    if bits is not None or options:
        raise ValueError("Give either a whole ClusterConfig or its arguments, not both.")
    # one of its own, as saving writes a checksum into it; and of the package's class, while the given one may be of a
    # copy of the code that came with a checkpoint, whose methods can't make models
    return ClusterConfig.from_dict(method.to_dict())


def _checked(config, kind: type, argument: str):
    """Return `config`, or the defaults for `None`. Raises `TypeError` if it is something else than a `kind`."""
    if config is None:
        return kind()
    if not isinstance(config, kind):
        raise TypeError(f"{argument} must be a {kind.__name__}, got {config!r}.")
    return config


def _require_data(config: ClusterConfig, calibration, calibration_config) -> None:
    """Raise `ValueError` naming the option that needs calibration data, if there is none."""
    if calibration is None and (calibration_config is not None or config.activation_bits is not None):
        option = "activation_bits" if calibration_config is None else "calibration_config"
        raise ValueError(
            f"{option} needs calibration data: pass calibration=, a DataLoader or dataset of a few hundred images."
        )


def _post_training(
    model, layers: dict[str, nn.Module], config: ClusterConfig, calibration, calibration_config
) -> tuple[ClusterConfig, dict[str, QuantizedLayer]]:
    """Quantize the fused `layers` after training; returns them and the configuration with all choices made."""
    _require_data(config, calibration, calibration_config)
    last_map = settle_last_map(model, layers, config)
    if calibration is None:
        return config, quantize_layers(layers, config)
    calibration_config = _checked(calibration_config, CalibrationConfig, "calibration_config")
    check_use_of_ranges(calibration_config, config.activation_bits is not None)
    float_model, data = _float_model_and_data(model, calibration, calibration_config)
    if calibration_config.equalization is not None:
        equalize(float_model, convertible_layers(float_model, config), data, calibration_config.equalization)
    return calibrate(float_model, config, data, calibration_config, last_map)


def _float_model_and_data(model, calibration, calibration_config: CalibrationConfig):
    """Return a fused float32 copy of `model` in eval mode, and the calibration data on its device."""
    float_model = copy.deepcopy(model).float().eval()
    _put_fused(float_model, fused_layers(float_model)[0])
    device = next(float_model.parameters()).device
    return float_model, CalibrationData(calibration, calibration_config.calibration_batch_size, device, float_model)


def _trained_layers(model, layers: dict[str, nn.Module], trained: dict) -> dict[str, QuantizedLayer]:
    """Return what quantization-aware training has made of each of the `layers` of the fused `model`."""
    inputs, outputs = trained_input_ranges(model), trained_output_ranges(model)
    found = {}
    for name, fake_quantizer in trained.items():
        require_finite(name, layers[name])
        weight, bias = fake_quantizer.quantized(layers[name].weight), None
        if name in inputs:
            weight, bias = settle_bias(weight, getattr(layers[name], "bias", None), inputs[name][0])
        found[name] = QuantizedLayer(weight, bias, inputs.get(name), outputs.get(name))
    return found


def _mark_quantized(model, config: ClusterConfig) -> None:
    """Set what loading sets on a quantized model, so that this one saves and reloads like it."""
    model.is_quantized = True
    is_plain_module = not isinstance(model, PreTrainedModel)
    if is_plain_module:
        model.quantization_config = config
        return
    model.config.quantization_config = config
    model.hf_quantizer = AUTO_QUANTIZER_MAPPING["cluster"](config, pre_quantized=True)
    model.quantization_method = config.quant_method
