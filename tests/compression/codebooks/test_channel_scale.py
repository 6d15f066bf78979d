"""A shared codebook with a scale for each channel, against simpler ways to fit the two and against brute force."""

import pytest
import torch

from repvgg_hf.compression.codebooks.channel_scale import fit_channel_scale
from repvgg_hf.compression.codebooks.kmeans import kmeans_1d
from repvgg_hf.compression.codebooks.sorted_groups import SortedGroups


def errors(rows, codebook, scale, importance=None):
    """Of every channel with the nearest entries, by all distances."""
    entries = (codebook.repeat_interleave(len(rows) // len(codebook), dim=0) * scale[:, None]).double()
    distances = (rows.double()[:, :, None] - entries[:, None, :]).square().amin(dim=2)
    return (distances * (1 if importance is None else importance)).sum(dim=1)


def normal(out, n, generator):
    return torch.randn(out, n, generator=generator)


def with_outliers(out, n, generator):
    """One weight of each channel is far larger, as the identity branch makes it, by a factor of its own."""
    rows = 0.05 * torch.randn(out, n, generator=generator)
    rows[:, 0] += torch.rand(out, generator=generator) + 0.3
    return rows


def of_all_sizes(out, n, generator):
    return torch.randn(out, n, generator=generator) * torch.randn(out, 1, generator=generator).mul(2).exp()


CHANNELS = {"normal": normal, "outliers": with_outliers, "of all sizes": of_all_sizes}


@pytest.fixture(params=CHANNELS)
def rows(request, generator):
    return CHANNELS[request.param](24, 300, generator)


def scaled_by(scale, rows, k, groups=1):
    """k-means of `rows / scale`, and the scale."""
    values = (rows / scale[:, None]).reshape(groups, -1)
    weights = scale.square()[:, None].expand_as(rows).reshape(groups, -1)
    return kmeans_1d(values, k, weights), scale


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("k", [2, 4, 16, 64])
def test_better_than_any_fixed_scale(k, groups, rows):
    ours = errors(rows, *fit_channel_scale(rows, k, groups, torch.float32)).sum()
    for scale in (rows.square().mean(dim=1).sqrt(), rows.abs().amax(dim=1), rows.abs().mean(dim=1), torch.ones(24)):
        assert ours <= 1.0001 * errors(rows, *scaled_by(scale, rows, k, groups)).sum()


@pytest.mark.parametrize("k, bar", [(4, 1.01), (16, 1.07)])
def test_normal_channels_of_a_usual_size_need_little_more_than_a_scale(k, bar, generator):
    """A codebook of its own also fits the accidents of a channel: 6 % of the error with 1728 weights and 16 entries."""
    rows = torch.randn(64, 1728, generator=generator)
    least = SortedGroups(rows).error(kmeans_1d(rows, k)).sum()
    assert errors(rows, *fit_channel_scale(rows, k, 1, torch.float32)).sum() <= bar * least


def test_scales_are_recovered(generator):
    codebook = torch.tensor([-1.0, -0.4, 0.1, 0.3, 0.9])
    scale = torch.rand(8, generator=generator) * 3 + 0.2
    rows = scale[:, None] * codebook[torch.randint(5, (8, 200), generator=generator)]
    assert errors(rows, *fit_channel_scale(rows, 5, 1, torch.float32)).sum() <= 1e-10 * rows.square().sum()


@pytest.mark.parametrize("k", [2, 3])
def test_two_channels_against_every_ratio_of_their_scales(k, generator):
    ours = best = 0.0
    for _ in range(4):
        rows = torch.randn(2, 25, generator=generator) * torch.tensor([[1.0], [2.5]])
        ours += errors(rows, *fit_channel_scale(rows, k, 1, torch.float32)).sum().item()
        ratios = torch.logspace(-0.7, 1.1, 80)
        every = [errors(rows, *scaled_by(torch.stack([torch.tensor(1.0), ratio]), rows, k)).sum() for ratio in ratios]
        best += min(every).item()
    assert ours <= 1.01 * best


def test_a_channel_alone_gets_the_best_codebook(rows):
    codebook, scale = fit_channel_scale(rows, 8, len(rows), torch.float32)
    assert torch.allclose(codebook.abs().amax(dim=1), torch.ones(len(rows)))
    assert torch.allclose(codebook * scale[:, None], kmeans_1d(rows, 8), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("k", [4, 16, 64, 128])
def test_entries_are_numbers_of_their_dtype_and_no_worse_than_rounded_ones(k, dtype, rows):
    largest, limit = (127, 127) if dtype == torch.int8 else (1, 1.1)
    codebook, scale = fit_channel_scale(rows, k, 1, dtype)
    assert torch.equal(codebook, codebook.to(dtype).float()) and codebook.abs().max() <= limit
    assert (codebook.diff(dim=1) > 0).all() and (scale > 0).all()
    exact, scale_of_exact = fit_channel_scale(rows, k, 1, torch.float32)
    rounded = (exact * largest).round() if dtype == torch.int8 else exact.half().float()
    before = errors(rows, rounded, scale_of_exact / largest).sum()
    assert errors(rows, codebook, scale).sum() <= before * (1 + 1e-6)


@pytest.mark.parametrize("k, bar", [(64, 0.85), (128, 0.75)])
def test_int8_is_much_better_than_rounding_where_there_are_outliers(k, bar, generator):
    rows = with_outliers(24, 600, generator)
    exact, scale = fit_channel_scale(rows, k, 1, torch.float32)
    rounded = errors(rows, (exact * 127).round(), scale / 127).sum()
    assert errors(rows, *fit_channel_scale(rows, k, 1, torch.int8)).sum() <= bar * rounded


def test_what_is_important_is_fitted_better(rows, generator):
    importance = torch.randn(rows.shape, generator=generator).mul(2).exp()
    equal, weighted = (fit_channel_scale(rows, 8, 1, torch.float32, some) for some in (None, importance))
    assert errors(rows, *weighted, importance).sum() < 0.9 * errors(rows, *equal, importance).sum()
    assert errors(rows, *equal).sum() < errors(rows, *weighted).sum()


def test_all_zero_channels_take_no_part(rows):
    with_zeros = torch.cat([torch.zeros(2, rows.shape[1]), rows, torch.zeros(1, rows.shape[1])])
    codebook, scale = fit_channel_scale(with_zeros, 4, 1, torch.float32)
    assert (scale > 0).all() and (codebook.abs().amax() * scale[[0, 1, -1]] < 1e-20).all()
    alone = errors(rows, *fit_channel_scale(rows, 4, 1, torch.float32)).sum()
    assert errors(with_zeros, codebook, scale).sum() <= 1.001 * alone


def test_the_same_rows_give_the_same_fit(rows):
    for dtype in (torch.float16, torch.int8):
        first, second = (fit_channel_scale(rows, 16, 1, dtype) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second))
