"""Training with coremltools' differentiable k-means, the peer in the study."""

import json

import pytest


def options(checkpoint, folder) -> list:
    chosen = ["--model_name_or_path", checkpoint, "--output_dir", folder, "--dataset_name", "digits"]
    return chosen + ["--image_column_name", "image", "--augmentation", "crop", "--max_eval_samples", 32]


def test_it_trains_and_palettizes(digits_checkpoint, run, tmp_path):
    pytest.importorskip("coremltools", reason="the peer needs the extra 'peers'")
    figures = tmp_path / "study.json"
    study = ["--models", f"tiny/7={digits_checkpoint}", "--dataset_name", "digits", "--image_column_name", "image"]
    study += ["--augmentation", "crop", "--bits", 2, "--activations", "none", "--methods", "coremltools DKM"]
    study += ["--num_train_epochs", 1, "--max_train_samples", 64, "--max_eval_samples", 32]
    run("studies.qat", *study, "--output_json", figures, "--output_dir", tmp_path / "dkm")
    row = json.loads(figures.read_text())["models"]["tiny/7"]["coremltools DKM|2"]
    trained = json.loads((tmp_path / "dkm" / "qat_results.json").read_text())
    assert trained["command"][0] == "recipes/studies/qat_dkm.py" and "--bits" in trained["command"]
    assert row["top1"] == trained["results"][1]["top1"] and row["float_top1"] == trained["results"][0]["top1"]
    assert 2 < row["bits_per_weight"] < 3  # codes, and what tables and scales take
    assert f"| coremltools DKM | {row['top1']:.2f} |" in figures.with_suffix(".md").read_text()


def test_refusals(digits_checkpoint, run, tmp_path):
    output = run("studies.qat_dkm", *options(digits_checkpoint, tmp_path), "--resume_from_checkpoint", expect=1)
    assert "leave --resume_from_checkpoint out" in output
    output = run("studies.qat_dkm", *options(digits_checkpoint, tmp_path)[2:], expect=1)
    assert "give --model_name_or_path" in output
