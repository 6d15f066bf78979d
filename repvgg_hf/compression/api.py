"""Quantizing a model, and preparing one for quantization-aware training.

Both compute everything first and change the model at the end, so that an error leaves it as it was.
"""

import copy
import dataclasses

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from ..runtime.logs import get_logger
from ..runtime.options import unknown_option
from ..runtime.quantization_cluster import ClusterConfig, QuantizationOptions
from ..runtime.quantization_methods import METHODS
from .layers import QuantizedLayer, fused_layers, quantize_layers, require_finite
from .ptq.calibrate import calibrate
from .ptq.config import CalibrationConfig
from .ptq.data import CalibrationData
from .ptq.input_ranges import observe_input_ranges
from .qat.config import QATConfig
from .qat.prepare import add_quantizers, described, fake_quantizers, remove_fake_quantizers, trained_input_ranges

logger = get_logger(__name__)


@torch.no_grad()
def quantize(model, method=None, bits=None, *, calibration=None, calibration_config=None, **options):
    """Replace every weight of `model` by codes and a codebook, in place; returns the model.

    The arguments are those of [`~ReparameterizedPreTrainedModel.quantize`].
    """
    if getattr(model, "is_quantized", False):
        raise ValueError("The model is quantized already: quantize the float model, or call model.dequantize() first.")
    trained = fake_quantizers(model)
    if trained and any(given is not None for given in (method, bits, calibration, calibration_config, *options)):
        raise ValueError(
            "The model was prepared for QAT, which fixed how it is quantized: call quantize() without arguments."
        )
    fused, layers = fused_layers(model)
    if fused:
        logger.warning("Fusing the branches of %d blocks before quantizing.", len(fused))
    if trained:
        config, quantized = model.qat_settings[0], _trained_layers(layers, trained, trained_input_ranges(model))
    else:
        config = resolve_config(method, bits, options)
        config.check_names(list(layers))
        config, quantized = _post_training(model, layers, config, calibration, calibration_config)

    remove_fake_quantizers(model)
    for name, layer in fused.items():
        model.set_submodule(name, layer)
    model.config.deploy = True
    for name, layer in model.replace_with_cluster_layers(config).items():
        layer.set_codes(quantized[name].weight.codes, quantized[name].weight.codebook, quantized[name].weight.scale)
        if quantized[name].bias is not None:
            layer.bias.copy_(quantized[name].bias)
        if quantized[name].input_range is not None:
            layer.set_input_range(*quantized[name].input_range)
    _mark_quantized(model, config)
    return model


@torch.no_grad()
def prepare_qat(
    model, method=None, bits=None, *, calibration=None, calibration_config=None, qat_config=None, **options
):
    """Make `model` compute with quantized weights while its parameters train, in place; returns the model.

    The arguments are those of [`~ReparameterizedPreTrainedModel.prepare_qat`]. Codebooks start where quantization
    without data would put them: starting from calibrated ones was measured to make training worse.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError("The model holds packed codes, which don't train: call model.dequantize() first.")
    if fake_quantizers(model):
        raise ValueError(
            f"The model is prepared for QAT already, with {described(model)}: train it, or call quantize() to freeze "
            "it. For other bits prepare the float model anew."
        )
    config = resolve_config(method, bits, options)
    if config.activation_bits is None and (calibration is not None or calibration_config is not None):
        raise ValueError(
            "Calibration images only find the input ranges here, and activation_bits is None: set it, or leave "
            "calibration and calibration_config out."
        )
    _require_data(config, calibration, calibration_config)
    qat_config = _checked(qat_config, QATConfig, "qat_config")
    calibration_config = _checked(calibration_config, CalibrationConfig, "calibration_config")
    _, layers = fused_layers(model)
    config.check_names(list(layers))
    start = {name: layer.weight for name, layer in quantize_layers(layers, config).items()}
    ranges = {}
    if config.activation_bits is not None:
        float_model, data = _float_model_and_data(model, calibration, calibration_config)
        ranges = observe_input_ranges(float_model, list(start), data, config.activation_bits, calibration_config)
    add_quantizers(model, start, ranges, config, qat_config)
    return model


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
    if calibration is None:
        return config, quantize_layers(layers, config)
    calibration_config = _checked(calibration_config, CalibrationConfig, "calibration_config")
    float_model, data = _float_model_and_data(model, calibration, calibration_config)
    return calibrate(float_model, config, data, calibration_config)


def _float_model_and_data(model, calibration, calibration_config: CalibrationConfig):
    """Return a fused float32 copy of `model` in eval mode, and the calibration data on its device."""
    float_model = copy.deepcopy(model).float().eval().reparameterize()
    return float_model, CalibrationData(calibration, calibration_config.calibration_batch_size, float_model.device)


def _trained_layers(layers: dict[str, nn.Module], trained: dict, ranges: dict) -> dict[str, QuantizedLayer]:
    """Return what quantization-aware training has made of each layer."""
    for name in trained:
        require_finite(name, layers[name])
    return {
        name: QuantizedLayer(fake_quantizer.quantized(layers[name].weight), input_range=ranges.get(name))
        for name, fake_quantizer in trained.items()
    }


def _mark_quantized(model, config: ClusterConfig) -> None:
    """Set what `from_pretrained` sets on a quantized model, so that this one saves and reloads like it."""
    model.config.quantization_config = config
    model.hf_quantizer = AUTO_QUANTIZER_MAPPING["cluster"](config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
