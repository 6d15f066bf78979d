"""Exporting a checkpoint in all formats, in a real process: the files, what is checked of them, and what is missing."""

import json
from pathlib import Path

import pytest
import torch

from repvgg_hf import RepVGGForImageClassification
from repvgg_hf.recipes import export as recipe

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def quantized(checkpoint, tmp_path_factory) -> Path:
    """The tiny classifier of digits, as integers."""
    folder = tmp_path_factory.mktemp("quantized")
    model = RepVGGForImageClassification.from_pretrained(checkpoint)
    images = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model.quantize(bits=4, activation_bits=8, calibration=[images]).save_pretrained(folder)
    processor = "preprocessor_config.json"
    (folder / processor).write_bytes((checkpoint / processor).read_bytes())
    return folder


@pytest.fixture(scope="module")
def exported(quantized, tmp_path_factory, run) -> tuple[Path, dict, str]:
    """(folder, the record, what was printed) of an export of several formats."""
    folder = tmp_path_factory.mktemp("exported")
    options = ["--formats", "onnx", "openvino", "torch", "--weights", "packed", "int8", "float", "--output_dir", folder]
    printed = run("export", "--model_name_or_path", quantized, *options, "--threads", 1)
    return folder, json.loads((folder / "export_results.json").read_text()), printed


def test_every_file_is_there(exported):
    folder, record, _ = exported
    files = {row["file"]: row["bytes"] for row in record["files"]}
    assert list(files) == [
        "onnx/model_q4.onnx", "onnx/model_int8.onnx", "onnx/model.onnx", "openvino/openvino_model.xml",
        "torch/model.pt2",
    ]  # fmt: skip
    assert all((folder / name).is_file() for name in files)
    assert files["onnx/model_q4.onnx"] == (folder / "onnx" / "model_q4.onnx").stat().st_size
    assert record["exact_without_vnni"] is True and record["image_size"] == 8 and record["images"] == 64


def test_every_file_is_checked(exported):
    _, record, printed = exported
    for row in record["files"]:
        assert (row["layers_equal"], row["layers"]) == (4, 4) and row["engine"] in printed and row["file"] in printed
        if row["weights"] != "float":
            assert row["agreement"] >= 98 and row["near"] >= 90 and row["largest_difference"] < 0.05
            assert row["remarks"] == []


def test_pictures_can_be_what_is_compared(quantized, images_of_two_classes, tmp_path, run):
    options = ["--formats", "onnx", "--images", images_of_two_classes, "--output_dir", tmp_path / "out"]
    run("export", "--model_name_or_path", quantized, *options)
    record = json.loads((tmp_path / "out" / "export_results.json").read_text())
    assert record["images"] == 8 and record["files"][0]["agreement"] == 100


@pytest.fixture
def missing(monkeypatch):
    """Lets the formats of mobile devices lack their packages."""

    def fail(model, folder, form, size):
        raise ImportError("x is not installed, and this needs it: `pip install 'repvgg-hf[x]'`.")

    for name in ("openvino", "coreml", "torch", "executorch", "litert"):
        kind = recipe.FORMATS[name]
        monkeypatch.setitem(recipe.FORMATS, name, type(kind)(kind.title, kind.weights, kind.engine, fail, kind.read))


def test_missing_packages_are_said_and_the_rest_is_written(quantized, tmp_path, missing, capsys):
    options = ["--model_name_or_path", str(quantized), "--output_dir", str(tmp_path), "--random_images", "4"]
    record = recipe.main(options)
    assert [row.get("file") for row in record["files"]] == ["onnx/model_q4.onnx", None, None, None, None, None]
    assert (
        "litert, int8: x is not installed, and this needs it: `pip install 'repvgg-hf[x]'`." in capsys.readouterr().out
    )
    with pytest.raises(SystemExit, match=r"pip install 'repvgg-hf\[x\]'"):  # one that was asked for
        recipe.main([*options, "--formats", "onnx", "litert"])


def test_wrong_weights_end_with_an_error(quantized, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "equal_weights", lambda model, file: (3, 4))
    options = ["--model_name_or_path", str(quantized), "--output_dir", str(tmp_path), "--formats", "onnx"]
    with pytest.raises(SystemExit, match="onnx/model_q4.onnx: WEIGHTS DIFFER"):
        recipe.main(options)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--formats", "tensorflow"], "formats must be a list of some of onnx, openvino"),
        (["--weights", "int4"], "--weights takes packed, int8, float, got int4"),
        (["--random_images", "0"], "--random_images must be at least 1"),
        (["--model_name_or_path", "{float}"], "is not quantized: call quantize"),
        (["--model_name_or_path", "{float}"], "Or write --formats onnx --weights float"),
        (["--images", "none.png"], "The picture none.png does not exist"),
        (["--image_size", "0"], "--image_size must be at least 1, got 0"),
        (
            ["--formats", "openvino", "--weights", "int8"],
            "--weights int8 is no form of --formats openvino: openvino has packed",
        ),
        (
            ["--images", "{images}", "--image_size", "16", "--formats", "onnx"],
            "image processor makes .* 8 x 8, and files are written for images 16 x 16: leave out --image_size",
        ),
    ],
)
def test_bad_options(options, message, quantized, checkpoint, images_of_two_classes, tmp_path):
    options = [option.format(float=checkpoint, images=images_of_two_classes) for option in options]
    with pytest.raises(ValueError, match=message):
        recipe.main(["--model_name_or_path", str(quantized), "--output_dir", str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "quantize the float model again .*Or write --formats onnx --weights float"),
        ({"channel_scale": False}, r"no scale for each channel .*channel_scale=True\. Or write --formats onnx"),
    ],
)
def test_a_checkpoint_without_integers(options, message, checkpoint, tmp_path):
    model = RepVGGForImageClassification.from_pretrained(checkpoint)
    model.quantize(bits=4, **options).save_pretrained(tmp_path / "model")
    arguments = ["--model_name_or_path", str(tmp_path / "model"), "--image_size", "8", "--random_images", "4"]
    with pytest.raises(ValueError, match=message):
        recipe.main(arguments)
    record = recipe.main([*arguments, "--formats", "onnx", "--weights", "float"])  # what is advised
    assert record["files"][0]["layers_equal"] == record["files"][0]["layers"] == 4


def test_the_advice_about_a_scale_is_true(checkpoint, tmp_path):
    model = RepVGGForImageClassification.from_pretrained(checkpoint)
    images = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {"bits": 4, "activation_bits": 8, "calibration": [images]}
    arguments = ["--image_size", "8", "--random_images", "4", "--formats", "onnx", "--output_dir", str(tmp_path)]
    model.quantize(channel_scale=False, **options).save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match="quantize the float model again .* and channel_scale=True"):
        recipe.main(["--model_name_or_path", str(tmp_path / "without"), *arguments])
    model = RepVGGForImageClassification.from_pretrained(checkpoint)
    model.quantize(channel_scale=True, **options).save_pretrained(tmp_path / "with")
    assert recipe.main(["--model_name_or_path", str(tmp_path / "with"), *arguments])["files"][0]["layers_equal"] == 4


def test_half_precision(quantized, tmp_path):
    half = RepVGGForImageClassification.from_pretrained(quantized, dtype=torch.float16)
    half.save_pretrained(tmp_path)
    options = ["--formats", "onnx", "--weights", "float", "--image_size", "8", "--random_images", "4"]
    row = recipe.main(["--model_name_or_path", str(tmp_path), *options])["files"][0]
    assert (row["layers_equal"], row["layers"]) == (4, 4) and "WEIGHTS DIFFER" not in row["remarks"]
