"""The pixels of evaluation are those of the model's image processor, whichever it is."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessor,
    BitImageProcessorPil,
    ConvNextImageProcessor,
    ConvNextImageProcessorPil,
    ViTImageProcessor,
    ViTImageProcessorPil,
)

from repvgg_hf.training.pixels import pixels_of

SIZES = [(1, 1), (5, 40), (64, 9), (21, 33), (33, 21), (31, 31), (50, 63), (300, 200)]
RESIZE = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
PROCESSORS = {
    "bilinear": BitImageProcessor(**RESIZE, resample=2),
    "bicubic": BitImageProcessor(**RESIZE, resample=3),
    "nearest": BitImageProcessor(**RESIZE, resample=0),
    "Lanczos": BitImageProcessor(**RESIZE, resample=1),
    "PIL": BitImageProcessorPil(**RESIZE, resample=3),
    "not normalized": BitImageProcessor(**RESIZE, do_normalize=False),
    "not rescaled": BitImageProcessor(**RESIZE, do_rescale=False, do_normalize=False),
    "another factor": BitImageProcessor(**RESIZE, rescale_factor=1 / 128),
    "not resized": BitImageProcessor(**RESIZE, do_resize=False),
    "oblong crop": BitImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 40, "width": 31}),
    "oblong crop, PIL": BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 40, "width": 31}),
    "ViT": ViTImageProcessor(size={"height": 32, "width": 24}),
    "ViT, PIL": ViTImageProcessorPil(size={"height": 32, "width": 24}),
    "ConvNext": ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.9),
    "ConvNext, PIL": ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.9),
    "ConvNext, large": ConvNextImageProcessor(size={"shortest_edge": 384}),
    "gray": BitImageProcessor(**RESIZE, image_mean=[0.4], image_std=[0.2], do_convert_rgb=False),
}


def assert_same_pixels(processor):
    pixels = pickle.loads(pickle.dumps(pixels_of(processor)))  # a worker gets it so
    generator = np.random.default_rng(1)
    for height, width in SIZES:
        shape = (height, width) if pixels.mode == "L" else (height, width, 3)
        image = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
        expected = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
        assert (pixels(image) - expected).abs().max() <= 1e-5, (height, width)


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_the_processors(name):
    assert_same_pixels(PROCESSORS[name])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop", ["center", "squash"])
def test_pixels_are_those_of_the_timm_wrapper(crop, interpolation):
    pytest.importorskip("timm", reason="the wrapper's processor is made of timm's transforms")
    from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

    settings = {"input_size": (3, 32, 32), "crop_pct": 0.9, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.2)}
    assert_same_pixels(TimmWrapperImageProcessor(settings | {"crop_mode": crop, "interpolation": interpolation}))
    with pytest.raises(ValueError, match="TimmWrapperImageProcessor.*its transforms are ResizeKeepRatio"):
        pixels_of(TimmWrapperImageProcessor(settings | {"crop_mode": "border"}))


class Inverting(BitImageProcessor):
    """A processor that does something its fields don't tell."""

    def rescale_and_normalize(self, images, *args):
        return super().rescale_and_normalize(255 - images, *args)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (BitImageProcessor(do_center_crop=False), "BitImageProcessor can't be followed.*sizes: set do_center_crop"),
        (BitImageProcessor(size={"max_height": 9, "max_width": 9}), "its size is .*max_height"),
        (Inverting(**RESIZE), "Inverting can't be followed.*its pixels differ"),
    ],
)  # fmt: skip
def test_what_can_not_be_followed_is_refused_by_name(processor, message):
    with pytest.raises(ValueError, match=message):
        pixels_of(processor)
