"""Post-training quantization of a whole model."""

import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils import logging

from ..runtime.quantization_cluster import ClusterConfig
from .ptq.calibrate import CalibratedLayer, CalibrationOptions
from .layers import fused_layers, require_finite, resolve_config, split_options
from .qat.prepare import fake_quantizers, remove_fake_quantizers, trained_input_ranges
from .ptq.starting import quantized_start

logger = logging.get_logger(__name__)


@torch.no_grad()
def quantize_model(model, method=None, bits=None, calibration=None, **options):
    """See `RepVGGPreTrainedModel.quantize`. Everything is computed first: an error leaves `model` unchanged."""
    if getattr(model, "is_quantized", False):
        raise ValueError("The model is quantized already: quantize the float model, or call model.dequantize() first.")
    trained = fake_quantizers(model)
    if trained and (method is not None or bits is not None or calibration is not None or options):
        raise ValueError(
            "The model was prepared for QAT, which fixed how it is quantized: call quantize() without arguments."
        )
    fused, float_layers = fused_layers(model)
    if fused:
        logger.warning("Fusing the branches of %d blocks before quantizing.", len(fused))
    if trained:
        layers, config = _trained_layers(float_layers, trained, trained_input_ranges(model)), model.qat_config
    else:
        layers, config = _quantized_layers(model, float_layers, method, bits, calibration, options)

    remove_fake_quantizers(model)
    for name, layer in fused.items():
        model.set_submodule(name, layer)
    model.config.deploy = True
    for name, layer in model.replace_with_cluster_layers(config).items():
        layer.set_codes(layers[name].weight.codes, layers[name].weight.codebook, layers[name].weight.scale)
        if layers[name].bias is not None:
            layer.bias.copy_(layers[name].bias)
        if layers[name].input_range is not None:
            layer.set_input_range(*layers[name].input_range)
    _mark_quantized(model, config)
    return model


def _trained_layers(layers, trained, ranges) -> dict[str, CalibratedLayer]:
    """What quantization-aware training has made of each layer."""
    for name in trained:
        require_finite(name, layers[name])
    return {
        name: CalibratedLayer(trained[name].quantized(layers[name].weight), input_range=ranges.get(name))
        for name in trained
    }


def _quantized_layers(
    model, layers, method, bits, calibration, options
) -> tuple[dict[str, CalibratedLayer], ClusterConfig]:
    """Each layer quantized after training, and the configuration with all choices made."""
    calibration_options, options = split_options(options, CalibrationOptions)
    config = resolve_config(method, bits, options)
    config.check_names(list(layers))
    return quantized_start(model, layers, config, calibration, calibration_options)


def _mark_quantized(model, config: ClusterConfig) -> None:
    """What `from_pretrained` sets on a quantized model, so that this one saves and reloads like it."""
    model.config.quantization_config = config
    model.hf_quantizer = AUTO_QUANTIZER_MAPPING["cluster"](config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
