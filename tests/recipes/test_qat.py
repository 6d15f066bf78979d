"""recipes/qat.py: its options, its feeding of images, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = ["--hidden_sizes", "8", "16", "--depths", "1", "1", "--max_train_samples", "256", "--max_eval_samples", "64"]
SHORT = [*TINY, "--num_float_epochs", "1", "--num_train_epochs", "1", "--per_device_train_batch_size", "32"]


def run(*options, expect: int = 0) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RECIPES / "qat.py"), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=580)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def data():
    sys.path.insert(0, str(RECIPES))
    import data

    yield data
    sys.path.remove(str(RECIPES))


@pytest.fixture(scope="module")
def everything_on(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qat") / "run"
    switches = (
        "--bits 2 --granularity per_channel --anneal_bits 4 --num_anneal_epochs 1 --calibration_images 32 "
        "--distillation_weight 0.5 --distillation_features 0.1 --ema_decay 0.5 --freeze_threshold 0.1 "
        "--batch_norm_every 3 --gradient_checkpointing True --codebook_update both"
    )
    return folder, run("--output_dir", folder, *SHORT, *switches.split()), switches


def test_all_switches_together(everything_on):
    folder, output, _ = everything_on
    rows = {row["model"]: row for row in json.loads((folder / "qat_results.json").read_text())["results"]}
    assert rows["2 bit, packed"]["largest_logit_difference"] == 0
    assert rows["2 bit, reloaded"]["largest_logit_difference"] == 0
    for phase in ("float", "qat4", "qat"):
        assert f"{phase} epoch 1: loss" in output and (folder / "checkpoint" / phase).exists()
    assert "images/s" in output and "of the time waiting for data" in output


def test_resuming_with_other_bits(everything_on):
    folder, _, switches = everything_on
    options = switches.replace("--bits 2", "--bits 3").replace("--anneal_bits 4 --num_anneal_epochs 1", "")
    output = run("--output_dir", folder, *SHORT, *options.split(), "--resume_from_checkpoint", "True", expect=1)
    assert "trained with other quantization options (bits=2, now 3): give the same ones" in output.replace("\n", " ")


def test_a_rate_that_diverges(tmp_path):
    run("--output_dir", tmp_path, *SHORT)
    good = (tmp_path / "checkpoint" / "qat" / "model.safetensors").read_bytes()
    options = ["--learning_rate", "1e30", "--num_train_epochs", "2", "--max_grad_norm", "1e30"]
    output = run(
        "--output_dir", tmp_path, *TINY, *options, "--model_name_or_path", tmp_path / "float", expect=1
    ).replace("\n", " ")  # fmt: skip
    assert "are NaN or infinite in optimizer step" in output and "lower the learning rate" in output
    assert (tmp_path / "checkpoint" / "qat" / "model.safetensors").read_bytes() == good


def test_cached_images_are_those_of_the_transform(data):
    args = data.DataArguments(augmentation="none")
    processor = data.make_processor(8)
    digits = data.load_digits_dataset()["train"].select(range(20))
    cached, transform = data.CachedImages(digits, args, processor), data.BatchTransform(args, processor, train=True)
    batch = transform(cached.__getitems__([3, 5, 19]))
    plain = data.with_pixel_values(digits, args, processor, train=False)
    expected = data.collate([plain[index] for index in (3, 5, 19)])
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], atol=1e-5, rtol=1e-5)
    assert torch.equal(batch["labels"], expected["labels"]) and len(cached) == 20


@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_windows_of_the_padded_image(data, flip):
    torch.manual_seed(0)
    args = data.DataArguments(augmentation="crop_flip" if flip else "crop")
    transform = data.BatchTransform(args, data.make_processor(16), train=True)
    images = torch.randint(1, 255, (32, 3, 16, 16), dtype=torch.uint8)
    crops, found, flipped = transform.random_crop(images), set(), 0
    padded = torch.nn.functional.pad(images, [2] * 4)
    for crop, image in zip(crops, padded):
        windows = {(y, x): image[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)}
        straight = [corner for corner, window in windows.items() if torch.equal(window, crop)]
        mirrored = [corner for corner, window in windows.items() if torch.equal(window.flip(2), crop)]
        assert straight or (flip and mirrored)
        found |= set(straight or mirrored)
        flipped += not straight
    assert len(found) > 10 and (8 < flipped < 24) == flip


def test_training_data_falls_back_to_decoding(data):
    digits = data.load_digits_dataset()["train"]
    processor = data.make_processor(8)
    for options in ({"cache_gigabytes": 0}, {"augmentation": "resized_crop_flip"}):
        dataset, collate = data.training_data(digits, data.DataArguments(**options), processor)
        assert collate is data.collate and len(dataset) == len(digits)


@pytest.mark.parametrize("name, processes", [("gpu1", 1), ("gpu8", 8), ("nodes4", 32)])
def test_configurations_are_what_accelerate_takes(name, processes):
    from accelerate.commands.config.config_args import load_config_from_file

    path = RECIPES / "configs" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.num_processes == processes
    assert set(yaml.safe_load(path.read_text())) <= set(config.to_dict())
