"""The benchmark of networks that are not of this package: its figures by hand, what is refused, and each library."""

import copy
import math
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="the networks are timm's")

from repvgg_hf.recipes.benchmarks import any_network  # noqa: E402
from repvgg_hf.recipes.benchmarks.any_network import PACKAGES, SIDES, AnyNetworkArguments, Side  # noqa: E402

# of each side: the bits that a weight takes beside its codes, for each table of all, and for each output channel
TABLES = {
    "ours, tensor + scale": (16 * 16, 32),
    "ours, channel": (0, 16 * 16),
    "coremltools, tensor": (16 * 16, 0),
    "coremltools, tensor + scale": (16 * 16, 16),
    "coremltools, channel": (0, 16 * 16),
    "nncf": (0, 16 + 8),
    "nncf, all layers": (0, 16 + 8),
    "quanto": (0, 32 + 32),
}


class Network(nn.Module):
    """A dense and a depthwise convolution and a classifier, of 128 inputs: NNCF's default refuses fewer."""

    def __init__(self):
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(3, 128, 5), nn.Conv2d(128, 128, 5, groups=128)
        self.classifier = nn.Linear(128, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.depthwise(self.conv(x).relu()).relu().mean(dim=(2, 3)))


def small_arguments(**options) -> AnyNetworkArguments:
    options = {"peers": ["none"], "device": "cpu", "repeats": 2, "images": 2, "image_size": 64} | options
    return AnyNetworkArguments(architectures=["test_resnet"], **options)


@torch.no_grad()
def decoded_weight(layer: nn.Module, inputs: int, size: tuple[int, ...]) -> torch.Tensor:
    """What a layer computes with `[out, inputs * size]`, found by feeding it unit vectors, in each group alike."""
    units = torch.eye(inputs * math.prod(size)).reshape(-1, inputs, *size)
    units = units.repeat(1, getattr(layer, "groups", 1), *[1] * len(size))
    return (layer(units) - layer(torch.zeros_like(units[:1]))).flatten(1).T


def with_library(name: str) -> Side:
    """The side of that name, if its library is there."""
    side = SIDES[name]
    if side.peer is not None:
        pytest.importorskip(PACKAGES[side.peer], reason=f"compares with {side.peer}")
    return side


@pytest.fixture
def network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Network().eval(), torch.randn(2, 3, 16, 16)


@pytest.mark.parametrize("name", SIDES)
def test_sides_say_how_many_bits_they_store(name, network):
    side, (model, images) = with_library(name), network
    expected = model(images)
    _, quantized = any_network.timed(side.quantize, model, images)
    assert any_network.relative_error(quantized, images, expected) < 0.3
    layers = side.layers(quantized)
    dense = {"nncf": 8, "nncf, all layers": 8}.get(name, 4)
    assert {layer: bits for layer, (bits, _) in layers.items()} == {
        "conv": dense, "depthwise": dense, "classifier": 8 if name == "nncf" else 4
    }  # fmt: skip
    for layer, (bits, stored) in layers.items():
        weight, (table, by_channel) = model.get_submodule(layer).weight, TABLES[name]
        zero_point = 4 if name == "nncf, all layers" and bits == 4 else 0  # of 8 bits otherwise
        assert stored == bits * weight.numel() + table + len(weight) * (by_channel - zero_point)


@pytest.mark.parametrize("name", [name for name in SIDES if "nncf" not in name])  # which decodes around the layers
def test_channels_have_as_many_values_as_bits_allow(name, network):
    side, (model, images) = with_library(name), network
    quantized = side.quantize(copy.deepcopy(model), images)
    for layer, inputs, size in (("conv", 3, (5, 5)), ("depthwise", 1, (5, 5)), ("classifier", 128, ())):
        decoded = decoded_weight(quantized.get_submodule(layer), inputs, size)
        weight = model.get_submodule(layer).weight.flatten(1)
        assert (decoded - weight).norm() < 0.15 * weight.norm()
        assert max(len(row.mul(1e4).round().unique()) for row in decoded) <= 2 ** side.layers(quantized)[layer][0]


def test_share_and_stored_bits_are_those_by_hand():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Linear(4, 7))  # 72 and 28 weights
    stored, shares = any_network.stored_and_shares(model, {"0": (4, 300)})
    assert shares == {"32": 0.28, "4": 0.72} and stored == (300 + 28 * 32) / 100


def test_batch_norms_have_the_statistics_of_what_they_see():
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), torch.randn(4, 3, 16, 16)
    output = any_network.with_statistics(model, images)(images).detach()
    assert not model.training
    torch.testing.assert_close(output.mean(dim=(0, 2, 3)), model[1].bias.detach(), atol=1e-4, rtol=0)
    torch.testing.assert_close(output.std(dim=(0, 2, 3)), model[1].weight.detach(), atol=0, rtol=2e-3)


def test_every_turn_has_other_weights_and_a_fused_network():
    args = small_arguments()
    (one, _), (same, _), (other, _) = (any_network.fused_network("test_resnet", args, seed) for seed in (0, 0, 1))
    first, second, third = (next(model.parameters()) for model in (one, same, other))
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in one.modules())


def refusing(model: nn.Module, images: torch.Tensor) -> nn.Module:
    raise RuntimeError("no convolutions, please")


def not_finite(model: nn.Module, images: torch.Tensor) -> nn.Module:
    next(model.parameters()).data.fill_(float("nan"))
    return model


def test_what_a_library_refuses_is_recorded(monkeypatch, capsys):
    ours = {name: side for name, side in SIDES.items() if side.peer is None}
    peers = {"stubborn": Side(refusing, dict, "ours, channel", "nncf")}
    peers["broken"] = Side(not_finite, dict, "ours, channel", "nncf")
    monkeypatch.setattr(any_network, "SIDES", ours | peers)
    args = small_arguments()
    args.peers = ["nncf"]
    records = any_network.measure("test_resnet", args)
    refused = records[-1]["refused"]
    assert refused["stubborn"] == "RuntimeError: no convolutions, please"
    assert refused["broken"] == "ValueError: The quantized model's logits differ by nan."
    assert all(record["values"].keys() == ours.keys() for record in records)
    assert records[-1]["share_by_bits"] == dict.fromkeys(ours, {"4": 1.0})
    printed = capsys.readouterr().out
    assert "stubborn: refused, RuntimeError: no convolutions, please" in printed
    assert "ours, channel: 100.0 % of the weights at 4 bits" in printed


def test_an_error_of_ours_is_raised(monkeypatch):
    monkeypatch.setattr(any_network, "SIDES", {"ours, channel": Side(refusing, dict)})
    with pytest.raises(RuntimeError, match="no convolutions, please"):
        any_network.measure("test_resnet", small_arguments())


def test_unknown_library_is_told_which_there_are():
    with pytest.raises(ValueError, match="--peers takes coremltools, nncf, optimum-quanto, or none, got tensorrt"):
        small_arguments(peers=["tensorrt"])


@pytest.mark.parametrize("peer", PACKAGES)
def test_missing_library_is_told_how_to_install(peer, monkeypatch):
    for module in {PACKAGES[peer], PACKAGES[peer].partition(".")[0]}:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"{peer} not installed: `pip install {peer}`"):
        small_arguments(peers=[peer])
