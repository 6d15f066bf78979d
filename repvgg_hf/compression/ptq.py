"""Post-training quantisation of a whole model."""

import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils import logging

from ..quantization_cluster import ClusterConfig
from .layers import fused_layers, quantize_layer, require_finite, resolve_config
from .qat import fake_quantizers, remove_fake_quantizers

logger = logging.get_logger(__name__)


@torch.no_grad()
def quantize_model(model, method=None, bits=None, **options):
    """See `RepVGGPreTrainedModel.quantize`. Everything is computed first: an error leaves `model` unchanged."""
    if getattr(model, "is_quantized", False):
        raise ValueError("The model is quantised already: quantise the float model, or call model.dequantize() first.")
    trained = fake_quantizers(model)
    if trained:
        if method is not None or bits is not None or options:
            raise ValueError(
                "The model was prepared for QAT, which fixed how it is quantised: call quantize() without arguments."
            )
        config = model.qat_config
    else:
        config = resolve_config(method, bits, options)
    fused, layers = fused_layers(model)
    if fused:
        logger.warning("Fusing the branches of %d blocks before quantising.", len(fused))
    config.check_names(list(layers))
    weights = {}
    for name, layer in layers.items():
        if name in trained:
            require_finite(name, layer)
            weights[name] = trained[name].quantized(layer.weight)
        elif config.converts(name):
            weights[name] = quantize_layer(name, layer, config)

    remove_fake_quantizers(model)
    for name, layer in fused.items():
        model.set_submodule(name, layer)
    model.config.deploy = True
    for name, layer in model.replace_with_cluster_layers(config).items():
        layer.set_codes(weights[name].codes, weights[name].codebook, weights[name].scale)
    _mark_quantized(model, config)
    return model


def _mark_quantized(model, config: ClusterConfig) -> None:
    """What `from_pretrained` sets on a quantised model, so that this one saves and reloads like it."""
    model.config.quantization_config = config
    model.hf_quantizer = AUTO_QUANTIZER_MAPPING["cluster"](config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
