"""The benchmarks at a size that says nothing about speed: they run, and their records are sound."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("timm", reason="the benchmarks compare with timm")

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = "--repeats 2 --seconds 0.001"
COMMANDS = {
    "inference": "--variant cifar --image_size 32 --batch_sizes 1 2 --method uniform",
    "train_step": "--variants cifar --image_sizes 32 --batch_sizes 2",
    "load": "--variant cifar --image_size 32 --method uniform --memory_repeats 1",
    "qat": "--variants cifar --image_sizes 32 --batch_sizes 2 --codebook_updates kmeans --dkm False --memory_repeats 0",
    "quantize": "--variants cifar --layers 3 --peers kmeans1d scikit-learn --peer_repeats 2",
    "calibrate": "--variant cifar --images 8 --image_size 32 --tuning_steps 0 1 --activation_memory 0",
}
RUNS = {"inference": 2, "train_step": 1, "load": 4, "qat": 1, "quantize": 5, "calibrate": 2}


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(RECIPES / "benchmark.py"), *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture(scope="module", params=COMMANDS)
def record(request, tmp_path_factory):
    name = request.param
    output = tmp_path_factory.mktemp(name) / "record.json"
    done = run(name, *SMALL.split(), *COMMANDS[name].split(), "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text())


def test_record_says_how_it_was_made(record):
    assert record["command"][:2] == ["recipes/benchmark.py", record["benchmark"]]
    assert record["seed"] == 0 and record["threads"] == 1 and record["device"]
    assert {"torch", "transformers", "timm"} <= record["versions"].keys()
    assert len(record["runs"]) == RUNS[record["benchmark"]]


def test_ratios_are_those_of_the_recorded_values(record):
    for measured in record["runs"]:
        medians = {name: statistics.median(values) for name, values in measured["values"].items()}
        assert measured["medians"] == medians and min(medians.values()) > 0
        for line in measured["ratios"]:
            assert line["ratio"] == medians[line["name"]] / medians[line["peer"]]
            assert line["bar"] is None or line["bar"] > 0
            low, high = line["quartiles"]
            assert low <= high


def test_every_time_is_recorded(record):
    for measured in record["runs"]:
        if measured["unit"] == "s":
            assert {len(values) for values in measured["values"].values()} == {2}


def test_unknown_benchmark_is_told_which_there_are():
    done = run("speed")
    assert done.returncode == 1 and "inference, train_step, load, qat, quantize, calibrate" in done.stderr
