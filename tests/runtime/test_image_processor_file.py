"""The image processor's configuration goes along when a model is loaded and saved again."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, BitImageProcessor

from repvgg_hf import RepVGGBackbone, RepVGGForImageClassification
from repvgg_hf.runtime import image_processor_file
from repvgg_hf.runtime.image_processor_file import PROCESSOR_FILE, ImageProcessorFile


@pytest.fixture
def folder(tiny_config, tmp_path):
    """A classifier with its image processor."""
    RepVGGForImageClassification(tiny_config()).save_pretrained(tmp_path / "train")
    side = {"height": 24, "width": 24}
    processor = BitImageProcessor(size={"shortest_edge": 30}, crop_size=side, image_mean=[0.1, 0.2, 0.3], resample=3)
    processor.save_pretrained(tmp_path / "train")
    return tmp_path / "train"


def contents(folder):
    return (folder / PROCESSOR_FILE).read_bytes()


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageClassification, RepVGGBackbone])
def test_it_is_saved_along(auto_class, folder, tmp_path):
    auto_class.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.reparameterize(),
        lambda model: model.quantize(bits=4),
        lambda model: model.quantize(bits=4).dequantize(),
        lambda model: model.prepare_qat(bits=4),
        copy.deepcopy,
    ],
    ids=["fused", "quantized", "dequantized", "qat", "copied"],
)
def test_it_stays_with_the_model(change, folder, tmp_path):
    change(RepVGGForImageClassification.from_pretrained(folder)).save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    loaded = RepVGGForImageClassification.from_pretrained(tmp_path / "again")
    loaded.save_pretrained(tmp_path / "third")
    assert contents(tmp_path / "third") == contents(folder)


def test_it_outlives_its_folder(folder, tmp_path):
    expected = contents(folder)
    model = RepVGGForImageClassification.from_pretrained(folder)
    shutil.rmtree(folder)
    model.save_pretrained(folder)
    assert contents(folder) == expected


def test_a_processor_that_is_there_stays(folder, tmp_path):
    own = BitImageProcessor(image_mean=[0.9] * 3)
    own.save_pretrained(tmp_path / "again")
    expected = contents(tmp_path / "again")
    RepVGGForImageClassification.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == expected != contents(folder)


def test_one_that_is_saved_afterwards_wins(folder, tmp_path):
    RepVGGForImageClassification.from_pretrained(folder).save_pretrained(tmp_path / "again")
    BitImageProcessor(image_mean=[0.9] * 3).save_pretrained(tmp_path / "again")
    assert json.loads(contents(tmp_path / "again"))["image_mean"] == [0.9] * 3


def test_only_the_main_process_writes_it(folder, tmp_path):
    model = RepVGGForImageClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again", is_main_process=False)
    assert not (tmp_path / "again" / PROCESSOR_FILE).exists()


def test_a_model_without_one(tiny_config, tmp_path, caplog):
    RepVGGForImageClassification(tiny_config()).save_pretrained(tmp_path / "new")
    RepVGGForImageClassification.from_pretrained(tmp_path / "new").save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"model.safetensors", "config.json"}
    assert "processor" not in caplog.text


def test_in_a_subfolder(folder, tmp_path):
    folder.rename(tmp_path / "inner")
    model = RepVGGForImageClassification.from_pretrained(tmp_path, subfolder="inner")
    model.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "inner")


class TestOfTheHub:
    """With a stand-in for the download; a server answers in `tests/hub/test_image_processor.py`."""

    @pytest.fixture
    def hub(self, folder, monkeypatch):
        """`hub.calls` to download the file, and the `answer`: a path, or an error."""

        class Hub:
            calls, answer = [], str(folder / PROCESSOR_FILE)

        def download(**arguments):
            Hub.calls.append(arguments)
            if isinstance(Hub.answer, Exception):
                raise Hub.answer
            return Hub.answer

        monkeypatch.setattr(image_processor_file, "hf_hub_download", download)
        monkeypatch.setattr(image_processor_file, "try_to_load_from_cache", lambda *args, **kwargs: None)
        return Hub

    def test_it_is_fetched_when_the_model_is_saved(self, hub, folder, tmp_path):
        arguments = {"token": "secret", "cache_dir": "cache", "subfolder": "inner", "revision": "v1"}
        file = ImageProcessorFile.beside("org/model", "abc123", arguments)
        assert hub.calls == [] and "secret" not in repr(file)
        for _ in range(2):
            file.write(tmp_path)
        place = {"repo_id": "org/model", "filename": f"inner/{PROCESSOR_FILE}", "revision": "abc123"}
        assert hub.calls == [place | {"cache_dir": "cache"}]
        assert contents(tmp_path) == contents(folder)

    def test_no_connection(self, hub, folder, tmp_path, caplog):
        path, hub.answer = hub.answer, OSError("no connection")
        file = ImageProcessorFile.beside("org/model", None, {"revision": "v1"})
        file.write(tmp_path)
        assert "image processor of org/model could not be fetched" in caplog.text and "no connection" in caplog.text
        hub.answer = path
        file.write(tmp_path)  # asks again
        assert len(hub.calls) == 2 and contents(tmp_path) == contents(folder)

    def test_local_files_only(self, hub, tmp_path, caplog):
        ImageProcessorFile.beside("org/model", None, {"local_files_only": True}).write(tmp_path)
        assert hub.calls == [] and not (tmp_path / PROCESSOR_FILE).exists() and not caplog.records


QUICK_START = """
import repvgg_hf

model = repvgg_hf.RepVGGForImageClassification.from_pretrained("train")
model.reparameterize().save_pretrained("fused")
model.quantize(method="cluster", bits=4, bits_overrides={"classifier": 8})
model.save_pretrained("w4")
"""
NEW_PROCESS = """
import repvgg_hf
from PIL import Image
from transformers import pipeline

for folder in ("fused", "w4"):
    print(len(pipeline("image-classification", folder)(Image.new("RGB", (50, 40), (200, 30, 60)))))
"""


def test_pipeline_in_a_new_process_after_the_quick_start(folder):
    for code in (QUICK_START, NEW_PROCESS):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=folder.parent
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["5", "5"]
    picture = Image.new("RGB", (50, 40), (200, 30, 60))
    before, after = (AutoImageProcessor.from_pretrained(folder.parent / name) for name in ("train", "w4"))
    assert torch.equal(*(processor(picture, return_tensors="pt")["pixel_values"] for processor in (before, after)))
