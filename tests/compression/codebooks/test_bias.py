"""Biases as multiples of the steps in which a layer's integers add up."""

import pytest
import torch

from repvgg_hf import ClusterConfig
from repvgg_hf.compression.codebooks.bias import settle_bias
from repvgg_hf.compression.codebooks.weights import quantize_weight

INT8 = ClusterConfig(bits=3, activation_bits=8)


@pytest.fixture
def weight(generator):
    return torch.randn(6, 4, 3, 3, generator=generator)


def test_the_nearest_multiple(weight, generator):
    quantized, bias = quantize_weight(weight, 3, 1, INT8), torch.randn(6, generator=generator)
    same, rounded = settle_bias(quantized, bias, 0.013)
    assert same is quantized
    step = (torch.tensor(0.013) * quantized.scale).double()
    steps = rounded.double() / step
    torch.testing.assert_close(steps, steps.round(), atol=1e-6, rtol=2**-24)  # float32 holds 24 bits
    assert ((rounded.double() - bias.double()).abs() <= step * 0.5001).all() and not torch.equal(rounded, bias)


@pytest.mark.parametrize("bits", [1, 3])
def test_a_channel_that_is_all_zero_keeps_its_bias(bits, weight, generator):
    """Its scale says nothing, and would leave int32 no room."""
    weight[2] = 0
    config = ClusterConfig(bits=bits, activation_bits=8)
    quantized, bias = quantize_weight(weight, bits, 1, config), torch.randn(6, generator=generator)
    settled, rounded = settle_bias(quantized, bias, 0.013)
    integers = rounded.double() / (torch.tensor(0.013) * settled.scale).double()
    assert integers.abs().max() <= 2**30 * (1 + 1e-6)
    torch.testing.assert_close(rounded[2], bias[2], rtol=1e-6, atol=0)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(settled.scale[others], quantized.scale[others])
    assert torch.equal(settled.codes[others], quantized.codes[others])
    # what it decodes to adds nothing that counts, for any input
    largest = (settled.decoded()[2].abs().sum() * 255 * 0.013).item()
    assert largest <= 1e-3 * bias[2].abs().item()


def test_an_extreme_scale_stays_a_number(weight):
    """The product of scales would be no normal float32 number."""
    quantized = quantize_weight(weight * 1e-12, 3, 1, INT8)
    settled, rounded = settle_bias(quantized, torch.zeros(6), 1e-36)
    assert torch.equal(rounded, torch.zeros(6)) and settled.scale.isfinite().all()
    assert (settled.scale.double() * 1e-36 >= 1.1e-38).all()


@pytest.mark.parametrize("config", [ClusterConfig(bits=3), ClusterConfig(bits=3, channel_scale=False)], ids=str)
def test_float_codebooks_stay_as_they_are(config, weight, generator):
    quantized, bias = quantize_weight(weight, 3, 1, config), torch.randn(6, generator=generator)
    assert settle_bias(quantized, bias, 0.1) == (quantized, bias)
    assert settle_bias(quantize_weight(weight, 3, 1, INT8), None, 0.1)[1] is None
