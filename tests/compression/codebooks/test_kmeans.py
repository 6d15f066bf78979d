"""k-means against the exact optimum: kmeans1d, and brute force over all partitions."""

from itertools import combinations

import kmeans1d
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from repvgg_hf.compression.codebooks.kmeans import assign, kmeans_1d
from repvgg_hf.compression.codebooks.sorted_groups import HISTOGRAM_VALUES


def with_outliers(shape, generator):
    values = 0.02 * torch.randn(shape, generator=generator)
    values[:, :: shape[1] // 20] += 1
    return values


def rounded(shape, generator):
    return (20 * torch.randn(shape, generator=generator)).round() / 20  # about 130 distinct values


def cauchy(shape, generator):
    return torch.randn(shape, generator=generator) / torch.randn(shape, generator=generator)


def two_peaks(shape, generator):
    values = 0.001 * torch.randn(shape, generator=generator)
    values[:, ::2] += 1
    return values


DISTRIBUTIONS = {
    "normal": lambda shape, generator: torch.randn(shape, generator=generator),
    "uniform": lambda shape, generator: torch.rand(shape, generator=generator),
    "lognormal": lambda shape, generator: torch.randn(shape, generator=generator).mul(2).exp(),
    "cauchy": cauchy,
    "outliers": with_outliers,
    "rounded": rounded,
    "two peaks": two_peaks,
}


def squared_error(values, codebook, weights=None):
    """Brute force: the distance to every entry, in float64."""
    distances = (np.asarray(values, dtype=np.float64)[:, None] - np.asarray(codebook, dtype=np.float64)) ** 2
    return float(np.sum(distances.min(axis=1) * (1 if weights is None else np.asarray(weights, dtype=np.float64))))


def error_of_sorted(values, codebook):
    """The same for an ascending codebook and many values."""
    codebook = np.asarray(codebook, dtype=np.float64)
    values = np.asarray(values, dtype=np.float64)
    nearest = codebook[np.searchsorted((codebook[1:] + codebook[:-1]) / 2, values)]
    return float(np.sum((values - nearest) ** 2))


def excess(values, k):
    """For each group, its error divided by the exact optimum's."""
    codebooks = kmeans_1d(values, k).numpy()
    optima = [kmeans1d.cluster(group.astype(np.float64), k).centroids for group in values.numpy()]
    return [
        error_of_sorted(group, codebook) / error_of_sorted(group, optimum)
        for group, codebook, optimum in zip(values.numpy(), codebooks, optima)
    ]


@pytest.mark.parametrize("k", [2, 4, 16, 32])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_one_group_gets_the_optimum(name, k, generator):
    assert excess(DISTRIBUTIONS[name]((1, 6000), generator), k)[0] <= 1.00005


@pytest.mark.parametrize("k", [4, 8, 16, 32])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_many_groups_are_near_the_optimum(name, k, generator):
    factors = excess(DISTRIBUTIONS[name]((8, 900), generator), k)
    assert np.mean(factors) <= (1.003 if name == "rounded" else 1.001)
    assert max(factors) <= 1.015


def test_channels_of_a_usual_layer_are_within_3_parts_in_10000_of_the_optimum(generator):
    assert np.mean(excess(torch.randn(48, 1728, generator=generator), 16)) <= 1.0003


@pytest.mark.parametrize("name", ["normal", "cauchy", "outliers", "two peaks"])
def test_so_many_values_that_they_are_counted_into_bins(name, generator):
    values = DISTRIBUTIONS[name]((1, HISTOGRAM_VALUES + 1), generator)
    assert excess(values, 16)[0] <= 1.0007


def test_many_values_of_which_few_are_distinct(generator):
    distinct = torch.randn(16, generator=generator).sort().values
    values = distinct[torch.randint(16, (1, HISTOGRAM_VALUES + 1), generator=generator)]
    assert torch.equal(kmeans_1d(values, 16)[0], distinct)


@pytest.mark.parametrize("k, bar", [(64, 1.002), (128, 1.006), (256, 1.02)])
@pytest.mark.parametrize("name", ["normal", "uniform", "cauchy", "outliers"])
def test_many_clusters_are_near_the_optimum(name, k, bar, generator):
    assert max(excess(DISTRIBUTIONS[name]((2, 3000), generator), k)) <= bar


@pytest.mark.parametrize("k", [3, 8, 16])
@pytest.mark.parametrize("name", ["normal", "lognormal", "outliers"])
def test_a_weight_is_that_many_values(name, k, generator):
    values = DISTRIBUTIONS[name]((1, 2000), generator)
    weights = torch.randint(1, 6, (1, 2000), generator=generator)
    optimum = kmeans1d.cluster(values[0].double().repeat_interleave(weights[0]).numpy(), k).centroids
    ours = squared_error(values[0], kmeans_1d(values, k, weights)[0], weights[0])
    assert ours <= 1.0002 * squared_error(values[0], optimum, weights[0])


def error_of_partition(parts, pinned=None) -> float:
    """Of (values, weights) in parts with their means as entries; that of part `pinned` is zero."""
    error = 0.0
    for index, (values, mass) in enumerate(parts):
        if index == pinned:
            error += np.sum(mass * values**2)
        elif mass.sum() > 0:
            error += np.sum(mass * (values - np.average(values, weights=mass)) ** 2)
    return error


def best_partition(values, k, weights, preserve_zero=False):
    """The least error of any partition into `k` intervals, some of which may be empty."""
    order = np.argsort(values)
    values, weights = values[order].astype(np.float64), weights[order].astype(np.float64)
    errors = []
    for inner in combinations(range(len(values) + k - 1), k - 1):  # with repetition: i - its index
        cuts = [0, *(position - index for index, position in enumerate(inner)), len(values)]
        parts = [(values[start:end], weights[start:end]) for start, end in zip(cuts, cuts[1:])]
        errors += [error_of_partition(parts, pinned) for pinned in (range(k) if preserve_zero else [None])]
    return min(errors)


small_values = hnp.arrays(np.float32, st.integers(2, 8), elements=st.floats(-100, 100, width=32))


@pytest.mark.parametrize("preserve_zero", [False, True], ids=["free", "with zero"])
@given(values=small_values, k=st.integers(2, 4), data=st.data())
def test_no_partition_is_better(preserve_zero, values, k, data):
    assume(len(values) > k)
    weight = st.one_of(st.just(0.0), st.floats(0.125, 8, width=32))
    weights = data.draw(hnp.arrays(np.float32, len(values), elements=weight))
    codebook = kmeans_1d(torch.tensor(values)[None], k, torch.tensor(weights)[None], preserve_zero)[0]
    assert codebook.isfinite().all() and (codebook.diff() >= 0).all()
    assert not preserve_zero or (codebook == 0).any()
    spread = float(np.sum(weights)) * max(1.0, float(np.abs(values).max())) ** 2
    expected = best_partition(values, k, weights, preserve_zero)
    assert squared_error(values, codebook, weights) <= expected * (1 + 1e-5) + 1e-9 * spread


@pytest.mark.parametrize("k", [2, 4, 16])
@pytest.mark.parametrize("name", ["normal", "lognormal", "outliers"])
def test_zero_costs_no_more_than_one_entry(name, k, generator):
    values = DISTRIBUTIONS[name]((3, 800), generator) + 0.1
    codebooks = kmeans_1d(values, k, preserve_zero=True)
    assert ((codebooks == 0).sum(dim=1) == 1).all()
    for group, codebook in zip(values, codebooks):
        fewer = kmeans1d.cluster(group.double().numpy(), k - 1).centroids
        assert squared_error(group, codebook) <= 1.002 * squared_error(group, [*fewer, 0.0])


@pytest.mark.parametrize("k", [2, 8, 16])
def test_symmetric_is_the_optimum_of_the_magnitudes(k, generator):
    values = torch.randn(2, 1000, generator=generator) + 0.3
    codebooks = kmeans_1d(values, k, symmetric=True)
    assert torch.equal(codebooks, -codebooks.flip(1))
    for group, codebook in zip(values, codebooks):
        half = kmeans1d.cluster(group.abs().double().numpy(), k // 2).centroids
        assert squared_error(group, codebook) <= 1.0005 * squared_error(group.abs(), half)
    if k == 2:
        assert torch.allclose(codebooks[:, 1], values.abs().mean(dim=1))


def test_symmetric_with_zero_has_it_twice(generator):
    values = torch.randn(2, 1000, generator=generator)
    codebooks = kmeans_1d(values, 8, preserve_zero=True, symmetric=True)
    assert torch.equal(codebooks, -codebooks.flip(1))
    assert (codebooks[:, 3:5] == 0).all() and (codebooks[:, 5:].diff(dim=1) > 0).all() and (codebooks[:, 5] > 0).all()
    magnitudes = kmeans_1d(values.abs(), 4, preserve_zero=True)
    assert torch.equal(codebooks[:, 4:], magnitudes)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=6, unique=True), st.integers(6, 9))
def test_few_distinct_values_are_kept_exactly(distinct, k):
    values = torch.tensor(distinct * 3)[None]
    expected = sorted(distinct) + [max(distinct)] * (k - len(distinct))
    assert kmeans_1d(values, k)[0].tolist() == expected


@given(hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-1e3, 1e3, width=32)), st.integers(2, 12))
def test_entries_ascend_within_the_values_in_whatever_order_these_come(values, k):
    values = torch.tensor(values)[None]
    codebook = kmeans_1d(values, k)
    assert (codebook.diff() >= 0).all()
    rounding = 1e-6 * (values.max() - values.min())
    assert values.min() - rounding <= codebook.min() and codebook.max() <= values.max() + rounding
    assert torch.equal(codebook, kmeans_1d(values.flip(1), k))


def test_the_same_values_give_the_same_codebook(generator):
    values = torch.randn(3, 500, generator=generator)
    weights = torch.rand(3, 500, generator=generator)
    order = torch.randperm(500, generator=generator)
    codebook = kmeans_1d(values, 16, weights)
    assert torch.equal(codebook, kmeans_1d(values, 16, weights))
    assert torch.equal(codebook, kmeans_1d(values[:, order], 16, weights[:, order]))


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_groups_are_clustered_alike_together_and_alone(weighted, generator):
    number = 300  # more than are done at a time
    values = with_outliers((number, 300), generator)
    weights = torch.rand(values.shape, generator=generator) if weighted else None
    together = kmeans_1d(values, 8, weights)
    assert together.shape == (number, 8)
    for group in (0, 1, 127, 128, number - 1):
        part = slice(group, group + 1)
        alone = kmeans_1d(values[part], 8, None if weights is None else weights[part])[0]
        errors = [
            squared_error(values[group], codebook, None if weights is None else weights[group])
            for codebook in (together[group], alone)
        ]
        assert max(errors) <= 1.005 * min(errors)


def test_a_group_of_few_values_beside_one_of_many(generator):
    values = torch.stack([torch.randn(100, generator=generator), torch.tensor([1.0, -2.0]).repeat(50)])
    codebook = kmeans_1d(values, 4)
    assert codebook[1].tolist() == [-2.0, 1.0, 1.0, 1.0]
    assert codebook[0].unique().numel() == 4


def test_values_without_weight_take_no_entry():
    values = torch.tensor([[0.0, 1.0, 10.0, 11.0, 500.0, -500.0]])
    weights = torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0, 0.0]])
    codebook = kmeans_1d(values, 2, weights)[0]
    assert codebook.tolist() == [0.75, 10.5]


@pytest.mark.parametrize("shift", [0.0, 100.0], ids=["centered", "far from zero"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_neither_scale_nor_offset_matters(scale, shift, generator):
    # in float32, values with an offset of 100 standard deviations have 17 bits left
    values = torch.randn(1, 3000, generator=generator).double()
    shifted = ((values + shift) * scale).float()
    exact = kmeans1d.cluster(shifted[0].double().numpy(), 16).centroids
    assert squared_error(shifted[0], kmeans_1d(shifted, 16)[0]) <= 1.0002 * squared_error(shifted[0], exact)


half_integers = st.integers(-40, 40).map(lambda value: value / 2)


@given(st.lists(half_integers, min_size=1, max_size=30), st.lists(half_integers, min_size=2, max_size=16))
def test_assign_takes_the_nearest_entry_and_the_lower_one_in_the_middle(values, entries):
    # multiples of 1/2: the middles are exact
    entries = sorted(entries)
    nearest = [min(entries, key=lambda entry: (abs(value - entry), entry)) for value in values]
    for groups in (1, 3):  # one codebook takes another path
        codes = assign(torch.tensor([values] * groups), torch.tensor([entries] * groups))
        assert codes.dtype == torch.uint8
        for row in codes.tolist():
            assert [entries[code] for code in row] == nearest


def test_assign_against_all_distances(generator):
    values, codebook = torch.randn(5, 800, generator=generator), torch.randn(5, 256, generator=generator)
    codebook = codebook.sort(dim=1).values
    codes = assign(values, codebook)
    distance = (values - codebook.gather(1, codes.long())).abs()
    best = (values[:, :, None] - codebook[:, None, :]).abs().min(dim=2).values
    assert (distance <= best + 1e-6).all()
