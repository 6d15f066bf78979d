"""Pretrained networks as a start: the same features from each kind of source, what OABN changes, what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from repvgg_hf import from_timm
from repvgg_hf.networks.original import REPVGG_NAMES
from repvgg_hf.networks.timm_folder import save_for_timm
from repvgg_hf.training.closing_bound import CLOSING, ClosingBound, find_clipping
from repvgg_hf.training.data_defaults import suggest_pretrained_size
from repvgg_hf.training.pretrained import (
    SourceArguments,
    check_pretrained,
    describe_change,
    load_pretrained,
    processor_of,
    with_new_classifier,
)


@pytest.fixture(scope="module")
def network():
    """A RepVGG-A0 whose identity branches are large, as those of trained ones are."""
    torch.manual_seed(0)
    model = from_timm(timm.create_model("repvgg_a0", num_classes=7).eval())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "identity.norm.weight" in name:
                parameter.fill_(2.0)
            elif name.endswith("norm.weight"):
                parameter.fill_(0.5)
    return model


@pytest.fixture(scope="module")
def sources(network, tmp_path_factory):
    """By its kind, the name of a place where the network is."""
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "timm").mkdir()
    save_for_timm(network, folder / "timm")
    network.save_pretrained(folder / "ours")
    state = {REPVGG_NAMES.theirs(name): tensor.contiguous() for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": state}, folder / "authors.pth")
    return {
        "timm's folder": folder / "timm",
        "timm's file": folder / "timm" / "model.safetensors",
        "ours": folder / "ours",
        "the authors' file": folder / "authors.pth",
    }


@pytest.fixture
def pixel_values(generator):
    return torch.randn(4, 3, 64, 64, generator=generator)


@torch.no_grad()
def test_every_source_gives_the_same_features_to_a_new_classifier(network, sources, pixel_values):
    expected = network.repvgg(pixel_values).pooler_output
    for kind, name in sources.items():
        loaded = load_pretrained(str(name))
        torch.testing.assert_close(loaded(pixel_values).logits, network(pixel_values).logits, msg=kind)
        model = with_new_classifier(loaded, ["cat", "dog"], oabn=False).eval()
        torch.testing.assert_close(model.repvgg(pixel_values).pooler_output, expected, msg=kind)
        assert model.config.id2label == {0: "cat", 1: "dog"} and model.classifier.weight.shape == (2, 1280)
        assert loaded.config.num_labels == 7  # the old one is not changed
        mean = processor_of(loaded).image_mean
        assert np.allclose(mean, timm.create_model("repvgg_a0").pretrained_cfg["mean"], atol=1e-3), kind


def test_what_the_bound_cuts_off_is_counted_and_told(network, pixel_values):
    model = with_new_classifier(network, ["cat", "dog"], oabn=True, oabn_threshold=6.0)
    clipping = find_clipping(model)
    # the stem has no identity, nor have the layers that halve the map: of 22 layers 17 have one
    widths = [192 if "stages.2" in name else 96 if "stages.1" in name else 48 for name, _ in network.named_modules()
              if name.endswith("branches.identity")]  # fmt: skip
    small = sum(module.out_channels for name, module in network.named_modules() if name.endswith("branches.1x1.conv"))
    assert clipping.channels == sum(widths) + small
    block = model.repvgg.encoder.stages[2].layers[5].conv
    kernel = block.branches["3x3"].conv.weight * 0.5 / np.sqrt(1 + 1e-5)  # of norms that have seen no image
    assert clipping.clipped >= sum(widths) and clipping.largest >= 2 / kernel.std().item() * 0.99
    first, second = describe_change(network, model, pixel_values, 200)
    assert f"bounds {clipping.clipped:,} of {clipping.channels:,} channels" in first and "of 4 training images" in first
    assert second.startswith("The bound closes in until step 200, before which validation tells little. --oabn False")
    wide = with_new_classifier(network, ["cat", "dog"], oabn=True, oabn_threshold=1e6)
    (line,) = describe_change(network, wide, pixel_values, 0)
    assert "bounds 0 of" in line and "by 0%; the old classifier then says the same of 4 of them." in line


@torch.no_grad()
def test_the_bound_closes_in_from_one_that_changes_nothing(network, pixel_values):
    model = with_new_classifier(network, ["cat", "dog"], oabn=True, oabn_threshold=6.0).eval()
    bound, found = ClosingBound(model, find_clipping(model).largest), []
    block = model.repvgg.encoder.stages[0].layers[0].conv
    for step in range(11):
        bound.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=10), None)
        found.append(block.oabn_threshold)
        if step == 0:
            expected = network.repvgg(pixel_values).pooler_output
            torch.testing.assert_close(model.repvgg(pixel_values).pooler_output, expected)
        bound.on_step_end(None, None, None)
        assert block.oabn_threshold == 6.0  # of what is evaluated and saved
    closed = round(CLOSING * 10)
    factors = np.divide(found[1 : closed + 1], found[:closed])
    assert np.allclose(factors, factors[0]) and factors[0] < 1 and found[closed:] == [6.0] * (11 - closed)


def test_what_is_no_pretrained_network(network, sources, tmp_path):
    def refused(name, message):
        with pytest.raises(ValueError, match=message):
            load_pretrained(str(name))

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no config.json: give a RepVGG of timm")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "vit"}')
    refused(tmp_path / "empty", "is vit by its config.json: give a RepVGG")
    network.reparameterize().save_pretrained(tmp_path / "fused")
    refused(tmp_path / "fused", "is fused, and training needs its branches")
    other = timm.create_model("mobileone_s0", num_classes=3)
    timm.models.save_for_hf(other, str(tmp_path / "other"), safe_serialization=True)
    refused(tmp_path / "other", "is mobileone_s0: give a RepVGG")
    save_file({"weight": torch.zeros(1)}, tmp_path / "some.safetensors")
    refused(tmp_path / "some.safetensors", "has no layers of RepVGG")
    refused("org/nowhere", "--pretrained org/nowhere is no file or folder, and can't be had from the Hub")


@pytest.mark.parametrize("option", ["model_name_or_path", "variant", "depths", "ignore_mismatched_sizes"])
def test_options_that_say_otherwise_are_refused(option):
    with pytest.raises(ValueError, match=f"--{option} says otherwise than --pretrained x"):
        check_pretrained(SourceArguments(pretrained="x"), {"pretrained", option})


@pytest.mark.parametrize(("side", "trained_with", "expected"), [(150, 224, 160), (40, 224, 128), (150, 32, 32)])
def test_size_of_pictures(split_of, side, trained_with, expected):
    assert suggest_pretrained_size(split_of(4, (side, side + 20)), trained_with) == expected
