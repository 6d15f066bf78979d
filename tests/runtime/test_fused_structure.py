"""The stored description of a fused network: what it makes of a fresh one, and errors that name the entry."""

import copy
import json

import pytest
import torch
from torch import nn

from repvgg_hf.runtime.fused_structure import (
    FusedAway,
    Nothing,
    check_fused_structure,
    describe_convolution,
    rebuild_fused,
    replace_modules,
    restore_modules,
)

CONVOLUTION = {
    "name": "block.dense", "kind": "conv2d", "in_channels": 4, "out_channels": 6, "kernel_size": [3, 1],
    "stride": [1, 2], "padding": [1, 0], "dilation": [1, 1], "groups": 2, "padding_mode": "reflect",
}  # fmt: skip


class Block(nn.Module):
    """A sum of two branches with a norm that has an activation as its child."""

    def __init__(self):
        super().__init__()
        self.dense, self.point = nn.Conv2d(4, 6, (3, 1)), nn.Conv2d(4, 6, 1)
        self.norm = nn.Sequential()
        self.norm.bn, self.norm.act = nn.BatchNorm2d(6), nn.PReLU()

    def forward(self, x):
        return self.norm(self.dense(x) + self.point(x))


def network() -> nn.Sequential:
    model = nn.Sequential()
    model.block = Block()
    model.alias = model.block.dense
    return model


ENTRIES = [
    CONVOLUTION,
    {"name": "alias", "kind": "alias", "of": "block.dense"},
    {"name": "block.point", "kind": "nothing"},
    {"name": "block.norm", "kind": "identity", "then": ["act"]},
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rebuild(device):
    with torch.device(device):
        model = network().half().eval()
    rebuild_fused(model, json.loads(json.dumps(ENTRIES)))
    dense = model.block.dense
    assert type(dense) is nn.Conv2d and dense.bias is not None and dense.weight.shape == (6, 2, 3, 1)
    assert dense.stride == (1, 2) and dense.padding == (1, 0) and dense.padding_mode == "reflect"
    assert dense.weight.dtype == torch.float16 and dense.weight.device.type == device
    assert model.alias is dense and isinstance(model.block.point, FusedAway)
    assert list(model.block.norm.state_dict()) == ["act.weight"]
    assert not any(module.training for module in model.modules())
    assert model.fused_structure == ENTRIES and describe_convolution("block.dense", dense) == CONVOLUTION


def test_sequence_keeps_names_of_children():
    model = network()
    entry = CONVOLUTION | {"name": "block", "out_channels": 6, "then": ["norm"]}
    rebuild_fused(model, [entry])
    assert [name for name, _ in model.block.named_children()] == ["fused", "norm"]
    assert describe_convolution("block", model.block.fused, ["norm"]) == entry


def test_replacing_can_be_undone():
    model = network()
    before = dict(model.named_modules())
    undo = replace_modules(model, ENTRIES, {})
    assert dict(model.named_modules()).keys() != before.keys()
    restore_modules(model, undo)
    assert dict(model.named_modules()) == before and model.alias is model.block.dense


@pytest.mark.parametrize(
    "position, name",
    [(0, "block.missing"), (1, "other"), (2, "block.point.deeper")],
)
def test_module_that_the_model_has_not(position, name):
    model = network()
    before = dict(model.named_modules())
    entries = copy.deepcopy(ENTRIES)
    entries[position]["name"] = name
    with pytest.raises(
        ValueError, match=rf"fused_structure\[{position}\] is of the module '{name}', and this Sequential"
    ):
        rebuild_fused(model, entries)
    assert dict(model.named_modules()) == before and not hasattr(model, "fused_structure")


def test_children_that_the_module_has_not():
    entry = {"name": "block.norm", "kind": "identity", "then": ["activation"]}
    with pytest.raises(ValueError, match=r"fused_structure\[0\].*block.norm.*activation"):
        rebuild_fused(network(), [entry])


BAD = [
    ({"kind": "conv"}, "'kind' among conv2d, identity, biased, nothing, alias, got 'conv'"),
    ({"kind": ["conv2d"]}, "'kind' among"),
    ({"name": ""}, "the dotted 'name' of a module, got ''"),
    ({"name": 3}, "the dotted 'name' of a module, got 3"),
    ({"kernel_size": [3]}, "two integers of at least 1 in 'kernel_size'"),
    ({"kernel_size": 3}, "two integers of at least 1 in 'kernel_size', got 3"),
    ({"stride": [0, 1]}, "'stride'"),
    ({"padding": [-1, 0]}, "two integers of at least 0 in 'padding'"),
    ({"dilation": [1, True]}, "'dilation'"),
    ({"in_channels": 4.0}, "a positive integer 'in_channels', got 4.0"),
    ({"groups": 4}, "out_channels=6, which groups=4 must divide"),
    ({"groups": 3}, "in_channels=4, which groups=3 must divide"),
    ({"padding_mode": "mirror"}, "'padding_mode' among zeros, reflect"),
    ({"bias": True}, "unknown field 'bias'"),
    ({"then": "act"}, "a list of children's names in 'then', got 'act'"),
    ({"then": [1]}, "children's names in 'then'"),
    ({"then": ["fused"]}, "other and different names than 'fused' in 'then'"),
    ({"then": ["act", "act"]}, "other and different names"),
]


@pytest.mark.parametrize("change, match", BAD, ids=lambda value: str(value)[:30])
def test_damaged_convolution(change, match):
    with pytest.raises(ValueError, match=r"^fused_structure\[1\].*") as error:
        rebuild_fused(network(), [ENTRIES[2], CONVOLUTION | change])
    assert match in str(error.value) and "fuse and quantize the float model again" in str(error.value)


@pytest.mark.parametrize("key", [key for key in CONVOLUTION if key not in ("name", "kind")])
def test_missing_field(key):
    with pytest.raises(ValueError, match=rf"of 'block.dense', is a conv2d and has no '{key}'"):
        check_fused_structure([{name: value for name, value in CONVOLUTION.items() if name != key}])


@pytest.mark.parametrize(
    "entries, match",
    [
        ({"name": "x"}, "must be a list of entries"),
        (None, "must be a list"),
        (["block"], r"fused_structure\[0\] must be a dictionary"),
        ([{"name": "a", "kind": "alias"}], "has no 'of'"),
        ([{"name": "a", "kind": "alias", "of": 2}], "another module in 'of', got 2"),
        ([{"name": "a", "kind": "nothing", "then": ["act"]}], "unknown field 'then'"),
        ([{"name": "a", "kind": "identity", "groups": 1}], "unknown field 'groups'"),
    ],
)
def test_damaged_list(entries, match):
    with pytest.raises(ValueError, match=match):
        check_fused_structure(entries)


def test_nothing_adds_nothing():
    y = torch.randn(2, 3)
    nothing = FusedAway()(y, mask=None)
    assert isinstance(nothing, Nothing)
    assert y + nothing is y and nothing + y is y and y - nothing is y
    assert sum([nothing, y, nothing]) is y
    z = y
    z += nothing
    assert z is y
    nothing += y
    assert nothing is y
    assert isinstance(Nothing() * torch.ones(3) / 2, Nothing) and isinstance(-Nothing() + Nothing(), Nothing)
    assert isinstance(torch.ones(3) * Nothing(), Nothing)
