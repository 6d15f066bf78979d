"""Ranges of uniform quantization, against dense searches."""

import pytest
import torch

from repvgg_hf.compression.codebooks.uniform import best_range, symmetric_integers, whole_range

VALUES = {
    "normal": lambda noise: noise,
    "outliers": lambda noise: torch.where(torch.arange(noise.shape[1]) % 150 == 0, noise + 15, noise),
    "skewed": lambda noise: noise.exp(),
    "far from zero": lambda noise: noise + 20,
}


@pytest.fixture(params=VALUES)
def values(request, generator):
    return VALUES[request.param](torch.randn(2, 600, generator=generator))


@pytest.fixture(params=[False, True], ids=["equal", "weighted"])
def importance(request, generator):
    return torch.rand(2, 600, generator=generator).square() if request.param else None


def error(values, offset, step, integers, importance):
    """Of every one of many ranges `[sets, ranges]`, by rounding."""
    position = (values[:, None, :] - offset[:, :, None]) / step[:, :, None]
    if len(integers) == 2:  # -1 and 1 for a symmetric grid
        nearest = torch.where(position > integers.mean(), integers[1], integers[0])
    else:
        nearest = position.round().clamp(integers[0], integers[-1])
    squares = (offset[:, :, None] + step[:, :, None] * nearest - values[:, None, :]).double().square()
    return (squares * (1 if importance is None else importance[:, None, :])).sum(dim=2)


def error_of(values, fit, integers, importance):
    return error(values, *(part[:, None] for part in fit), integers, importance)[:, 0]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_no_symmetric_step_is_better(bits, values, importance):
    integers = symmetric_integers(2**bits)
    offset, step = best_range(values, integers, affine=False, importance=importance)
    assert (offset == 0).all()
    tried = whole_range(values, integers, affine=False)[1][:, None] * torch.logspace(0.1, -2.3, 1500)
    least = error(values, torch.zeros_like(tried), tried, integers, importance).amin(dim=1)
    assert (error_of(values, (offset, step), integers, importance) <= 1.001 * least).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_no_affine_range_is_better(bits, values, importance):
    integers = torch.arange(2**bits).float()
    low, high, middle = values.amin(dim=1), values.amax(dim=1), values.mean(dim=1)
    ratios = torch.logspace(0, -2, 45)
    first = torch.lerp(middle[:, None], low[:, None], ratios)[:, :, None]
    last = torch.lerp(middle[:, None], high[:, None], ratios)[:, None, :]
    steps = (last - first) / (len(integers) - 1)
    least = error(values, first.expand_as(steps).flatten(1), steps.flatten(1), integers, importance).amin(dim=1)
    ours = error_of(values, best_range(values, integers, affine=True, importance=importance), integers, importance)
    assert (ours <= 1.001 * least).all()


@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
def test_the_whole_range_takes_in_every_value(affine, values):
    integers = symmetric_integers(8)
    offset, step = whole_range(values, integers, affine)
    ends = offset[:, None] + step[:, None] * integers[[0, -1]]
    slack = 1e-5 * values.abs().amax()
    assert (ends[:, 1] >= values.amax(dim=1) - slack).all() and (ends[:, 0] <= values.amin(dim=1) + slack).all()
    if affine:
        assert torch.allclose(ends[:, 0], values.amin(dim=1), atol=1e-5)


@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
def test_constant_values_are_kept(affine):
    values = torch.tensor([[0.0], [0.3], [-2.0]]).expand(-1, 50)
    offset, step = best_range(values, symmetric_integers(4), affine)
    assert (error(values, offset[:, None], step[:, None].clamp_min(1e-30), symmetric_integers(4), None) < 1e-10).all()
