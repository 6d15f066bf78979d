"""Float training on the digits, in real processes."""

import json
import shutil

import pytest
from safetensors.torch import load_file

SHORT = "--num_train_epochs 4 --max_train_samples 640 --per_device_train_batch_size 16".split()
SHORT += "--hidden_sizes 16 32 --depths 1 1".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run):
    folder = tmp_path_factory.mktemp("train") / "model"
    run("train", "--output_dir", folder, *SHORT)
    return folder


def test_it_writes_a_checkpoint_and_its_figures(trained):
    figures = json.loads((trained / "train_results.json").read_text())
    assert figures["eval_top1"] > 50 and figures["command"][0] == "recipes/train.py" and figures["seed"] == 0
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {path.name for path in trained.iterdir()}


def test_it_resumes_to_the_same_weights(trained, tmp_path, run):
    resumed = tmp_path / "resumed"
    shutil.copytree(trained, resumed)
    (resumed / "model.safetensors").unlink()
    first_epoch = sorted(resumed.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[0]
    run("train", "--output_dir", resumed, *SHORT, "--resume_from_checkpoint", first_epoch)
    expected, found = load_file(trained / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)


def test_labels_of_another_dataset_are_refused(trained, images_of_two_classes, run, tmp_path):
    options = ["--train_dir", images_of_two_classes, "--image_size", 8, "--model_name_or_path", trained]
    options += ["--output_dir", tmp_path / "out"]
    output = run("train", *options, expect=1).replace("\n", " ")
    assert "has 10 classes, the dataset 2" in output and "--ignore_mismatched_sizes" in output
