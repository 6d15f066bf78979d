"""Figures are taken only if every field is there, known and possible; an error names the field and the fix."""

import copy
import json
from dataclasses import asdict

import pytest

from repvgg_hf import CalibrationConfig, ClusterConfig
from repvgg_hf.hub import Results
from repvgg_hf.hub.recipe_figures import benchmark_latency, qat_models, quantize_models
from repvgg_hf.recipes import quantize as recipe


def test_json_round_trip(results, tmp_path):
    results.to_json(tmp_path / "results.json")
    assert Results.from_json(tmp_path / "results.json") == results
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


HISTOGRAM = {"name": "OABN, fused", "first": -1, "bin_width": 0.5, "counts": [2, 3], "largest": 0.5}


def changed(values: dict, path: str, value) -> dict:
    values = copy.deepcopy(values)
    *parents, last = path.split(".")
    target = values
    for key in parents:
        target = target[int(key)] if key.isdigit() else target[key]
    if isinstance(target, list):
        target[int(last)] = value
    elif value is KeyError:
        del target[last]
    else:
        target[last] = value
    return values


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("models.1.top1", KeyError, r"results.models\[1\] lacks 'top1'"),
        ("models.1.top_1", 80.0, r"results.models\[1\] has an unknown field 'top_1': did you mean 'top1'"),
        ("speed", 3, "results has an unknown field 'speed'"),
        ("dataset", KeyError, "results lacks 'dataset'"),
        ("dataset", "digits", "results.dataset must be an object with the fields of DatasetInfo"),
        ("models.0.top1", 100.5, r"results.models\[0\].top1 must be a percentage from 0 to 100, got 100.5"),
        ("models.0.top1", -1, r"top1 must be a percentage"),
        ("models.0.top1", float("nan"), r"results.models\[0\].top1 is nan: .*left out"),
        ("models.0.loss", float("inf"), r"results.models\[0\].loss is inf"),
        ("models.0.top1", "96", r"results.models\[0\].top1 must be float, got '96'"),
        ("models.0.top1", True, r"must be float, got True"),
        ("models.0.top5", 12.0, "top5 is 12.0, below top1"),
        ("models.0.bytes", 12.5, r"results.models\[0\].bytes must be int, got 12.5"),
        ("models.0.bytes", 0, "bytes must be positive"),
        ("models.1.bits", 9, "bits must be 32 for float and 1 to 8 otherwise, got 9"),
        ("models.1.bits", 32, "bits must be 32 for float and 1 to 8 otherwise, got 32"),
        ("models.1.method", "kmeans", "method must be one of float, cluster, uniform, got 'kmeans'"),
        ("models.1.granularity", "per tensor", r"\[1\].granularity must be one of per_tensor, .*got 'per tensor'"),
        ("models.0.granularity", "per_tensor", r"models\[0\] is float and has no codebooks: leave out granularity"),
        ("models.1.channel_scale", 1, r"models\[1\].channel_scale must be bool, got 1"),
        ("models.1.model", "float", "has 'float' with seed 0 twice"),
        ("models.1.activation_bits", 16, r"models\[1\].activation_bits must be 2 to 8, or left out, got 16"),
        ("histograms", [HISTOGRAM | {"counts": [0, 0]}], r"histograms\[0\].counts must be numbers of entries, and not"),
        ("histograms", [HISTOGRAM | {"counts": [3, -1]}], r"histograms\[0\].counts must be numbers of entries"),
        ("histograms", [HISTOGRAM | {"counts": []}], r"histograms\[0\].counts must be numbers of entries"),
        ("histograms", [HISTOGRAM | {"bin_width": 0}], r"histograms\[0\].bin_width must be positive, got 0"),
        ("histograms", [HISTOGRAM, HISTOGRAM], "histograms must have different names and the same bin_width"),
        ("histograms", [HISTOGRAM, HISTOGRAM | {"name": "BN", "bin_width": 0.25}], "and the same bin_width"),
        ("models", [], "results.models is empty"),
        ("models", "none", "results.models must be a list"),
        ("models.0", None, r"results.models\[0\] must be an object"),
        ("dataset.name", "a\x00b", r"results.dataset.name has the character '\\x00'.*remove it"),
        ("description", "\ud800", r"results.description has the character '\\ud800'"),
        ("commands", ["ls", 3], r"results.commands\[1\] must be str, got 3"),
        ("kernels_after", [{"name": "x"}], r"results.kernels_after\[0\] lacks 'shape'"),
        ("latency", [{"model": "m", "engine": "e", "device": "d", "setting": "s", "median_ms": 0}],
         r"results.latency\[0\].median_ms must be positive"),
    ],
)  # fmt: skip
def test_bad_fields(results, path, value, message):
    with pytest.raises(ValueError, match=message):
        Results.from_dict(changed(asdict(results), path, value))


def test_fractions_are_not_percent(results):
    values = asdict(results)
    for row in values["models"]:
        row["top1"] /= 100
    with pytest.raises(ValueError, match=r"no top1 is above 0\.965: it looks like a fraction, give percent"):
        Results.from_dict(values)


@pytest.mark.parametrize("content", ["", "[1]", "{", "\ud800"])
def test_not_a_results_file(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="results.json .*that a recipe wrote"):
        Results.from_json(path)
    with pytest.raises(ValueError, match="none.json is no readable JSON file"):
        Results.from_json(tmp_path / "none.json")


FLOAT_ROW = {"method": "float", "bits": 32, "granularity": None, "channel_scale": None, "activation_bits": None}
FIGURES = {"top1": 95.0, "top5": 99.0, "loss": 0.1, "bytes": 200, "bits_per_weight": 4.1}
RECORD = {"seed": 3, "images": 360, "results": [{"model": "float", "stage": "float", **FLOAT_ROW, **FIGURES}]}


def models_of(results, rows: list[dict]) -> list:
    return Results.from_dict(asdict(results) | {"models": rows}).models


def test_rows_of_the_quantize_recipe(results):
    """Rows that the recipe's own functions make, with all that it adds: labels, seconds, options, mixed bits."""
    calibration = CalibrationConfig()
    trials = [
        recipe.make_trial(4, "quantized", ClusterConfig(bits=4), calibration),
        recipe.make_trial(4, "calibrated", ClusterConfig(bits=4, activation_bits=8), calibration),
        recipe.make_trial(3, "bias_correction", ClusterConfig(bits=3, granularity="per_channel"), calibration),
        recipe.make_trial(3.2, "mixed", ClusterConfig(method="uniform"), calibration),
    ]
    size = {"bytes": 300, "bits_per_weight": 3.3}
    rows = [recipe.trial_row(trial, {"top1": 90.0, "top5": 99.0, "loss": 0.1}, size, 1.5) for trial in trials]
    models = models_of(results, quantize_models(RECORD | {"results": RECORD["results"] + rows}))
    fields = ("method", "granularity", "channel_scale", "bits", "activation_bits", "training")
    assert [tuple(getattr(model, name) for name in fields) for model in models] == [
        ("float", None, False, 32, None, None),
        ("cluster", "per_tensor", True, 4, None, None),
        ("cluster", "per_tensor", True, 4, 8, "calibrated"),
        ("cluster", "per_channel", False, 3, None, "bias correction"),
        ("uniform", "per_tensor", False, 3.2, None, "mixed"),
    ]
    assert {model.seed for model in models} == {3} and models[0].top1 == 95.0 and models[1].bytes == 300


def test_rows_of_other_files_are_refused(results):
    with pytest.raises(ValueError, match="lacks the list 'results'"):
        quantize_models({"seed": 0})
    with pytest.raises(ValueError, match=r"quantize_results.results\[0\] lacks 'method'.*this version's recipe"):
        quantize_models(RECORD | {"results": [{"model": "cluster-per_tensor-w4"} | FIGURES]})
    with pytest.raises(ValueError, match=r"models\[0\].images must be int, got None"):
        models_of(results, quantize_models({"seed": 0, "results": RECORD["results"]}))


def test_rows_of_the_qat_recipe(results):
    quantized = {"method": "uniform", "bits": 4, "granularity": "per_channel", "channel_scale": True,
                 "activation_bits": 8}  # fmt: skip
    kinds = {"float": FLOAT_ROW, "fused": FLOAT_ROW, "trained": quantized, "packed": quantized, "reloaded": quantized}
    rows = [
        {"model": "any name", "stage": stage, **kind, **FIGURES, "images": 360, "largest_logit_difference": 0.0}
        for stage, kind in kinds.items()
    ]
    float_model, packed = models_of(results, qat_models({"seed": 0, "results": rows}))
    assert (float_model.model, float_model.method, float_model.training) == ("float", "float", None)
    assert (packed.model, packed.method, packed.training) == ("uniform-qat-w4", "uniform", "QAT")
    assert (packed.granularity, packed.channel_scale, packed.activation_bits) == ("per_channel", True, 8)
    assert (packed.top1, packed.top5, packed.loss, packed.images) == (95.0, 99.0, 0.1, 360)
    del rows[3]["bytes"]
    with pytest.raises(ValueError, match=r"models\[1\] lacks 'bytes'"):
        models_of(results, qat_models({"seed": 0, "results": rows}))


def test_latency_of_the_benchmark_recipe(results):
    record = {
        "benchmark": "inference", "device": "cpu", "cpu": "x86_64 AVX512", "threads": 2,
        "versions": {"torch": "2.14.1+cu130"},
        "runs": [{"setting": "a0, 224 px, batch 1", "medians": {"ours, fused": 0.0187}}],
    }  # fmt: skip
    (row,) = Results.from_dict(json.loads(json.dumps(asdict(results) | {"latency": benchmark_latency(record)}))).latency
    assert (row.engine, row.median_ms) == ("PyTorch 2.14.1", pytest.approx(18.7))
    with pytest.raises(ValueError, match="give a file that `python -m repvgg_hf.recipes.benchmarks inference` wrote"):
        benchmark_latency(record | {"benchmark": "load"})
