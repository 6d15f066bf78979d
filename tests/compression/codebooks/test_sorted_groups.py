"""Prefix sums of sorted values, against sums over the values themselves."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from repvgg_hf.compression.codebooks import sorted_groups
from repvgg_hf.compression.codebooks.sorted_groups import HISTOGRAM_VALUES, SortedGroups, ascending_pairs


def squared_error(values, codebook, weights):
    nearest = (values.double()[:, :, None] - codebook.double()[:, None, :]).square().amin(dim=2)
    return (nearest * (1 if weights is None else weights.double())).sum(dim=1)


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_error_is_that_of_the_nearest_entries(weighted, generator):
    values = torch.randn(4, 200, generator=generator) + 3
    weights = torch.rand(4, 200, generator=generator) if weighted else None
    codebook = torch.randn(4, 7, generator=generator).add(3).sort(dim=1).values
    error = SortedGroups(values, weights).error(codebook)
    assert torch.allclose(error, squared_error(values, codebook, weights), rtol=1e-9)


@pytest.mark.parametrize("chunk", [1, 10**6], ids=["one at a time", "all at once"])
def test_errors_of_stretched_and_shifted_entries(chunk, generator, monkeypatch):
    monkeypatch.setattr(sorted_groups, "CHUNK_VALUES", chunk)
    values = torch.randn(3, 150, generator=generator)
    entries = torch.randn(1, 5, generator=generator).sort(dim=1).values
    factors, offsets = torch.rand(3, 4, generator=generator) + 0.1, torch.randn(3, 4, generator=generator)
    errors = SortedGroups(values).errors(entries, factors, offsets)
    assert errors.shape == (3, 4)
    for candidate in range(4):
        codebook = entries * factors[:, candidate, None] + offsets[:, candidate, None]
        assert torch.allclose(errors[:, candidate], squared_error(values, codebook, None), rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 10**6], ids=["row by row", "all at once"])
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_means_are_those_of_the_values_between_the_cuts(weighted, chunk, generator, monkeypatch):
    monkeypatch.setattr(sorted_groups, "CHUNK_VALUES", chunk)
    values = torch.randn(3, 50, generator=generator)
    weights = torch.rand(3, 50, generator=generator) if weighted else torch.ones(3, 50)
    cuts = torch.tensor([[0, 10, 10, 50], [0, 1, 49, 50], [0, 0, 25, 50]])
    empty = torch.full((3, 3), 7.0)
    groups = SortedGroups(values, weights if weighted else None)
    means = groups.means(cuts, empty)
    assert torch.equal(groups.values, values.sort(dim=1).values)
    for group, order in enumerate(values.argsort(dim=1)):
        for interval, (start, end) in enumerate(zip(cuts[group], cuts[group, 1:])):
            inside = order[start:end]
            expected = 7.0
            if end > start:
                expected = np.average(values[group, inside], weights=weights[group, inside])
            assert means[group, interval].item() == pytest.approx(expected, abs=1e-6)


def rows_of_nine(elements):
    return hnp.arrays(np.float32, (2, 9), elements=elements)


@given(rows_of_nine(st.floats(-(2.0**60), 2.0**60, width=32)), rows_of_nine(st.floats(0, 2.0**30, width=32)))
def test_weights_travel_with_their_values(values, weights):
    ordered, carried = ascending_pairs(torch.tensor(values), torch.tensor(weights))
    for row in range(2):
        pairs = sorted((value, weight) for value, weight in zip(values[row].tolist(), weights[row].tolist()))
        assert ordered[row].tolist() == [value for value, _ in pairs]
        found = sorted(zip(ordered[row].tolist(), carried[row].tolist()))
        assert found == pairs  # -0.0 and 0.0 are equal, with their weights in any order


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_bins_have_the_mass_and_the_error_of_their_values(weighted, generator, monkeypatch):
    values = torch.randn(2, 30_000, generator=generator).exp()  # a long tail
    values[1] -= 100
    weights = torch.rand(values.shape, generator=generator) if weighted else None
    exact = SortedGroups(values, weights)
    monkeypatch.setattr(sorted_groups, "HISTOGRAM_VALUES", 10_000)
    monkeypatch.setattr(sorted_groups, "CHUNK_VALUES", 2**12)
    binned = SortedGroups(values, weights)
    assert binned.values.shape[1] > values.shape[1]  # of bins
    assert (binned.values.diff(dim=1) >= 0).all()
    assert torch.allclose(binned.mass[:, -1], exact.mass[:, -1])
    assert torch.allclose(binned.first[:, -1], exact.first[:, -1], atol=1e-6)
    codebook = values[:, :16].sort(dim=1).values
    assert torch.allclose(binned.error(codebook), exact.error(codebook), rtol=1e-4)


def test_values_that_fill_few_bins_are_sorted(generator):
    values = torch.randint(100, (1, HISTOGRAM_VALUES + 1), generator=generator) / 7
    assert torch.equal(SortedGroups(values).values, values.sort(dim=1).values)
