"""k-means against the exact optimum (kmeans1d, all partitions) and against scikit-learn."""

import warnings
from itertools import combinations

import kmeans1d
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.cluster import KMeans

from repvgg_hf.compression.clustering import GROUPS_A_CHUNK, SortedGroups, assign, kmeans_1d


def with_outliers(shape, generator):
    values = 0.02 * torch.randn(shape, generator=generator)
    values[:, :: shape[1] // 20] += 1
    return values


def rounded(shape, generator):
    return (20 * torch.randn(shape, generator=generator)).round() / 20  # about 130 distinct values


def cauchy(shape, generator):
    return torch.randn(shape, generator=generator) / torch.randn(shape, generator=generator)


DISTRIBUTIONS = {
    "normal": lambda shape, generator: torch.randn(shape, generator=generator),
    "uniform": lambda shape, generator: torch.rand(shape, generator=generator),
    "lognormal": lambda shape, generator: torch.randn(shape, generator=generator).mul(2).exp(),
    "cauchy": cauchy,
    "outliers": with_outliers,
    "rounded": rounded,
}


def squared_error(values, codebook, weights=None):
    """Brute force: the distance to every entry, in float64."""
    distances = (np.asarray(values, dtype=np.float64)[:, None] - np.asarray(codebook, dtype=np.float64)) ** 2
    return float(np.sum(distances.min(axis=1) * (1 if weights is None else np.asarray(weights, dtype=np.float64))))


def excess(values, k):
    """For each group, its error divided by the exact optimum's."""
    codebooks = kmeans_1d(values, k).numpy()
    optima = [kmeans1d.cluster(group.astype(np.float64), k).centroids for group in values.numpy()]
    return [
        squared_error(group, codebook) / squared_error(group, optimum)
        for group, codebook, optimum in zip(values.numpy(), codebooks, optima)
    ]


@pytest.mark.parametrize("k", [2, 3, 4, 8, 16, 32])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_one_group_is_as_good_as_the_optimum(name, k, generator):
    assert excess(DISTRIBUTIONS[name]((1, 6000), generator), k)[0] <= 1.0002


@pytest.mark.parametrize("k", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_many_groups_are_near_the_optimum(name, k, generator):
    factors = excess(DISTRIBUTIONS[name]((10, 1200), generator), k)
    assert np.mean(factors) <= 1.005
    assert max(factors) <= 1.03


@pytest.mark.parametrize("k", [2, 7, 16, 32])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_small_groups_get_the_optimum(name, k, generator):
    assert max(excess(DISTRIBUTIONS[name]((8, 150), generator), k)) <= 1.000001


@pytest.mark.parametrize("k", [64, 128, 256])
@pytest.mark.parametrize("name", [name for name in DISTRIBUTIONS if name != "rounded"])  # its optimum is 0 at 256
def test_many_clusters_are_near_the_optimum(name, k, generator):
    assert max(excess(DISTRIBUTIONS[name]((2, 3000), generator), k)) <= 1.05


def best_of_sklearn(values, k, weights):
    fits = [KMeans(k, init=init, n_init=count, random_state=0) for init, count in (("k-means++", 8), ("random", 8))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return min(fit.fit(values[:, None], sample_weight=weights).inertia_ for fit in fits)


@pytest.mark.parametrize("k", [3, 8, 16])
@pytest.mark.parametrize("name", ["normal", "lognormal", "outliers"])
def test_weighted_clusters_are_no_worse_than_sklearns_best(name, k, generator):
    values = DISTRIBUTIONS[name]((1, 2000), generator)
    weights = torch.randn(1, 2000, generator=generator).mul(1.5).exp()
    codebook = kmeans_1d(values, k, weights)
    expected = best_of_sklearn(values[0].double().numpy(), k, weights[0].double().numpy())
    assert squared_error(values[0], codebook[0], weights[0]) <= 1.0002 * expected


def optimum_of_all_partitions(values, k, weights):
    order = np.argsort(values)
    values, weights = values[order].astype(np.float64), weights[order].astype(np.float64)
    errors = []
    for inner in combinations(range(1, len(values)), k - 1):
        cuts = [0, *inner, len(values)]
        error = 0.0
        for start, end in zip(cuts, cuts[1:]):
            part, mass = values[start:end], weights[start:end]
            if mass.sum() > 0:
                error += np.sum(mass * (part - np.average(part, weights=mass)) ** 2)
        errors.append(error)
    return min(errors)


small_values = hnp.arrays(np.float32, st.integers(2, 9), elements=st.floats(-100, 100, width=32))


@given(small_values, st.integers(2, 4), st.data())
def test_no_partition_is_better(values, k, data):
    assume(len(values) > k)
    weight = st.one_of(st.just(0.0), st.floats(0.125, 8, width=32))
    weights = data.draw(hnp.arrays(np.float32, len(values), elements=weight))
    codebook = kmeans_1d(torch.tensor(values)[None], k, torch.tensor(weights)[None])[0]
    assert codebook.isfinite().all() and (codebook.diff() >= 0).all()
    spread = float(np.sum(weights)) * max(1.0, float(np.abs(values).max())) ** 2
    expected = optimum_of_all_partitions(values, k, weights)
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


def test_groups_are_clustered_alike_together_and_alone(generator):
    values = with_outliers((GROUPS_A_CHUNK + 3, 300), generator)
    weights = torch.rand(values.shape, generator=generator)
    together = kmeans_1d(values, 8, weights)
    assert together.shape == (GROUPS_A_CHUNK + 3, 8)
    for group in (0, 1, GROUPS_A_CHUNK - 1, GROUPS_A_CHUNK, GROUPS_A_CHUNK + 2):
        alone = kmeans_1d(values[group : group + 1], 8, weights[group : group + 1])[0]
        errors = [squared_error(values[group], codebook, weights[group]) for codebook in (together[group], alone)]
        assert max(errors) <= 1.01 * min(errors)


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


@pytest.mark.parametrize("shift", [0.0, 100.0], ids=["centred", "far from zero"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_neither_scale_nor_offset_matters(scale, shift, generator):
    # in float32, values with an offset of 100 standard deviations have 17 bits left
    values = torch.randn(1, 3000, generator=generator).double()
    shifted = ((values + shift) * scale).float()
    exact = kmeans1d.cluster(shifted[0].double().numpy(), 16).centroids
    assert squared_error(shifted[0], kmeans_1d(shifted, 16)[0]) <= 1.001 * squared_error(shifted[0], exact)


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


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_error_of_sorted_groups(weighted, generator):
    values = torch.randn(4, 200, generator=generator) + 3
    weights = torch.rand(4, 200, generator=generator) if weighted else None
    codebook = torch.randn(4, 7, generator=generator).add(3).sort(dim=1).values
    error = SortedGroups(values, weights).error(codebook)
    expected = [squared_error(values[i], codebook[i], weights[i] if weighted else None) for i in range(4)]
    assert error.tolist() == pytest.approx(expected, rel=1e-9)
