"""Codes and codebooks for the least output error."""

import itertools

import pytest
import torch

from repvgg_hf import ClusterConfig
from repvgg_hf.compression.codebooks.codes import decode
from repvgg_hf.compression.codebooks.weights import QuantizedWeight, quantize_weight
from repvgg_hf.compression.ptq.gptq import LayerProblem, compensate, compensated_weight, descend, fit_codebook


def correlated_moments(conv_groups, width, generator, samples=400):
    """Second moments of inputs that have much in common, as the patches of an image have."""
    mixing = torch.randn(width, width, generator=generator) * 0.3 + 1
    x = torch.randn(conv_groups, samples, width, generator=generator) @ mixing
    return x.mT @ x / samples


def output_error(weight, quantized, moments):
    """tr((W - Q) H (W - Q)^T), in the weight's own order of columns, float64."""
    groups, width = moments.shape[:2]
    difference = (weight - quantized.decoded()).reshape(groups, -1, width).double()
    return torch.einsum("gow,gwv,gov->", difference, moments.double(), difference).item()


@pytest.fixture
def problem(generator):
    """(weight `[6, 2, 3, 3]`, its moments for 2 groups of the convolution)."""
    return torch.randn(6, 2, 3, 3, generator=generator), correlated_moments(2, 18, generator)


OPTIONS = {
    "per_tensor": {},
    "per_tensor without scale": {"channel_scale": False},
    "per_channel": {"granularity": "per_channel"},
    "per_group": {"granularity": "per_group", "group_size": 2},
    "int8": {"codebook_dtype": "int8"},
    "uniform": {"method": "uniform"},
    "uniform per_channel": {"method": "uniform", "granularity": "per_channel"},
    "uniform per_channel without scale": {"method": "uniform", "granularity": "per_channel", "channel_scale": False},
    "uniform int8": {"method": "uniform", "codebook_dtype": "int8"},
    "affine": {"method": "uniform", "symmetric": False},
}


def start(weight, bits, options):
    config = ClusterConfig(bits=bits, **options)
    return quantize_weight(weight, bits, config.groups_of("layer", len(weight)), config), config


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_output_error_is_below_that_of_the_nearest_entries(options, bits, problem):
    weight, moments = problem
    plain, config = start(weight, bits, options)
    compensated = compensated_weight(weight, plain, moments, config, damping=0.001)
    # two channels of 18 weights can be fitted by 4 entries each as they are
    bar = 1.0 if bits == 2 and "per_channel" in options.values() else 0.5
    assert output_error(weight, compensated, moments) < bar * output_error(weight, plain, moments)
    codebook = compensated.codebook
    assert codebook.dtype == plain.codebook.dtype and codebook.shape == plain.codebook.shape
    assert (codebook.float().diff(dim=1) >= 0).all()
    assert compensated.codes.shape == weight.shape and compensated.codes.dtype == torch.uint8


@pytest.mark.parametrize("name", ["uniform", "uniform per_channel", "uniform per_channel without scale", "affine"])
def test_a_grid_stays_evenly_spaced(name, problem):
    weight, moments = problem
    plain, config = start(weight, 3, OPTIONS[name])
    found = compensated_weight(weight, plain, moments, config, 0.01)
    steps = found.codebook.float().diff(dim=1)
    assert torch.allclose(steps, steps[:, :1].expand_as(steps), rtol=1e-2)
    if plain.scale is None:
        assert not torch.equal(found.codebook, plain.codebook)
    else:
        assert torch.equal(found.codebook, plain.codebook) and not torch.equal(found.scale, plain.scale)


def test_descent_ends_where_no_single_code_can_improve(problem):
    weight, moments = problem
    plain, _ = start(weight, 2, OPTIONS["per_channel"])
    layer = LayerProblem(weight, moments, damping=1e-6)
    found = QuantizedWeight(compensate(layer, plain), plain.codebook, None)
    errors = [layer.error(found.decoded()).item()]
    for _ in range(20):
        found = QuantizedWeight(descend(layer, found), plain.codebook, None)
        errors.append(layer.error(found.decoded()).item())
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    least = output_error(weight, found, moments)
    for position in range(weight.numel()):
        for code in range(4):
            codes = found.codes.clone()
            codes.view(-1)[position] = code
            changed = QuantizedWeight(codes, found.codebook, None)
            assert output_error(weight, changed, moments) >= least * (1 - 1e-4)


def test_near_the_best_of_all_codes():
    """One row of 6 weights and 3 entries: all 729 assignments can be tried."""
    generator = torch.Generator().manual_seed(0)
    config = ClusterConfig(bits=2, granularity="per_channel")
    ratios = []
    for _ in range(20):
        weight, moments = torch.randn(1, 6, generator=generator), correlated_moments(1, 6, generator)
        plain = quantize_weight(weight, 2, 1, config)
        layer = LayerProblem(weight, moments, damping=1e-6)
        found = QuantizedWeight(compensate(layer, plain), plain.codebook, None)
        for _ in range(5):
            found = QuantizedWeight(descend(layer, found), plain.codebook, None)
        every = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.uint8)
        best = min(output_error(weight, QuantizedWeight(codes[None], plain.codebook, None), moments) for codes in every)
        ratios.append(output_error(weight, found, moments) / best)
    ratios = torch.tensor(ratios)
    assert ratios.median() < 1.5 and (ratios > 0.999).all()


@pytest.mark.parametrize("name", ["per_tensor", "per_channel", "per_group"])
def test_codebook_is_the_least_squares_one(name, problem):
    """Against `torch.linalg.lstsq` on the square root of the moments."""
    weight, moments = problem
    plain, _ = start(weight, 2, OPTIONS[name])
    layer = LayerProblem(weight, moments, damping=1e-6)
    codebook = fit_codebook(layer, plain)
    root = torch.linalg.cholesky(moments.double()).repeat_interleave(3, dim=0)  # [out, width, width]
    groups, k = codebook.shape
    columns = []  # the output that a unit entry makes, for each entry of each codebook
    for entry in range(groups * k):
        unit = torch.zeros(groups * k)
        unit[entry] = 1
        values = decode(plain.codes, unit.view(groups, k), plain.scale).reshape(6, 1, 18).double()
        columns.append((values @ root).reshape(-1))
    wanted = (weight.reshape(6, 1, 18).double() @ root).reshape(-1, 1)
    expected = torch.linalg.lstsq(torch.stack(columns, dim=1), wanted, driver="gelsd").solution.view(groups, k)
    assert torch.allclose(codebook.double(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def test_inputs_that_are_always_zero_do_no_harm(problem):
    weight, moments = problem
    moments[:, 4, :] = moments[:, :, 4] = 0
    plain, config = start(weight, 3, {})
    compensated = compensated_weight(weight, plain, moments, config, damping=0.01)
    assert output_error(weight, compensated, moments) < output_error(weight, plain, moments)
    assert compensated.decoded().isfinite().all()


def test_groups_of_a_convolution_whose_inputs_are_always_zero(generator):
    """A channel of a depthwise convolution that the layers before have switched off: its weights keep their codes."""
    weight, config = torch.randn(4, 1, 3, 3, generator=generator), ClusterConfig(bits=3)
    moments = correlated_moments(4, 9, generator)
    moments[2] = 0
    plain, _ = start(weight, 3, {})
    compensated = compensated_weight(weight, plain, moments, config, damping=0.01)
    assert output_error(weight, compensated, moments) < output_error(weight, plain, moments)
    channel_error = (compensated.decoded() - weight)[2].norm()
    assert channel_error < 1.5 * (plain.decoded() - weight)[2].norm() + 1e-6
