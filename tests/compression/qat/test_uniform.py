"""Learned step sizes against LSQ as its paper writes it."""

import pytest
import torch

from repvgg_hf import ClusterConfig, QATConfig
from repvgg_hf.compression.codebooks.weights import quantize_weight
from repvgg_hf.compression.qat.uniform import UniformFakeQuantize


def lsq_by_formula(weight, step, offset, low, high, spacing):
    """LSQ as its paper writes it, with straight-through rounding, in autograd operations."""
    values = (weight - offset) / step

    def rounded(v):
        return v + (((v - low) / spacing).round() * spacing + low - v).detach()

    inside = (values >= low - spacing / 2) & (values <= high + spacing / 2)
    integers = torch.where(inside, rounded(values), values.detach().clamp(low, high))
    return integers * step + offset


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("symmetric, channel_scale", [(True, True), (True, False), (False, False)])
def test_learned_steps_are_lsq(symmetric, channel_scale, bits, generator):
    kernel = 0.1 * torch.randn(6, 4, 3, 3, generator=generator)
    config = ClusterConfig(
        method="uniform", bits=bits, channel_scale=channel_scale, symmetric=symmetric, codebook_dtype="float32"
    )
    weight = quantize_weight(kernel, bits, 1, config)
    layer = UniformFakeQuantize(weight, config, QATConfig())
    direction = torch.randn(kernel.shape, generator=generator)
    leaf = kernel.clone().requires_grad_()
    torch.testing.assert_close(layer(leaf), weight.decoded())  # it starts there
    (layer(leaf) * direction).sum().backward()

    low, high, spacing = (-1, 1, 2) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 1)
    if not symmetric:
        low, high, spacing = 0, 2**bits - 1, 1
    expected = kernel.clone().requires_grad_()
    step = layer.step_size().detach().clone().requires_grad_()
    offset = torch.zeros(1) if symmetric else layer.offset.detach().clone().requires_grad_()
    shape = (-1, 1, 1, 1) if channel_scale else (1, 1, 1, 1)
    output = lsq_by_formula(expected, step.view(shape), offset.view(-1, 1, 1, 1), low, high, spacing)
    torch.testing.assert_close(layer(kernel), output, rtol=1e-4, atol=1e-6)
    (output * direction).sum().backward()
    weights = kernel.numel() // len(step)
    factor = (weights * max(1, high)) ** -0.5
    torch.testing.assert_close(leaf.grad, expected.grad)
    torch.testing.assert_close(layer.scale.grad, step.grad * factor / layer.unit, rtol=1e-3, atol=1e-5)
    if not symmetric:
        torch.testing.assert_close(layer.offset.grad, offset.grad * factor, rtol=1e-3, atol=1e-5)


def test_channels_share_integers_and_have_steps_of_their_own(generator):
    kernel = torch.randn(6, 4, 3, 3, generator=generator) * torch.rand(6, 1, 1, 1, generator=generator)
    config = ClusterConfig(method="uniform", bits=3, granularity="per_channel")
    weight = quantize_weight(kernel, 3, config.groups_of("", 6), config)
    layer = UniformFakeQuantize(weight, config, QATConfig())
    stored, step = layer.stored()
    assert stored.tolist() == [[-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]]
    integers = (kernel / step.view(-1, 1, 1, 1)).round().clamp(-4, 3)
    assert torch.equal(layer(kernel), integers * step.view(-1, 1, 1, 1))
    assert repr(layer) == "UniformFakeQuantize(steps=6, integers=-4..3)"
