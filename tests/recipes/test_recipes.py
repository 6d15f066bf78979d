"""The recipes as a user runs them: real processes on the digits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

RECIPES = Path(__file__).parents[2] / "recipes"
SHORT_TRAINING = "--num_train_epochs 4 --max_train_samples 640 --per_device_train_batch_size 16".split()
SHORT_TRAINING += "--hidden_sizes 16 32 --depths 1 1".split()
SHORT_QAT = ["--num_float_epochs", "4", *SHORT_TRAINING]


def run(*command, expect: int = 0, **environment) -> str:
    """The output of a recipe (`name.py`, options); the process must end with the exit code `expect`."""
    name, *options = map(str, command)
    arguments = [sys.executable, str(RECIPES / name), *options]
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(arguments, capture_output=True, text=True, env=variables, timeout=240)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train") / "model"
    run("train.py", "--output_dir", folder, *SHORT_TRAINING)
    return folder


def test_train_writes_a_checkpoint_and_its_figures(trained):
    figures = json.loads((trained / "train_results.json").read_text())
    assert figures["eval_top1"] > 50 and figures["command"][0] == "recipes/train.py"
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {path.name for path in trained.iterdir()}


def test_train_resumes_to_the_same_weights(trained, tmp_path):
    resumed = tmp_path / "resumed"
    shutil.copytree(trained, resumed)
    (resumed / "model.safetensors").unlink()
    first_epoch = sorted(resumed.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[0]
    run("train.py", "--output_dir", resumed, *SHORT_TRAINING, "--resume_from_checkpoint", first_epoch)
    expected, found = load_file(trained / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)


def test_ptq_and_evaluate_agree(trained, tmp_path):
    output = run(
        "ptq.py", "--model_name_or_path", trained, "--output_dir", tmp_path / "ptq",
        "--bits", "4", "8", "--methods", "cluster", "uniform",
    )  # fmt: skip
    record = json.loads((tmp_path / "ptq" / "ptq_results.json").read_text())
    rows = {row["model"]: row for row in record["results"]}
    assert list(rows) == [
        "float", "cluster-per_tensor+scale-w4", "cluster-per_tensor+scale-w8", "uniform-per_tensor-w4",
        "uniform-per_tensor-w8",
    ]  # fmt: skip
    assert rows["float"]["top1"] - rows["cluster-per_tensor+scale-w8"]["top1"] < 1
    assert all(row["model"] in output for row in record["results"])

    figures = tmp_path / "figures.json"
    checkpoint = tmp_path / "ptq" / "cluster-per_tensor+scale-w4"
    run("evaluate.py", "--model_name_or_path", checkpoint, "--output_json", figures)
    evaluated = json.loads(figures.read_text())
    for key in ("top1", "top5", "loss", "bytes", "bits_per_weight"):
        assert evaluated[key] == pytest.approx(rows[checkpoint.name][key], rel=1e-4)
    assert evaluated["bytes"] == (checkpoint / "model.safetensors").stat().st_size


def test_arguments_from_a_json_file(trained, tmp_path):
    options = {"model_name_or_path": str(trained), "max_eval_samples": 50, "output_json": str(tmp_path / "out.json")}
    (tmp_path / "arguments.json").write_text(json.dumps(options))
    run("evaluate.py", tmp_path / "arguments.json")
    assert json.loads((tmp_path / "out.json").read_text())["images"] == 50


@pytest.mark.parametrize(
    "command, message",
    [
        (["ptq.py", "--model_name_or_path", "{model}", "--bits", "9"], "bits must be an integer from 1 to 8, got 9"),
        (["ptq.py", "--model_name_or_path", "{model}", "--methods", "kmeans"], "method must be one of cluster"),
        (["evaluate.py", "--model_name_or_path", "{model}", "--label_column_name", "digit"], "--label_column_name"),
        (["qat.py", "--bits", "0"], "bits must be an integer from 1 to 8, got 0"),
        (["train.py", "--train_dir", "{images}", "--image_size", "8", "--model_name_or_path", "{model}"],
         "has 10 classes, the dataset 2.*--ignore_mismatched_sizes"),
        (["evaluate.py", "--model_name_or_path", "{model}", "--validation_dir", "{images}"],
         "The model has 10 classes, the dataset 2"),
    ],
)  # fmt: skip
def test_bad_options_stop_with_a_message(trained, tmp_path, command, message):
    import re

    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(4):
            Image.new("RGB", (9, 9), (index * 40, 0, 0)).save(tmp_path / name / f"{index}.png")
    places = {"model": trained, "images": tmp_path}
    output = run(*(part.format(**places) for part in command), expect=1)
    assert re.search(message, output.replace("\n", " "))


@pytest.fixture(scope="module")
def whole_story(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qat") / "run"
    run("qat.py", "--output_dir", folder, *SHORT_QAT)
    return folder


def test_qat_packs_what_it_trained(whole_story):
    rows = {row["model"]: row for row in json.loads((whole_story / "qat_results.json").read_text())["results"]}
    assert rows["4 bit, packed"]["largest_logit_difference"] == 0
    assert rows["4 bit, reloaded"]["largest_logit_difference"] == 0
    assert rows["4 bit, reloaded"]["accuracy"] > rows["float, fused"]["accuracy"] - 3
    assert rows["4 bit, packed"]["bytes"] < 0.25 * rows["float, fused"]["bytes"]


def test_qat_killed_and_resumed_gives_the_same_files(whole_story, tmp_path):
    folder = tmp_path / "run"
    arguments = [sys.executable, str(RECIPES / "qat.py"), "--output_dir", str(folder), *SHORT_QAT]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (folder / "checkpoint" / "qat").exists():  # the first of two epochs of QAT is done
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "quantized").exists()
    run("qat.py", "--output_dir", folder, *SHORT_QAT, "--resume_from_checkpoint", "True")
    for name in ("float", "quantized"):
        expected = (whole_story / name / "model.safetensors").read_bytes()
        assert (folder / name / "model.safetensors").read_bytes() == expected


def test_qat_on_two_processes(tmp_path):
    """Half the batch on each of two ranks gives one model, which is saved once and reloads exactly."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        str(RECIPES / "qat.py"), "--output_dir", str(tmp_path), *SHORT_QAT, "--per_device_train_batch_size", "8",
    ]  # fmt: skip
    variables = os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["model"]: row for row in json.loads((tmp_path / "qat_results.json").read_text())["results"]}
    assert rows["4 bit, reloaded"]["largest_logit_difference"] == 0
    assert rows["4 bit, packed"]["largest_logit_difference"] == 0
    assert rows["4 bit, packed"]["accuracy"] > 50


def test_study_makes_its_tables_from_its_json(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    features = Features({"img": Image(), "label": ClassLabel(num_classes=10)})
    for name, start in (("train", 0), ("test", 500)):
        images = [(image * 15).astype("uint8") for image in digits.images[start : start + 200]]
        columns = {"img": images, "label": digits.target[start : start + 200].tolist()}
        (tmp_path / "data").mkdir(exist_ok=True)
        Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data" / f"{name}.parquet")
    run(
        "study.py", "--dataset_name", tmp_path / "data", "--num_train_epochs", "1", "--dataloader_num_workers", "0",
        "--output_dir", tmp_path / "models", "--output_json", tmp_path / "study.json", "--max_eval_samples", "64",
    )  # fmt: skip
    record = json.loads((tmp_path / "study.json").read_text())
    table = (tmp_path / "study.md").read_text()
    for norm in ("BN", "OABN"):
        assert len(record["norms"][norm]["results"]) == 17
        for row in record["norms"][norm]["results"]:
            assert f"{row['top1']:.2f}" in table
        for kernel in record["norms"][norm]["kernels"][:-1]:
            assert f"{kernel['kurtosis']:.1f} | {kernel['max_over_std']:.1f}" in table


def test_committed_tables_are_made_from_the_committed_json():
    root = RECIPES.parent
    script = (
        "import json, study\n"
        "record = json.load(open('../model_cards/oabn_study.json'))\n"
        "print(json.dumps([study.markdown(record), study.summary(record)]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=RECIPES, capture_output=True, text=True, check=True)
    table, short = json.loads(done.stdout.splitlines()[-1])
    assert (root / "model_cards" / "oabn_study.md").read_text() == table
    assert f"<!-- study -->\n{short}<!-- /study -->" in (root / "README.md").read_text()
