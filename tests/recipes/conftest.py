"""Fixtures of the studies' tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BitImageProcessor

from repvgg_hf import RepVGGConfig, RepVGGForImageClassification

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="session")
def run_study():
    """`run_study(*arguments)`: Python with these arguments, in the recipes' folder; what became of it."""

    def run(*arguments) -> subprocess.CompletedProcess:
        variables = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=240, cwd=RECIPES)

    return run


@pytest.fixture
def digits_checkpoint(tmp_path):
    """A tiny untrained classifier of the digits, with its image processor."""
    names = {"id2label": {i: str(i) for i in range(10)}, "label2id": {str(i): i for i in range(10)}}
    config = RepVGGConfig(stem_hidden_size=8, hidden_sizes=[32], depths=[1], strides=[2], **names)
    RepVGGForImageClassification(config).save_pretrained(tmp_path / "model")
    side = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    BitImageProcessor(**side).save_pretrained(tmp_path / "model")
    return tmp_path / "model"
