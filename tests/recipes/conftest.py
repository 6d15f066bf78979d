"""Fixtures of the recipes' tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor

from repvgg_hf import RepVGGConfig, RepVGGForImageClassification

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
def run(start):
    """`run(recipe, *options, expect=0)`: the output of a recipe, which must end with the exit code `expect`."""

    def run(recipe: str, *options, expect: int = 0, **environment) -> str:
        done = start("-m", f"repvgg_hf.recipes.{recipe}", *options, timeout=580, **environment)
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout + done.stderr

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
