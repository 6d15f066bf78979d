"""The recipe that converts checkpoints: what it writes loads to the same logits, and is whole or not there."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from repvgg_hf import RepVGGConfig, RepVGGForImageClassification, to_timm_state_dict
from repvgg_hf.networks.original import REPVGG_NAMES
from repvgg_hf.recipes import convert

timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def a0():
    """RepVGG-A0 of five classes."""
    torch.manual_seed(0)
    return RepVGGForImageClassification(RepVGGConfig.from_variant("a0", num_labels=5, oabn=False)).eval()


@pytest.fixture(scope="module")
def files(a0, tmp_path_factory):
    """The same weights in files of timm and of the authors, and names for the classes."""
    folder = tmp_path_factory.mktemp("files")
    save_file(to_timm_state_dict(a0), folder / "timm.safetensors")
    theirs = {REPVGG_NAMES.theirs(key): tensor for key, tensor in a0.state_dict().items()}
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in theirs.items()}}, folder / "authors.pth")
    (folder / "names.txt").write_text("ant\nbee\n\ncrab\ndog\neel\n")
    (folder / "names.json").write_text(json.dumps(["ant", "bee", "crab", "dog", "eel"]))
    return folder


def options(**given) -> list[str]:
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)]


@torch.no_grad()
def assert_same_logits(folder, a0, tolerance=1e-4):
    loaded = AutoModelForImageClassification.from_pretrained(folder).eval()
    pixels = torch.randn(1, 3, 64, 64)
    expected = a0(pixels).logits
    torch.testing.assert_close(loaded(pixels).logits, expected, rtol=0, atol=tolerance * expected.abs().max().item())
    return loaded


def test_of_timm(a0, files, tmp_path, run):
    out = tmp_path / "out"
    given = {"model_name_or_path": "repvgg_a0", "checkpoint_file": files / "timm.safetensors"}
    printed = run("convert", *options(source="timm", output_dir=out, label_names=files / "names.txt", **given))
    assert "RepVGGForImageClassification of 7,8" in printed and f"written to {out}" in printed.replace("\n", " ")
    assert assert_same_logits(out, a0).config.id2label[2] == "crab"
    assert AutoImageProcessor.from_pretrained(out).crop_size["height"] == 224


def test_of_the_authors_and_fused(a0, files, tmp_path):
    given = {"source": "original", "checkpoint_file": files / "authors.pth", "model_name_or_path": "RepVGG-A0"}
    convert.main(options(output_dir=tmp_path / "out", fuse=True, label_names=files / "names.json", **given))
    loaded = assert_same_logits(tmp_path / "out", a0)
    assert loaded.config.deploy and loaded.config.label2id["eel"] == 4


def test_to_timm(a0, tmp_path):
    a0.save_pretrained(tmp_path / "in")
    given = {"source": "transformers", "model_name_or_path": tmp_path / "in", "to": "timm"}
    convert.main(options(output_dir=tmp_path / "out", **given))
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixels), a0(pixels).logits, rtol=1e-4, atol=1e-4)


def test_other_networks(tmp_path, files):
    theirs = timm.create_model("lcnetv2_small", num_classes=5).eval()
    save_file(theirs.state_dict(), tmp_path / "file.safetensors")
    given = {"source": "timm", "model_name_or_path": "lcnetv2_small", "checkpoint_file": tmp_path / "file.safetensors"}
    given |= {"label_names": files / "names.txt", "model_args": '{"drop_rate": 0.1}'}
    convert.main(options(output_dir=tmp_path / "branches", **given))
    convert.main(options(output_dir=tmp_path / "fused", fuse=True, **given))
    sizes = [len(load_file(tmp_path / name / "model.safetensors")) for name in ("branches", "fused")]
    assert sizes[1] < sizes[0]
    pixels = torch.randn(1, 3, 64, 64)
    for name in ("branches", "fused"):
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / name).eval()
        assert loaded.config.id2label[4] == "eel" and loaded.config.model_args["drop_rate"] == 0.1
        assert AutoImageProcessor.from_pretrained(tmp_path / name).data_config["input_size"] == (3, 224, 224)
        with torch.no_grad():
            torch.testing.assert_close(loaded(pixels).logits, theirs(pixels), rtol=1e-4, atol=1e-6)


def test_an_image_processor_from_elsewhere(files, tmp_path, checkpoint):
    given = {"source": "original", "checkpoint_file": files / "authors.pth", "output_dir": tmp_path / "out"}
    convert.main(options(image_processor=checkpoint, **given))
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").crop_size["height"] == 8

    save_file(timm.create_model("repghostnet_050").state_dict(), tmp_path / "file.safetensors")
    given = {
        "source": "timm",
        "model_name_or_path": "repghostnet_050",
        "checkpoint_file": tmp_path / "file.safetensors",
    }
    convert.main(options(output_dir=tmp_path / "ghost", image_processor=checkpoint, **given))
    assert AutoImageProcessor.from_pretrained(tmp_path / "ghost").data_config["input_size"] == (3, 8, 8)
    processor = json.loads((checkpoint / "preprocessor_config.json").read_text()) | {"do_center_crop": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match="--image_processor must resize, crop the center"):
        convert.main(options(output_dir=tmp_path / "none", image_processor=tmp_path, **given))


def test_a_failed_conversion_leaves_nothing(files, tmp_path, monkeypatch):
    given = {"source": "original", "checkpoint_file": files / "authors.pth", "output_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match="not the weights of RepVGG-B0"):
        convert.main(options(model_name_or_path="RepVGG-B0", **given))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()

    def fail(self, folder):
        (folder / "config.json").touch()
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(RepVGGForImageClassification, "save_pretrained", fail)
        convert.main(options(**given))
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(ValueError, match="--output_dir .*out is there and not empty: give a new folder"):
        convert.main(options(**given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": "keras"}, "--source must be one of timm, original, transformers, got 'keras'"),
        ({"source": "timm", "to": "onnx", "model_name_or_path": "a"}, "--to must be one of transformers, timm"),
        ({"source": "original"}, "--source original converts a file: give --checkpoint_file"),
        ({"source": "timm"}, "--source timm needs --model_name_or_path"),
        ({"source": "transformers", "model_name_or_path": "a", "checkpoint_file": "b"}, "leave --checkpoint_file out"),
        ({"source": "timm", "model_name_or_path": "a", "entry": "ema"}, "--entry is an option of --source original"),
        ({"source": "timm", "model_name_or_path": "a", "to": "timm", "fuse": True}, "--to timm takes no --fuse"),
        ({"source": "timm", "model_name_or_path": "a", "model_args": "[1]"}, "--model_args must be a JSON object"),
        (
            {"source": "timm", "model_name_or_path": "a", "model_args": "{"},
            "--model_args must be a JSON object, got '{'",
        ),
        (
            {"source": "timm", "model_name_or_path": "a", "label_names": "/no/file"},
            "--label_names must be imagenet-1k or",
        ),
        ({"source": "timm", "model_name_or_path": "a", "image_processor": "/no"}, "has no preprocessor_config.json"),
        ({"source": "timm", "model_name_or_path": "repvgg_a9"}, "has no model 'repvgg_a9': did you mean 'repvgg_a"),
    ],
)
def test_bad_options(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert.main(options(output_dir=tmp_path / "out", **given))
    assert not (tmp_path / "out").exists()


def test_bad_label_names(files, tmp_path):
    given = {"source": "original", "checkpoint_file": files / "authors.pth", "output_dir": tmp_path / "out"}
    (tmp_path / "twice.txt").write_text("ant\nbee\nant\n")
    with pytest.raises(ValueError, match="has 'ant' 2 times"):
        convert.main(options(label_names=tmp_path / "twice.txt", **given))
    (tmp_path / "few.json").write_text('["ant"]')
    with pytest.raises(ValueError, match="--label_names has 1 names, and the model 5 classes"):
        convert.main(options(label_names=tmp_path / "few.json", **given))
    with pytest.raises(ValueError, match="--label_names has 1000 names, and the model 5 classes"):
        convert.main(options(label_names="imagenet-1k", **given))
    (tmp_path / "object.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="must hold a list of names"):
        convert.main(options(label_names=tmp_path / "object.json", **given))


def test_fused_models_that_can_not_be_loaded_again(tmp_path):
    theirs = timm.create_model("mobileone_s0", num_classes=5)
    save_file(theirs.state_dict(), tmp_path / "file.safetensors")
    given = {"source": "timm", "model_name_or_path": "mobileone_s0", "checkpoint_file": tmp_path / "file.safetensors"}
    with pytest.raises(ValueError, match="A fused mobileone_s0 can't be loaded again.*convert it without --fuse"):
        convert.main(options(output_dir=tmp_path / "out", fuse=True, **given))
    assert not (tmp_path / "out").exists()
