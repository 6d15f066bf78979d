"""A checkpoint of quantization-aware training loads back as what it was; inputs are quantized as they were trained."""

import json

import pytest
import torch
from transformers import AutoModelForImageClassification

from repvgg_hf import RepVGGForImageClassification, update_codebooks
from repvgg_hf.compression.qat.prepare import fake_quantizers

FORMATS = {
    "w3": {"bits": 3},
    "uniform": {"method": "uniform", "bits": 2, "channel_scale": True},
    "affine": {"method": "uniform", "bits": 3, "symmetric": False},
    "kmeans, part, frozen": {
        "bits": 2, "codebook_update": "kmeans", "modules_to_not_convert": ["embeddings"], "freeze_threshold": 0.1,
        "update_every": 2, "bits_overrides": {"classifier": 3},
    },
    "symmetric": {"bits": 3, "symmetric": True},
    "zero": {"bits": 2, "preserve_zero": True},
    "w4a8": {"bits": 4, "activation_bits": 8, "tuning_steps": 0},
    "w2a4, moving average": {
        "bits": 2, "activation_bits": 4, "activation_update": "moving_average", "tuning_steps": 0,
        "batch_norm_every": 2,
    },
}  # fmt: skip


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(batch["pixel_values"]).logits


def same(actual, expected, exact):
    return torch.equal(actual, expected) if exact else torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)


def train(model, batch, optimizer, steps=3):
    for _ in range(steps):
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_codebooks(model)


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_it_loads_back_goes_on_and_freezes(options, form, make_model, batch, tmp_path):
    if "activation_bits" in options:
        options = options | {"calibration": batch["pixel_values"]}
    # the memory layout that from_pretrained gives kernels: sums over them round alike
    model = make_model(form).to(memory_format=torch.channels_last).prepare_qat(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    train(model, batch, optimizer)
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
    train(model, batch, optimizer)
    train(loaded, batch, again)
    for name, tensor in model.state_dict().items():
        if "freezing" not in name:  # a code on a border may fall to the other side
            torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0.02, atol=2e-3, msg=name)
    expected = logits(loaded, batch)
    loaded.quantize()
    actual = logits(loaded, batch)
    assert same(actual, expected, exact)
    loaded.save_pretrained(tmp_path / "quantized")
    assert json.loads((tmp_path / "quantized" / "config.json").read_text()).get("qat_config") is None
    shipped = RepVGGForImageClassification.from_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(shipped, batch), actual)


def test_other_bits_than_the_checkpoint(make_model, tmp_path):
    make_model().prepare_qat(bits=3).save_pretrained(tmp_path)
    model = RepVGGForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="prepared for QAT already, with method='cluster', bits=3"):
        model.prepare_qat(bits=2)


def test_in_half_precision_the_codebooks_stay_whole(make_model, batch, tmp_path):
    make_model().prepare_qat(bits=3).save_pretrained(tmp_path)
    model = RepVGGForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {fake.codebook.dtype for fake in fake_quantizers(model).values()} == {torch.float32}


def test_calibrated_start(make_model, batch):
    """Training begins with exactly the calibrated model, or with its codebooks and biases."""
    options = {"bits": 2, "granularity": "per_channel", "calibration": batch["pixel_values"], "tuning_steps": 5}
    for form in ("train", "deploy"):
        calibrated = make_model(form).quantize(**options)
        model = make_model(form).prepare_qat(**options, start="decoded")
        torch.testing.assert_close(logits(model, batch), logits(calibrated, batch), rtol=1e-3, atol=1e-4)
        model = make_model(form).prepare_qat(**options)
        for name, fake in fake_quantizers(model).items():
            layer, expected = model.get_submodule(name), calibrated.get_submodule(name)
            assert torch.equal(fake.stored()[0], expected.weight_codebook)
            kernel = make_model("deploy").get_submodule(name).weight
            torch.testing.assert_close(layer.kernel(), kernel, rtol=1e-4, atol=1e-5)
            bias = layer.bias if form == "deploy" or name == "classifier" else layer.equivalent()[1]
            torch.testing.assert_close(bias, expected.bias, rtol=1e-4, atol=1e-5)
