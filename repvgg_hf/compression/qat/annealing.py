"""Fewer bits in stages: a network that was trained with some bits is a better start for fewer (arXiv 1905.03696)."""

import copy

import torch

from ..layers import fused_layers
from .prepare import describe, fake_quantizers, make_fake_quantizer
from ..ptq.starting import plain_start


@torch.no_grad()
def set_bits(model, bits: int) -> None:
    """Go on with codes of `bits` bits, and new codebooks for the present kernels, in a model prepared for QAT.

    `bits_overrides` stay. The codebooks are new parameters: build the optimizer afterwards, again. Raises `ValueError`
    for a model that is not prepared, or bits that are not 1 to 8; the model is then unchanged.
    """
    trained = fake_quantizers(model)
    if not trained:
        raise ValueError("The model is not prepared for QAT: call prepare_qat() with these bits instead.")
    config = copy.deepcopy(model.qat_config)
    config.bits = bits
    config._validate()
    _, layers = fused_layers(model)
    start = plain_start(layers, config)
    fake = {name: make_fake_quantizer(start[name].weight, config, model.qat_options) for name in trained}
    for name, fake_quantize in fake.items():
        fake_quantize.train(trained[name].training)
        model.get_submodule(name).weight_fake_quant = fake_quantize.to(layers[name].weight.device)
    describe(model, config, model.qat_options)
