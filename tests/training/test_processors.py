"""New image processors, and a checkpoint's at another size."""

import pytest
from transformers import BitImageProcessorPil, ConvNextImageProcessor, ViTImageProcessor

from repvgg_hf.training.pixels import pixels_of
from repvgg_hf.training.processors import make_processor, with_size


def test_a_new_processor():
    processor = make_processor(224, 0.875)
    assert processor.size["shortest_edge"] == 256 and processor.crop_size["height"] == 224
    assert pixels_of(make_processor(32, channels=1)).mode == "L"
    with pytest.raises(ValueError, match="--num_channels must be 3, or 1 for gray images, got 4"):
        make_processor(32, channels=4)


def test_another_size_keeps_all_else():
    sizes = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    processor = BitImageProcessorPil(**sizes, resample=1, image_mean=[0.1, 0.2, 0.3])
    changed = with_size(processor, 112, None)
    assert changed.size["shortest_edge"] == 128 and changed.crop_size["width"] == 112
    assert (changed.resample, list(changed.image_mean), type(changed)) == (1, [0.1, 0.2, 0.3], BitImageProcessorPil)
    assert with_size(processor, None, 0.5).size["shortest_edge"] == 448
    assert processor.size["shortest_edge"] == 256


def test_other_processors_at_another_size():
    assert pixels_of(with_size(ViTImageProcessor(), 32, None)).size == (32, 32)
    assert pixels_of(with_size(ConvNextImageProcessor(), 32, 0.8)).resized((50, 50)) == (40, 40)
    with pytest.raises(ValueError, match="ViTImageProcessor resizes to .* without a crop: leave --crop_ratio out"):
        with_size(ViTImageProcessor(), None, 0.8)
