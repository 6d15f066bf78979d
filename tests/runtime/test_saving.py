"""What killed saves leave, and folders that are in the way. The kills themselves are in `kill_saves.py`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from repvgg_hf import RepVGGForImageClassification
from repvgg_hf.runtime import saving

KINDS = {"whole_over_whole", "sharded_over_whole", "whole_over_sharded", "sharded_over_sharded", "first"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize(
    "every", [pytest.param(1, marks=[pytest.mark.slow, pytest.mark.full]), 11], ids=["every call", "a sample"]
)
def test_killed_saves(tmp_path, every):
    """The script asserts that the old model or the new one loads, and that nothing stays after the next save."""
    script = Path(__file__).with_name("kill_saves.py")
    command = [sys.executable, str(script), str(tmp_path), "--every", str(every)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1800, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {record["save"] for record in found} == KINDS
    assert sum(record["points"] for record in found) >= 110 / every
    for outcome in ("old", "new"):
        assert any(record[outcome] for record in found)


@pytest.fixture
def models(tiny_config):
    """An old and a new model of other sizes."""
    new = RepVGGForImageClassification(tiny_config(hidden_sizes=[8, 24]))
    return RepVGGForImageClassification(tiny_config()).eval(), new.eval()


@pytest.fixture
def interrupted(models, tmp_path, monkeypatch):
    """`interrupted()`: a folder with an old model, and a new one that was saved and not moved yet."""

    def make(**options) -> Path:
        old, new = models
        folder = tmp_path / "checkpoint"
        old.save_pretrained(folder)
        with monkeypatch.context() as patch:
            patch.setattr(saving, "_move_files", lambda folder, target: None)
            new.save_pretrained(folder, **options)
        assert len(list(folder.glob(".saving-*/.complete.json"))) == 1
        return folder

    return make


def same_weights(model, expected) -> bool:
    ours, theirs = model.state_dict(), expected.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("cls", [RepVGGForImageClassification, AutoModelForImageClassification])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "4KB"}], ids=["whole", "sharded"])
def test_loading_finishes_a_save(models, interrupted, cls, options):
    """An Auto class has read the old configuration before."""
    folder = interrupted(**options)
    loaded = cls.from_pretrained(folder)
    assert same_weights(loaded, models[1]) and loaded.config.hidden_sizes == [8, 24]
    assert not list(folder.glob(".saving-*")) and (folder / "model.safetensors").exists() == (not options)


def test_arguments_survive_another_configuration(interrupted):
    folder = interrupted()
    loaded = AutoModelForImageClassification.from_pretrained(
        folder, num_labels=3, classifier_dropout=0.5, ignore_mismatched_sizes=True
    )
    config = loaded.config
    assert (config.hidden_sizes, config.num_labels, config.classifier_dropout) == ([8, 24], 3, 0.5)
    assert loaded.classifier.weight.shape == (3, 24) and set(config.id2label) == {0, 1, 2}


def test_saving_finishes_a_save_first(models, interrupted):
    """Files that the second save has no counterpart of are those of the first."""
    folder = interrupted()
    models[1].save_pretrained(folder, variant="other")
    assert same_weights(RepVGGForImageClassification.from_pretrained(folder), models[1])
    assert not list(folder.glob(".saving-*"))


def test_a_folder_that_can_not_be_finished_is_named(interrupted, monkeypatch):
    folder = interrupted()

    def refuse(source, target):
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ValueError, match=r"A save into .*checkpoint was interrupted .*\.saving-.*make .* writable"):
        RepVGGForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize("name", [".saving-old", ".saving-{host}-999999999-abcdefgh"], ids=["foreign", "dead process"])
def test_incomplete_folders_are_removed_by_the_next_save(models, tmp_path, name):
    folder = tmp_path / name.format(host=saving.platform.node())
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    models[0].save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_folders_of_running_saves_stay(models, tmp_path):
    """Those of another process here, and of another machine, until nothing was written there for an hour."""
    host = saving.platform.node()
    here, elsewhere = tmp_path / f".saving-{host}-{os.getppid()}-abcdefgh", tmp_path / ".saving-elsewhere-1-abcdefgh"
    for folder in (here, elsewhere):
        folder.mkdir()
    with saving.replace_files(tmp_path) as own:
        saving.clean(tmp_path)
        assert own.exists() and here.exists() and elsewhere.exists()
    os.utime(elsewhere, (0, 0))
    models[0].save_pretrained(tmp_path)
    assert here.exists() and not elsewhere.exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model-00001-of-00002.safetensors"])
def test_a_folder_with_the_name_of_a_file_is_kept(models, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").write_text("mine")
    with pytest.raises(ValueError, match=f"{name} is a folder, .*: rename it, or save into another folder"):
        models[0].save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name / "precious").exists()


def test_files_are_as_readable_as_the_umask_says(models, tmp_path):
    """And not as safetensors leaves them, which only their owner can read."""
    before = os.umask(0o027)
    try:
        models[0].save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_files_in_folders_and_other_processes(tmp_path):
    """Files in folders are moved one by one; what another process has moved meanwhile is no error."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "stays").touch()
    with saving.replace_files(tmp_path) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "new").write_text("new")
        (folder / "gone").touch()
        saving._write_manifest(folder, tmp_path)
        shutil.move(folder / "gone", tmp_path / "gone")
        assert saving.finish(tmp_path) and not folder.exists()
        folder.mkdir()
    assert sorted(path.name for path in (tmp_path / "inner").iterdir()) == ["new", "stays"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gone", "inner"]
