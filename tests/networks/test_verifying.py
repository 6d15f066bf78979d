"""A fused network's graph is compared with the one before: what its outputs would not show, or show falsely."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from repvgg_hf import fuse
from repvgg_hf.networks.recording import record
from repvgg_hf.networks.regions import Graph
from repvgg_hf.networks.verifying import find_difference

sys.path.insert(0, str(Path(__file__).parent))
from reparam_blocks import acb, conv_norm, network, randomize  # noqa: E402

C = 8


def images() -> torch.Tensor:
    return torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Runs(nn.Module):
    """A network of two blocks whose forward is a function of both and the input."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.first, self.second = conv_norm(3, C, 3), conv_norm(C, C, 3)

    def forward(self, x):
        return self.function(self.first, self.second, x)


def difference(first, second, x=None):
    """What is different between two functions of the same blocks."""
    torch.manual_seed(0)
    before, after = randomize(Runs(first)), randomize(Runs(second))
    x = images() if x is None else x
    return find_difference(Graph(record(before, x)), record(after, x), {})


def test_the_same():
    assert difference(lambda a, b, x: b(a(x).relu()), lambda a, b, x: 0 + b(a(x).relu() + 0)) is None
    assert difference(lambda a, b, x: {"a": a(x), "b": [x]}, lambda a, b, x: (a(x), x)) is None


@pytest.mark.parametrize(
    "after, match",
    [
        (lambda a, b, x: b(a(x).sigmoid()), "computes sigmoid"),
        (lambda a, b, x: b(a(x)), "in the place of relu"),
        (lambda a, b, x: b(a(x + 1).relu()), "computes add"),
        (lambda a, b, x: (b(a(x).relu()), x), "2 tensors instead of 1"),
        (lambda a, b, x: torch.ones(1, C, 16, 16), "does not depend on the input"),
        (lambda a, b, x: b(a(x).relu())[:, :, 1:], "computes __getitem__"),
    ],
    ids=["function", "missing", "more", "outputs", "constant", "shape"],
)
def test_differences(after, match):
    assert match in difference(lambda a, b, x: b(a(x).relu()), after)


def test_swapped_inputs():
    x = (images(), images() + 1)

    class Two(nn.Module):
        def __init__(self, swapped):
            super().__init__()
            self.swapped = swapped

        def forward(self, x, y):
            return y.exp() - x if self.swapped else x.exp() - y

    assert find_difference(Graph(record(Two(False), x)), record(Two(False), x), {}) is None
    assert "an input in the place of an input" in find_difference(
        Graph(record(Two(False), x)), record(Two(True), x), {}
    )


def test_what_selects_is_fused_although_outputs_jump():
    """The order of equal scores turns with the last digit; the outputs say nothing about the structure."""

    class Selects(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = conv_norm(3, C, 3)

        def forward(self, x):
            y = self.block(torch.cat([x, x.flip(0)]).relu()).flatten(1)
            return ((y[0] * 1e9).sin() > 0).float() * 100

    model = randomize(Selects())
    report = fuse(model, images())
    assert len(report.fused) == 1 and report.left == [] and report.error > 0.1
    assert "It may have selected others" in str(report)


@pytest.mark.parametrize("selects", [False, True])
def test_outputs_that_differ_are_an_error_unless_something_selects(selects):
    """Constant tensors that the model's code makes are not compared; the outputs tell."""

    class ByKind(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = conv_norm(3, C, 3)

        def forward(self, x):
            y = self.block(x).relu()
            y = y * torch.full((C, 1, 1), 2.0 + isinstance(self.block, nn.Sequential))
            return y.argmax(1) + y if selects else y

    model = randomize(ByKind())
    report = fuse(model, images())
    if selects:
        assert len(report.fused) == 1
    else:
        (left,) = report.left
        assert "outputs differ by" in left.left and isinstance(model.block, nn.Sequential)


def test_callers_that_rely_on_a_change_in_place():
    """The block overwrites its input, and its caller uses that: one convolution does not, and the block is left."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = conv_norm(C, C, 3)

        def forward(self, x):
            x *= 2
            x += self.block(x)
            return x

    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = InPlace()

        def forward(self, x):
            y = x * 3
            return self.inner(y) + y

    model = network(Caller(), C)
    expected = model(images())
    fuse(model, images())
    assert torch.allclose(model(images()), expected, atol=1e-4)


def test_an_interrupt_restores_the_model(monkeypatch):
    model = network(acb(C), C)
    before = dict(model.named_modules())

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("repvgg_hf.networks.fusing.find_difference", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fuse(model, images())
    assert dict(model.named_modules()) == before and not hasattr(model, "fused_structure")


@torch.jit.script
def gated(x):
    return x * torch.sigmoid(x)


def test_a_map_that_unseen_code_reads_stays():
    """A recording does not see inside TorchScript: that it read the map between a convolution and its norm, say."""

    def function(first, second, x):
        y = first[0](x)
        return second(first[1](y) + gated(y))

    torch.manual_seed(0)
    model = randomize(Runs(function)).eval()
    x = images()
    with torch.no_grad():
        expected = model(x)
        report = fuse(model, x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(model.first[1], nn.BatchNorm2d) and isinstance(model.second, nn.Conv2d)
    assert "outputs differ" in str(report)
