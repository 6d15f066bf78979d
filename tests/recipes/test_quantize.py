"""The sweep of post-training quantization, on an untrained network: what it makes, names and draws."""

import json
import re

import pytest

from repvgg_hf import RepVGGForImageClassification
from repvgg_hf.analysis import bits_per_weight
from repvgg_hf.compression.ptq.config import CalibrationConfig

CALIBRATED = "--calibration_images 48 --calibration_batch_size 16 --max_eval_samples 40".split()
STEPS = ("sensitivity", "error_compensation", "bias_correction")


def test_ablation_adds_one_step_after_the_other(checkpoint, tmp_path, run):
    output = run(
        "quantize", "--model_name_or_path", checkpoint, "--output_dir", tmp_path, "--bits", 3,
        "--granularity", "per_channel", *CALIBRATED, "--ablation", "True", "--sensitivity", "fisher",
        "--target_bits_per_weight", 5.5, "--activation_range", "minmax",
    )  # fmt: skip
    record = json.loads((tmp_path / "quantize_results.json").read_text())
    assert record["calibration_images"] == 48 and record["images"] == 40 and record["peers"] == []
    rows = {row["model"]: row for row in record["results"]}
    plain = "cluster-per_channel-w3"
    assert list(rows) == ["float", plain, *(f"{plain}-{step}" for step in STEPS), "cluster-per_channel-w5.5-mixed"]
    assert [row["stage"] for row in record["results"]] == ["float", "quantized", *STEPS, "mixed"]
    fields = {"method": "cluster", "granularity": "per_channel", "channel_scale": False, "activation_bits": None}
    assert all(row.items() >= fields.items() for row in record["results"][1:])

    off = {"sensitivity": "none", "error_compensation": False, "bias_correction": False}
    on = {"sensitivity": "fisher", "error_compensation": True, "bias_correction": True}
    assert rows["float"]["calibration_config"] is None and rows[plain]["calibration_config"] is None
    for count, step in enumerate(STEPS, 1):
        expected = off | {name: on[name] for name in STEPS[:count]} | {"activation_range": "minmax"}
        expected = vars(CalibrationConfig(**expected, calibration_batch_size=16))
        assert rows[f"{plain}-{step}"]["calibration_config"] == expected
    labels = [row["label"] for row in record["results"]]
    assert labels[1:4] == [
        "cluster, channel",
        "cluster, channel, + sensitivity",
        "cluster, channel, + error compensation",
    ]

    mixed = rows["cluster-per_channel-w5.5-mixed"]
    assert mixed["bits"] == 5.5 and 3.5 < mixed["bits_per_weight"] <= 5.5
    for name, row in list(rows.items())[1:]:
        assert name in output.replace("\n", "")
        assert row["bytes"] == (tmp_path / name / "model.safetensors").stat().st_size and row["seconds"] > 0
        reloaded = RepVGGForImageClassification.from_pretrained(tmp_path / name)
        assert bits_per_weight(reloaded) == row["bits_per_weight"]

    for x in ("bits", "bytes"):
        assert (tmp_path / f"accuracy_{x}.png").exists()
        drawn = (tmp_path / f"accuracy_{x}.svg").read_text()
        assert all(f">{label}</text>" in drawn for label in labels)


def test_without_ablation_calibration_is_one_step(checkpoint, tmp_path, run):
    run(
        "quantize", "--model_name_or_path", checkpoint, "--output_dir", tmp_path, "--bits", 4, 3,
        "--method", "uniform", *CALIBRATED, "--activation_bits", 8, "--plot", "False",
    )  # fmt: skip
    rows = json.loads((tmp_path / "quantize_results.json").read_text())["results"]
    names = [f"uniform-per_tensor+scale-w{bits}-a8-calibrated" for bits in (4, 3)]  # as integers need a scale
    assert [row["model"] for row in rows[1:]] == names
    assert not list(tmp_path.glob("*.svg"))
    config = RepVGGForImageClassification.from_pretrained(tmp_path / rows[1]["model"]).config.quantization_config
    assert config.activation_bits == 8 and config.bits == 4


def test_combinations_take_only_the_options_that_they_have():
    from repvgg_hf.recipes.quantize import SweepOptions

    both = {"method": ["cluster", "uniform"], "granularity": ["per_channel", "per_group"]}
    sweep = SweepOptions(**both, bits=[3], group_size=4, symmetric=False, channel_scale=False)
    config = sweep.config("cluster", "per_group", 3)
    assert (config.group_size, config.symmetric, config.bits) == (4, None, 3)
    config = sweep.config("uniform", "per_channel", 3)
    assert (config.group_size, config.symmetric, config.range_method) == (None, False, "mse")
    with pytest.raises(ValueError, match="symmetric=False is an option of method='uniform'"):
        SweepOptions(symmetric=False)
    with pytest.raises(ValueError, match="group_size=4 don't fit"):
        SweepOptions(group_size=4)


BAD = {
    "--bits 9": "bits must be an integer from 1 to 8, got 9",
    "--method kmeans": "method must be one of cluster, uniform, got 'kmeans'",
    "--ablation True": "--ablation needs images to calibrate on: add --calibration_images",
    "--activation_bits 8": "--activation_bits needs images to calibrate on",
    "--target_bits_per_weight 3.2": "--target_bits_per_weight needs images to calibrate on",
    "--calibration_images 8 --target_bits_per_weight 9": "target_bits_per_weight must be from 1 to 8, got 9.0",
    "--calibration_images 8 --sensitivity hessian": "sensitivity must be one of none, fisher, got 'hessian'",
    "--peers tensorrt": "--peers must be of coremltools, nncf, got 'tensorrt'",
    "--peers coremltools": "Comparing with coremltools needs it: `pip install coremltools`",
    "--peers nncf": "Comparing with nncf needs it: `pip install nncf openvino`",
    "--plot True": r"Plots need matplotlib: `pip install 'repvgg-hf\[plot\]'`",
}


@pytest.fixture(scope="module")
def messages(start) -> dict[str, str]:
    """What the recipe says to bad options before it looks at the model; the extras are not installed."""
    code = f"""
import json, sys
from repvgg_hf.recipes import quantize
sys.modules |= dict.fromkeys(["coremltools", "nncf", "matplotlib"])
said = {{}}
for options in {list(BAD)!r}:
    try:
        quantize.main(["--model_name_or_path", "/there/is/no/model", *options.split()])
    except (ValueError, ImportError) as error:
        said[options] = str(error)
print(json.dumps(said))
"""
    done = start("-c", code)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("options", BAD)
def test_bad_options_stop_before_any_work(messages, options):
    assert re.search(BAD[options], messages[options])
