"""Fusing blocks from papers on re-parameterization: each becomes one convolution, checked against the unfused model."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from repvgg_hf import fuse

sys.path.insert(0, str(Path(__file__).parent))
from reparam_blocks import (  # noqa: E402
    OREPA,
    NormAndPad,
    QARepVGG,
    Scaled,
    SumOf,
    ZeroPadded,
    acb,
    conv_norm,
    dbb,
    dilated,
    network,
    randomize,
)

C = 8
BLOCKS = {
    "ACB": (acb(C), "closed form", (3, 3)),
    "DBB": (dbb(C, C), "Jacobian", (3, 3)),
    "DBB, strided": (dbb(C, C, stride=2), "Jacobian", (3, 3)),
    "DBB, 5x5": (dbb(C, C, 5), "Jacobian", (5, 5)),
    "OREPA": (OREPA(C), "closed form", (3, 3)),
    "QARepVGG": (QARepVGG(C), "closed form", (3, 3)),
    "UniRepLKNet": (dilated(C), "closed form", (13, 13)),
    "RepMixer": (Scaled(C), "closed form", (3, 3)),
    "pooled branch": (
        SumOf(nn.Conv2d(C, C, 3, padding=1), nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(C))),
        "closed form",
        (3, 3),
    ),
    "two grouped": (SumOf(conv_norm(C, C, 3, groups=2), conv_norm(C, C, 1, groups=4)), "closed form", (3, 3)),
    "1x1 then 3x3 without padding": (
        nn.Sequential(conv_norm(C, C, 1), conv_norm(C, C, 3, padding=0)),
        "closed form",
        (3, 3),
    ),
    "strided in a row": (
        nn.Sequential(nn.Conv2d(C, C, 1, 2, bias=False), conv_norm(C, C, 3)),
        "closed form",
        (3, 3),
    ),
    "reflected": (
        SumOf(nn.Conv2d(C, C, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(C), nn.Conv2d(C, C, 1)),
        "closed form",
        (3, 3),
    ),
    "dilated alone": (
        nn.Sequential(nn.Conv2d(C, C, 3, padding=2, dilation=2), nn.BatchNorm2d(C)),
        "closed form",
        (3, 3),
    ),
    "even kernel": (nn.Sequential(nn.Conv2d(C, C, 2, 2), nn.BatchNorm2d(C)), "closed form", (2, 2)),
    "words for padding": (
        nn.Sequential(nn.Conv2d(C, C, (3, 5), padding="same", dilation=(1, 2)), nn.BatchNorm2d(C)),
        "closed form",
        (3, 5),
    ),
}


def images(size: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def relative(model: nn.Module, expected: torch.Tensor, x: torch.Tensor) -> float:
    return ((model(x) - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", BLOCKS)
def test_block_is_one_convolution(name):
    block, method, size = BLOCKS[name]
    model = network(copy.deepcopy(block), C)
    reference = copy.deepcopy(model).double()
    report = fuse(model, images(seed=2))
    assert [region.method for region in report.fused] == [method] and report.left == []
    assert report.fused[0].error <= 1e-14
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 3 == report.layers_after
    assert convolutions[1].kernel_size == size
    for pixels in (24, 25):  # other images, and another size
        x = images(pixels)
        with torch.no_grad():
            expected = reference(x.double())
        assert relative(model.double(), expected, x.double()) <= 1e-5
        model.float()


def test_weights_are_exact():
    """In a float64 model nothing is rounded to float32 on the way."""
    for block in (dbb(C, C), OREPA(C), Scaled(C), dilated(C)):
        model = network(block, C).double()
        with torch.no_grad():
            expected = model(images().double())
        fuse(model, images(seed=2).double())
        assert relative(model, expected, images().double()) <= 1e-14


def test_zero_padding_inside_a_branch_is_found_out():
    model = network(ZeroPadded(C), C)
    with torch.no_grad():
        expected = model(images())
    report = fuse(model, images(seed=2))
    assert len(report.fused) == 2 and report.layers_after == 4  # the norms only
    assert relative(model, expected, images()) <= 1e-5


def test_padding_with_a_norm_of_its_own_is_left_where_it_is_read():
    """The padding reads the norm's parameters: without an outer convolution there is nothing to gain."""
    model = network(nn.Sequential(nn.Conv2d(C, C, 1, bias=False), NormAndPad(C, 1)), C)
    with torch.no_grad():
        expected = model(images())
    report = fuse(model, images(seed=2))
    (left,) = report.left
    assert "the model reads 1.1.norm.weight elsewhere" in left.left and report.layers_after == report.layers_before
    assert torch.equal(model(images()), expected)


def test_what_costs_more_is_not_merged():
    wide = nn.Sequential(nn.Conv2d(C, 2, 1, bias=False), nn.Conv2d(2, C, 3, bias=False))  # 2 channels in between
    depthwise = SumOf(nn.Conv2d(C, C, 3, padding=1, groups=C), nn.Conv2d(C, C, 1))  # dense 3 x 3 together
    narrow = nn.Sequential(nn.Conv2d(C, 64, 1, bias=False), nn.Conv2d(64, C, 1, bias=False))
    for block, layers in ((wide, 4), (depthwise, 4), (narrow, 3)):
        assert fuse(network(block, C), images()).layers_after == layers


def test_activations_end_a_region():
    block = nn.Sequential(
        *conv_norm(C, C, 3), nn.ReLU6(), *conv_norm(C, C, 1), nn.Hardtanh(-1e5, 1e5), nn.BatchNorm2d(C)
    )
    report = fuse(network(block, C), images())
    assert len(report.fused) == 2 and report.layers_after == 5


def test_values_used_elsewhere_are_kept():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) * y.sigmoid()

    model = network(Twice(), C)
    with torch.no_grad():
        expected = model(images())
    report = fuse(model, images(seed=2))
    (left,) = report.left
    assert left.name == "1.norm" and "used elsewhere" in left.left
    assert torch.equal(model(images()), expected)


@pytest.mark.parametrize("returns", ["tuple", "dict"])
def test_values_that_the_model_returns_are_kept(returns):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)

        def forward(self, x):
            y = self.conv(x)
            return (y, [self.norm(y)]) if returns == "tuple" else {"hidden": y, "output": self.norm(y)}

    report = fuse(randomize(Net()), images())
    assert report.fused == [] and report.layers_after == 2


def test_weights_used_twice_are_left():
    shared = conv_norm(C, C, 3)
    model = network(nn.Sequential(shared, nn.ReLU(), shared), C)
    with torch.no_grad():
        expected = model(images())
    report = fuse(model, images(seed=2))
    assert report.fused == [] and {region.name for region in report.left} == {"1.0.1"}
    assert "runs 2 times in one pass" in report.left[0].left
    assert torch.equal(model(images()), expected)


def test_tied_weights_are_left():
    first, second = conv_norm(C, C, 3), conv_norm(C, C, 3)
    second[0].weight = first[0].weight
    report = fuse(network(nn.Sequential(first, nn.ReLU(), second), C), images())
    assert report.fused == [] and all("shares its weight" in region.left for region in report.left)


def test_module_under_two_names_is_replaced_under_both():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU()
            self.projection = self.conv

        def forward(self, x):
            return self.act(self.norm(self.conv(x))) + self.projection.weight.shape[0]

    model = randomize(Net())
    with torch.no_grad():
        expected = model(images())
    fuse(model, images())
    assert model.projection is model.conv and model.conv.bias is not None
    assert [entry["kind"] for entry in model.fused_structure].count("alias") == 1
    assert relative(model, expected, images()) <= 1e-5


def test_hooks_are_not_lost():
    model = network(conv_norm(C, C, 3), C)
    handle = model[1][1].register_forward_hook(lambda module, args, result: result * 2)
    with torch.no_grad():
        expected = model(images())
    report = fuse(model, images())
    (left,) = report.left
    assert "1.1 has forward hooks" in left.left and report.fused == []
    assert torch.equal(model(images()), expected)
    handle.remove()
    assert len(fuse(model, images()).fused) == 1


def test_in_place_changes_of_a_shared_map_are_seen():
    """`x` is overwritten after another name for its memory was taken: that name must keep seeing it."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)

        def forward(self, x):
            y = self.conv(x)
            view = y.view(y.shape)
            y += 1
            return self.norm(view) + y

    model = network(InPlace(), C)
    with torch.no_grad():
        expected = model(images())
    fuse(model, images(seed=2))
    assert relative(model, expected, images()) <= 1e-5


def test_report_is_readable():
    report = fuse(network(acb(C), C), images())
    first, second = str(report).splitlines()
    assert first.startswith("1 regions fused") and "8 layers with weights before, 3 after" in first
    assert second.startswith("  1: 7 parts (1.branches.0.0, 1.branches.0.1, ") and "closed form, error" in second


def test_fusing_twice_changes_nothing():
    model = network(acb(C), C)
    fuse(model, images())
    entries = copy.deepcopy(model.fused_structure)
    report = fuse(model, images())
    assert report.fused == [] and report.layers_before == report.layers_after
    assert model.fused_structure == entries


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = network(acb(C), C)
    exact = copy.deepcopy(model.to(dtype)).double()
    report = fuse(model, images().to(dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert report.fused[0].error <= 1e-14
    x = images().to(dtype)
    assert relative(model.double(), exact(x.double()), x.double()) <= torch.finfo(dtype).eps
