"""The image processor and the label names that come over with a timm model, against timm's own transform and lists."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from repvgg_hf import RepVGGForImageClassification
from repvgg_hf.networks import from_timm

SMALL = {"input_size": (3, 40, 40), "crop_pct": 0.8, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}


def make(num_classes=4, **config):
    """A RepVGG of timm, of a few channels, that says this of its images and classes."""
    torch.manual_seed(0)
    model = timm.models.byobnet
    blocks = tuple(model.ByoBlockCfg(type="rep", d=1, c=width, s=2) for width in (8, 16))
    made = model.ByobNet(model.ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=8), num_classes=num_classes)
    made.pretrained_cfg = timm.create_model("repvgg_a0").pretrained_cfg | SMALL | config
    return made.eval()


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((120, 90), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    "config",
    [{}, {"interpolation": "bicubic"}, {"crop_mode": "squash"}, {"crop_pct": 1.0, "input_size": (3, 32, 32)}],
    ids=["bilinear", "bicubic", "squash", "whole"],
)
def test_pixels_are_those_of_timm(config, picture, tmp_path):
    theirs = make(**config)
    from_timm(theirs).save_pretrained(tmp_path)
    expected = create_transform(**resolve_model_data_config(theirs), is_training=False)(picture)[None]
    # timm resizes in PIL, and so does this backend; the other one rounds otherwise, by less than three steps of 255
    for backend, tolerance in (("pil", 1e-5), ("torchvision", 3 / 255 / 0.2)):
        processor = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
        actual = processor(picture, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_the_published_settings():
    processor = json.loads(from_timm(timm.create_model("repvgg_a0")).image_processor_file.text)
    assert processor["size"] == {"shortest_edge": 256} and processor["crop_size"] == {"height": 224, "width": 224}
    assert processor["resample"] == Image.Resampling.BILINEAR
    assert processor["image_mean"] == [0.485, 0.456, 0.406] and processor["image_std"] == [0.229, 0.224, 0.225]


def test_a_pipeline_works_after_every_step(picture, tmp_path):
    model = from_timm(make(label_names=["ant", "bee", "crab", "dog"]))
    model.save_pretrained(tmp_path / "train")
    model.reparameterize().save_pretrained(tmp_path / "fused")
    model.quantize(bits=4).save_pretrained(tmp_path / "w4")
    loaded = RepVGGForImageClassification.from_pretrained(tmp_path / "train")
    loaded.prepare_qat(bits=4).save_pretrained(tmp_path / "qat")
    names = {}
    for folder in ("train", "fused", "w4", "qat"):
        predicted = pipeline("image-classification", str(tmp_path / folder))(picture)
        names[folder] = {entry["label"] for entry in predicted}
    assert names == dict.fromkeys(names, {"ant", "bee", "crab", "dog"})


def test_images_that_no_processor_prepares_alike(caplog, tmp_path):
    for config in ({"crop_mode": "border"}, {"input_size": (3, 32, 40)}, {"interpolation": "other"}):
        caplog.clear()
        model = from_timm(make(**config))
        assert model.image_processor_file is None and "Save one beside it" in caplog.text
    caplog.clear()
    grey = timm.create_model("repvgg_a0", num_classes=4, in_chans=1)
    assert from_timm(grey).image_processor_file is None and "a mean of 3 channels for a model of 1" in caplog.text


class TestLabelNames:
    def test_of_imagenet(self):
        config = from_timm(timm.create_model("repvgg_a0")).config
        descriptions = ImageNetInfo("imagenet-1k").label_descriptions()
        assert all(config.id2label[index].startswith(descriptions[index]) for index in range(1000))
        assert config.id2label[0] == "tench, Tinca tinca"
        assert len(config.label2id) == 1000  # none is lost for a second class of its name
        assert config.id2label[134] == "crane (n02012849)" and config.id2label[517] == "crane (n03126707)"

    def test_their_own(self, tmp_path):
        described = {"n1": "an ant", "n3": "a crab"}
        model = from_timm(make(num_classes=3, label_names=["n1", "n2", "n3"], label_descriptions=described))
        model.save_pretrained(tmp_path)
        config = AutoModelForImageClassification.from_pretrained(tmp_path).config
        assert config.id2label == {0: "an ant", 1: "n2", 2: "a crab"}
        assert config.label2id == {"an ant": 0, "n2": 1, "a crab": 2}

    @pytest.mark.parametrize("config", [{}, {"label_names": ["a", "b"]}], ids=["none", "of other weights"])
    def test_none(self, config):
        assert from_timm(make(num_classes=4, **config)).config.id2label == {i: f"LABEL_{i}" for i in range(4)}
