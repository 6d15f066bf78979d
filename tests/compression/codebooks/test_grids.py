"""Codebooks in their dtype's grid, against rounding the optimum and against brute force."""

from itertools import combinations

import pytest
import torch

from repvgg_hf.compression.codebooks.grids import best_integers
from repvgg_hf.compression.codebooks.kmeans import kmeans_1d
from repvgg_hf.compression.codebooks.sorted_groups import SortedGroups

VALUES = {
    "normal": lambda noise: noise,
    "outliers": lambda noise: torch.where(torch.arange(noise.shape[1]) % 50 == 0, 40 * noise, noise),
    "far from zero": lambda noise: 100 + 0.05 * noise,  # float16 has steps of 1/16 there
    "tiny": lambda noise: 1e-7 * noise,  # and of 6e-8 there
}


@pytest.mark.parametrize("k", [4, 16, 64])
@pytest.mark.parametrize("name", VALUES)
def test_float16_is_no_worse_than_rounding_the_optimum(name, k, generator):
    values = VALUES[name](torch.randn(3, 1000, generator=generator))
    optimum, codebook = kmeans_1d(values, k), kmeans_1d(values, k, dtype=torch.float16)
    assert torch.equal(codebook, codebook.half().float()) and (codebook.diff(dim=1) >= 0).all()
    groups = SortedGroups(values)
    assert (groups.error(codebook) <= groups.error(optimum.half().float()) * (1 + 1e-9)).all()


@pytest.mark.parametrize("name, k, bar", [("far from zero", 4, 0.9), ("tiny", 16, 0.97)])
def test_float16_is_better_where_entries_are_no_finer_than_its_steps(name, k, bar, generator):
    values = VALUES[name](torch.randn(8, 2000, generator=generator))
    groups, rounded = SortedGroups(values), kmeans_1d(values, k).half().float()
    assert groups.error(kmeans_1d(values, k, dtype=torch.float16)).sum() <= bar * groups.error(rounded).sum()


def test_entries_that_round_alike_are_replaced(generator):
    values = VALUES["far from zero"](torch.randn(8, 2000, generator=generator))
    rounded, codebook = kmeans_1d(values, 4).half(), kmeans_1d(values, 4, dtype=torch.float16)
    assert (rounded.diff(dim=1) == 0).any()
    assert (codebook.diff(dim=1) > 0).all()


def test_a_local_optimum_of_the_grid(generator):
    """Nothing is gained by moving one entry to the next number of the grid."""
    values = VALUES["far from zero"](torch.randn(2, 500, generator=generator))
    codebook = kmeans_1d(values, 4, dtype=torch.float16)
    groups = SortedGroups(values)
    for entry in range(4):
        for direction in (-float("inf"), float("inf")):
            moved = codebook.half()
            moved[:, entry] = torch.nextafter(moved[:, entry], torch.full((2,), direction, dtype=torch.float16))
            assert (groups.error(moved.float().sort(dim=1).values) >= groups.error(codebook)).all()


def moments_between_half_integers(values, lowest, levels):
    borders = (2 * lowest + torch.arange(2 * levels - 1)) / 2
    cell = torch.bucketize(values, borders)
    mass, first = (torch.bincount(cell, weight.double(), 2 * levels) for weight in (torch.ones_like(values), values))
    return mass[None], first[None]


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
def test_no_choice_of_integers_is_better(k, generator):
    lowest, levels = -3, 7
    for _ in range(8):
        values = 2 * torch.randn(30, generator=generator) + 0.5
        chosen = best_integers(*moments_between_half_integers(values, lowest, levels), lowest, k)
        choices = torch.tensor(list(combinations(range(lowest, lowest + levels), k))).float()
        errors = (values[:, None, None] - choices).square().amin(dim=2).double().sum(dim=0)
        ours = (values[:, None] - chosen[0]).square().amin(dim=1).double().sum()
        assert chosen.shape == (1, k) and (chosen.diff(dim=1) > 0).all()
        assert ours <= errors.min() * (1 + 1e-6)


def test_integers_of_many_groups_at_once(generator):
    values = 3 * torch.randn(20, 60, generator=generator)
    mass, first = (torch.cat(part) for part in zip(*(moments_between_half_integers(row, -127, 255) for row in values)))
    together = best_integers(mass, first, -127, 6)
    alone = [best_integers(mass[row : row + 1], first[row : row + 1], -127, 6)[0] for row in range(20)]
    assert torch.equal(together, torch.stack(alone))
