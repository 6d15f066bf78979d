"""Batch norms next to linear, one-dimensional, transposed and other layers: folded into them, or left with a reason."""

import copy

import pytest
import torch
from torch import nn

import repvgg_hf

BEHIND = {
    "linear": (lambda: [nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)], (3, 6)),
    "conv1d": (lambda: [nn.Conv1d(6, 8, 3, padding=2, padding_mode="reflect"), nn.BatchNorm1d(8)], (3, 6, 9)),
    "conv1d, groups": (lambda: [nn.Conv1d(6, 8, 3, 2, groups=2, bias=False), nn.BatchNorm1d(8)], (3, 6, 9)),
    "conv3d": (lambda: [nn.Conv3d(6, 8, 3, groups=2), nn.BatchNorm3d(8, affine=False)], (2, 6, 4, 5, 6)),
    "transposed": (lambda: [nn.ConvTranspose2d(6, 8, 3, 2, bias=False), nn.BatchNorm2d(8)], (2, 6, 5, 4)),
    "transposed, groups": (
        lambda: [nn.ConvTranspose2d(6, 8, 2, 2, groups=2, output_padding=1, dilation=2), nn.BatchNorm2d(8)],
        (2, 6, 5, 4),
    ),
    "conv2d that pads unevenly": (lambda: [nn.Conv2d(6, 8, 4, padding="same"), nn.BatchNorm2d(8)], (2, 6, 7, 5)),
}


def with_statistics(*layers: nn.Module) -> nn.Sequential:
    """The layers in eval mode, with norms such as training might leave."""
    for norm in layers:
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            tensors = [norm.running_mean, norm.running_var, *norm.parameters()]
            for tensor in tensors:
                tensor.data.uniform_(0.5, 2.0)
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("kind", BEHIND)
def test_a_norm_behind_a_layer_is_folded(kind, tmp_path):
    torch.manual_seed(0)
    make, shape = BEHIND[kind]
    fresh = with_statistics(*make(), nn.ReLU())
    model, x = copy.deepcopy(fresh), torch.randn(shape)
    report = repvgg_hf.fuse(model, x)
    (region,) = report.regions
    assert region.left is None and region.parts == ("0", "1") and region.error < 1e-14 and report.layers_after == 1
    assert type(model[0]) is type(fresh[0]) and type(model[1]) is nn.Identity
    torch.testing.assert_close(model(x), fresh(x))
    if isinstance(fresh[0], (nn.Linear, nn.Conv1d)):  # quantized, and rebuilt from the stored structure
        repvgg_hf.save_quantized(repvgg_hf.quantize(model, bits=8), tmp_path)
        loaded = repvgg_hf.load_quantized(copy.deepcopy(fresh), tmp_path)
        assert torch.equal(loaded(x), model(x))


def test_a_norm_before_a_linear_layer_is_folded(tmp_path):
    torch.manual_seed(0)
    fresh = with_statistics(nn.BatchNorm1d(6), nn.Linear(6, 8, bias=False), nn.ReLU())
    model, x = copy.deepcopy(fresh), torch.randn(3, 6)
    report = repvgg_hf.fuse(model, x)
    (region,) = report.regions
    assert region.left is None and region.parts == ("0", "1") and region.error < 1e-14 and report.layers_after == 1
    torch.testing.assert_close(model(x), fresh(x))
    repvgg_hf.save_quantized(repvgg_hf.quantize(model, bits=8), tmp_path)
    loaded = repvgg_hf.load_quantized(copy.deepcopy(fresh), tmp_path)
    assert torch.equal(loaded(x), model(x)) and type(loaded[0]) is nn.Identity


def test_of_two_norms_next_to_a_layer_one_is_left_for_the_next_time():
    torch.manual_seed(0)
    model, x = with_statistics(nn.BatchNorm1d(6), nn.Linear(6, 8), nn.BatchNorm1d(8)), torch.randn(3, 6)
    expected = model(x)
    first = repvgg_hf.fuse(model, x)
    assert len(first.fused) == 1 and "1 takes in another norm: fuse once more" in first.left[0].left
    second = repvgg_hf.fuse(model, x)
    assert len(second.fused) == 1 and not second.left and second.layers_after == 1
    torch.testing.assert_close(model(x), expected)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(self.layer(self.norm(self.layer(x))))


class UsedElsewhere(Twice):
    def forward(self, x):
        y = self.layer(x)
        return self.norm(y) + y


class OverPositions(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.layer(x))


class ReadsAgain(Twice):
    def forward(self, x):
        return self.norm(self.layer(x)).relu() @ self.layer.weight


class AsksForBias(Twice):
    """What it computes depends on whether a layer has a bias, which a folded one has."""

    def __init__(self):
        super().__init__()
        self.layer.bias = None

    def forward(self, x):
        return self.norm(self.layer(x)) * (1 if self.layer.bias is None else 2)


class OwnLinear(nn.Linear):
    pass


def hooked_backward() -> nn.Module:
    norm = nn.BatchNorm1d(6)
    norm.register_full_backward_hook(lambda module, gradients, others: None)
    return norm


class Flattened(nn.Module):
    """A norm of a sequence's features, as LeViT has it."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return self.norm(y.flatten(0, 1)).reshape_as(y)


def hooked() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.register_forward_hook(lambda module, args, output: None)
    return layer


@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (Twice, (3, 6), "runs 2 times in one pass"),
        (UsedElsewhere, (3, 6), "what 0.layer gives is used elsewhere as well"),
        (OverPositions, (3, 4, 6), "another dimension than the layer's features"),
        (lambda: nn.Sequential(OwnLinear(6, 6), nn.BatchNorm1d(6)), (3, 6), "may do more than a plain Linear"),
        (lambda: nn.Sequential(hooked(), nn.BatchNorm1d(6)), (3, 6), "0.0 has forward hooks"),
        (lambda: nn.Sequential(nn.Linear(6, 6), hooked_backward()), (3, 6), "0.1 has backward hooks"),
        (ReadsAgain, (3, 6), "the model reads 0.layer.weight elsewhere as well, by matmul() in 0"),
        (AsksForBias, (3, 6), "the model is another: it computes mul() in 0"),
        (lambda: nn.Sequential(nn.Conv1d(6, 7, 3), nn.BatchNorm1d(7)), (6, 9), "its input is no batch"),
        (Flattened, (3, 4, 6), "it follows flatten(), no layer"),
        (lambda: nn.BatchNorm1d(6), (3, 6), "it follows an input, no layer"),
    ],
    ids=[
        "twice",
        "elsewhere",
        "positions",
        "subclass",
        "hooks",
        "backward",
        "weight",
        "bias",
        "no batch",
        "flattened",
        "input",
    ],  # fmt: skip
)
def test_what_cannot_be_folded_is_left_with_a_reason(make, shape, reason):
    model, x = nn.Sequential(make()).eval(), torch.randn(shape)
    expected = model(x)
    report = repvgg_hf.fuse(model, x)
    assert not report.fused and reason in report.left[0].left
    assert torch.equal(model(x), expected)


def test_a_norm_goes_into_the_convolution_behind_it_if_that_takes_it():
    """A transposed convolution, its norm and a convolution: the norm is folded once."""
    torch.manual_seed(0)
    model = with_statistics(nn.ConvTranspose2d(4, 6, 2, 2), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1))
    x = torch.randn(1, 4, 5, 5)
    expected = model(x)
    report = repvgg_hf.fuse(model, x)
    assert len(report.fused) == 1 and report.layers_after == 2
    torch.testing.assert_close(model(x), expected)


class FrozenNorm(nn.Module):
    """Batch norm of a detector, in two operations of its own; a fresh one shifts by zero, which changes nothing."""

    def __init__(self, shift):
        super().__init__()
        self.register_buffer("scale", torch.rand(1, 8, 1, 1) + 0.5)
        self.register_buffer("shift", shift * torch.randn(1, 8, 1, 1))

    def forward(self, x):
        return x * self.scale + self.shift


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_frozen_norm_is_folded_as_a_whole(shift):
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), FrozenNorm(shift), nn.ReLU()).eval(),
        torch.randn(1, 3, 9, 9),
    )
    expected = model(x)
    report = repvgg_hf.fuse(model, x)
    assert len(report.fused) == 1 and not report.left and type(model[1]) is nn.Identity
    torch.testing.assert_close(model(x), expected)
