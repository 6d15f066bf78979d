"""Fixtures of the tests of compression."""

import sys
from pathlib import Path

import pytest
import torch

from repvgg_hf import RepVGGForImageClassification

sys.path.insert(0, str(Path(__file__).parent))  # of tiny_models, which a process of its own imports too


@pytest.fixture
def make_model(tiny_config, randomize_batch_norms):
    """`make_model(form, **fields)`: the same weights at every call."""

    def make(form="train", **fields):
        torch.manual_seed(1)
        model = RepVGGForImageClassification(tiny_config(num_labels=4, **fields))
        randomize_batch_norms(model, torch.Generator().manual_seed(1))
        return model.reparameterize() if form == "deploy" else model

    return make


@pytest.fixture
def batch(generator):
    """Images that differ by class in the brightness of a quadrant."""
    labels = torch.arange(16) % 4
    pixel_values = 0.3 * torch.randn(16, 3, 16, 16, generator=generator)
    for image, label in zip(pixel_values, labels):
        row, column = 8 * (label // 2), 8 * (label % 2)
        image[:, row : row + 8, column : column + 8] += 1
    return {"pixel_values": pixel_values, "labels": labels}
