"""Loading through a bad connection, and what is refused."""

import pytest
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError
from loopback_store import WRITE_TOKEN
from transformers import AutoModelForImageClassification

from repvgg_hf.hub import publish

REPO, WEIGHTS = "org/tiny", "/resolve/.*model.safetensors"


@pytest.fixture
def load(hub, tiny_model, processor, monkeypatch, tmp_path):
    """`load()` downloads the published 4 bit model into a new cache."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    publish(tiny_model(4), REPO, processor=processor, token=WRITE_TOKEN)
    return lambda: AutoModelForImageClassification.from_pretrained(REPO, cache_dir=tmp_path)


def same_weights(model, expected) -> bool:
    ours, theirs = model.state_dict(), expected.state_dict()
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize("path", [WEIGHTS, "/resolve/.*config.json"])
@pytest.mark.parametrize("action", ["truncate", 429])
def test_the_client_overcomes(hub, load, tiny_model, action, path):
    hub.fail("GET", path, action)
    assert same_weights(load(), tiny_model(4))
    assert hub.faults[0].times == 0, "the fault did not happen"


@pytest.mark.parametrize("path", [WEIGHTS, "/resolve/.*config.json"])
@pytest.mark.parametrize("action", ["reset", 500])
def test_loading_again_is_enough(hub, load, tiny_model, action, path):
    """The client gives up at once on these two, and what it has by then does no harm."""
    hub.fail("GET", path, action)
    with pytest.raises((OSError, HTTPError)):
        load()
    assert same_weights(load(), tiny_model(4))


def test_tampered_download_is_refused(hub, load):
    hub.fail("GET", WEIGHTS, "tamper")
    with pytest.raises(ValueError, match="don't fit the checksum in config.json.*Download"):
        load()


def test_truncated_file_in_the_cache_is_refused(load, tmp_path):
    load()
    path = hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="a file is truncated or damaged. Download"):
        load()
