"""What cards say of a model's integers is what the model has."""

import pytest
import torch

from repvgg_hf import ClusterConfig, RepVGGForImageClassification
from repvgg_hf.hub.integers import integers_section
from repvgg_hf.interop.integers import integer_layers, runs_exactly_without_vnni


@pytest.mark.parametrize("options", [
    {"bits": 4}, {"bits": 8}, {"bits": 8, "reduce_range": True}, {"bits": 4, "bits_overrides": {"classifier": 8}},
    {"bits": 2, "activation_scheme": "int8_symmetric", "quantize_last_map": False},
], ids=str)  # fmt: skip
def test_it_says_what_the_model_has(options, tiny_config, generator):
    images = torch.randn(8, 3, 16, 16, generator=generator)
    model = RepVGGForImageClassification(tiny_config()).quantize(activation_bits=8, calibration=images, **options)
    text, layers = integers_section(model.config.quantization_config), integer_layers(model)
    assert ("every CPU computes the same" in text) is runs_exactly_without_vnni(layers)
    assert ("beyond +-63" in text) is not runs_exactly_without_vnni(layers)
    assert ("last feature map" in text) is any(layer.output_scale is not None for layer in layers.values())
    assert ("TensorRT" in text) is all(layer.input_zero_point == 128 for layer in layers.values())


def test_nothing_without_integers():
    for config in (None, ClusterConfig(), ClusterConfig(activation_bits=8, codebook_dtype="float16")):
        assert integers_section(config) == ""
    config = ClusterConfig(activation_bits=8, modules_to_not_convert=["classifier"])
    assert "Floating point is `classifier`" in integers_section(config)
