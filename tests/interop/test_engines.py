"""One call for every engine: the same logits, names and processor; damaged and foreign files are named."""

import shutil
import sys

import numpy as np
import pytest
import torch
from engine_models import SIZE, pictures, trained
from PIL import Image
from transformers import BitImageProcessor

from repvgg_hf import RepVGGForImageClassification, export_onnx, load_engine
from repvgg_hf.interop.agreement import agreement, in_batches
from repvgg_hf.interop.formats import FORMATS, check_formats, equal_weights, export_format, file_bytes
from repvgg_hf.interop.processor import processor_facts

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")
helper, FLOAT, INT64 = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
IMAGE = ("x", FLOAT, ["n", 3, "h", "w"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A quantized checkpoint with names of classes, an image processor, and files for engines."""
    folder, model = tmp_path_factory.mktemp("checkpoint"), trained()
    model.config.id2label = dict(enumerate(["top left", "top right", "bottom left", "bottom right"]))
    model.save_pretrained(folder)
    side = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    BitImageProcessor(**side, resample=2).save_pretrained(folder)
    export_format(model, folder, "onnx")
    export_format(model, folder, "torch", image_size=SIZE)
    return folder


@pytest.fixture
def images() -> np.ndarray:
    return pictures(64, seed=3)[0].numpy()


def write_graph(path, inputs, outputs, opset=18):
    """An ONNX file with a chain from the first input to the first output, that is not of this package."""
    values = [[helper.make_tensor_value_info(*entry) for entry in part] for part in (inputs, outputs)]
    nodes = [helper.make_node("Identity", [inputs[0][0]], [output[0]]) for output in outputs]
    model = helper.make_model(
        helper.make_graph(nodes, "foreign", *values), opset_imports=[helper.make_opsetid("", opset)], ir_version=8
    )
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch"])
def test_engines_agree_with_the_simulation(name, checkpoint, images):
    if name == "openvino":
        pytest.importorskip("openvino")
    path = checkpoint / "onnx" / "model_q4.onnx" if name == "openvino" else checkpoint
    engine, simulated = load_engine(path, name, threads=1), load_engine(checkpoint, threads=1)
    expected = simulated(images)
    model = RepVGGForImageClassification.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        assert np.array_equal(expected, model(torch.from_numpy(images)).logits)
    found = agreement(engine(images), expected)
    assert found["agreement"] == 100 and found["near"] >= 95
    assert agreement(in_batches(engine, images, 7), expected)["near"] >= 95
    assert len(set(expected.argmax(1))) == 4


def test_names_and_processor_are_found(checkpoint, monkeypatch):
    for path in (checkpoint, checkpoint / "onnx" / "model_q4.onnx"):
        engine = load_engine(path)
        assert engine.labels == ["top left", "top right", "bottom left", "bottom right"]
        assert engine.processor().crop_size["height"] == SIZE
    monkeypatch.chdir(checkpoint / "onnx")
    assert load_engine("model_q4.onnx").file == engine.file == "onnx/model_q4.onnx"
    assert load_engine(checkpoint).file is None
    assert load_engine(checkpoint).title == "PyTorch" and engine.title == "ONNX Runtime"


def test_a_file_alone(checkpoint, images, tmp_path):
    path = shutil.copy(checkpoint / "onnx" / "model_q4.onnx", tmp_path / "alone.onnx")
    engine = load_engine(path)
    assert engine.labels is None and engine.file == "alone.onnx" and engine(images).shape == (64, 4)
    with pytest.raises(ValueError, match="has no preprocessor_config.json, which says how images for alone.onnx"):
        engine.processor()


def test_the_file_with_integers_is_preferred(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "all")
    for name in ("model.onnx", "model_int8.onnx", "model_q4_image.onnx"):
        shutil.copy(checkpoint / "onnx" / "model_q4.onnx", tmp_path / "all" / "onnx" / name)
    assert load_engine(tmp_path / "all", "onnxruntime").path.name == "model_q4.onnx"


def test_a_fixed_number_of_images(images, tmp_path):
    model = trained()
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).logits.numpy()
    engine = load_engine(export_onnx(model, tmp_path, dynamic=(), image_size=SIZE))
    assert engine.ends.image.shape == (1, 3, SIZE, SIZE)
    assert agreement(engine(images[:5]), expected[:5])["agreement"] == 100
    with pytest.raises(
        ValueError, match=r"takes pixel_values float32 \[1, 3, 16, 16\], got images float32 \[2, 3, 16, 8"
    ):
        engine(images[:2, :, :, :8])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_finite(images, tmp_path, value):
    engine = load_engine(export_onnx(trained(), tmp_path))
    images = images[:3].copy()
    images[1, 0, 2, 3] = value
    with pytest.raises(ValueError, match=r"^1 of 3 images for .*model_q4.onnx have pixels that are NaN .* image 1:"):
        engine(images)
    images[1] = np.finfo(np.float32).max  # whose sum is infinite
    assert np.isfinite(engine(images)).all()


def test_a_file_that_prepares_pictures(checkpoint, tmp_path):
    model = RepVGGForImageClassification.from_pretrained(checkpoint).eval()
    engine = load_engine(export_onnx(model, tmp_path, preprocess=checkpoint))
    pixels = np.random.default_rng(0).integers(0, 256, (1, 40, 30, 3), dtype=np.uint8)
    prepared = load_engine(checkpoint).processor()(Image.fromarray(pixels[0]), return_tensors="pt")["pixel_values"]
    assert engine.takes_pictures
    assert np.abs(engine(pixels) - load_engine(checkpoint)(prepared)).max() < 0.2  # a gray level, by the resizing
    with pytest.raises(ValueError, match=r"takes image uint8 \[any, any, any, 3\], got images float32"):
        engine(prepared)


@pytest.mark.parametrize(
    "inputs, outputs, found",
    [
        ([IMAGE], [("y", FLOAT, ["n", 3, "h", "w"])], r"inputs are x float32 \[any, 3, any, any\], its outputs y "),
        ([("ids", INT64, ["n", "t"])], [("y", INT64, ["n", "t"])], r"inputs are ids tensor\(int64\) \[any, any\]"),
        ([IMAGE, ("mask", FLOAT, ["n"])], [("y", FLOAT, None)], r"inputs are x float32 .*, mask float32 \[any\]"),
    ],
)  # fmt: skip
def test_a_foreign_file(inputs, outputs, found, tmp_path):
    with pytest.raises(ValueError, match=rf"foreign.onnx is no image classifier: its {found}"):
        load_engine(write_graph(tmp_path / "foreign.onnx", inputs, outputs))


def test_a_classifier_of_others_runs(tmp_path, images):
    x, y = helper.make_tensor_value_info(*IMAGE), helper.make_tensor_value_info("scores", FLOAT, ["n", "c"])
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["m"]), helper.make_node("Flatten", ["m"], ["scores"])]
    graph = helper.make_graph(nodes, "others", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    (tmp_path / "others.onnx").write_bytes(model.SerializeToString())
    assert np.allclose(load_engine(tmp_path / "others.onnx")(images), images.mean((2, 3)), atol=1e-6)


def test_a_damaged_file(checkpoint, tmp_path):
    data = (checkpoint / "onnx" / "model_q4.onnx").read_bytes()
    for name, content in {"half.onnx": data[: len(data) // 2], "text.onnx": b"not a model", "empty.onnx": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} (can't be loaded by ONNX Runtime 1|is no image classifier)"):
            load_engine(tmp_path / name)
    (tmp_path / "text.pt2").write_bytes(b"not a program")
    with pytest.raises(ValueError, match="text.pt2 can't be loaded by PyTorch"):
        load_engine(tmp_path / "text.pt2")
    with pytest.raises(ValueError, match="can't be loaded as a classifier's checkpoint"):
        load_engine(tmp_path, "pytorch")


def test_an_operator_that_is_too_new(tmp_path):
    path = write_graph(tmp_path / "new.onnx", [IMAGE], [("logits", FLOAT, ["n", "c"])], opset=999)
    with pytest.raises(ValueError, match=r"can't be loaded by ONNX Runtime.*needs a newer one, `pip install --upgrade"):
        load_engine(path)


@pytest.mark.parametrize(
    "path, engine, message",
    [
        ("nothing.onnx", None, "nothing.onnx does not exist: give a checkpoint's folder"),
        ("{checkpoint}", "tflite", "engine must be one of pytorch, inductor, .*, got 'tflite'"),
        (
            "{checkpoint}",
            "executorch",
            r"no file for ExecuTorch \(executorch/model.pte\): write one with recipes/export",
        ),
        (
            "{checkpoint}/config.json",
            None,
            "config.json is no model's file: give a checkpoint's folder, or a file .onnx",
        ),
        ("{checkpoint}/config.json", "onnxruntime", "ONNX Runtime takes .onnx, got .*config.json"),
        ("{checkpoint}/onnx/model_q4.onnx", "pytorch", "PyTorch takes a checkpoint's folder, got"),
        ("no/such-model", None, "no/such-model is neither a file nor a folder here"),
    ],
)
def test_bad_paths(path, engine, message, checkpoint):
    with pytest.raises(ValueError, match=message):
        load_engine(path.format(checkpoint=checkpoint), engine)


def test_other_bad_arguments(checkpoint, images, tmp_path):
    with pytest.raises(ValueError, match="threads must be a positive integer"):
        load_engine(checkpoint, threads=0)
    (tmp_path / "model.mlpackage").mkdir()
    with pytest.raises(ValueError, match="is for Core ML, which runs on Apple's systems alone"):
        load_engine(tmp_path / "model.mlpackage")
    engine = load_engine(checkpoint)
    for wrong in (images.astype(np.float64), images[0], images[:, :2], images[:0]):
        with pytest.raises(ValueError, match=r"takes pixel_values float32 \[any, 3, any, any\], got images"):
            engine(wrong)


@pytest.mark.parametrize(
    "suffix, extra, package", [("onnx", "onnx", "onnxruntime"), ("pte", "executorch", "executorch")]
)
def test_a_missing_package_is_named_with_its_extra(suffix, extra, package, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package] + [package]:
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / f"model.{suffix}").write_bytes(b"")
    with pytest.raises(ImportError, match=rf"`pip install 'repvgg-hf\[{extra}\]"):
        load_engine(tmp_path / f"model.{suffix}")


def test_agreement_by_hand():
    expected = np.array([[0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])  # whose standard deviation is 1
    logits = expected + np.array([[0, 0], [0, 9e-6], [0, 3]])
    assert agreement(logits, expected) == pytest.approx(
        {"agreement": 200 / 3, "near": 200 / 3, "largest_difference": 3}
    )


def test_facts_of_the_processor(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    facts = processor_facts()
    assert facts["max_isa"] == "AVX2" and facts["cpu"]
    capability = torch.backends.cpu.get_cpu_capability().lower()  # such as avx512
    assert not capability.startswith("avx") or any(flag.startswith(capability) for flag in facts["cpu_flags"])


class TestFormats:
    def test_weights_are_compared(self, checkpoint, tmp_path):
        model = RepVGGForImageClassification.from_pretrained(checkpoint)
        for weights in ("packed", "float"):
            file = export_format(model, tmp_path, "onnx", weights)
            assert equal_weights(model, file) == (6, 6) and file.bytes == file.path.stat().st_size
            with torch.no_grad():
                changed = RepVGGForImageClassification.from_pretrained(checkpoint)
                changed.classifier.weight_codes[0] ^= 1  # the code of one weight
            assert equal_weights(changed, file) == (5, 6)

    def test_bytes_of_all_parts(self, tmp_path):
        for name, size in {"a.xml": 3, "a.bin": 5, "b.onnx": 7}.items():
            (tmp_path / name).write_bytes(b"x" * size)
        assert [file_bytes(tmp_path / name) for name in ("a.xml", "b.onnx")] == [8, 7] and file_bytes(tmp_path) == 15

    def test_bad_arguments(self, tmp_path):
        for formats in (["onnx", "tensorrt"], "onnx"):
            with pytest.raises(ValueError, match="formats must be a list of some of onnx, openvino, .*, got '[to]"):
                check_formats(formats)
        with pytest.raises(ValueError, match="weights of openvino must be one of packed, got 'float'"):
            export_format(trained(), tmp_path, "openvino", "float")
        assert all(kind.weights for kind in FORMATS.values())
