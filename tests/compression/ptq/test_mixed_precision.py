"""Bits for each layer."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repvgg_hf.compression.ptq.mixed_precision import MAX_STATES, allocate_bits

CHOICES = (1, 2, 4)


def brute_force(sizes, costs, budget):
    """The least cost of any allocation within the budget; infinity if there is none."""
    allocations = itertools.product(CHOICES, repeat=len(sizes))
    affordable = [a for a in allocations if sum(sizes[n][b] for n, b in zip(sizes, a)) <= budget]
    return min((sum(costs[n][b] for n, b in zip(costs, a)) for a in affordable), default=float("inf"))


@settings(max_examples=60, deadline=None)
@given(
    numels=st.lists(st.integers(1, 500), min_size=1, max_size=5),
    seed=st.randoms(use_true_random=False),
    share=st.floats(0.1, 1.2),
)
def test_the_cheapest_allocation_within_the_budget(numels, seed, share):
    sizes = {f"layer{i}": {bits: bits * numel + 7 for bits in CHOICES} for i, numel in enumerate(numels)}
    costs = {name: {bits: seed.random() for bits in CHOICES} for name in sizes}  # not even falling with the bits
    budget = int(share * sum(size[4] for size in sizes.values()))
    expected = brute_force(sizes, costs, budget)
    if expected == float("inf"):
        with pytest.raises(ValueError, match=rf"the smallest allocation takes \d+ bits, {budget} are allowed"):
            allocate_bits(sizes, costs, budget)
        return
    allocation = allocate_bits(sizes, costs, budget)
    assert list(allocation) == list(sizes)
    assert sum(sizes[name][bits] for name, bits in allocation.items()) <= budget
    assert sum(costs[name][bits] for name, bits in allocation.items()) == pytest.approx(expected)


def test_sizes_without_a_common_divisor_are_rounded_but_never_exceed_the_budget():
    sizes = {f"layer{i}": {bits: bits * 10 * MAX_STATES + 13 * i + 1 for bits in CHOICES} for i in range(6)}
    costs = {name: {bits: 1 / bits**2 for bits in CHOICES} for name in sizes}
    budget = 6 * 2 * 10 * MAX_STATES + 1000
    allocation = allocate_bits(sizes, costs, budget)
    assert sum(sizes[name][bits] for name, bits in allocation.items()) <= budget
    assert set(allocation.values()) == {2}


def test_a_budget_that_only_the_smallest_choices_meet():
    sizes = {"a": {1: 1_000_003, 2: 2_000_003}, "b": {1: 999_999, 2: 1_999_999}}
    costs = {name: {1: 1.0, 2: 0.0} for name in sizes}
    assert allocate_bits(sizes, costs, 2_000_002) == {"a": 1, "b": 1}
