"""What the fake quantizers of all methods share."""

import pytest
import torch

from repvgg_hf import ClusterConfig, QATConfig
from repvgg_hf.compression.codebooks.weights import quantize_weight
from repvgg_hf.compression.qat.fake_quantize import power_of_two


@pytest.mark.parametrize("method", ["cluster", "uniform"])
def test_blending_goes_from_the_kernel_to_its_quantized_value(method, generator):
    kernel = torch.randn(8, 4, 3, 3, generator=generator)
    config, qat_config = ClusterConfig(method=method, bits=2), QATConfig(codebook_update_every=100, blend_steps=4)
    weight = quantize_weight(kernel, 2, 1, config)
    make = config.quantization_method.fake_quantizer
    layer = make(weight, config, qat_config)
    for step in range(6):
        share = min(1, step / 4)
        leaf = kernel.clone().requires_grad_()
        output = layer(leaf)
        quantized = layer.eval()(kernel)
        torch.testing.assert_close(output, (1 - share) * kernel + share * quantized)
        assert torch.equal(quantized, layer.train().quantized(kernel).decoded())
        output.sum().backward()
        assert share < 1 or torch.equal(output, quantized)
        if method == "cluster":
            torch.testing.assert_close(leaf.grad, torch.ones_like(kernel))
        restored = make(weight, config, qat_config)
        restored.load_state_dict(layer.state_dict())
        assert torch.equal(restored(kernel), output)
        layer.step(lambda: kernel)


@pytest.mark.parametrize("method", ["cluster", "uniform"])
def test_the_kernel_is_computed_when_it_is_needed(method, generator):
    """Every second step for k-means, never for a grid that is learned by gradient."""
    kernel = torch.randn(8, 4, 3, 3, generator=generator)
    config = ClusterConfig(method=method, bits=2)
    weight = quantize_weight(kernel, 2, 1, config)
    layer = config.quantization_method.fake_quantizer(weight, config, QATConfig(codebook_update_every=2))
    calls = []
    for _ in range(5):
        due = layer.is_due()
        before = len(calls)
        layer.step(lambda: calls.append(kernel) or kernel)
        assert len(calls) - before == due
    assert len(calls) == (2 if method == "cluster" else 0)
    assert layer.steps == layer.steps_taken() == 5


def test_state_of_other_bits_is_refused(make_model):
    state = make_model().prepare_qat(bits=3).state_dict()
    with pytest.raises(
        ValueError, match=r"weight_fake_quant.codebook of the checkpoint is \[1, 8\], the model's \[1, 4\]"
    ):
        make_model().prepare_qat(bits=2).load_state_dict(state)


def test_units_are_powers_of_two():
    values = torch.tensor([1e-40, 0.001, 0.7, 1.0, 3.1])
    units = power_of_two(values)
    assert units[1:].tolist() == [2**-10, 0.5, 1.0, 4.0] and units[0] == 2.0**-100
