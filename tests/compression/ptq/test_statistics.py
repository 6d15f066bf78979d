"""Moments and means of a layer's inputs, against sums over single patches."""

import numpy as np
import pytest
import torch
from torch import nn

from repvgg_hf.compression.ptq import patches
from repvgg_hf.compression.ptq.activation_ranges import RangeObserver
from repvgg_hf.compression.ptq.statistics import InputStatistics

LAYERS = {
    "conv": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "grouped": nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "linear": nn.Linear(5, 3),
}


def columns_of(layer, x: torch.Tensor) -> np.ndarray:
    """Every patch that the layer sees, `[groups, d, positions]`, by loops over images and pixels."""
    if isinstance(layer, nn.Linear):
        return x.numpy().T[None]
    (height, width), stride = layer.kernel_size, layer.stride[0]
    padded = np.pad(x.numpy(), [(0, 0), (0, 0), (1, 1), (1, 1)])
    found = []
    for image in padded:
        for row in range(0, padded.shape[2] - height + 1, stride):
            for column in range(0, padded.shape[3] - width + 1, stride):
                patch = image[:, row : row + height, column : column + width]
                found.append(patch.reshape(layer.groups, -1))
    return np.stack(found, axis=2)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_against_single_patches(name, generator, monkeypatch):
    monkeypatch.setattr(patches, "PATCH_BYTES", 2000)  # so that there are several pieces
    layer = LAYERS[name]
    size = (5,) if name == "linear" else (4, 7, 6)
    batches = [torch.randn(count, *size, generator=generator) + 0.5 for count in (3, 4, 1)]
    float_batches = [batch + 0.1 * torch.randn(batch.shape, generator=generator) for batch in batches]
    block, float_block = nn.Sequential(nn.ReLU(), layer), nn.Sequential(nn.ReLU(), layer)
    observer = RangeObserver()
    found = InputStatistics.collect(block, layer, batches, float_block, layer, float_batches, observer)

    x, float_x = torch.cat(batches).relu(), torch.cat(float_batches).relu()
    columns = columns_of(layer, x).astype(np.float64)
    moments = np.einsum("gdp,gep->gde", columns, columns) / columns.shape[2]
    assert np.allclose(found.moments.numpy(), moments, rtol=1e-4, atol=1e-5)
    assert np.allclose(found.mean.numpy(), columns.mean(axis=2), rtol=1e-4, atol=1e-5)
    assert np.allclose(found.float_mean.numpy(), columns_of(layer, float_x).mean(axis=2), rtol=1e-4, atol=1e-5)
    assert (observer.min, observer.max) == (x.min(), x.max()) and found.observer is observer

    quantized = (layer.weight * 4).round() / 4
    axes = (0,) if name == "linear" else (0, 2, 3)
    wanted = layer(float_x).mean(dim=axes)
    layer_bias, layer.weight.data, weight = layer.bias, quantized, layer.weight.data
    actual = layer(x).mean(dim=axes)
    layer.weight.data = weight
    assert layer_bias is layer.bias
    torch.testing.assert_close(found.mean_error(weight, quantized), wanted - actual, rtol=1e-4, atol=1e-5)


def test_no_range_unless_it_is_wanted(generator):
    layer = LAYERS["linear"]
    x = [torch.randn(4, 5, generator=generator)]
    block = nn.Sequential(layer)
    assert InputStatistics.collect(block, layer, x, block, layer, x).observer is None
