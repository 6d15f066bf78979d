"""recipes/qat.py: the whole story on the digits, on one and two processes, killed and resumed; what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoImageProcessor, AutoModelForImageClassification

TINY = ["--hidden_sizes", "8", "16", "--depths", "1", "1", "--max_train_samples", "256", "--max_eval_samples", "64"]
SHORT = [*TINY, "--num_float_epochs", "1", "--num_train_epochs", "1", "--per_device_train_batch_size", "32"]
LONGER = "--num_float_epochs 4 --num_train_epochs 4 --max_train_samples 640 --per_device_train_batch_size 16".split()
LONGER += "--hidden_sizes 16 32 --depths 1 1".split()


def rows_by_stage(folder) -> dict[str, dict]:
    return {row["stage"]: row for row in json.loads((folder / "qat_results.json").read_text())["results"]}


@pytest.fixture(scope="module")
def whole_story(tmp_path_factory, run):
    folder = tmp_path_factory.mktemp("qat") / "run"
    run("qat", "--output_dir", folder, *LONGER)
    return folder


def test_few_pictures_of_a_folder_are_trained_on_for_many_epochs(images_of_two_classes):
    """180 pictures are 6 batches of 32: 400 steps are 67 epochs. What was given stays."""
    from repvgg_hf.recipes import qat
    from repvgg_hf.training.splits import DataArguments

    data_args, args = DataArguments(dataset_name=str(images_of_two_classes)), qat.QATArguments()
    qat.suit_pictures(data_args, args, 180, 1, {"folder", "dataset_name"})
    assert (data_args.augmentation, args.per_device_train_batch_size) == ("photo", 32)
    assert args.num_train_epochs * 6 >= 400 > (args.num_train_epochs - 1) * 6
    args = qat.QATArguments(num_train_epochs=2, per_device_train_batch_size=8)
    qat.suit_pictures(data_args, args, 180, 1, {"num_train_epochs", "per_device_train_batch_size"})
    assert (args.num_train_epochs, args.per_device_train_batch_size) == (2, 8)
    with pytest.raises(ValueError, match="There is no folder no/such: give a folder with one folder of pictures"):
        qat.main(["no/such"])


def test_it_packs_what_it_trained(whole_story):
    rows = rows_by_stage(whole_story)
    assert list(rows) == ["float", "fused", "trained", "packed", "reloaded"]
    assert rows["packed"]["largest_logit_difference"] == rows["reloaded"]["largest_logit_difference"] == 0
    assert rows["reloaded"]["top1"] > rows["fused"]["top1"] - 3
    assert rows["packed"]["bytes"] < 0.25 * rows["fused"]["bytes"]
    assert (rows["fused"]["method"], rows["fused"]["bits"], rows["fused"]["granularity"]) == ("float", 32, None)
    packed = {"method": "cluster", "bits": 4, "granularity": "per_tensor", "channel_scale": True}
    assert rows["packed"].items() >= packed.items()


def in_a_fresh_process(folder):
    """Logits of the model in `folder` for some noise, and its image processor's crop."""
    from repvgg_hf.recipes.qat import reload_logits

    images = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    return reload_logits(folder, images), AutoImageProcessor.from_pretrained(folder).crop_size["height"]


def test_the_state_of_each_phase_is_a_checkpoint(whole_story):
    """For `from_pretrained`, of the weights that the phase ended with: in QAT of quantized ones."""
    logits = {}
    for phase, model in (("float", "float"), ("qat", "quantized")):
        found, expected = (in_a_fresh_process(whole_story / folder) for folder in (f"checkpoint/{phase}", model))
        logits[model] = expected[0]
        assert np.abs(found[0] - expected[0]).max() < 1e-5 and found[1] == expected[1] == 8
        state = AutoModelForImageClassification.from_pretrained(whole_story / "checkpoint" / phase)
        assert (state.config.qat_config is not None) == (phase == "qat")
        assert state.config.id2label[7] == "7" and state.config.architectures == ["RepVGGForImageClassification"]
    assert np.abs(logits["float"] - logits["quantized"]).max() > 1e-2


def test_killed_and_resumed_it_gives_the_same_files(whole_story, tmp_path, run):
    folder = tmp_path / "run"
    arguments = [sys.executable, "-m", "repvgg_hf.recipes.qat", "--output_dir", str(folder), *LONGER]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (folder / "checkpoint" / "qat").exists():  # the first epoch of QAT is done
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "quantized").exists()
    run("qat", "--output_dir", folder, *LONGER, "--resume_from_checkpoint", "True")
    for name in ("float", "quantized"):
        expected = (whole_story / name / "model.safetensors").read_bytes()
        assert (folder / name / "model.safetensors").read_bytes() == expected


def test_two_processes(tmp_path, start, recipes):
    """Half the batch on each of two ranks gives one model with one choice of bits, saved once and reloading exactly."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", recipes / "qat.py"]
    options = ["--output_dir", tmp_path, *LONGER, "--per_device_train_batch_size", "8"]
    options += ["--target_bits_per_weight", "5", "--calibration_images", "32"]
    done = start(*launch, *options, timeout=580, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_by_stage(tmp_path)
    assert rows["packed"]["largest_logit_difference"] == rows["reloaded"]["largest_logit_difference"] == 0
    assert rows["packed"]["top1"] > 50 and rows["packed"]["bits_per_weight"] <= rows["packed"]["bits"] == 5
    found, expected = (in_a_fresh_process(tmp_path / folder)[0] for folder in ("checkpoint/qat", "quantized"))
    assert np.abs(found - expected).max() < 1e-5


@pytest.fixture(scope="module")
def everything_on(tmp_path_factory, run):
    folder = tmp_path_factory.mktemp("qat") / "run"
    switches = (
        "--bits 2 --granularity per_channel --calibration_images 32 --activation_bits 8 --activation_range minmax "
        "--distillation_weight 0.5 --distillation_features 0.1 --ema_decay 0.5 --blend_ratio 0.5 --momentum 0.8 "
        "--codebook_momentum 0.5 --codebook_update_every 2 --gradient_checkpointing True"
    )
    return folder, run("qat", "--output_dir", folder, *SHORT, *switches.split()), switches


def test_all_switches_together(everything_on):
    folder, output, _ = everything_on
    rows = rows_by_stage(folder)
    assert rows["packed"]["largest_logit_difference"] == rows["reloaded"]["largest_logit_difference"] == 0
    assert rows["packed"].items() >= {"bits": 2, "granularity": "per_channel", "activation_bits": 8}.items()
    record = json.loads((folder / "qat_results.json").read_text())
    # 256 images in batches of 32 are 8 steps
    assert record["qat_config"] == {"codebook_momentum": 0.5, "codebook_update_every": 2, "blend_steps": 4}
    for phase in ("float", "qat"):
        assert f"{phase} epoch 1: loss" in output and (folder / "checkpoint" / phase).exists()
    assert "images/s" in output and "of the time waiting for data" in output


def test_resuming_with_other_bits(everything_on, run):
    folder, _, switches = everything_on
    options = switches.replace("--bits 2", "--bits 3").split()
    output = run("qat", "--output_dir", folder, *SHORT, *options, "--resume_from_checkpoint", "True", expect=1)
    assert "is of another run (--bits was 2, now 3): give the same to go on" in output.replace("\n", " ")


def test_a_rate_that_diverges(tmp_path, run):
    run("qat", "--output_dir", tmp_path, *SHORT)
    good = (tmp_path / "checkpoint" / "qat" / "model.safetensors").read_bytes()
    options = ["--learning_rate", "1e30", "--num_train_epochs", "2", "--max_grad_norm", "1e30"]
    options += ["--output_dir", tmp_path, "--model_name_or_path", tmp_path / "float"]
    output = run("qat", *TINY, *options, expect=1).replace("\n", " ")
    assert "are NaN or infinite in optimizer step" in output and "lower the learning rate" in output
    assert (tmp_path / "checkpoint" / "qat" / "model.safetensors").read_bytes() == good


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--bits 0", "bits must be an integer from 1 to 8, got 0"),
        ("--blend_ratio 0.5 --blend_steps 9", "--blend_ratio 0.5 and --blend_steps 9 say the same: give one"),
        ("--blend_ratio 2", "--blend_ratio must be from 0 to 1, got 2.0"),
        ("--activation_bits 8", "--activation_bits 8, --target_bits_per_weight None and --calibration_images 0, give"),
        ("--calibration_images 8", "--activation_bits None, --target_bits_per_weight None and --calibration_images 8"),
        ("--target_bits_per_weight 9 --calibration_images 8", "target_bits_per_weight must be from 1 to 8, got 9.0"),
        (
            '--target_bits_per_weight 3 --calibration_images 8 --bits_overrides {"classifier":8}',
            "--target_bits_per_weight chooses the bits of every layer, and --bits_overrides those of some",
        ),
        ("--activation_range entropy --activation_bits 8", "activation_range must be one of minmax, mse"),
        ("--activation_range minmax", "activation_range='minmax' is for quantized activations, and activation_bits is"),
        ("--distillation_temperature 4", "--distillation_temperature does nothing without --distillation_weight"),
        ("--model_name_or_path x --num_float_epochs 9", "--num_float_epochs is of float training, and --model_name"),
        ("--method uniform --codebook_momentum 0.5", "codebook_momentum=0.5 is an option of method='cluster', not of"),
        ("--codebook_momentum 1", "codebook_momentum must be at least 0 and less than 1"),
    ],
)
def test_bad_options_stop_before_the_float_training(options, message):
    from repvgg_hf.recipes import qat

    with pytest.raises(ValueError, match=message):
        qat.main(options.split())


def test_steps_are_counted_as_the_loop_takes_them():
    from repvgg_hf.recipes.qat import QATArguments, total_steps

    args = QATArguments(num_train_epochs=3, per_device_train_batch_size=10, gradient_accumulation_steps=2)
    assert total_steps(102, 1, args) == 3 * 6  # 11 batches
    assert total_steps(101, 1, args) == 3 * 5  # 10 batches: the last one, of a single image, is left out
    assert total_steps(101, 2, args) == 3 * 3  # 6 batches on each


@pytest.mark.parametrize(("name", "processes"), [("gpu1", 1), ("gpu8", 8), ("nodes4", 32)])
def test_configurations_are_what_accelerate_takes(name, processes, recipes):
    from accelerate.commands.config.config_args import load_config_from_file

    path = recipes / "configs" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.num_processes == processes
    assert set(yaml.safe_load(path.read_text())) <= set(config.to_dict())
