"""Runs that are killed and go on: to the same files, or not at all if it is another run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser

from repvgg_hf.hub import write_folder
from repvgg_hf.recipes import qat, train
from repvgg_hf.training.checkpoints import resume_place
from repvgg_hf.training.trainer_checkpoints import STATE, find_fault

TINY = "--hidden_sizes 8 --depths 1 --max_eval_samples 16 --per_device_train_batch_size 16".split()
KILL_POINTS = Path(__file__).parents[1] / "kill_points.py"


@pytest.fixture(scope="module", autouse=True)
def reloaded_in_this_process():
    """Not in a fresh one, which test_qat.py looks at, and which takes longer than all the rest of such a run."""

    def reload(folder, batches):
        model = AutoModelForImageClassification.from_pretrained(folder)
        with torch.inference_mode():
            return torch.cat([model(batch).logits for batch in batches]).numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qat, "reload_logits", reload)
        yield


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory) -> Path:
    """Images of ants and bees, of which each recipe below takes 32 to train on and 16 to evaluate."""
    folder, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for split, number in (("train", 16), ("val", 8)):
        for name in ("ant", "bee"):
            (folder / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / split / name / f"{index:02}.png")
    return folder


def on(folder: Path) -> list[str]:
    images = ["--train_dir", folder / "train", "--validation_dir", folder / "val", "--image_size", "8"]
    return [*TINY, *map(str, images), "--num_train_epochs", "1"]


@pytest.fixture(scope="module")
def source(tmp_path_factory, two_classes) -> Path:
    """A float model of `train.py`, with two checkpoints."""
    folder = tmp_path_factory.mktemp("source") / "model"
    train.main([*on(two_classes), "--num_train_epochs", "2", "--use_cpu", "--output_dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, two_classes, source) -> tuple[Path, list[str]]:
    """A finished run of `qat.py`, and its options."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    options = [*on(two_classes), "--model_name_or_path", str(source), "--output_dir", str(folder)]
    qat.main(options)
    return folder, options


@pytest.mark.parametrize("runs", [("qat", "train"), pytest.param(("qat_two_processes",), marks=pytest.mark.slow)])
def test_killed_anywhere_it_ends_with_the_same_files(runs, start):
    """A few of all points; the script itself tries them all."""
    done = start(KILL_POINTS, "--sample", 3, "--runs", *runs, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in runs:
        assert f"{name}: 3 of 3 points give the same files" in done.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--bits 3", "--bits was 4, now 3"),
        ("--learning_rate 0.5", "--learning_rate was 0.01, now 0.5"),
        ("--seed 1", "--seed was 0, now 1"),
        ("--max_train_samples 20", "the number of training images was 32, now 20"),
        ("--max_eval_samples 8", "the number of validation images was 16, now 8"),
        ("--image_size 12", "crop_size of the image processor was .* now "),
        ("--distillation_weight 0.5", "--distillation_weight was 0.0, now 0.5"),
    ],
)
def test_other_options_are_refused(finished, more, message):
    folder, options = finished
    before = (folder / "qat_results.json").read_bytes()
    with pytest.raises(ValueError, match=f"of another run .*{message}"):
        qat.main([*options, *more.split(), "--resume_from_checkpoint"])
    assert (folder / "qat_results.json").read_bytes() == before


def changed_pixel(images: Path, model: Path):
    Image.new("RGB", (8, 8)).save(images / "train" / "ant" / "00.png")


def other_class(images: Path, model: Path):
    for split in ("train", "val"):
        (images / split / "bee").rename(images / split / "beetle")
    config = json.loads((model / "config.json").read_text())
    config |= {"id2label": {"0": "ant", "1": "beetle"}, "label2id": {"ant": 0, "beetle": 1}}
    (model / "config.json").write_text(json.dumps(config))


def other_labels(images: Path, model: Path):
    (images / "train" / "ant" / "00.png").rename(images / "train" / "bee" / "99.png")


def other_weights(images: Path, model: Path):
    weights = load_file(model / "model.safetensors")
    weights["classifier.bias"] += 1
    config = json.loads((model / "config.json").read_text())
    config.pop("checksum", None)  # that of other weights; a file without one is as good
    (model / "config.json").write_text(json.dumps(config))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, None),
        (changed_pixel, r"\(the pixels of training images was"),
        (other_class, "the name of class 1 was 'bee', now 'beetle'"),
        (other_labels, "the labels of training images was"),
        (other_weights, r"\(the model to begin with was \S* now \S*\)"),
    ],
)
def test_other_data_and_models_at_the_same_place_are_refused(finished, two_classes, source, tmp_path, change, message):
    """And a copy of the same at another place is not."""
    images, model, run = (tmp_path / name for name in ("images", "model", "run"))
    for old, new in ((two_classes, images), (source, model), (finished[0], run)):
        shutil.copytree(old, new)
    options = [*on(images), "--model_name_or_path", str(model), "--output_dir", str(run), "--resume_from_checkpoint"]
    if change is None:
        qat.main(options)
        for name in ("float", "fused", "quantized"):
            before, after = ((folder / name / "model.safetensors").read_bytes() for folder in (finished[0], run))
            assert before == after
        return
    change(images, model)
    with pytest.raises(ValueError, match=message):
        qat.main(options)


def test_a_path_means_the_run_that_it_lies_in(finished, source):
    folder, options = finished
    before = (folder / "quantized" / "model.safetensors").read_bytes()
    qat.main([*options, "--resume_from_checkpoint", str(folder / "checkpoint" / "qat")])
    assert (folder / "quantized" / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="is not in --output_dir .* Give its folder as --output_dir"):
        qat.main([*options, "--resume_from_checkpoint", str(source)])


@pytest.mark.parametrize("arguments", [qat.QATArguments, train.TrainArguments])
def test_both_recipes_take_the_same_forms(arguments, tmp_path):
    forms = [
        ([], False), (["--resume_from_checkpoint"], True), (["--resume_from_checkpoint", "True"], True),
        (["--resume_from_checkpoint", "false"], False), (["--resume_from_checkpoint", str(tmp_path)], tmp_path),
        (["--resume_from_checkpoint", "--seed", "3"], True),
    ]  # fmt: skip
    for given, expected in forms:
        (parsed,) = HfArgumentParser(arguments).parse_args_into_dataclasses(given)
        assert resume_place(parsed.resume_from_checkpoint) == expected
    (tmp_path / "options.json").write_text('{"resume_from_checkpoint": true}')
    (parsed,) = HfArgumentParser(arguments).parse_json_file(tmp_path / "options.json")
    assert resume_place(parsed.resume_from_checkpoint) is True
    with pytest.raises(ValueError, match="--resume_from_checkpoint nowhere is no folder"):
        resume_place("nowhere")


def resumed(source: Path, folder: Path, two_classes: Path, *value: str) -> None:
    options = [*on(two_classes), "--num_train_epochs", "2", "--use_cpu", "--output_dir", str(folder)]
    train.main([*options, "--resume_from_checkpoint", *value])
    assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def cut(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("trainer_state.json", Path.unlink, "it has no trainer_state.json"),
        ("trainer_state.json", cut, "trainer_state.json can't be read"),
        ("model.safetensors", cut, "model.safetensors can't be read"),
        ("optimizer.pt", cut, "optimizer.pt can't be read"),
        ("optimizer.pt", Path.unlink, "it has no file for the optimizer"),
        ("scheduler.pt", Path.unlink, "it has no file for the schedule"),
        ("rng_state.pth", cut, "rng_state.pth can't be read"),
    ],
)
def test_train_leaves_out_a_checkpoint_that_is_not_whole(
    source, two_classes, tmp_path, capsys, caplog, name, damage, reason
):
    folder = tmp_path / "run"
    shutil.copytree(source, folder)
    (folder / "model.safetensors").unlink()
    damage(folder / "checkpoint-4" / name)
    with pytest.raises(ValueError, match=f"checkpoint-4 is not whole: {reason}.*Choose an earlier one"):
        resumed(source, folder, two_classes, str(folder / "checkpoint-4"))
    resumed(source, folder, two_classes)
    assert f"The checkpoint {folder / 'checkpoint-4'} is not whole and left out: {reason}" in caplog.text
    assert f"Going on from {folder / 'checkpoint-2'}." in capsys.readouterr().out


def test_a_checkpoint_without_its_average_is_not_whole(source, tmp_path):
    shutil.copytree(source / "checkpoint-2", tmp_path / "checkpoint-2")
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    assert '"--ema_decay": 0.0' in path.read_text()
    path.write_text(path.read_text().replace('"--ema_decay": 0.0', '"--ema_decay": 0.9'))
    assert find_fault(path.parent) == "it has no average.pt, the moving average of the weights"


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ("--max_steps 3 --load_best_model_at_end True --ema_decay 0.9", (3, 3)),  # in the second epoch
        ("--num_train_epochs 6 --early_stopping_patience 1 --learning_rate 1e-9", (4, 4)),  # which gets no better
        ("--num_train_epochs 2 --save_strategy steps --save_steps 3", (3, 4)),
        ("--num_train_epochs 2 --save_strategy steps --save_steps 3", (4, 4)),
    ],
)
def test_train_goes_on_to_the_same_end_and_no_further(two_classes, tmp_path, options, steps):
    whole, killed, moved = (tmp_path / name for name in ("whole", "killed", "moved"))
    options = [*on(two_classes)[:-2], "--use_cpu", *options.split()]
    train.main([*options, "--output_dir", str(whole)])
    history = json.loads((whole / f"checkpoint-{steps[1]}" / STATE).read_text())["log_history"]
    assert sum("eval_top1" in line for line in history) == 2  # at each epoch's end, with steps alone given too
    for path in whole.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) <= steps[0]:
            shutil.copytree(path, killed / path.name)
    whole.rename(moved)  # nothing is taken from where the run was
    train.main([*options, "--output_dir", str(killed), "--resume_from_checkpoint"])
    for name in ("model.safetensors", "report.html"):
        assert (killed / name).read_bytes() == (moved / name).read_bytes()
    assert {path.name for path in killed.iterdir()} == {path.name for path in moved.iterdir()}


def test_train_begins_anew_without_any_checkpoint(source, two_classes, tmp_path, capsys):
    resumed(source, tmp_path / "run", two_classes)
    assert f"There is no checkpoint in {tmp_path / 'run'}: beginning anew." in capsys.readouterr().out


def test_train_refuses_another_run(source, two_classes, tmp_path):
    options = [*on(two_classes), "--num_train_epochs", "2", "--use_cpu", "--output_dir", str(source)]
    before = (source / "train_results.json").read_bytes()
    for more, message in (
        ("--learning_rate 0.5", "--learning_rate was 0.025, now 0.5"),
        ("--oabn False", "--oabn was"),
    ):
        for place in ([], [str(source / "checkpoint-2")]):
            with pytest.raises(ValueError, match=f"is of another run .*{message}"):
                train.main([*options, *more.split(), "--resume_from_checkpoint", *place])
    assert (source / "train_results.json").read_bytes() == before
    # nothing says what another Trainer's was trained with
    foreign = tmp_path / "checkpoint-2"
    shutil.copytree(source / "checkpoint-2", foreign)
    state = json.loads((foreign / "trainer_state.json").read_text()) | {"stateful_callbacks": {}}
    (foreign / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="train.py has not written it"):
        train.main([*options, "--resume_from_checkpoint", str(foreign)])


def test_training_on_from_a_published_quantized_checkpoint(finished, two_classes, tmp_path):
    """The codes are decoded first; what is then trained and packed reloads, and a resumed run gives the same."""
    published, folder = tmp_path / "published", tmp_path / "run"
    packed = AutoModelForImageClassification.from_pretrained(finished[0] / "quantized")
    processor = AutoImageProcessor.from_pretrained(finished[0] / "quantized")
    write_folder(packed, published, "org/insects", processor=processor, license="mit")
    options = [*on(two_classes), "--model_name_or_path", str(published), "--dequantize", "True", "--bits", "3"]
    rows = {row["stage"]: row for row in qat.main([*options, "--output_dir", str(folder)])["results"]}
    assert rows["float"]["model"] == "float, as it began" and rows["float"]["largest_logit_difference"] is None
    assert rows["fused"]["largest_logit_difference"] < 1e-5
    assert rows["packed"]["largest_logit_difference"] == rows["reloaded"]["largest_logit_difference"] == 0
    decoded = AutoModelForImageClassification.from_pretrained(folder / "float")
    trained = AutoModelForImageClassification.from_pretrained(folder / "quantized")
    pixel_values = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected, begun, ended = (model(pixel_values).logits for model in (packed, decoded, trained))
    assert decoded.config.deploy and getattr(decoded.config, "quantization_config", None) is None
    torch.testing.assert_close(begun, expected, rtol=1e-5, atol=1e-6)
    assert (ended - expected).abs().max() > 1e-3
    assert trained.config.quantization_config.bits == 3 and trained.config.id2label == {0: "ant", 1: "bee"}

    before = {path: path.read_bytes() for path in (folder / "quantized").iterdir()}
    qat.main([*options, "--output_dir", str(folder), "--resume_from_checkpoint"])
    assert {path: path.read_bytes() for path in (folder / "quantized").iterdir()} == before


def test_results_do_not_depend_on_when_it_was_killed(finished, tmp_path):
    """After the packed model was saved, its checksum is in its files alone."""
    folder, options = tmp_path / "run", finished[1]
    shutil.copytree(finished[0], folder)
    before = json.loads((folder / "qat_results.json").read_text())
    (folder / "qat_results.json").unlink()
    qat.main([*options, "--output_dir", str(folder), "--resume_from_checkpoint"])
    after = json.loads((folder / "qat_results.json").read_text())
    assert before["quantization_config"]["checksum"] is not None
    assert after | {"command": None} == before | {"command": None}


def test_no_file_has_the_token(two_classes, tmp_path):
    token = "s3cret-of-the-hub"
    options = [*on(two_classes), "--use_cpu", "--output_dir", str(tmp_path), "--hub_token", token]
    train.main([*options, "--report_to", "tensorboard"])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"training_args.bin", "train_results.json", "trainer_state.json"} <= {path.name for path in files}
    assert [path for path in files if token.encode() in path.read_bytes()] == []
    saved = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert saved.hub_token == "***" and saved.learning_rate == 0.025


def test_train_does_not_end_well_with_weights_that_are_not_finite(two_classes, tmp_path):
    options = [*on(two_classes), "--use_cpu", "--learning_rate", "1e30", "--max_grad_norm", "1e30"]
    with pytest.raises(RuntimeError, match="are NaN or infinite: the training has diverged"):
        train.main([*options, "--warmup_steps", "0", "--output_dir", str(tmp_path)])
    assert not list(tmp_path.rglob("model.safetensors")) and not (tmp_path / "train_results.json").exists()
