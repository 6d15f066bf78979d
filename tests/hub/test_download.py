"""Loading through a bad connection, and what is refused."""

import json
import re
from functools import partial, partialmethod
from pathlib import Path

import pytest
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError
from loopback_store import PUBLIC
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from repvgg_hf import ClusterConfig, RepVGGBackbone, RepVGGForImageClassification, RepVGGModel
from repvgg_hf.hub import publish, write_folder

REPO, WEIGHTS = "org/tiny", "/resolve/.*model.safetensors"


@pytest.fixture
def load(hub, tiny_model, processor, monkeypatch, tmp_path):
    """`load()` downloads the published 4 bit model into a new cache."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    publish(tiny_model(4), REPO, processor=processor, **PUBLIC)
    return partial(AutoModelForImageClassification.from_pretrained, REPO, cache_dir=tmp_path)


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


def cached_weights(folder) -> str:
    return hf_hub_download(REPO, "model.safetensors", cache_dir=folder)


@pytest.mark.parametrize("bits", [None, 4], ids=["float", "w4"])
def test_tampered_download_is_refused(hub, load, tiny_model, processor, tmp_path, bits):
    """The message names the file; downloading again helps."""
    publish(tiny_model(bits), REPO, processor=processor, **PUBLIC)
    hub.fail("GET", WEIGHTS, "tamper")
    with pytest.raises(ValueError, match=r"don't fit (the|weights_)\s?checksum in config.json.*Download") as caught:
        load()
    assert cached_weights(tmp_path) in str(caught.value)
    with pytest.raises(ValueError, match="checksum"):  # it is still in the cache
        load()
    assert same_weights(load(force_download=True), tiny_model(bits))


@pytest.mark.parametrize("bits", [None, 4], ids=["float", "w4"])
@pytest.mark.parametrize("keep", [0, 100, -1000, -1], ids=lambda keep: f"keep {keep}")
def test_truncated_file_in_the_cache_is_refused(load, tiny_model, processor, tmp_path, keep, bits):
    publish(tiny_model(bits), REPO, processor=processor, **PUBLIC)
    load()
    path = cached_weights(tmp_path)
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:keep])
    message = f"The weights of {REPO} can't be read .*{re.escape(path)} is truncated or damaged. .*force_download=True"
    with pytest.raises(ValueError, match=message):
        load()
    assert same_weights(load(force_download=True), tiny_model(bits))


@pytest.mark.parametrize("shard", [1, 2])
def test_a_damaged_shard_of_float_weights_is_named(tiny_model, processor, tmp_path, monkeypatch, shard):
    """Weights in several files have one checksum."""
    model, save = tiny_model(), RepVGGForImageClassification.save_pretrained
    monkeypatch.setattr(RepVGGForImageClassification, "save_pretrained", partialmethod(save, max_shard_size="8KB"))
    write_folder(model, tmp_path / "repo", REPO, processor=processor, license="mit")
    files = sorted((tmp_path / "repo").glob("model-*.safetensors"))
    assert len(files) > 1
    load = partial(AutoModelForImageClassification.from_pretrained, tmp_path / "repo")
    assert same_weights(load(), model)
    content = files[shard - 1].read_bytes()
    files[shard - 1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="don't fit weights_checksum.*remove weights_checksum"):
        load()
    files[shard - 1].write_bytes(content[:-8])
    with pytest.raises(ValueError, match=f"{re.escape(str(files[shard - 1]))} is truncated"):
        load()


def test_float_checksum_in_all_ways_to_load(load, hub, tiny_model, processor, tmp_path):
    """Headless, in half precision, as a backbone, and while quantizing: it is that of the files, not of the model."""
    publish(tiny_model(), REPO, processor=processor, **PUBLIC)
    options = {"cache_dir": tmp_path}
    assert AutoModel.from_pretrained(REPO, dtype=torch.float16, **options).dtype == torch.float16
    RepVGGBackbone.from_pretrained(REPO, out_features=["stage1"], **options)
    RepVGGModel.from_pretrained(REPO, quantization_config=ClusterConfig(bits=3), **options)
    path = Path(cached_weights(tmp_path))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for cls in (AutoModel, RepVGGBackbone, RepVGGForImageClassification):
        with pytest.raises(ValueError, match="don't fit weights_checksum"):
            cls.from_pretrained(REPO, **options)
    with pytest.raises(ValueError, match="don't fit weights_checksum"):
        RepVGGModel.from_pretrained(REPO, quantization_config=ClusterConfig(bits=3), **options)


def test_what_is_trained_further_has_no_checksum(load, tiny_model, processor, tmp_path):
    """Saving a model that was loaded, or one made from its configuration, drops that of the published weights."""
    publish(tiny_model(), REPO, processor=processor, **PUBLIC)
    model = load()
    assert model.config.weights_checksum.startswith("crc32:")
    with torch.no_grad():
        model.classifier.bias.add_(1)
    model.save_pretrained(tmp_path / "tuned")
    assert same_weights(AutoModelForImageClassification.from_pretrained(tmp_path / "tuned"), model)
    config = AutoConfig.from_pretrained(REPO, cache_dir=tmp_path)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "new")
    for folder in ("tuned", "new"):
        AutoModelForImageClassification.from_pretrained(tmp_path / folder)
        assert json.loads((tmp_path / folder / "config.json").read_text())["weights_checksum"] is None
    load().quantize(bits=4).save_pretrained(tmp_path / "w4")
    AutoModelForImageClassification.from_pretrained(tmp_path / "w4")


def test_error_in_a_tampered_copy_without_the_package(hub, tiny_model, processor, fresh_process, python_without_package,
                                                      tmp_path):  # fmt: skip
    publish(tiny_model(), REPO, processor=processor, **PUBLIC)
    hub.fail("GET", WEIGHTS, "tamper")
    code = f"""
from transformers import AutoModelForImageClassification
try:
    AutoModelForImageClassification.from_pretrained("{REPO}", trust_remote_code=True)
except ValueError as error:
    print(error)
else:
    raise SystemExit("it was loaded")
AutoModelForImageClassification.from_pretrained("{REPO}", trust_remote_code=True, force_download=True)
"""
    shown = fresh_process(code, hub.url, tmp_path, python=python_without_package, cwd=tmp_path)
    assert "don't fit weights_checksum in config.json" in shown and "force_download=True" in shown
