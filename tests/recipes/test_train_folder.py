"""`train` on a folder of pictures: what it finds, chooses, says, refuses, and never overwrites."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, TrainerState

from repvgg_hf import RepVGGForImageClassification
from repvgg_hf.recipes import train

SMALL = "--stem_hidden_size 8 --hidden_sizes 8 16 --depths 1 1".split()
SHORT = [*SMALL, "--num_train_epochs", "2", "--per_device_train_batch_size", "8"]


def draw(folder, count: int, side: int = 40, seed: int = 0) -> None:
    """Store pictures of stripes across and along, of random colors, in a folder for each class."""
    generator = np.random.default_rng(seed)
    for name in ("across", "along"):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            stripes = np.arange(side) // 4 % 2 * np.ones((side, 1))
            stripes = stripes.T if name == "across" else stripes
            colors = generator.integers(0, 256, (2, 3))
            pixels = np.where(stripes[..., None] > 0, colors[0], colors[1]).astype(np.uint8)
            Image.fromarray(pixels).resize((side + 20, side)).save(folder / name / f"{index:02}.jpg")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "photos"
    draw(folder / "train", 12)
    draw(folder / "val", 6, seed=1)
    (folder / ".thumbnails").mkdir()  # as file managers leave them
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photos, run):
    folder = tmp_path_factory.mktemp("run") / "out"
    return folder, run("train", photos, *SHORT, "--output_dir", folder)


def call(*options):
    return train.main(list(map(str, options)))


def test_it_says_what_it_found_did_and_what_is_next(photos, trained):
    folder, output = trained
    lines = output.strip().splitlines()
    assert lines[0] == (
        "24 training and 12 validation images of 2 classes (across, along), 12 of each to train on; 32 x 32 pixels; "
        "6 steps of 8 images."
    )
    pattern = r"epoch +(\d) of 2  loss \d\.\d{3}  validation +[\d.]+ %  [\d,]+ images/s  \d:\d\d left"
    assert [re.fullmatch(pattern, line)[1] for line in lines[1:3]] == ["1", "2"]
    figures = json.loads((folder / "train_results.json").read_text())
    low, high = figures["eval_top1_interval"]
    assert low <= figures["eval_top1"] <= high
    assert lines[3] == (
        f"The model in {folder} is right on {figures['eval_top1']:.1f} % of 12 validation images (95 % interval "
        f"{low:.1f} to {high:.1f} %)."
    )
    assert lines[4] == f"Report: {folder}/report.html and report.png."
    assert lines[5] == f"Next: repvgg-hf quantize --model_name_or_path {folder} --dataset_name {photos}"
    assert len(lines) == 6  # no bars, no warnings of libraries


def test_the_same_options_by_name_give_the_same_weights(photos, trained, tmp_path):
    call(
        "--train_dir",
        photos / "train",
        "--validation_dir",
        photos / "val",
        *SHORT,
        "--output_dir",
        tmp_path,
        "--use_cpu",
    )
    expected, found = (load_file(path / "model.safetensors") for path in (trained[0], tmp_path))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_a_run_is_not_overwritten(photos, trained, tmp_path):
    folder = trained[0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(ValueError, match="holds a run already .*another --output_dir, or --resume_from_checkpoint"):
        call(photos, *SHORT, "--output_dir", folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    # any other model is none the worse for it, either
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"holds a run already \(model.safetensors\)"):
        call(photos, *SHORT, "--output_dir", tmp_path)
    (tmp_path / "train_results.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run already"):  # there is nothing to go on from
        call(photos, *SHORT, "--output_dir", tmp_path, "--resume_from_checkpoint")
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"


def test_it_goes_on_where_it_was_asked_to(photos, trained, capsys):
    before = (trained[0] / "model.safetensors").read_bytes()
    call(photos, *SHORT, "--output_dir", trained[0], "--resume_from_checkpoint")
    assert "Going on from" in capsys.readouterr().out
    assert (trained[0] / "model.safetensors").read_bytes() == before


def test_images_are_held_out_by_the_seed(tmp_path, photos, capsys):
    draw(tmp_path / "classes", 10)
    figures = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        call(tmp_path / "classes", *SHORT, "--seed", seed, "--output_dir", tmp_path / name)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("16 training and 4 validation images")
        state = TrainerState.load_from_json(tmp_path / name / "checkpoint-4" / "trainer_state.json")
        (record,) = [value for key, value in state.stateful_callbacks.items() if key == "RunCallback"]
        figures.append(record["args"]["record"]["the pixels of validation images"])
    assert figures[0] == figures[1] != figures[2]
    assert "--seed 1" in lines[-1]  # or other images would be evaluated


def test_no_pictures(tmp_path):
    options = [*SHORT, "--output_dir", tmp_path / "out"]
    with pytest.raises(ValueError, match="There is no folder .*nowhere: give a folder"):
        call(tmp_path / "nowhere", *options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no folders but 0 images"):
        call(tmp_path / "empty", *options)
    draw(tmp_path / "classes", 3)
    (tmp_path / "classes" / "neither").mkdir()
    with pytest.raises(ValueError, match="has no images in 'neither': remove the folder"):
        call(tmp_path / "classes", *options)


def test_what_would_fail_after_an_epoch_is_refused_before(photos, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--output_dir .*out can't be written \(Not a directory in .*file\)"):
        call(photos, *SHORT, "--output_dir", tmp_path / "file" / "new" / "out")
    with pytest.raises(ValueError, match="--metric_for_best_model must be one of top1, top5, loss, got 'foo'"):
        call(photos, *SHORT, "--output_dir", tmp_path / "out", "--metric_for_best_model", "foo")
    assert not (tmp_path / "out").exists()


def test_a_damaged_picture_stops_it_before_anything_is_written(tmp_path):
    draw(tmp_path / "classes", 5)
    path = tmp_path / "classes" / "along" / "03.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=f"file {path}, can't be read"):
        call(tmp_path / "classes", *SHORT, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "option", ["--variant a0", "--hidden_sizes 8 8", "--stem_hidden_size 8", "--strides 2 2", "--num_channels 3"]
)
def test_sizes_beside_a_checkpoint_are_refused(photos, trained, tmp_path, option):
    with pytest.raises(ValueError, match=f"{option.split()[0]} is an option of a new model, and --model_name_or_path"):
        call(photos, "--model_name_or_path", trained[0], *option.split(), "--output_dir", tmp_path)


def test_steps_without_their_strategy_are_refused(photos, tmp_path):
    with pytest.raises(ValueError, match="--save_steps does nothing without --save_strategy steps"):
        call(photos, "--save_steps", "0.2", "--output_dir", tmp_path)


def test_sizes_beside_a_variant_are_refused(photos, tmp_path):
    with pytest.raises(ValueError, match="--variant a0 sets all sizes, --depths too"):
        call(photos, "--variant", "a0", "--depths", "1", "--output_dir", tmp_path)


def test_oabn_of_a_checkpoint_is_switched_when_asked(photos, trained, tmp_path):
    model = ("--model_name_or_path", trained[0])
    more = ("--num_train_epochs", "1", "--per_device_train_batch_size", "8")
    call(photos, *model, *more, "--oabn", "False", "--output_dir", tmp_path / "off")
    call(photos, "--model_name_or_path", tmp_path / "off", *more, "--output_dir", tmp_path / "kept")
    found = {name: AutoConfig.from_pretrained(tmp_path / name).oabn for name in ("off", "kept")}
    assert found == {"off": False, "kept": False} and AutoConfig.from_pretrained(trained[0]).oabn


def test_oabn_of_fused_branches_is_refused(photos, trained, tmp_path):
    RepVGGForImageClassification.from_pretrained(trained[0]).reparameterize().save_pretrained(tmp_path / "fused")
    with pytest.raises(ValueError, match="--oabn bounds branches, and those of .* are fused"):
        call(photos, "--model_name_or_path", tmp_path / "fused", "--oabn", "True", "--output_dir", tmp_path / "out")


@pytest.fixture(scope="module")
def network(trained, tmp_path_factory):
    """A network of plain batch normalization with a large identity branch."""
    model = RepVGGForImageClassification.from_pretrained(trained[0], oabn=False)
    weights = [value for name, value in model.named_parameters() if "identity.norm.weight" in name]
    assert weights
    for weight in weights:
        weight.data.fill_(3.0)
    folder = tmp_path_factory.mktemp("network")
    model.save_pretrained(folder)
    return folder


def test_a_pretrained_start_with_an_average_goes_on_to_the_same_weights(photos, network, tmp_path, capsys):
    """The bound closes in until the third of six steps: after the second, of which a checkpoint is left."""
    options = [photos, "--pretrained", network, "--num_train_epochs", 2, "--per_device_train_batch_size", 8]
    options += ["--save_steps", 2, "--save_strategy", "steps", "--eval_strategy", "no", "--ema_decay", 0.9, "--use_cpu"]
    call(*options, "--output_dir", tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    assert re.match(
        r"OABN at 6 standard deviations bounds [1-9]\d* of 40 channels of the pretrained branches", lines[1]
    )
    assert lines[2].startswith("The bound closes in until step 3, before which")
    shutil.copytree(tmp_path / "run" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    call(*options, "--output_dir", tmp_path / "other", "--save_total_limit", 5)
    shutil.copytree(tmp_path / "other" / "checkpoint-2", tmp_path / "early" / "checkpoint-2")
    expected = (tmp_path / "run" / "model.safetensors").read_bytes()
    for name in ("resumed", "early"):
        call(*options, "--output_dir", tmp_path / name, "--resume_from_checkpoint")
        assert (tmp_path / name / "model.safetensors").read_bytes() == expected
    assert not (tmp_path / "run" / "average.pt").exists()
    # checkpoints have the weights and their average, which is the model in the end
    last = tmp_path / "run" / "checkpoint-6"
    average, weights = torch.load(last / "average.pt"), load_file(last / "model.safetensors")
    for key, tensor in load_file(tmp_path / "run" / "model.safetensors").items():
        assert torch.equal(average[f"module.{key}"], tensor)
    assert not torch.equal(weights["classifier.weight"], average["module.classifier.weight"])


def test_without_a_report(photos, tmp_path, capsys):
    call(
        photos,
        *SMALL,
        "--max_steps",
        1,
        "--per_device_train_batch_size",
        8,
        "--report",
        "False",
        "--output_dir",
        tmp_path,
    )
    assert not list(tmp_path.glob("report*")) and "Report" not in capsys.readouterr().out


def test_the_best_evaluation_is_kept_and_said_to_be_it(photos, tmp_path, capsys):
    options = [
        *SMALL,
        "--num_train_epochs",
        "30",
        "--per_device_train_batch_size",
        "8",
        "--early_stopping_patience",
        "2",
    ]
    figures = call(
        photos, *options, "--mixing", "both", "--class_weights", "True", "--ema_decay", 0.5, "--output_dir", tmp_path
    )
    states = [TrainerState.load_from_json(path) for path in tmp_path.glob("checkpoint-*/trainer_state.json")]
    last = max(states, key=lambda state: state.global_step)
    accuracies = [line["eval_top1"] for line in last.log_history if "eval_top1" in line]
    assert len(accuracies) < 30 or max(accuracies[-2:]) > max(accuracies[:-2])
    assert figures["eval_top1"] == max(accuracies)
    text = capsys.readouterr().out
    assert f"the best of {len(accuracies)} evaluations of them and so a little too good" in text
