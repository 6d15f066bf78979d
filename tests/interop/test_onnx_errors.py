"""What `export_onnx` refuses, and what an interrupted export leaves."""

import sys

import pytest
import torch
from quantized_models import CONFIG, images, quantized, small_repvgg
from torch import nn

import repvgg_hf
from repvgg_hf import RepVGGConfig, RepVGGForImageClassification, export_onnx
from repvgg_hf.interop.onnx import exporting, read_onnx_weights

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return small_repvgg()


@pytest.fixture
def train_form():
    return RepVGGForImageClassification(RepVGGConfig(**CONFIG))


def test_train_form(train_form, tmp_path):
    with pytest.raises(ValueError, match=r"train form \(repvgg.embeddings.layer.conv and 4 more .* quantize\(\)"):
        export_onnx(train_form, tmp_path)
    assert not list(tmp_path.iterdir())


def test_quantized_training_under_way(train_form, tmp_path):
    train_form.prepare_qat(bits=4)
    with pytest.raises(ValueError, match=r"being trained quantized: call quantize\(\) without arguments"):
        export_onnx(train_form, tmp_path, "float")


def test_not_quantized(train_form, tmp_path):
    with pytest.raises(ValueError, match=r"not quantized: call quantize\(activation_bits=8.* weights='float'"):
        export_onnx(train_form.reparameterize(), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_bits": None}, "codebook of .* is float16"),
        ({"activation_bits": None, "codebook_dtype": "int8", "channel_scale": True}, "is not quantized"),
    ],
    ids=["float codebooks", "no activation bits"],
)
def test_no_integers(options, message, tmp_path):
    with pytest.raises(ValueError, match=rf"{message}.* Or export it with weights='float'"):
        export_onnx(small_repvgg(**options), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "int4"}, "weights must be one of packed, int8, float, got 'int4'"),
        ({"tensorrt": True}, "pass weights='int8'"),
        ({"weights": "int8", "tensorrt": True}, "zero point .* and TensorRT takes 8 and 0: .*int8_symmetric"),
        ({"dynamic": "batch"}, "dynamic must be a list of some of batch, height, width, got 'batch'"),
        ({"dynamic": ["depth"]}, "dynamic must be a list"),
        ({"dynamic": None}, "dynamic must be a list of some of batch, height, width, got None"),
        ({"opset": 13}, "opset must be an integer from 18 to 2[0-9], which .* can write, got 13"),
        ({"opset": 99}, "opset must be an integer from 18 to 2[0-9], which .* can write, got 99"),
        ({"opset": 18.0}, "opset must be an integer .* got 18.0"),
        ({"opset": True}, "opset must be an integer .* got True"),
        ({"file_name": ".onnx"}, "such as 'model.onnx', without folders, got '.onnx'"),
        ({"file_name": 3}, "must be the name of an .onnx file .* got 3"),
        ({"file_name": "folder/model.onnx"}, "without folders, got 'folder/model.onnx'"),
        ({"file_name": "model.bin"}, "must be the name of an .onnx file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_arguments(model, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_onnx(model, tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_package(model, package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ImportError, match=rf"{package}.*pip install 'repvgg-hf\[onnx\]'"):
        export_onnx(model, tmp_path)


@pytest.mark.parametrize("limit", ["onnx", "onnxscript"])
def test_an_older_package_has_fewer_opsets(model, limit, tmp_path, monkeypatch):
    if limit == "onnx":
        monkeypatch.setattr("onnx.defs.onnx_opset_version", lambda: 20)
    else:
        monkeypatch.setattr("onnxscript.version_converter._version_converter.SUPPORTED_MAX_ONNX_OPSET", 20)
    with pytest.raises(ValueError, match="opset must be an integer from 18 to 20, .* got 21"):
        export_onnx(model, tmp_path, opset=21)


def test_a_model_that_is_not_converted(model, tmp_path, monkeypatch):
    monkeypatch.setattr("onnxscript.version_converter._version_converter.convert_version", lambda *_, **__: None)
    with pytest.raises(ValueError, match="could not convert RepVGGFor.* to opset 20 and left it at 18"):
        export_onnx(model, tmp_path, opset=20)


def test_a_size_that_can_only_be_fixed(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 3))
    model = quantized(network, size=16)
    with pytest.raises(ValueError, match=r"images \[3, 16, 16\] and any batch, height, width .* pass image_size="):
        export_onnx(model, tmp_path, image_size=16)
    assert export_onnx(model, tmp_path, image_size=16, dynamic=["batch"]).is_file()


def test_a_model_that_values_decide(tmp_path):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x) if x.mean() < 1000 else x

    model = quantized(Network(), size=16)
    with pytest.raises(ValueError, match="Network can't be exported .* Look at what its forward does"):
        export_onnx(model, tmp_path, image_size=16, dynamic=[])


def test_a_file_in_the_folders_place(model, tmp_path):
    (tmp_path / "onnx").write_text("")
    with pytest.raises(ValueError, match="onnx is a file"):
        export_onnx(model, tmp_path)


def test_an_interrupted_export_leaves_the_old_file(model, tmp_path, monkeypatch):
    before = export_onnx(model, tmp_path).read_bytes()

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        export_onnx(model, tmp_path)
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["model_q4.onnx"]
    assert (tmp_path / "onnx" / "model_q4.onnx").read_bytes() == before


def test_more_than_a_file_holds(model, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "LARGEST", 1000)
    with pytest.raises(ValueError, match="and one ONNX file holds 1000"):
        export_onnx(model, tmp_path)


def test_a_changed_bias(tmp_path):
    model = small_repvgg()
    model.classifier.bias.data += 0.01234
    with pytest.raises(ValueError, match="biases of 'classifier' are no multiples"):
        export_onnx(model, tmp_path)


def test_reading_a_file_without_our_weights(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    path = export_onnx(network, tmp_path, "float", image_size=8)
    with pytest.raises(ValueError, match="has no weights that export_onnx wrote"):
        read_onnx_weights(path)


def test_it_is_public_and_costs_nothing_until_it_is_used():
    assert repvgg_hf.export_onnx is export_onnx and "export_onnx" in repvgg_hf.__all__
    assert images().shape == (16, 3, 32, 32)
