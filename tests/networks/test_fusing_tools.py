"""PyTorch's tools take a fused network: it is copied, pickled, compiled, exported, rebuilt from its description."""

import copy
import io
import json

import pytest
import torch
from torch import nn

from repvgg_hf import fuse
from repvgg_hf.runtime.fused_structure import FusedAway, rebuild_fused


class Summed(nn.Module):
    """Branches that are summed and activated in one forward: one is to be the convolution, and others nothing."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.point = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))
        self.skip = nn.BatchNorm2d(channels)
        self.gain = nn.Parameter(torch.full((channels, 1, 1), 0.5))

    def forward(self, x):
        y = self.point(x) * self.gain + self.skip(x)
        y += self.dense(x)
        return torch.relu(y)


class Net(nn.Module):
    """Two such blocks; the first has an activation of its own, in the place of one that is called in `forward`."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.first, self.second = Summed(), Summed()
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.second(self.first(self.stem(x))).mean((2, 3)))


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def fused():
    torch.manual_seed(0)
    model = Net().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    expected = model(images())
    report = fuse(model, images(1))
    assert len(report.fused) == 3 and report.left == []
    assert sum(isinstance(module, FusedAway) for module in model.modules()) == 4
    assert torch.allclose(model(images()), expected, atol=1e-5)
    return model


def test_deepcopy_and_pickle(fused):
    expected = fused(images())
    assert torch.equal(copy.deepcopy(fused)(images()), expected)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(images()), expected)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fresh_model_takes_the_weights(fused, device):
    with torch.device(device):
        fresh = Net()
    rebuild_fused(fresh, json.loads(json.dumps(fused.fused_structure)))
    fresh.load_state_dict(fused.state_dict(), strict=True, assign=True)
    assert torch.equal(fresh.eval()(images()), fused(images()))
    assert fresh.fused_structure == fused.fused_structure


def test_compile(fused):
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(images()), fused(images()), atol=1e-6)


@pytest.mark.slow
def test_inductor_removes_the_zeros(fused):
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True)
    assert torch.allclose(compiled(images()), fused(images()), atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_export(fused, strict):
    exported = torch.export.export(copy.deepcopy(fused), (images(),), strict=strict)
    assert torch.allclose(exported.module()(images()), fused(images()), atol=1e-6)
    convolutions = [node for node in exported.graph.nodes if "conv2d" in str(node.target)]
    assert len(convolutions) == 3


def test_trace_and_fx(fused):
    assert torch.allclose(torch.jit.trace(copy.deepcopy(fused), images())(images()), fused(images()), atol=1e-6)
    assert torch.allclose(torch.fx.symbolic_trace(copy.deepcopy(fused))(images()), fused(images()), atol=1e-6)


def test_training_goes_on(fused):
    model = copy.deepcopy(fused).train()
    model(images()).sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "gain" not in name)


def test_dtype_follows(fused):
    assert copy.deepcopy(fused).double()(images().double()).dtype == torch.float64


class Caching(Net):
    """It computes a tensor in its first forward pass and keeps it, as RT-DETR does with its anchors."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def forward(self, x):
        if not self.kept:
            self.kept.append(torch.linspace(0, 1, 5, device=x.device))
        return super().forward(x) + self.kept[0]


def test_what_the_first_pass_keeps_is_no_difference():
    report = fuse(Caching().eval(), images())
    assert len(report.fused) == 3 and not report.left
