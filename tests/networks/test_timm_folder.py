"""Folders that timm loads: the same logits and preparation of images, what timm can't make."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from transformers import BitImageProcessorPil

from repvgg_hf import RepVGGConfig, RepVGGForImageClassification, from_timm
from repvgg_hf.networks.timm_folder import save_for_timm
from repvgg_hf.networks.timm_images import timm_image_settings
from repvgg_hf.runtime.image_processor_file import ImageProcessorFile


def a0(**fields):
    torch.manual_seed(0)
    return RepVGGForImageClassification(RepVGGConfig.from_variant("a0", num_labels=3, **fields)).eval()


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))


@torch.no_grad()
def test_repvgg(tmp_path, picture):
    ours = a0(id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    processor = BitImageProcessorPil(
        size={"shortest_edge": 73}, crop_size={"height": 64, "width": 64}, resample=3, image_mean=[0.4, 0.5, 0.6]
    )
    ours.image_processor_file = ImageProcessorFile(processor.to_json_string())
    save_for_timm(ours, tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pixels = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(theirs(pixels), ours(pixels).logits)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "repvgg_a0" and config["label_names"] == ["a", "b", "c"]
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    actual = create_transform(**resolve_model_data_config(theirs), is_training=False)(picture)[None]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}


@torch.no_grad()
def test_other_networks(tmp_path):
    ours = from_timm(timm.create_model("repghostnet_050", num_classes=3, in_chans=1, drop_rate=0.1).eval())
    save_for_timm(ours, tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pixels = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(theirs(pixels), ours(pixels).logits)


def test_what_timm_can_not_make(tmp_path):
    with pytest.raises(ValueError, match=r"timm's repvgg_a0 has other tensors: missing: .*reparameterize_model"):
        save_for_timm(a0().reparameterize(), tmp_path)
    with pytest.raises(ValueError, match=r"timm \S+ has no repvgg_b1g2: a newer one may have"):
        save_for_timm(RepVGGForImageClassification(RepVGGConfig.from_variant("b1g2", num_labels=3)), tmp_path)
    assert not list(tmp_path.iterdir())


class TestImageSettings:
    @pytest.mark.parametrize("crop_mode", ["center", "squash"])
    @pytest.mark.parametrize("crop_pct", [0.8, 0.875, 0.9, 0.95, 1.0])
    def test_there_and_back(self, crop_pct, crop_mode):
        theirs = timm.create_model("repvgg_a0", num_classes=3)
        theirs.pretrained_cfg = theirs.pretrained_cfg | {"crop_pct": crop_pct, "crop_mode": crop_mode}
        processor = json.loads(from_timm(theirs).image_processor_file.text)
        settings = timm_image_settings(processor)
        edges = [int(settings["input_size"][1] / share) for share in (settings["crop_pct"], crop_pct)]
        assert edges[0] == edges[1] and settings["crop_mode"] == crop_mode
        assert settings["interpolation"] == "bilinear" and settings["std"] == [0.229, 0.224, 0.225]

    def test_every_edge(self):
        for edge in range(32, 600):
            processor = {
                "size": {"shortest_edge": edge}, "crop_size": {"height": 32, "width": 32}, "resample": 2,
                "rescale_factor": 1 / 255, "image_mean": [0.5], "image_std": [0.5],
            } | dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True)  # fmt: skip
            assert int(32 / timm_image_settings(processor)["crop_pct"]) == edge

    @pytest.mark.parametrize("change", [{"do_resize": False}, {"do_center_crop": False}, {"size": {"longest_edge": 9}}])
    def test_what_timm_does_not_do(self, change, caplog):
        processor = json.loads(from_timm(timm.create_model("repvgg_a0")).image_processor_file.text)
        assert timm_image_settings(processor | change) is None and "timm can't prepare images" in caplog.text
