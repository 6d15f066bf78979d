"""Int8 codebooks within +-63: what they cost, and that nothing leaves that range."""

import pytest
import torch

from repvgg_hf import ClusterConfig, RepVGGForImageClassification, update_codebooks
from repvgg_hf.compression.codebooks.weights import quantize_weight
from repvgg_hf.runtime.cluster_layers import cluster_layers


@pytest.fixture
def weight(generator):
    return torch.randn(24, 32, 3, 3, generator=generator) * torch.rand(24, 1, 1, 1, generator=generator)


def quantized(weight, bits, method="cluster", groups=1, **options):
    options = {"codebook_dtype": "int8", "reduce_range": True} | options
    granularity = {} if groups == 1 else {"granularity": "per_group", "group_size": len(weight) // groups}
    return quantize_weight(weight, bits, groups, ClusterConfig(bits=bits, method=method, **granularity, **options))


def error(weight, found) -> float:
    return (found.decoded() - weight).square().mean().item()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("method", ["cluster", "uniform"])
def test_all_entries_are_within(method, bits, groups, weight):
    found = quantized(weight, bits, method, groups)
    entries = found.codebook.int()
    assert found.codebook.dtype == torch.int8 and entries.abs().max() <= 63
    assert (entries.diff(dim=1) >= 0).all()
    used = {63 if bits > 6 else None, entries.abs().max().item()} - {None}
    assert bits <= 6 or used == {63}
    # the nearest entry, over a brute force
    decoded = found.decoded()
    scale = found.scale[:, None, None, None, None]
    table = entries.float().repeat_interleave(len(weight) // groups, dim=0)[:, None, None, None]
    nearest = (table * scale - weight[..., None]).abs().amin(dim=-1)
    torch.testing.assert_close((decoded - weight).abs(), nearest, atol=1e-6, rtol=1e-5)


def test_what_it_costs(weight):
    """Next to nothing with few codes, at most what a bit is worth with many."""
    for bits, bar in ((1, 1.001), (2, 1.01), (3, 1.02), (4, 1.03), (5, 1.06), (6, 1.25)):
        assert error(weight, quantized(weight, bits)) <= bar * error(
            weight, quantized(weight, bits, reduce_range=False)
        )
    seven, eight = (error(weight, quantized(weight, bits, reduce_range=False)) for bits in (7, 8))
    assert error(weight, quantized(weight, 7)) <= 1.6 * seven
    assert eight < error(weight, quantized(weight, 8)) <= 1.1 * error(weight, quantized(weight, 7))


def test_uniform_grids_of_few_bits_are_as_they_are(weight):
    for bits in range(1, 7):
        one, other = (quantized(weight, bits, "uniform", reduce_range=some) for some in (True, False))
        assert torch.equal(one.codebook, other.codebook) and torch.equal(one.codes, other.codes)
    entries = quantized(weight, 7, "uniform").codebook
    assert entries.unique().numel() == 127


def test_without_negative_weights(weight):
    for bits in range(1, 9):
        found = quantized(weight.abs(), bits)
        assert found.codebook.abs().max() <= 63
        assert bits < 3 or error(weight.abs(), found) < 0.05 * weight.square().mean()


@pytest.mark.parametrize("bits, reduce_range, activation_bits, expected", [
    (4, None, None, 127), (4, None, 8, 63), (6, None, 8, 63), (7, None, 8, 127), (8, None, 4, 127),
    (8, True, 8, 63), (8, True, None, 63), (4, False, 8, 127),
])  # fmt: skip
def test_the_default_goes_by_the_layers_bits(bits, reduce_range, activation_bits, expected):
    options = {"codebook_dtype": "int8", "reduce_range": reduce_range, "activation_bits": activation_bits}
    assert ClusterConfig(**options).largest_integer(bits) == expected


def test_it_is_for_integers():
    for options in ({}, {"codebook_dtype": "float32"}, {"activation_bits": 8, "channel_scale": False}):
        with pytest.raises(ValueError, match="^reduce_range=True is for integers, and codebook_dtype is 'float"):
            ClusterConfig(**options, reduce_range=True)
    with pytest.raises(ValueError, match="^reduce_range must be True, False or None .*, got 1"):
        ClusterConfig(codebook_dtype="int8", reduce_range=1)


@pytest.mark.parametrize("options", [
    {"bits": 4}, {"bits": 4, "method": "uniform"}, {"bits": 8, "reduce_range": True},
    {"bits": 7, "reduce_range": True, "method": "uniform"}, {"bits": 8, "method": "uniform", "reduce_range": True},
    {"bits": 2, "bits_overrides": {"classifier": 6}},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("how", ["calibrated", "trained"])
def test_models_stay_within(how, options, make_model, batch):
    options = options | {"activation_bits": 8, "calibration": batch["pixel_values"]}
    model: RepVGGForImageClassification = make_model()
    if how == "trained":
        model.prepare_qat(**options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(12):  # the codebooks move in the tenth
            model.train()(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            update_codebooks(model)
        with torch.no_grad():
            expected = model.eval()(batch["pixel_values"]).logits
        model.quantize()
        with torch.no_grad():
            torch.testing.assert_close(model(batch["pixel_values"]).logits, expected, atol=1e-5, rtol=1e-5)
    else:
        model.quantize(**options)
    layers = cluster_layers(model).values()
    assert all(layer.weight_codebook.int().abs().max() <= 63 for layer in layers)
