"""The sweep of post-training quantization, on an untrained network: what it makes, names and draws."""

import json
import re
import shlex

import pytest

from repvgg_hf import RepVGGConfig, RepVGGForImageClassification
from repvgg_hf.analysis import bits_per_weight
from repvgg_hf.compression.ptq.config import CalibrationConfig
from repvgg_hf.training.processors import make_processor

CALIBRATED = "--calibration_images 48 --calibration_batch_size 16 --max_eval_samples 40".split()
STEPS = ("sensitivity", "error_compensation", "bias_correction", "tuning_steps")


def test_ablation_adds_one_step_after_the_other(checkpoint, tmp_path, run):
    output = run(
        "quantize", "--model_name_or_path", checkpoint, "--output_dir", tmp_path, "--bits", 3,
        "--granularity", "per_channel", *CALIBRATED, "--ablation", "True", "--sensitivity", "fisher",
        "--target_bits_per_weight", 5.5, "--activation_memory", 1, "--tuning_steps", 2,
    )  # fmt: skip
    record = json.loads((tmp_path / "quantize_results.json").read_text())
    assert record["calibration_images"] == 48 and record["images"] == 40 and record["peers"] == []
    rows = {row["model"]: row for row in record["results"]}
    plain = "cluster-per_channel-w3"
    assert list(rows) == ["float", plain, *(f"{plain}-{step}" for step in STEPS), "cluster-per_channel-w5.5-mixed"]
    assert [row["stage"] for row in record["results"]] == ["float", "quantized", *STEPS, "mixed"]
    fields = {"method": "cluster", "granularity": "per_channel", "channel_scale": False, "activation_bits": None}
    assert all(row.items() >= fields.items() for row in record["results"][1:])

    off = {"sensitivity": "none", "error_compensation": False, "bias_correction": False, "tuning_steps": 0}
    on = {"sensitivity": "fisher", "error_compensation": True, "bias_correction": True, "tuning_steps": 2}
    assert rows["float"]["calibration_config"] is None and rows[plain]["calibration_config"] is None
    for count, step in enumerate(STEPS, 1):
        expected = off | {name: on[name] for name in STEPS[:count]} | {"activation_memory": 1.0}
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
        assert name in output
        assert row["bytes"] == (tmp_path / name / "model.safetensors").stat().st_size and row["seconds"] > 0
        reloaded = RepVGGForImageClassification.from_pretrained(tmp_path / name)
        assert bits_per_weight(reloaded) == row["bits_per_weight"]

    for x in ("bits", "bytes"):
        assert (tmp_path / f"accuracy_{x}.png").exists()
        drawn = (tmp_path / f"accuracy_{x}.svg").read_text()
        assert all(f">{label}</text>" in drawn for label in [*labels, "recommended"])


def test_without_ablation_calibration_is_one_step(checkpoint, tmp_path, run):
    run(
        "quantize", "--model_name_or_path", checkpoint, "--output_dir", tmp_path, "--bits", 4, 3,
        "--method", "uniform", *CALIBRATED, "--activation_bits", 8, "--plot", "False",
    )  # fmt: skip
    rows = json.loads((tmp_path / "quantize_results.json").read_text())["results"]
    names = [f"uniform-per_tensor-scale-w{bits}-a8-calibrated" for bits in (4, 3)]  # as integers need a scale
    assert [row["model"] for row in rows[1:]] == names
    assert not list(tmp_path.glob("*.svg"))
    config = RepVGGForImageClassification.from_pretrained(tmp_path / rows[1]["model"]).config.quantization_config
    assert config.activation_bits == 8 and config.bits == 4


def test_a_folder_of_pictures_and_nothing_else(tmp_path, images_of_two_classes, run):
    """A family that is calibrated with all images there are, one recommended, a next command that runs, plain modes."""
    names = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    config = RepVGGConfig(stem_hidden_size=8, hidden_sizes=[8], depths=[1], stem_stride=1, strides=[1], **names)
    RepVGGForImageClassification(config).save_pretrained(tmp_path / "model")
    make_processor(8).save_pretrained(tmp_path / "model")
    output = run(
        "quantize", images_of_two_classes, "--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "out"
    )  # fmt: skip
    record = json.loads((tmp_path / "out" / "quantize_results.json").read_text())
    rows = {row["model"]: row for row in record["results"]}
    assert list(rows)[1:] == [f"cluster-per_tensor-scale-w{bits}-calibrated" for bits in (8, 4, 3, 2)]
    assert record["calibration_images"] == 6 and record["images"] == 2
    chosen = tmp_path / "out" / record["recommended"]
    assert f"Recommended: {record['recommended']} (" in output and "Fusing" not in output
    last = shlex.split(next(line for line in output.splitlines() if line.startswith("Next:")))
    assert last == ["Next:", "repvgg-hf", "predict", str(images_of_two_classes), "--model", str(chosen)]
    assert "class" in run("predict", *last[3:])
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    new = tmp_path / "new"
    new.touch()
    assert set(modes.values()) == {new.stat().st_mode & 0o777} and not any("+" in path.name for path in modes)


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


def test_steps_that_are_off_leave_out_what_they_alone_use():
    from repvgg_hf.recipes.quantize import QuantizeArguments, SweepCalibration

    calibration = SweepCalibration(equalization=0.3, tuning_steps=300, tuning_learning_rate=0.01, damping=0.1)
    stages = calibration.stages(QuantizeArguments(model_name_or_path="", ablation=True))
    used = {name: (stage.damping, stage.tuning_learning_rate) for name, stage in stages.items()}
    assert [stage.equalization for stage in stages.values()] == [None, 0.3, 0.3, 0.3, 0.3]
    assert used == {
        "quantized": (0.01, 0.001),
        "equalization": (0.01, 0.001),
        "error_compensation": (0.1, 0.001),
        "bias_correction": (0.1, 0.001),
        "tuning_steps": (0.1, 0.01),
    }


BAD = {
    "--bits 9": "bits must be an integer from 1 to 8, got 9",
    "--method kmeans": "method must be one of cluster, uniform, got 'kmeans'",
    "--calibration_images 0 --ablation True": "--ablation needs images to calibrate on: leave it out, or add --cali",
    "--calibration_images 0 --activation_bits 8": "--activation_bits needs images to calibrate on",
    "--calibration_images 0 --target_bits_per_weight 3.2": "--target_bits_per_weight needs images to calibrate on",
    "--calibration_images 0 --tuning_steps 9": "--tuning_steps needs images to calibrate on",
    "--calibration_images 0 --order one_pass": "--order needs images to calibrate on: leave it out, or add --cali",
    "--activation_range minmax": "activation_range='minmax' is for quantized activations, and activation_bits is None",
    "--calibration_images 8 --target_bits_per_weight 9": "target_bits_per_weight must be from 1 to 8, got 9.0",
    "--calibration_images 8 --sensitivity hessian": "sensitivity must be one of none, fisher, got 'hessian'",
    "--tolerance -1": "--tolerance must be from 0 to 100 percentage points, got -1.0",
    "no/such/photos": "There is no folder no/such/photos: give a folder with one folder of pictures per class",
    "--peers tensorrt": "--peers must be of coremltools, nncf, onnxruntime, got 'tensorrt'",
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
