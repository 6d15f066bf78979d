"""Fixtures of the recipes' tests."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor

from repvgg_hf import RepVGGConfig, RepVGGForImageClassification

sys.path.insert(0, str(Path(__file__).parent))
from forks import ask  # noqa: E402

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def start():
    """`start(*arguments, timeout=...)`: Python with these arguments; what became of the process."""

    def start(*arguments, timeout: int = 240, **environment) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, arguments)]
        variables = ENVIRONMENT | environment
        return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=timeout)

    return start


@pytest.fixture(scope="session")
def forks():
    """The socket of `forks.py`, one for all tests of this process."""
    with tempfile.TemporaryDirectory() as folder:  # whose name is short: that of a socket must be
        path = Path(folder) / "socket"
        process = subprocess.Popen([sys.executable, Path(__file__).with_name("forks.py"), path], env=ENVIRONMENT)
        deadline = time.monotonic() + 240
        while not path.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        yield path
        process.terminate()
        process.wait()


@pytest.fixture(scope="session")
def run(forks, tmp_path_factory):
    """`run(recipe, *options, expect=0)`: the output of a recipe, which must end with the exit code `expect`.

    In a process of its own, a fork of one that has imported what recipes do; `start` is for those that shall not be.
    """

    def run(recipe: str, *options, expect: int = 0) -> str:
        output = tmp_path_factory.mktemp("output")
        task = {"module": f"repvgg_hf.recipes.{recipe}", "arguments": [*map(str, options)], "folder": os.getcwd()}
        task |= {"environment": dict(ENVIRONMENT)} | {name: str(output / name) for name in ("stdout", "stderr")}
        code = ask(str(forks), task)
        printed = "".join((output / name).read_text() for name in ("stdout", "stderr"))
        assert code == expect, printed
        return printed

    return run


@pytest.fixture(scope="session")
def recipes() -> Path:
    """The folder of the recipes in the checkout."""
    return Path(__file__).parents[2] / "recipes"


@pytest.fixture
def digits_checkpoint(tmp_path) -> Path:
    """A tiny untrained classifier of the digits, with its image processor."""
    return save_classifier(tmp_path / "model", hidden_sizes=[32], depths=[1], strides=[2])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The same with two stages, one for all tests of a module."""
    return save_classifier(tmp_path_factory.mktemp("checkpoint"), hidden_sizes=[8, 16], depths=[1, 1], strides=[1, 2])


def save_classifier(folder: Path, **sizes) -> Path:
    torch.manual_seed(0)
    names = {"id2label": {i: str(i) for i in range(10)}, "label2id": {str(i): i for i in range(10)}}
    RepVGGForImageClassification(RepVGGConfig(stem_hidden_size=8, **sizes, **names)).save_pretrained(folder)
    side = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    BitImageProcessor(**side, resample=2).save_pretrained(folder)
    return folder


@pytest.fixture
def images_of_two_classes(tmp_path) -> Path:
    """A folder of images in a folder for each of two classes."""
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (9, 9), (index * 40, 0, 0)).save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"
