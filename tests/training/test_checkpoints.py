"""The folder of a run that was killed: what is taken for finished, and what is found of its states."""

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from transformers import BitImageProcessor

from repvgg_hf import RepVGGForImageClassification
from repvgg_hf.training.checkpoints import RunFolder, check_finite
from repvgg_hf.training.run_record import check_same_run, run_record

RECORD = {"--bits": 2, "the number of training images": 5}


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True, step_scheduler_with_optimizer=False)


@pytest.fixture
def run(accelerator, tmp_path):
    """`run(**changes)`: the folder of a run, opened again by one whose record has these changes."""
    return lambda **changes: RunFolder(accelerator, tmp_path, RECORD | changes, True, BitImageProcessor())


@pytest.fixture
def saved(run, tiny_config):
    run().save_model("float", RepVGGForImageClassification(tiny_config()))
    return run


def test_a_model_is_finished_with_its_last_file(saved, tmp_path):
    assert saved().finished == {"float"}
    (tmp_path / "checkpoint" / "float.json").unlink()  # killed before
    assert saved().finished == set()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_file_that_is_lost_or_changed_makes_it_unfinished(saved, tmp_path, capsys, name):
    (tmp_path / "float" / name).write_bytes(b"{}")
    assert saved().finished == set()
    (tmp_path / "float" / name).unlink()
    assert saved().finished == set()
    assert f"{tmp_path / 'float' / name} is not as this run saved it: float is made again." in capsys.readouterr().out


def test_another_run_is_refused_by_name(saved, accelerator, tiny_config, tmp_path):
    with pytest.raises(ValueError, match="--bits was 2, now 3; --new was not given, now 'a'.: give the same to go on"):
        saved(**{"--bits": 3, "--new": "a"})
    # without --resume_from_checkpoint it begins, and what it saves is then its own
    other = RunFolder(accelerator, tmp_path, RECORD | {"--bits": 3}, False, BitImageProcessor())
    assert other.finished == set()
    other.save_state("qat", accelerator.prepare(RepVGGForImageClassification(tiny_config())))
    again = saved(**{"--bits": 3})
    assert (again.finished, again.states) == (set(), {"qat"})
    assert (saved().finished, saved().states) == ({"float"}, set())


@pytest.mark.parametrize("moment", ["new is cut", "old is aside", "old is left"])
def test_a_state_is_complete_after_an_interruption(run, accelerator, tiny_config, tmp_path, moment):
    model = accelerator.prepare(RepVGGForImageClassification(tiny_config()))
    folder = run()
    folder.save_state("qat", model)
    state = tmp_path / "checkpoint" / "qat"
    weights = load_file(state / "model.safetensors")
    if moment == "old is aside":
        state.rename(state.with_name("qat.old"))
    else:
        name = "qat.new" if moment == "new is cut" else "qat.old"
        state.with_name(name).mkdir()
        (state.with_name(name) / "model.safetensors").write_bytes(b"")
    with torch.no_grad():
        model.classifier.weight.add_(1)
    folder = run()
    assert folder.states == {"qat"} and [path.name for path in state.parent.iterdir()] == ["qat"]
    folder.load_state("qat")
    assert model.classifier.weight.equal(weights["classifier.weight"])


def test_damaged_records_are_named(saved, tmp_path):
    path = tmp_path / "checkpoint" / "float.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        saved()


def test_weights_that_are_not_finite_are_named():
    layer = nn.BatchNorm2d(3)
    check_finite(layer)
    layer.running_var[1] = float("inf")
    layer.bias.data[0] = float("nan")
    with pytest.raises(RuntimeError, match="^bias and 1 other tensors of the model are NaN or infinite"):
        check_finite(layer)


def test_the_record_has_all_that_the_weights_depend_on(tiny_config):
    model = RepVGGForImageClassification(tiny_config(groups=1))
    images = [{"pixel_values": torch.full((3, 8, 8), float(index))} for index in range(40)]

    def record(model=model, images=images, labels=tuple(range(40)), size=8, **options):
        processor = BitImageProcessor(crop_size={"height": size, "width": size})
        return run_record((options,), model, processor, {"training": (images, labels)}, processes=1)

    before = record(bits=2)
    assert before == json.loads(json.dumps(before)) == record(bits=2, output_dir="elsewhere")
    changed = RepVGGForImageClassification(model.config)
    changed.load_state_dict(model.state_dict())
    assert record(model=changed, bits=2) == before
    with torch.no_grad():
        changed.classifier.bias[0] += 1e-6
    for first, other in (
        ("--bits", record(bits=3)),
        ("the model to begin with", record(model=changed, bits=2)),
        ("the labels of training images", record(labels=(1, *range(1, 40)), bits=2)),
        ("the number of training images", record(images=images[:39], labels=tuple(range(39)), bits=2)),
        ("the pixels of training images", record(images=[*images[:39], images[0]], bits=2)),
        ("crop_size of the image processor", record(size=9, bits=2)),
    ):
        with pytest.raises(ValueError, match=f"The state is of another run .*{first}"):
            check_same_run(before, other, "The state")
    model.config.id2label = dict(enumerate("abcde"))
    with pytest.raises(ValueError, match="the name of class 0 was 'LABEL_0', now 'a'; .*class 4"):
        check_same_run(before, record(bits=2), "The state")
