"""k-means against the exact optimum: kmeans1d, and brute force over all partitions."""

from itertools import combinations

import kmeans1d
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from repvgg_hf.compression.codebooks.kmeans import kmeans_1d
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


def error_of_partition(parts) -> float:
    """The error of (values, weights) in parts, with their means as entries."""
    return sum(
        np.sum(mass * (values - np.average(values, weights=mass)) ** 2) for values, mass in parts if mass.sum() > 0
    )


def best_partition(values, k, weights):
    """The least error of any partition into `k` intervals, some of which may be empty."""
    order = np.argsort(values)
    values, weights = values[order].astype(np.float64), weights[order].astype(np.float64)
    errors = []
    for inner in combinations(range(len(values) + k - 1), k - 1):  # with repetition: i - its index
        cuts = [0, *(position - index for index, position in enumerate(inner)), len(values)]
        errors.append(error_of_partition([(values[a:b], weights[a:b]) for a, b in zip(cuts, cuts[1:])]))
    return min(errors)


small_values = hnp.arrays(np.float32, st.integers(2, 8), elements=st.floats(-100, 100, width=32))


@given(values=small_values, k=st.integers(2, 4), data=st.data())
def test_no_partition_is_better(values, k, data):
    assume(len(values) > k)
    weight = st.one_of(st.just(0.0), st.floats(0.125, 8, width=32))
    weights = data.draw(hnp.arrays(np.float32, len(values), elements=weight))
    codebook = kmeans_1d(torch.tensor(values)[None], k, torch.tensor(weights)[None])[0]
    assert codebook.isfinite().all() and (codebook.diff() >= 0).all()
    spread = float(np.sum(weights)) * max(1.0, float(np.abs(values).max())) ** 2
    expected = best_partition(values, k, weights)
    assert squared_error(values, codebook, weights) <= expected * (1 + 1e-5) + 1e-9 * spread


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
