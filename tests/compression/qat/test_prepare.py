"""Models that are prepared: where they start, that what is trained is what is shipped, and what is refused."""

import pytest
import torch
from torch import nn

from repvgg_hf import ClusterConfig, QATConfig, RepVGGForImageClassification
from repvgg_hf.compression.codebooks.weights import quantize_weight
from repvgg_hf.compression.qat.layers import qat_layers
from repvgg_hf.compression.qat.prepare import (
    add_quantizers,
    fake_quantizers,
    remove_fake_quantizers,
    trained_input_ranges,
)

FORMATS = {
    "w3": {"bits": 3},
    "w1": {"bits": 1},
    "w4 without scale": {"bits": 4, "channel_scale": False},
    "w2 per_channel": {"bits": 2, "granularity": "per_channel"},
    "w4 per_group float32": {"bits": 4, "granularity": "per_group", "group_size": 4, "codebook_dtype": "float32"},
    "w3 int8": {"bits": 3, "codebook_dtype": "int8", "bits_overrides": {"classifier": 8}},
    "w2 per_channel int8": {"bits": 2, "granularity": "per_channel", "codebook_dtype": "int8"},
    "part": {"bits": 3, "modules_to_not_convert": ["embeddings", "encoder.stages.1.layers.0"]},
    "w3 uniform": {"method": "uniform", "bits": 3},
    "w2 uniform per_channel": {"method": "uniform", "bits": 2, "granularity": "per_channel"},
}


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_quantize_changes_nothing(options, form, make_model, train, logits, batch, tmp_path):
    model = make_model(form)
    assert model.prepare_qat(**options) is model
    train(model, batch)
    codebooks = {name: layer.stored()[0] for name, layer in fake_quantizers(model).items()}
    expected = logits(model, batch)
    assert model.quantize() is model and model.is_quantized and not fake_quantizers(model)
    if options == FORMATS["part"] and form == "train":  # fusing what stays float rounds
        torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-6)
        expected = logits(model, batch)
    assert torch.equal(logits(model, batch), expected)
    assert all(torch.equal(model.get_submodule(name).weight_codebook, book) for name, book in codebooks.items())
    model.save_pretrained(tmp_path)
    loaded = RepVGGForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batch), expected)


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize("method", ["cluster", "uniform"])
def test_it_starts_where_post_training_quantization_ends(method, form, make_model, logits, batch):
    quantized = make_model(form).quantize(method, bits=3)
    assert torch.equal(logits(make_model(form).prepare_qat(method, bits=3), batch), logits(quantized, batch))


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_quantizers_are_put_where_they_are_wanted(form, make_model, logits, batch):
    model, config = make_model(form), ClusterConfig(bits=3, activation_bits=4)
    expected, names = logits(model, batch), list(model.state_dict())
    name = "repvgg.encoder.stages.0.layers.1.conv"
    layer = model.get_submodule(name)
    kernel = layer.weight if form == "deploy" else layer.equivalent()[0]
    weights = {name: quantize_weight(kernel, 3, 1, config)}
    add_quantizers(model, weights, {name: (0.25, 3)}, {}, config, QATConfig(blend_steps=7))
    assert list(fake_quantizers(model)) == [name] and trained_input_ranges(model) == {name: (0.25, 3)}
    assert model.config.qat_config == {
        "quantization": config.to_dict(),
        "training": {"codebook_momentum": 0.9, "codebook_update_every": 10, "blend_steps": 7},
    }
    assert not torch.equal(logits(model, batch), expected)
    remove_fake_quantizers(model)
    assert model.config.qat_config is None and list(model.state_dict()) == names
    # kernels stay in another memory layout, in which branches round otherwise
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-6)


def test_a_model_prepared_already(make_model):
    with pytest.raises(ValueError, match="prepared for QAT already, with method='cluster', bits=4: train it, or"):
        make_model().prepare_qat().prepare_qat(bits=2)


def test_a_quantized_model(make_model, logits, batch):
    options = {"bits": 3, "granularity": "per_channel"}
    model = make_model().quantize(**options)
    with pytest.raises(ValueError, match="holds packed codes, which don't train: call model.dequantize"):
        model.prepare_qat()
    expected = logits(model, batch)
    assert torch.equal(logits(model.dequantize().prepare_qat(**options), batch), expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"activation_bits": 8}, "activation_bits needs calibration data: pass calibration="),
        ({"qat_config": {"blend_steps": 3}}, "qat_config must be a QATConfig, got"),
        ({"codebook_momentum": 0.5}, r"codebook_momentum is an option of qat_config: pass qat_config=QATConfig\("),
        ({"granularty": "per_channel"}, "has no option 'granularty': did you mean 'granularity'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options(options, message, make_model):
    model = make_model()
    with pytest.raises((ValueError, TypeError), match=message):
        model.prepare_qat(**options)
    assert not fake_quantizers(model)


def test_a_config_and_bits(make_model):
    with pytest.raises(ValueError, match="Give either a whole ClusterConfig or its arguments, not both"):
        make_model().prepare_qat(ClusterConfig(bits=4), bits=2)


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_nothing_changes_when_it_fails(form, make_model):
    model = make_model(form)
    model.classifier.weight.data[2, 3] = float("inf")
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match="The weight of 'classifier' has 1 NaN or infinite entries"):
        model.prepare_qat()
    assert dict(model.named_modules()) == modules and not fake_quantizers(model)
    assert not qat_layers(model)


def test_arguments_after_training(make_model):
    model = make_model().prepare_qat(bits=3)
    for arguments in ({"bits": 3}, {"method": "cluster"}, {"granularity": "per_channel"}):
        with pytest.raises(ValueError, match="prepared for QAT, which fixed how it is quantized: call quantize"):
            model.quantize(**arguments)


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_training_that_diverged(form, make_model):
    model = make_model(form).prepare_qat(bits=3)
    conv = model.repvgg.embeddings.layer.conv
    next(parameter for parameter in conv.parameters() if parameter.dim() == 4).data[0] = float("nan")
    with pytest.raises(ValueError, match="'repvgg.embeddings.layer.conv' (can't be fused|has 27 NaN)"):
        model.quantize()
    assert fake_quantizers(model)


def test_fusing_would_lose_the_codebooks(make_model):
    with pytest.raises(ValueError, match="prepared for QAT: quantize.. fuses it and keeps the trained codebooks"):
        make_model().prepare_qat().reparameterize()


def test_repr_says_what_a_fake_quantizer_holds(make_model):
    model = make_model().prepare_qat(bits=3)
    assert repr(model.classifier.weight_fake_quant) == (
        "ClusterFakeQuantize(codebooks=[1, 8], channel_scale, momentum=0.9)"
    )
    model = make_model().prepare_qat("uniform", bits=3, channel_scale=True)
    assert repr(model.classifier.weight_fake_quant) == "UniformFakeQuantize(steps=4, integers=-4..3)"


def test_only_what_trains_is_changed_in_the_model(make_model):
    """Layers that stay float keep their class."""
    model = make_model().prepare_qat(bits=3, modules_to_not_convert=["classifier"])
    assert type(model.classifier) is nn.Linear and len(fake_quantizers(model)) == 5


@torch.no_grad()
def test_blending_ends_in_evaluation_of_a_fused_model(tiny_config, tmp_path):
    """It is in evaluation when it is fused, so that its outputs are those of the checkpoint, without float weights."""
    model = RepVGGForImageClassification(tiny_config()).eval().reparameterize()
    model.prepare_qat(bits=2, qat_config=QATConfig(blend_steps=2))
    model.save_pretrained(tmp_path)
    pixel_values = torch.randn(2, 3, 16, 16)
    loaded = RepVGGForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)
