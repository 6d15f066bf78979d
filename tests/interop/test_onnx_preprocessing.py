"""Resize, crop and normalization in an ONNX file, against the image processors of Transformers."""

import numpy as np
import pytest
import torch
from PIL import Image
from quantized_models import session, small_repvgg
from transformers import BitImageProcessorPil, ConvNextImageProcessorPil, ViTImageProcessorPil

from repvgg_hf import export_onnx
from repvgg_hf.interop.onnx.preprocessing import add_preprocessing, image_steps

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def noise(height: int, width: int) -> np.ndarray:
    """An image with an edge at every pixel, on which filters differ most."""
    return np.random.RandomState(height).randint(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(noise(9, 12)).resize((width, height), 3))


PICTURES = [smooth(48, 64), smooth(75, 50), noise(64, 64), noise(57, 91), noise(20, 30), noise(200, 133), noise(56, 56)]


def width_first(picture: np.ndarray, steps) -> Image.Image:
    """Resize the width, so that the processor is left with the height; Pillow 13 has another order at some sizes."""
    image = Image.fromarray(picture)
    if steps.resize is None:
        return image
    if isinstance(steps.resize, tuple):
        return image.resize((steps.resize[1], image.height), {"linear": 2, "cubic": 3}[steps.filter])
    assert image.height <= 2 * image.width  # else the height would go first
    return image


def gray_levels(processor, steps, picture) -> float:
    """Return the largest difference between the processor's image and the graph's, of gray levels from 0 to 255."""
    helper = onnx.helper
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 3, "height", "width"])
        for name in ("pixel_values", "same")
    ]
    node = helper.make_node("Identity", ["pixel_values"], ["same"])
    graph = helper.make_graph([node], "graph", values[:1], values[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    add_preprocessing(proto, steps)
    onnx.checker.check_model(proto, full_check=True)
    import onnxruntime

    loaded = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = loaded.run(None, {"image": np.stack([picture, picture])})
    expected = processor(width_first(picture, steps), return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(found[0], found[1])
    assert found[:1].shape == expected.shape
    return (abs(found[:1] - expected) * np.array(STD).reshape(1, 3, 1, 1) * 255).max()


SIZES = [{"shortest_edge": 64}, {"shortest_edge": 57}, {"height": 60, "width": 72}, {"shortest_edge": 56}]


@pytest.mark.parametrize("resample", [2, 3], ids=["bilinear", "bicubic"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_within_one_gray_level(size, resample):
    processor = BitImageProcessorPil(size=size, crop_size=56, resample=resample, image_mean=MEAN, image_std=STD)
    steps = image_steps(processor)
    assert steps.size == (56, 56)
    assert max(gray_levels(processor, steps, picture) for picture in PICTURES) < 1.01


def test_without_a_crop_and_without_resizing():
    processor = ViTImageProcessorPil(size={"height": 40, "width": 56}, image_mean=MEAN, image_std=STD)
    assert max(gray_levels(processor, image_steps(processor), picture) for picture in PICTURES) < 1.01
    processor = BitImageProcessorPil(do_resize=False, do_center_crop=False, image_mean=MEAN, image_std=STD)
    assert image_steps(processor).size is None
    assert gray_levels(processor, image_steps(processor), noise(31, 45)) < 0.01


def test_torchvisions_processor_is_near():
    """It and PIL's are up to two gray levels apart."""
    pytest.importorskip("torchvision")
    from transformers import BitImageProcessor

    processor = BitImageProcessor(size={"shortest_edge": 64}, crop_size=56, image_mean=MEAN, image_std=STD)
    assert max(gray_levels(processor, image_steps(processor), picture) for picture in PICTURES) < 2.01


def test_a_whole_file(tmp_path):
    model = small_repvgg()
    processor = BitImageProcessorPil(size={"shortest_edge": 36}, crop_size=32, image_mean=MEAN, image_std=STD)
    processor.save_pretrained(tmp_path)
    path = export_onnx(model, tmp_path, preprocess=tmp_path)
    assert path.name == "model_q4_image.onnx"
    loaded = session(path)
    (image,) = loaded.get_inputs()
    assert (image.name, image.type, image.shape) == (
        "image", "tensor(uint8)", ["batch", "image_height", "image_width", 3],
    )  # fmt: skip
    for picture in PICTURES:
        (found,) = loaded.run(None, {"image": picture[None]})
        with torch.no_grad():
            expected = model(**processor(Image.fromarray(picture), return_tensors="pt")).logits
        assert abs(found - expected.numpy()).max() < 0.05 * expected.std()


def test_another_size_than_the_model_takes(tmp_path):
    processor = BitImageProcessorPil(size={"shortest_edge": 64}, crop_size=56)
    with pytest.raises(ValueError, match=r"makes images of \(56, 56\), and the model takes \(32, 32\)"):
        export_onnx(small_repvgg(), tmp_path, preprocess=processor, dynamic=["batch"], image_size=32)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (BitImageProcessorPil(resample=1), "resample=.*use 2 .bilinear"),
        (BitImageProcessorPil(size={"shortest_edge": 20}, crop_size=32), "set its size to at least its crop_size"),
        (BitImageProcessorPil(do_resize=False), "may be smaller"),
        (ConvNextImageProcessorPil(), "got a ConvNextImageProcessorPil"),
        (object(), "got a object"),
    ],
    ids=["filter", "small size", "no resize", "kind", "no processor"],
)
def test_processors_that_do_something_else(processor, message):
    with pytest.raises(ValueError, match=message):
        image_steps(processor)
