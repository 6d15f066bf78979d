"""The study of quantisation-aware training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BitImageProcessor

from repvgg_hf import RepVGGConfig, RepVGGForImageClassification

ROOT = Path(__file__).parents[2]


def run(*command) -> subprocess.CompletedProcess:
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=240, cwd=ROOT / "recipes")


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny untrained classifier of the digits."""
    names = {"id2label": {i: str(i) for i in range(10)}, "label2id": {str(i): i for i in range(10)}}
    config = RepVGGConfig(stem_hidden_size=8, hidden_sizes=[32], depths=[1], strides=[2], **names)
    RepVGGForImageClassification(config).save_pretrained(tmp_path / "model")
    side = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    BitImageProcessor(**side).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_it_goes_on_where_it_stopped(checkpoint, tmp_path):
    figures = tmp_path / "study.json"
    options = ["--models", f"tiny/7={checkpoint}", "--dataset_name", "digits", "--image_column_name", "image"]
    options += ["--augmentation", "crop", "--bits", 2, "--activations", "W4A8", "--num_train_epochs", 1]
    options += ["--max_train_samples", 64, "--max_eval_samples", 32, "--output_json", figures]
    options += ["--output_dir", tmp_path / "qat"]
    done = run("qat_study.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(figures.read_text())
    results = record["models"]["tiny/7"]
    assert list(results) == ["uniform (LSQ)|2", "ClusterQAT|2", "ClusterQAT, all switches|2", "W4A8"]
    packed = json.loads((tmp_path / "qat" / "qat_results.json").read_text())  # of the last line
    assert packed["quantization_config"]["activation_bits"] == 8 and packed["quantization_config"]["bits"] == 4
    assert results["W4A8"]["top1"] == next(r["accuracy"] for r in packed["results"] if r["model"] == "4 bit, packed")
    assert results["ClusterQAT|2"]["bits_per_weight"] < results["W4A8"]["bits_per_weight"]
    table = figures.with_suffix(".md").read_text()
    assert all(f"{row['top1']:.2f}" in table for row in results.values())
    assert str(tmp_path) not in figures.read_text() + table

    del results["W4A8"]
    results["ClusterQAT|2"]["top1"] = 12.34  # what is there is kept
    figures.write_text(json.dumps(record))
    assert run("qat_study.py", *options).returncode == 0
    again = json.loads(figures.read_text())["models"]["tiny/7"]
    assert again["ClusterQAT|2"]["top1"] == 12.34 and "W4A8" in again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "x"], "--models takes name/seed=folder, got 'x'"),
        (["--models", "x=y", "--activations", "W1A1"], "--activations must be of W4A8, W4A4, W2A8, got 'W1A1'"),
    ],
)
def test_bad_arguments(options, message):
    done = run("qat_study.py", *options, "--dataset_name", "digits")
    assert done.returncode != 0 and message in done.stdout + done.stderr
