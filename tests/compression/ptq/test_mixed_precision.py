"""Bits for each layer."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repvgg_hf import CalibrationConfig, ClusterConfig, RepVGGForImageClassification
from repvgg_hf.analysis import bits_per_weight
from repvgg_hf.compression.ptq.mixed_precision import MAX_STATES, allocate_bits, stored_bits

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


@pytest.mark.parametrize("target", [2.2, 3.2, 5.0])
def test_mixed_precision_meets_its_target_and_beats_the_same_bits_everywhere(target, model, images):
    how = CalibrationConfig(target_bits_per_weight=target)
    quantized = copy.deepcopy(model).quantize(calibration=images, calibration_config=how)
    config = quantized.config.quantization_config
    assert bits_per_weight(quantized) <= target
    assert bits_per_weight(quantized) > target - 0.5  # no layer has room for another bit, in a net this small
    layers = [name for name, layer in quantized.named_modules() if hasattr(layer, "weight_codes")]
    assert list(config.bits_overrides) == layers
    assert all(quantized.get_submodule(name).bits == bits for name, bits in config.bits_overrides.items())


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_training_begins_with_the_bits_that_quantization_chooses(activation_bits, model, images, tmp_path):
    how = CalibrationConfig(target_bits_per_weight=3.2)
    options = {"activation_bits": activation_bits, "calibration": images, "calibration_config": how}
    chosen = copy.deepcopy(model).quantize(**options).config.quantization_config.bits_overrides
    assert len(set(chosen.values())) > 1
    copy.deepcopy(model).prepare_qat(**options).save_pretrained(tmp_path)
    trained = RepVGGForImageClassification.from_pretrained(tmp_path).quantize()
    assert trained.config.quantization_config.bits_overrides == chosen and bits_per_weight(trained) <= 3.2


def test_stored_bits_are_those_of_the_checkpoint(model, images):
    uniform = {"method": "uniform", "granularity": "per_channel"}
    for options in ({}, {"granularity": "per_channel"}, {"codebook_dtype": "int8"}, uniform):
        config = ClusterConfig(bits=3, **options)
        quantized = copy.deepcopy(model).quantize(config)
        layers = [(n, m) for n, m in quantized.named_modules() if hasattr(m, "weight_codes")]
        total = sum(stored_bits(name, torch.Size(layer.weight_shape), 3, config) for name, layer in layers)
        weights = sum(layer.weight_numel for _, layer in layers)
        assert total / weights == pytest.approx(bits_per_weight(quantized))
