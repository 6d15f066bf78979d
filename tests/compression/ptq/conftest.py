"""Fixtures of the tests of calibration."""

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture
def images(generator):
    """Neighboring pixels of an image are alike, as in photographs."""
    noise = torch.randn(48, 3, 6, 6, generator=generator)
    return F.interpolate(noise, size=16, mode="bilinear") + 0.2 * torch.randn(48, 3, 16, 16, generator=generator)


@pytest.fixture
def model(make_model):
    return make_model(hidden_sizes=[12, 16], depths=[2, 1], strides=[2, 2]).eval()
