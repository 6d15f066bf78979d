"""The sweep of post-training quantization, on an untrained network: what it makes, names and draws."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BitImageProcessor

from repvgg_hf import RepVGGConfig, RepVGGForImageClassification
from repvgg_hf.analysis import bits_per_weight

RECIPE = Path(__file__).parents[2] / "recipes" / "ptq.py"
CALIBRATED = "--calibration_samples 48 --calibration_batch_size 16 --max_eval_samples 40 --tuning_steps 2".split()
STEPS = ("sensitivity", "error_compensation", "bias_correction", "tuning_steps")


def run(*options) -> str:
    """The output of the recipe, which must succeed."""
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RECIPE), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    config = RepVGGConfig(stem_hidden_size=8, hidden_sizes=[8, 16], depths=[1, 1], strides=[1, 2], num_labels=10)
    RepVGGForImageClassification(config).save_pretrained(folder)
    size = {"height": 8, "width": 8}
    BitImageProcessor(size={"shortest_edge": 8}, crop_size=size, resample=2).save_pretrained(folder)
    return folder


def test_ablation_adds_one_step_after_the_other(checkpoint, tmp_path):
    output = run(
        "--model_name_or_path", checkpoint, "--output_dir", tmp_path, "--bits", 3, "--granularities", "per_channel",
        *CALIBRATED, "--ablation", "True", "--sensitivity", "fisher", "--target_bits_per_weight", 5.5,
        "--activation_range", "minmax",
    )  # fmt: skip
    record = json.loads((tmp_path / "ptq_results.json").read_text())
    assert record["calibration_samples"] == 48 and record["images"] == 40 and record["peers"] == []
    rows = {row["model"]: row for row in record["results"]}
    plain = "cluster-per_channel-w3"
    assert list(rows) == ["float", plain, *(f"{plain}-{step}" for step in STEPS), "cluster-per_channel-w5.5-mixed"]

    off = {"sensitivity": "none", "error_compensation": False, "bias_correction": False, "tuning_steps": 0}
    on = {"sensitivity": "fisher", "error_compensation": True, "bias_correction": True, "tuning_steps": 2}
    assert rows["float"]["options"] is None and rows[plain]["options"] is None
    for count, step in enumerate(STEPS, 1):
        expected = off | {name: on[name] for name in STEPS[:count]} | {"activation_range": "minmax"}
        assert rows[f"{plain}-{step}"]["options"] == expected
    labels = [row["label"] for row in record["results"]]
    assert labels[1:4] == [
        "cluster, channel",
        "cluster, channel, + sensitivity",
        "cluster, channel, + error compensation",
    ]

    mixed = rows["cluster-per_channel-w5.5-mixed"]
    assert mixed["bits"] is None and 3.5 < mixed["bits_per_weight"] <= 5.5
    for name, row in list(rows.items())[1:]:
        assert name in output.replace("\n", "")
        assert row["bytes"] == (tmp_path / name / "model.safetensors").stat().st_size and row["seconds"] > 0
        reloaded = RepVGGForImageClassification.from_pretrained(tmp_path / name)
        assert bits_per_weight(reloaded) == row["bits_per_weight"]

    for x in ("bits", "bytes"):
        assert (tmp_path / f"accuracy_{x}.png").exists()
        drawn = (tmp_path / f"accuracy_{x}.svg").read_text()
        assert all(f">{label}</text>" in drawn for label in labels)


def test_without_ablation_calibration_is_one_step(checkpoint, tmp_path):
    run(
        "--model_name_or_path", checkpoint, "--output_dir", tmp_path, "--bits", 4, 3, "--methods", "uniform",
        *CALIBRATED, "--activation_bits", 8, "--plot", "False",
    )  # fmt: skip
    rows = json.loads((tmp_path / "ptq_results.json").read_text())["results"]
    assert [row["model"] for row in rows[1:]] == [f"uniform-per_tensor-w{bits}-a8-calibrated" for bits in (4, 3)]
    assert not list(tmp_path.glob("*.svg"))
    config = RepVGGForImageClassification.from_pretrained(tmp_path / rows[1]["model"]).config.quantization_config
    assert config.activation_bits == 8 and config.bits == 4


BAD = {
    "--ablation True": "--ablation needs images to calibrate on: add --calibration_samples",
    "--activation_bits 8": "--activation_bits needs images to calibrate on",
    "--target_bits_per_weight 3.2": "--target_bits_per_weight needs images to calibrate on",
    "--calibration_samples 8 --target_bits_per_weight 9": "target_bits_per_weight must be from 1 to 8, got 9.0",
    "--calibration_samples 8 --sensitivity hessian": "sensitivity must be one of none, second_moment, fisher",
    "--peers tensorrt": "--peers must be of coremltools, nncf, got 'tensorrt'",
    "--peers coremltools": "Comparing with coremltools needs it: `pip install coremltools`",
    "--peers nncf": "Comparing with nncf needs it: `pip install nncf openvino`",
    "--plot True": r"Plots need matplotlib: `pip install 'repvgg-hf\[plot\]'`",
}


@pytest.fixture(scope="module")
def messages() -> dict[str, str]:
    """What the recipe says to bad options before it looks at the model; the extras are not installed."""
    code = f"""
import json, sys
import ptq
sys.modules |= dict.fromkeys(["coremltools", "nncf", "matplotlib"])
said = {{}}
for options in {list(BAD)!r}:
    try:
        ptq.main(["--model_name_or_path", "/there/is/no/model", *options.split()])
    except (ValueError, ImportError) as error:
        said[options] = str(error)
print(json.dumps(said))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=RECIPE.parent, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("options", BAD)
def test_bad_options_stop_before_any_work(messages, options):
    assert re.search(BAD[options], messages[options])
