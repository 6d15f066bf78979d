"""Layers that compute with fake-quantized weights: what they run, and the gradients that they pass."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from repvgg_hf import ClusterConfig, QATConfig, ReparamConv2d
from repvgg_hf.compression.codebooks.weights import quantize_weight
from repvgg_hf.compression.qat.cluster import ClusterFakeQuantize
from repvgg_hf.compression.qat.inputs import InputFakeQuantize
from repvgg_hf.compression.qat.layers import QATReparamConv2d, make_float_layer, make_qat_layer, qat_layers


class CountConvolutions(TorchFunctionMode):
    def __init__(self):
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in (F.conv2d, torch.conv2d)
        return function(*args, **(kwargs or {}))


def test_one_convolution_per_block(make_model, batch):
    model = make_model()
    counts = []
    for prepare in (False, True):
        if prepare:
            model.prepare_qat()
        with CountConvolutions() as mode:
            model.train()(**batch)
        counts.append(mode.count)
    assert counts == [10, 5]  # 3x3 and 1x1 in each block


@pytest.fixture(params=[None, 2.0], ids=["bn", "oabn"])
def block(request, randomize_batch_norms, generator) -> ReparamConv2d:
    block = ReparamConv2d(8, 8, groups=2, oabn_threshold=request.param)
    return randomize_batch_norms(block, generator)


def quantizer(block: ReparamConv2d) -> ClusterFakeQuantize:
    config = ClusterConfig(bits=2)
    return ClusterFakeQuantize(quantize_weight(block.equivalent()[0], 2, 1, config), config, QATConfig())


def test_the_gradient_is_that_of_the_convolution_with_the_quantized_kernel(block, generator):
    make_qat_layer(block, quantizer(block), None)
    x, direction = torch.randn(2, 8, 7, 7, generator=generator), torch.randn(2, 8, 7, 7, generator=generator)
    (block(x) * direction).sum().backward()

    kernel, bias = block.equivalent()
    quantized = block.weight_fake_quant.quantized(kernel).decoded().requires_grad_()
    fixed_bias = bias.detach().requires_grad_()
    (F.conv2d(x, quantized, fixed_bias, padding=1, groups=2) * direction).sum().backward()
    assert not torch.equal(quantized, kernel)
    parameters = dict(block.named_parameters())
    expected = torch.autograd.grad((kernel, bias), parameters.values(), (quantized.grad, fixed_bias.grad))
    for (name, parameter), gradient in zip(parameters.items(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_inputs_are_rounded_first(block, generator):
    x = torch.randn(2, 8, 7, 7, generator=generator)
    inputs = InputFakeQuantize(4, 0.3, 8)
    rounded = inputs(x).detach()
    plain, both = copy.deepcopy(block), block
    make_qat_layer(plain, quantizer(block), None)
    make_qat_layer(both, quantizer(block), inputs)
    assert torch.equal(both(x), plain(rounded)) and not torch.equal(both(x), plain(x))


def test_there_and_back(block, generator):
    x = torch.randn(2, 8, 7, 7, generator=generator)
    expected, names = block.eval()(x), list(block.state_dict())
    make_qat_layer(block, quantizer(block), InputFakeQuantize(4, 0.3, 8))
    assert type(block) is QATReparamConv2d and list(qat_layers(block)) == [""]
    assert not torch.equal(block(x), expected)
    make_float_layer(block)
    assert type(block) is ReparamConv2d and list(block.state_dict()) == names and not qat_layers(block)
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize("method", ["cluster", "uniform"])
@pytest.mark.parametrize("form", ["train", "deploy"])
def test_gradients_reach_everything_and_statistics_stay(form, method, make_model, batch):
    model = make_model(form, oabn=False).prepare_qat(method, bits=2)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers() if "fake_quant" not in name}
    model.train()(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    for name, buffer in model.named_buffers():
        assert "fake_quant" in name or torch.equal(buffer, statistics[name]), name
    assert len(statistics) == (0 if form == "deploy" else 3 * (5 + 5 + 2))  # 2 of the 5 blocks have an identity


@pytest.mark.parametrize("method", ["cluster", "uniform"])
def test_compiled_blocks_train_alike(method, make_model, batch):
    model = make_model().prepare_qat(method, bits=2).train()
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    step = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for runner in (model, step):
        runner(**batch).loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), compiled.parameters()):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_autocast(make_model, batch):
    model = make_model().prepare_qat(bits=4).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite() and all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
