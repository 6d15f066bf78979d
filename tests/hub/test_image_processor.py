"""The image processor of a model from the Hub: fetched when the model is saved, and not before."""

from pathlib import Path

import pytest
from huggingface_hub import constants
from loopback_store import PUBLIC, WRITE_TOKEN
from transformers import AutoImageProcessor, AutoModelForImageClassification

from repvgg_hf.hub import publish
from repvgg_hf.runtime.image_processor_file import PROCESSOR_FILE


@pytest.fixture
def repository(hub, tiny_model, processor):
    """A repository on the Hub, with an image processor."""
    publish(tiny_model(4), "org/digits-w4", processor=processor, **PUBLIC)
    return hub


def cached() -> set[str]:
    """The names of all files in the cache."""
    return {path.name for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.is_file()}


def test_it_is_downloaded_when_the_model_is_saved(repository, tmp_path):
    model = AutoModelForImageClassification.from_pretrained("org/digits-w4")
    assert "model.safetensors" in cached() and PROCESSOR_FILE not in cached()
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / PROCESSOR_FILE).read_bytes() == repository.files("org/digits-w4")[PROCESSOR_FILE]


def test_offline_it_comes_from_the_cache(repository, tmp_path, monkeypatch, caplog):
    AutoModelForImageClassification.from_pretrained("org/digits-w4")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    AutoModelForImageClassification.from_pretrained("org/digits-w4").save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without" / PROCESSOR_FILE).exists()
    assert "The image processor of org/digits-w4 could not be fetched" in caplog.text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    AutoImageProcessor.from_pretrained("org/digits-w4")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    AutoModelForImageClassification.from_pretrained("org/digits-w4").save_pretrained(tmp_path / "with")
    assert (tmp_path / "with" / PROCESSOR_FILE).exists()


def test_a_repository_without_one(repository, tmp_path, caplog):
    del repository.repos["org/digits-w4"].find("main").files[PROCESSOR_FILE]
    model = AutoModelForImageClassification.from_pretrained("org/digits-w4")
    model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / PROCESSOR_FILE).exists() and "processor" not in caplog.text


@pytest.mark.parametrize("how", ["save_pretrained", "push_to_hub"])
def test_it_goes_to_the_hub_again(how, repository, tmp_path):
    model = AutoModelForImageClassification.from_pretrained("org/digits-w4")
    if how == "push_to_hub":
        model.push_to_hub("org/other", token=WRITE_TOKEN)
    else:
        model.save_pretrained(tmp_path / "other", push_to_hub=True, repo_id="org/other", token=WRITE_TOKEN)
    files = repository.files("org/other")
    assert files[PROCESSOR_FILE] == repository.files("org/digits-w4")[PROCESSOR_FILE]
    assert {"config.json", "model.safetensors"} <= files.keys()
