"""Figures of kernels against NumPy and SciPy."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from repvgg_hf import RepVGGForImageClassification, kernel_report


@pytest.mark.parametrize("fields", [{}, {"use_squeeze_excitation": True}], ids=str)
def test_kernel_report(fields, tiny_config, randomize_batch_norms, generator):
    model = randomize_batch_norms(RepVGGForImageClassification(tiny_config(**fields)), generator)
    before = copy.deepcopy(model.state_dict())
    report = kernel_report(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.config.deploy

    fused = copy.deepcopy(model).reparameterize()
    assert report == kernel_report(fused)
    weights = {name: layer.weight for name, layer in fused.named_modules() if type(layer) in (nn.Conv2d, nn.Linear)}
    assert [entry["name"] for entry in report] == list(weights)
    for entry, weight in zip(report, weights.values()):
        values = weight.detach().numpy().astype(np.float64).ravel()
        assert entry["shape"] == list(weight.shape)
        assert entry["std"] == pytest.approx(np.std(values), rel=1e-9)
        assert entry["max_over_std"] == pytest.approx(np.abs(values).max() / np.std(values), rel=1e-9)
        assert entry["kurtosis"] == pytest.approx(stats.kurtosis(values, fisher=False), rel=1e-9)
