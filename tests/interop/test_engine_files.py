"""Which file of a checkpoint's folder an engine runs: never one of another checkpoint, nor half of two."""

import copy
import os
import shutil

import numpy as np
import pytest
import torch
from engine_models import SIZE, pictures, trained, trained_float

from repvgg_hf import RepVGGForImageClassification, export_onnx, export_openvino, load_engine
from repvgg_hf.interop.formats import compare_weights, equal_weights, export_format
from repvgg_hf.runtime import saving

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")
LAYER = "repvgg.encoder.stages.1.layers.0.conv"


@pytest.fixture(scope="module")
def model():
    return trained()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """A checkpoint with the files of ONNX, and of OpenVINO if that is installed."""
    folder = tmp_path_factory.mktemp("exported")
    model.save_pretrained(folder)
    for weights in ("packed", "int8", "float"):
        export_onnx(model, folder, weights)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "model")


@torch.no_grad()
def changed(model, tensor="weight_codes"):
    """The same model but for one layer's first code or its scales."""
    other = copy.deepcopy(model)
    layer = other.get_submodule(LAYER)
    if tensor == "weight_codes":
        layer.weight_codes[0] ^= 1
    else:
        getattr(layer, tensor).mul_(1.5)
        layer.bias.mul_(1.5)  # which is in its steps
    layer.forget_weight()
    return other


def only(folder, *names):
    for path in folder.glob("onnx/*.onnx"):
        if path.name not in names:
            path.unlink()


@pytest.mark.parametrize("name", ["model_q4.onnx", "model_int8.onnx", "model.onnx"])
def test_a_file_of_an_older_checkpoint_is_refused(name, model, folder):
    only(folder, name)
    assert load_engine(folder, "onnxruntime").path.name == name
    changed(model).save_pretrained(folder)
    call = {"model_int8.onnx": r', "int8"', "model.onnx": r', "float"'}.get(name, "")
    message = rf"{name} has other weights than the checkpoint in '{LAYER}'\. .*export_onnx\(model, \".*model\"{call}\)"
    with pytest.raises(ValueError, match=message):
        load_engine(folder, "onnxruntime")
    assert load_engine(folder / "onnx" / name)(pictures(2, 3)[0]).shape == (2, 4)  # given itself, it runs


def test_other_scales_are_refused_too(model, folder):
    only(folder, "model_q4.onnx")
    changed(model, "input_scale").save_pretrained(folder)
    with pytest.raises(ValueError, match=rf"model_q4.onnx has another {LAYER}.input_scale than the checkpoint"):
        load_engine(folder, "onnxruntime")


@pytest.mark.parametrize("tensor", ["weight_codes", "input_scale"])
def test_openvino(tensor, model, tmp_path):
    pytest.importorskip("openvino")
    model.save_pretrained(tmp_path)
    export_openvino(model, tmp_path)
    load_engine(tmp_path, "openvino")
    changed(model, tensor).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"openvino_model.xml has .*{LAYER}.*export_openvino\(model, "):
        load_engine(tmp_path, "openvino")


def test_a_file_of_torch_export(model, tmp_path):
    model.save_pretrained(tmp_path)
    export_format(model, tmp_path, "torch", image_size=SIZE)
    load_engine(tmp_path, "torch")
    changed(model).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=rf"model.pt2 has other weights .*'{LAYER}'.*recipes/export.py --formats torch"
    ):
        load_engine(tmp_path, "torch")


def test_the_file_with_the_checkpoints_bits_is_taken(model, folder):
    shutil.copy(folder / "onnx" / "model_q4.onnx", folder / "onnx" / "model_q2.onnx")  # the same weights
    assert load_engine(folder, "onnxruntime").path.name == "model_q4.onnx"


def test_else_the_file_with_the_checkpoints_weights(model, folder):
    only(folder, "model_int8.onnx", "model_q4.onnx")
    fresh = changed(model)
    fresh.save_pretrained(folder)
    export_onnx(fresh, folder, "int8")
    assert load_engine(folder, "onnxruntime").path.name == "model_int8.onnx"
    model.save_pretrained(folder)
    (folder / "onnx" / "model_q4.onnx").rename(folder / "onnx" / "model_q2.onnx")
    assert load_engine(folder, "onnxruntime").path.name == "model_q2.onnx"
    changed(fresh, "input_scale").save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"model_q2.onnx has .*; .*model_int8.onnx has .* or export_onnx\(.*\"int8\"\)"
    ):
        load_engine(folder, "onnxruntime")


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    shutil.copy(folder / "onnx" / "model_q4.onnx", folder / "onnx" / "model_q2.onnx")
    assert load_engine(folder, "onnxruntime").path.name == "model_q4.onnx"
    (folder / "onnx" / "model_q4.onnx").rename(folder / "onnx" / "model_q3.onnx")
    with pytest.raises(ValueError, match="several files for ONNX Runtime, model_q2.onnx, model_q3.onnx"):
        load_engine(folder, "onnxruntime")


def test_a_quantized_file_beside_a_float_checkpoint(folder):
    only(folder, "model_q4.onnx")
    trained_float().save_pretrained(folder)
    with pytest.raises(ValueError, match=r"model_q4.onnx has other weights .* in 5 more of 6 layers"):
        load_engine(folder, "onnxruntime")


def test_a_damaged_file_is_named(folder):
    only(folder, "model_q4.onnx")
    path = folder / "onnx" / "model_q4.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model_q4.onnx (can't be read|has other weights)"):
        load_engine(folder, "onnxruntime")


@pytest.mark.parametrize("moved", [0, 1])
def test_an_interrupted_export_is_finished(moved, model, folder, monkeypatch):
    """As after SIGKILL: the new files complete in their folder, and some of them or none moved."""
    pytest.importorskip("openvino")
    export_openvino(model, folder)
    fresh = changed(model)
    fresh.save_pretrained(folder)
    replace, done = os.replace, []
    before = {path.name: path.read_bytes() for path in folder.glob("openvino/*")}

    def stop(source, target):
        if target.parent == folder / "openvino":  # and no other file on the way there
            if len(done) == moved:
                raise KeyboardInterrupt
            done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(saving.os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            export_openvino(fresh, folder)
    assert list(folder.glob(".saving-*"))
    half = {path.name for path in folder.glob("openvino/*") if path.read_bytes() != before[path.name]}
    assert half == {"openvino_model.bin"} if moved else half == set()
    engine = load_engine(folder / "openvino" / "openvino_model.xml") if moved else load_engine(folder, "openvino")
    assert not list(folder.glob(".saving-*"))
    images = pictures(16, seed=3)[0]
    with torch.no_grad():
        assert np.abs(engine(images) - fresh(images).logits.numpy()).max() < 0.1
    assert equal_weights(fresh, export_format(fresh, folder, "openvino")) == (6, 6)
    load_engine(folder, "openvino")


def test_an_interrupted_onnx_export_is_finished(model, folder):
    only(folder)
    new = export_onnx(model, folder / "elsewhere")
    staging = folder / "onnx" / ".saving-x-1-y"
    staging.mkdir()
    new.rename(staging / new.name)
    (staging / saving._MANIFEST).write_text(f'["{new.name}"]')
    assert load_engine(folder / "onnx" / new.name).path.is_file()  # that was not there
    assert not staging.exists()


def test_half_precision_is_compared_in_float32(model, exported):
    half = RepVGGForImageClassification.from_pretrained(exported, dtype=torch.float16)
    for name in ("model.onnx", "model_q4.onnx"):
        assert set(compare_weights(half, "onnx", exported / "onnx" / name).values()) == {True}


class TestImages:
    def test_a_tensor_with_a_gradient(self, exported):
        images = pictures(2, 3)[0]
        engine = load_engine(exported, "onnxruntime")
        assert np.array_equal(engine(images.clone().requires_grad_()), engine(images))

    def test_wrong_images(self, exported):
        engine = load_engine(exported, "onnxruntime")
        wrong = {
            (1, 3, 0, 8): r"takes pixel_values float32 .*, got images float32 \[1, 3, 0, 8\]",
            (0, 3, 8, 8): r"got images float32 \[0, 3, 8, 8\]",
            (3, 8, 8): r"got images float32 \[3, 8, 8\]",
        }
        for shape, message in wrong.items():
            for images in (torch.zeros(shape), np.zeros(shape, np.float32)):
                with pytest.raises(ValueError, match=message):
                    engine(images)
        with pytest.raises(ValueError, match="NumPy has no bfloat16.*pass images.float"):
            engine(torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match="images for .*model_q4.onnx are no array"):
            engine([[1.0], [1.0, 2.0]])

    def test_what_the_engine_fails_on(self, exported, tmp_path, model):
        export_format(model, tmp_path, "torch", image_size=SIZE)
        with pytest.raises(ValueError, match=r"can't run .*model.pt2 on images float32 \[2, 1, 16, 16\] \("):
            load_engine(tmp_path / "torch" / "model.pt2")(torch.zeros(2, 1, SIZE, SIZE))
