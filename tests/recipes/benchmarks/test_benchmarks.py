"""The benchmarks at a size that says nothing about speed: they run, and their records are sound."""

import json
import statistics
from pathlib import Path

import pytest

from repvgg_hf.recipes.benchmarks.chromium import find_chromium, find_onnxruntime_web

pytest.importorskip("timm", reason="the benchmarks compare with timm")

RESULTS = Path(__file__).parents[3] / "recipes" / "benchmarks" / "results"
SMALL = "--repeats 2 --seconds 0.001"
COMMANDS = {
    "inference": "--variant cifar --image_size 32 --batch_sizes 1 2 --method uniform",
    "train_step": "--variants cifar --image_sizes 32 --batch_sizes 2",
    "load": "--variant cifar --image_size 32 --method uniform --memory_repeats 1",
    "qat": "--variants cifar --image_sizes 32 --batch_sizes 2 --dkm False --memory_repeats 0",
    "quantize": "--variants cifar --layers 3 --peers kmeans1d scikit-learn --peer_repeats 2",
    "calibrate": "--variant cifar --calibration_images 8 --image_size 32 --activation_memory 1 0 --repeats 1",
    "fuse": "--architectures repghostnet_050 --image_size 32",
    "any_network": "--architectures test_resnet --image_size 64 --images 2 --peers none",
    "engines": "--variant cifar --image_size 32 --batch_sizes 1 --engines onnxruntime --method uniform",
    "browser": "--variant cifar --image_size 32 --images 16",
    "data": "--images 6 --image_size 32 --batch_size 2 --workers 0",
}
RUNS = {"inference": 2, "train_step": 1, "load": 4, "qat": 1, "quantize": 5, "calibrate": 2, "fuse": 2, "data": 2}
RUNS["any_network"], RUNS["engines"], RUNS["browser"] = 3, 3, 1


@pytest.fixture(scope="module", params=COMMANDS)
def record(request, tmp_path_factory, run):
    name = request.param
    for package in NEEDED.get(name, []):
        pytest.importorskip(package)
    if name == "browser" and not (find_chromium() and find_onnxruntime_web()):
        pytest.skip("needs Chromium and the npm package onnxruntime-web")
    output = tmp_path_factory.mktemp(name) / "record.json"
    run("benchmarks", name, *SMALL.split(), *COMMANDS[name].split(), "--output_json", output)
    return json.loads(output.read_text())


NEEDED = {"engines": ["onnxruntime", "onnxscript"], "browser": ["onnxruntime", "onnxscript"]}


def test_record_says_how_it_was_made(record):
    assert record["command"][:2] == ["recipes/benchmarks", record["benchmark"]]
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
            repeats = 1 if record["benchmark"] == "calibrate" else 2  # each is a fresh process
            assert {len(values) for values in measured["values"].values()} == {repeats}


def test_unknown_benchmark_is_told_which_there_are(run):
    assert "inference, train_step, load, qat, quantize, calibrate, fuse, any_network, engines, browser, data" in run(
        "benchmarks", "speed", expect=1
    )


def test_engines_have_the_simulations_logits(record):
    """And are measured in processes of their own, whose processor is known."""
    if record["benchmark"] != "engines":
        pytest.skip("of the benchmark of engines")
    measured, loading, size = record["runs"]
    for name in ("ONNX Runtime, packed", "ONNX Runtime, int8", "ONNX Runtime, float", "ours, fused, float"):
        assert measured["logits"][name]["agreement"] == 100 and measured["logits"][name]["largest_difference"] < 0.05
    assert measured["engine_versions"]["onnxruntime"] and measured["cpu"] and "max_isa" in measured
    assert loading["medians"]["allowed"] == 0.2 and size["ratios"][0]["ratio"] < 1.1


def test_memory_is_measured_in_processes_of_their_own(run, tmp_path):
    options = "--variants cifar --image_sizes 32 --batch_sizes 2 --dkm False --time False --memory_repeats 1"
    run("benchmarks", "qat", *SMALL.split(), *options.split(), "--output_json", tmp_path / "record.json")
    (measured,) = json.loads((tmp_path / "record.json").read_text())["runs"]
    assert measured["unit"] == "B" and all(value[0] > 50e6 for value in measured["values"].values())


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_ratios_are_those_of_the_committed_values(path):
    test_ratios_are_those_of_the_recorded_values(json.loads(path.read_text()))
