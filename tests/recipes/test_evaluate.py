"""The evaluation of a checkpoint, in real processes."""

import json
import shutil

import pytest
import torch

from repvgg_hf import RepVGGForImageClassification, export_onnx


def test_it_agrees_with_the_recipe_that_quantized(checkpoint, tmp_path, run):
    folder, figures = tmp_path / "quantize", tmp_path / "figures.json"
    run("quantize", "--model_name_or_path", checkpoint, "--output_dir", folder, "--plot", "False")
    results = json.loads((folder / "quantize_results.json").read_text())["results"]
    name = "cluster-per_tensor-scale-w4-calibrated"
    row = next(row for row in results if row["model"] == name)
    run("evaluate", "--model_name_or_path", folder / name, "--output_json", figures)
    evaluated = json.loads(figures.read_text())
    for key in ("top1", "top5", "loss", "bytes", "bits_per_weight"):
        assert evaluated[key] == pytest.approx(row[key], rel=1e-4)
    assert evaluated["bytes"] == (folder / name / "model.safetensors").stat().st_size
    assert evaluated["command"][0] == "recipes/evaluate.py"


def test_a_script_takes_its_arguments_from_a_json_file(checkpoint, tmp_path, start, recipes):
    options = {"model_name_or_path": str(checkpoint), "max_eval_samples": 50, "output_json": str(tmp_path / "out.json")}
    (tmp_path / "arguments.json").write_text(json.dumps(options))
    done = start(recipes / "evaluate.py", tmp_path / "arguments.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["images"] == 50


def test_engines_against_pytorch(checkpoint, tmp_path, run):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    shutil.copytree(checkpoint, tmp_path / "model")
    model = RepVGGForImageClassification.from_pretrained(checkpoint)
    images = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model.quantize(bits=4, activation_bits=8, calibration=[images]).save_pretrained(tmp_path / "model")
    path = export_onnx(model, tmp_path / "model")
    options = ["--engines", "onnxruntime", "--files", path, "--threads", 1, "--timed_images", 3]
    options += ["--per_device_eval_batch_size", 100, "--output_json", tmp_path / "out.json"]
    printed = run("evaluate", "--model_name_or_path", tmp_path / "model", *options)
    record = json.loads((tmp_path / "out.json").read_text())
    for row in record["engines"]:
        assert row["engine"] == "ONNX Runtime" and row["file"] == "onnx/model_q4.onnx"
        assert row["bytes"] == path.stat().st_size and row["milliseconds"] > 0
        assert row["agreement"] >= 99.7 and row["near"] >= 95  # of 360 images one may differ
        assert row["top1"] == pytest.approx(record["top1"], abs=0.3)
    assert len(record["engines"]) == 2 and record["threads"] == 1 and record["cpu_flags"] and "ONNX Runtime" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engines", "onnxruntime"], "has no file for ONNX Runtime"),
        (["--engines", "pytorch"], "--engines takes inductor, onnxruntime"),
        (["--label_column_name", "digit"], "--label_column_name is 'digit'"),
        (["--validation_dir", "{images}"], "The model has 10 classes, the dataset 2"),
    ],
)
def test_bad_options(options, message, checkpoint, images_of_two_classes, run):
    options = [option.format(images=images_of_two_classes) for option in options]
    assert message in run("evaluate", "--model_name_or_path", checkpoint, *options, expect=1).replace("\n", " ")
