"""The study of post-training quantisation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    return tmp_path / "model"


def test_it_goes_on_where_it_stopped(checkpoint, tmp_path):
    figures = tmp_path / "study.json"
    options = ["--models", f"tiny/7={checkpoint}", "--image_size", 8, "--bits", 3, "--max_eval_samples", 32]
    options += ["--calibration_samples", 32, "--output_json", figures, "--dataset_title", "Digits"]
    done = run("ptq_study.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(figures.read_text())
    results = record["models"]["tiny/7"]
    assert record["images"] == 32 and "k-means, channel|3" in results and "W4A8|W4A8" in results
    assert results["mixed|3.2"]["bits_per_weight"] <= 3.2
    table = figures.with_suffix(".md").read_text()
    assert "| tiny, float" in table and "trained with the seeds 7." in table
    for line, row in results.items():
        assert f"{row['top1']:.2f}" in table and line.split("|")[0].replace("mixed", "mixed precision") in table
    assert str(tmp_path) not in figures.read_text() + table

    del results["W4A8|W4A8"]
    results["k-means, channel|3"]["top1"] = 12.34  # what is there is kept
    figures.write_text(json.dumps(record))
    assert run("ptq_study.py", *options).returncode == 0
    again = json.loads(figures.read_text())["models"]["tiny/7"]
    assert again["k-means, channel|3"]["top1"] == 12.34 and "W4A8|W4A8" in again


def test_seeds_share_a_table_of_means():
    sizes = {"float": 32.0, "k-means, channel|4": 4.5, "theirs|4": 5.0}
    rows = {line: {"top1": 90.0 - 2 * size, "bits_per_weight": size} for line, size in sizes.items()}
    rows["theirs|4"]["library"] = "x"
    other = {line: row | {"top1": row["top1"] + 3} for line, row in rows.items()}
    record = {"images": 1, "dataset": "D", "calibration_samples": 2, "seed": 0, "models": {"BN/0": rows, "BN/1": other}}
    script = "import json, sys, ptq_study; print(ptq_study.markdown(json.loads(sys.argv[1])))"
    table = run("-c", script, json.dumps(record)).stdout
    assert "trained with the seeds 0 and 1." in table
    assert table.rstrip().splitlines()[2:] == [
        "| BN, float 27.50 | 4 bit | stored |", "|---|---|---|",
        "| k-means, channel | 82.50 | 4.50 |", "| theirs | 81.50 | 5.00 |",
    ]  # fmt: skip


def test_committed_tables_are_made_from_the_committed_json():
    script = "import json, ptq_study; print(json.dumps(ptq_study.markdown(json.load(open('%s')))))"
    figures = ROOT / "model_cards" / "ptq_study.json"
    done = run("-c", script % figures)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == figures.with_suffix(".md").read_text()
