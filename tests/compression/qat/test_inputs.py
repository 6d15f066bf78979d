"""Learned input ranges against torch's own learnable fake quantization."""

import pytest
import torch

from repvgg_hf.compression.qat.inputs import InputFakeQuantize
from repvgg_hf.runtime.cluster_layers import fake_quantize


def test_learned_input_scale_is_that_of_torch(generator):
    """torch's learnable fake quantization has LSQ's gradients too; `grad_factor` is given to it."""
    x = torch.randn(3, 4, 5, 5, generator=generator)
    layer = InputFakeQuantize(4, 0.2, 6)
    direction = torch.randn(x.shape, generator=generator)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    (layer(ours) * direction).sum().backward()
    scale, zero_point = torch.tensor([0.2], requires_grad=True), torch.tensor([6.0])
    factor = (x.numel() * 15) ** -0.5
    output = torch._fake_quantize_learnable_per_tensor_affine(theirs, scale, zero_point, 0, 15, factor)
    torch.testing.assert_close(layer(x), output)
    (output * direction).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(layer.scale.grad, scale.grad.squeeze() / layer.unit)


@pytest.mark.parametrize("bits", [2, 8])
def test_it_computes_what_a_quantized_layer_will(bits, generator):
    x = 2 * torch.randn(3, 4, 5, 5, generator=generator)
    layer = InputFakeQuantize(bits, 0.3, 1)
    torch.nn.init.constant_(layer.scale, 0.9)
    scale, zero_point = layer.range()
    assert zero_point == 1 and scale == pytest.approx(0.9 * 0.25)
    expected = fake_quantize(x, torch.tensor(scale), torch.tensor(zero_point, dtype=torch.uint8), bits)
    assert torch.equal(layer(x), expected)


def test_a_scale_below_zero_is_a_tiny_one():
    layer = InputFakeQuantize(4, 0.2, 6)
    torch.nn.init.constant_(layer.scale, -1)
    assert 0 < layer.range()[0] < 1e-20 and layer(torch.randn(5)).isfinite().all()
