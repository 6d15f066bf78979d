"""A checkpoint of quantization-aware training loads back as what it was; inputs are quantized as they were trained."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForImageClassification

from repvgg_hf import QATConfig, RepVGGBackbone, RepVGGForImageClassification, RepVGGModel
from repvgg_hf.compression.qat.prepare import fake_quantizers

FORMATS = {
    "w3": {"bits": 3},
    "uniform": {"method": "uniform", "bits": 2, "channel_scale": True},
    "uniform per channel": {"method": "uniform", "bits": 3, "granularity": "per_channel"},
    "affine": {"method": "uniform", "bits": 3, "symmetric": False},
    "part, every 2 steps": {
        "bits": 2, "modules_to_not_convert": ["embeddings"], "bits_overrides": {"classifier": 3},
        "qat_config": QATConfig(codebook_update_every=2),
    },
    "blended": {"bits": 1, "qat_config": QATConfig(blend_steps=5)},
    "w4a8": {"bits": 4, "activation_bits": 8},
    "w2a4": {"bits": 2, "activation_bits": 4},
}  # fmt: skip


def same(actual, expected, exact):
    return torch.equal(actual, expected) if exact else torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_it_loads_back_goes_on_and_freezes(options, form, make_model, train, logits, batch, tmp_path):
    if "activation_bits" in options:
        options = options | {"calibration": batch["pixel_values"]}
    # the memory layout that from_pretrained gives kernels: sums over them round alike
    model = make_model(form).to(memory_format=torch.channels_last).prepare_qat(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    train(model, batch, 3, optimizer)
    # what stays float, in branches or fused, rounds otherwise in another memory layout
    exact = "modules_to_not_convert" not in options
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert fake_quantizers(loaded).keys() == fake_quantizers(model).keys()
    assert same(logits(loaded, batch), expected, exact)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name

    again = torch.optim.SGD(loaded.parameters(), lr=0.02, momentum=0.9)
    again.load_state_dict(optimizer.state_dict())
    train(model, batch, 3, optimizer)
    train(loaded, batch, 3, again)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0.02, atol=2e-3, msg=name)
    expected = logits(loaded, batch)
    loaded.quantize()
    actual = logits(loaded, batch)
    assert same(actual, expected, exact)
    loaded.save_pretrained(tmp_path / "quantized")
    assert json.loads((tmp_path / "quantized" / "config.json").read_text()).get("qat_config") is None
    shipped = RepVGGForImageClassification.from_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(shipped, batch), actual)


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_resuming_is_not_noticed(form, make_model, train, logits, assert_same_state, batch):
    def prepared():
        model = make_model(form).prepare_qat(bits=3, qat_config=QATConfig(codebook_update_every=2))
        return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    model, optimizer = prepared()
    train(model, batch, 3, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, batch, 3, optimizer)

    resumed, optimizer = prepared()
    assert {name for name in saved[0] if name.endswith(("fake_quant.codebook", "fake_quant.scale"))} == {
        f"{name}.weight_fake_quant.{buffer}" for name in fake_quantizers(model) for buffer in ("codebook", "scale")
    }
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(resumed, batch, 3, optimizer)
    assert_same_state(resumed.state_dict(), model.state_dict())
    assert torch.equal(logits(resumed.quantize(), batch), logits(model, batch))


def test_layers_have_their_bits_by_their_names_in_the_whole_model(make_model, logits, batch, tmp_path):
    """Loading prepares the parts of a model first, where layers have other names."""
    model = make_model().prepare_qat(bits=2, bits_overrides={"repvgg.encoder.stages.0": 4, "classifier": 3})
    model.save_pretrained(tmp_path)
    loaded = RepVGGForImageClassification.from_pretrained(tmp_path)
    entries = {name: fake.codebook.shape[1] for name, fake in fake_quantizers(loaded).items()}
    assert entries == {name: fake.codebook.shape[1] for name, fake in fake_quantizers(model).items()}
    assert sorted(entries.values()) == [4, 4, 4, 8, 16, 16]
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_class", [RepVGGModel, RepVGGBackbone])
def test_models_without_a_head(model_class, tiny_config, tmp_path):
    model = model_class(tiny_config()).prepare_qat(bits=2, bits_overrides={"encoder.stages.0": 4})
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert fake_quantizers(loaded).keys() == fake_quantizers(model).keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    loaded.quantize()


def test_other_bits_than_the_checkpoint(make_model, tmp_path):
    make_model().prepare_qat(bits=3).save_pretrained(tmp_path)
    model = RepVGGForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="prepared for QAT already, with method='cluster', bits=3"):
        model.prepare_qat(bits=2)


def test_in_half_precision_the_codebooks_stay_whole(make_model, tmp_path):
    make_model().prepare_qat(bits=3).save_pretrained(tmp_path)
    model = RepVGGForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {fake.codebook.dtype for fake in fake_quantizers(model).values()} == {torch.float32}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"training": {"freeze_threshold": 0.1}}, "QATConfig has no option 'freeze_threshold': it takes blend_steps"),
        ({"quantization": {"preserve_zero": True}}, "ClusterConfig has no option 'preserve_zero'"),
        ({"options": {}}, "it has quantization, training, options, and quantization and training are expected"),
        ({"training": {"blend_steps": -1}}, "blend_steps must be an integer of at least 0, got -1"),
    ],
    ids=["training", "quantization", "other", "value"],
)
def test_settings_that_this_version_does_not_know(changes, message, make_model, tmp_path):
    make_model().prepare_qat(bits=3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for part, options in changes.items():
        config["qat_config"].setdefault(part, {}).update(options)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"qat_config in config.json can't be used: {message}"):
        RepVGGForImageClassification.from_pretrained(tmp_path)
