"""k-means on what is far from a normal distribution, against the exact optimum of kmeans1d.

Found first where it was up to 35 times the optimum: far outliers, a dense and a sparse half, many equal values.
"""

import kmeans1d
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repvgg_hf.compression.codebooks.kmeans import kmeans_1d, uneven
from repvgg_hf.compression.codebooks.sorted_groups import HISTOGRAM_VALUES, SortedGroups

BAR = 1.001


def squared_error(values, codebook, weights=None):
    codebook, values = np.asarray(codebook, dtype=np.float64), np.asarray(values, dtype=np.float64)
    nearest = codebook[np.searchsorted((codebook[1:] + codebook[:-1]) / 2, values)]
    return float(np.sum((values - nearest) ** 2 * (1 if weights is None else np.asarray(weights))))


def factors(values, k, weights=None):
    """For each group, the error divided by the optimum's; entries are float32, whose rounding is not counted."""
    found = []
    codebooks = kmeans_1d(values, k, weights)
    for group, codebook, mass in zip(values, codebooks, [None] * len(values) if weights is None else weights):
        repeated = group if mass is None else group.repeat_interleave(mass.long())
        repeated = np.sort(repeated.double().numpy())
        center = float(np.median(repeated))  # kmeans1d subtracts large sums of squares: about 0 they keep more digits
        optimum = np.sort(kmeans1d.cluster(repeated - center, k).centroids) + center
        rounding = 1e-13 * float(np.sum(repeated**2))
        found.append(
            (squared_error(repeated, codebook) + 1e-300) / (squared_error(repeated, optimum) + rounding + 1e-300)
        )
    return found


def outliers(n, share, size, generator):
    values = torch.randn(n, generator=generator)
    values[: max(1, int(share * n))] *= size
    return values


def pruned(n, share, generator):
    values = torch.randn(n, generator=generator)
    return values * (values.abs() > values.abs().sort().values[int(share * n) - 1])


def peaks(n, number, width, generator):
    places = 3 * torch.randn(number, generator=generator)
    return places[torch.randint(number, (n,), generator=generator)] + width * torch.randn(n, generator=generator)


def halves(n, width, generator):
    dense = width * torch.randn(n - n // 2, generator=generator)
    return torch.cat([dense, 1 / torch.rand(n // 2, generator=generator).clamp_min(1e-4)])


def repeated(n, distinct, generator):
    values = torch.randn(distinct, generator=generator).mul(2).exp()
    return values[(torch.rand(n, generator=generator) ** 3 * distinct).long()]


DISTRIBUTIONS = {
    "outliers": lambda n, g: outliers(n, 0.001, 1000, g),
    "many outliers": lambda n, g: outliers(n, 0.05, 100, g),
    "one outlier": lambda n, g: outliers(n, 0, 1e4, g),
    "pruned": lambda n, g: pruned(n, 0.5, g),
    "nearly all pruned": lambda n, g: pruned(n, 0.95, g),
    "pruned with outliers": lambda n, g: pruned(n, 0.9, g) * outliers(n, 0.01, 100, g).abs(),
    "dense and sparse half": lambda n, g: halves(n, 0.01, g),
    "peaks": lambda n, g: peaks(n, 30, 0.001, g),
    "wide peaks": lambda n, g: peaks(n, 12, 0.05, g),
    "17 distinct": lambda n, g: repeated(n, 17, g),
    "300 distinct": lambda n, g: repeated(n, 300, g),
    "integers": lambda n, g: (30 * torch.randn(n, generator=g)).round(),
    "lognormal": lambda n, g: torch.randn(n, generator=g).mul(3).exp(),
}


@pytest.mark.parametrize("k", [2, 4, 8, 16, 64])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", [(4, 288), (1, 6000)], ids=str)
def test_few_groups_get_the_optimum(name, k, shape, generator):
    values = torch.stack([DISTRIBUTIONS[name](shape[1], generator) for _ in range(shape[0])])
    assert max(factors(values, k)) <= BAR


@pytest.mark.parametrize("k", [4, 16])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_weights_that_are_numbers_of_values(name, k, generator):
    values = DISTRIBUTIONS[name](1500, generator)[None]
    weights = torch.randint(0, 6, values.shape, generator=generator).float()
    assert max(factors(values, k, weights)) <= BAR


@pytest.mark.parametrize("k", [4, 8, 16])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_channels_of_a_layer_are_near_the_optimum_on_average(name, k, generator):
    values = torch.stack([DISTRIBUTIONS[name](432, generator) for _ in range(24)])
    found = factors(values, k)
    assert np.mean(found) <= 1.003 and max(found) <= 1.02


@pytest.mark.parametrize("k", [8, 16])
@pytest.mark.parametrize("name", ["outliers", "pruned", "dense and sparse half", "nearly all pruned"])
def test_so_many_values_that_they_are_counted_into_bins(name, k, generator):
    assert max(factors(DISTRIBUTIONS[name](HISTOGRAM_VALUES + 1, generator)[None], k)) <= BAR


@pytest.mark.parametrize("k", [8, 16])
def test_a_layer_of_which_a_thousandth_lies_far_out(k, generator):
    assert max(factors(outliers(36864, 0.001, 1000, generator)[None], k)) <= BAR


@pytest.mark.parametrize("k, bar", [(128, 1.006), (256, 1.025)])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_many_clusters(name, k, bar, generator):
    assert max(factors(DISTRIBUTIONS[name](3000, generator)[None], k)) <= bar


def test_outliers_beside_normal_groups_change_nothing_there(generator):
    values = torch.randn(20, 500, generator=generator)
    expected = kmeans_1d(values, 16)
    values[3, 0] = 1000
    changed = kmeans_1d(values, 16)
    others = torch.arange(20) != 3
    assert torch.equal(changed[others], expected[others])


@st.composite
def mixtures(draw):
    """Groups of parts: each a number of values around a place, of a width that may be zero, some of them repeated."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    parts = []
    for _ in range(draw(st.integers(1, 5))):
        count = draw(st.integers(1, 300))
        place = draw(st.sampled_from([0.0, 1.0, -3.0, 20.0, 1000.0]))
        width = draw(st.sampled_from([0.0, 1e-3, 0.1, 1.0, 30.0]))
        part = place + width * torch.randn(count, generator=generator)
        if draw(st.booleans()):
            part = part[torch.randint(max(1, count // 10), (count,), generator=generator)]
        parts.append(part)
    return torch.cat(parts)[None]


@settings(max_examples=150, deadline=None)
@given(values=mixtures(), k=st.sampled_from([2, 3, 4, 7, 8, 16, 32]), weighted=st.booleans(), seed=st.integers(0, 99))
def test_mixtures(values, k, weighted, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(1, 9, values.shape, generator=generator).float() if weighted else None
    assert max(factors(values, k, weights)) <= BAR


def test_uneven_tells_a_cluster_too_many_in_the_bulk():
    values = torch.cat([torch.linspace(-1, 1, 1000), torch.tensor([1000.0, 2000.0, 3000.0])])[None]
    groups = SortedGroups(values)
    wasteful = torch.tensor([[-0.5, 0.5, 1000.0, 2500.0]])
    right = torch.tensor([[0.0, 1000.0, 2000.0, 3000.0]])
    assert uneven(groups, wasteful).all() and not uneven(groups, right).any()
