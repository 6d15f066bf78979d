"""What is recorded of a forward pass: which tensors depend on the example, which are constants, and who overwrites."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from repvgg_hf.networks.recording import OUTSIDE, arguments_of, record


class Runs(nn.Module):
    """A module whose forward is a function of its convolution and the input."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 3, 1), function

    def forward(self, x):
        return self.function(self.conv, x)


def recorded(function, x=None):
    return record(Runs(function).eval(), torch.randn(1, 3, 4, 4) if x is None else x)


def test_nodes_and_calls():
    recording = recorded(lambda conv, x: F.relu(conv(x)) + 1)
    assert [node.name for node in recording.nodes] == ["", "conv2d", "relu", "add"]
    assert [node.inputs for node in recording.nodes] == [(), (0,), (1,), (2,)]
    assert [node.users for node in recording.nodes] == [{1}, {2}, {3}, {OUTSIDE}]
    assert recording.nodes[1].modules == ("", "conv") and recording.nodes[2].modules == ("",)
    (call,) = recording.calls["conv"]
    assert (call.source, call.result, call.first, call.last) == (0, 1, 1, 2)
    assert recording.live() == {0, 1, 2, 3}


def test_what_comes_of_weights_alone_is_constant():
    recording = recorded(
        lambda conv, x: x * (conv.weight.float() * 2 + torch.ones(3, 1, 1, 1)).sum((1, 2, 3)).view(3, 1, 1)
    )
    assert [node.name for node in recording.nodes] == ["", "mul"]
    constant = recording.nodes[1].args[1]
    assert recording.exact(constant).dtype == torch.float64


def test_constants_are_computed_again_in_float64():
    model = Runs(lambda conv, x: x + (conv.bias / 3 * 7).view(-1, 1, 1))
    recording = record(model, torch.randn(1, 3, 4, 4))
    expected = (model.conv.bias.detach().double() / 3 * 7).view(-1, 1, 1)
    got = recording.exact(recording.nodes[1].args[1])
    assert torch.equal(got, expected) and not torch.equal(got.float().double(), expected)


def test_overwriting_makes_a_new_node():
    def function(conv, x):
        y = conv(x)
        y += 1
        F.relu(y, inplace=True)
        y[:, 0] = 0
        return y

    recording = recorded(function)
    assert [node.name for node in recording.nodes] == ["", "conv2d", "add_", "relu", "__setitem__"]
    assert [node.in_place for node in recording.nodes] == [False, False, True, True, True]
    assert recording.nodes[-1].users == {OUTSIDE}


@pytest.mark.parametrize(
    "view", [lambda y: y[:, :1], lambda y: y.view(1, 3, 16), lambda y: y.detach(), lambda y: y.data]
)
def test_other_names_for_overwritten_memory(view):
    """What a view holds after the memory was overwritten is no longer what it was made of."""

    def function(conv, x):
        y = conv(x)
        other = view(y)
        y.mul_(2)
        return other.sum()

    recording = recorded(function)
    total = recording.nodes[-1]
    names = [recording.nodes[number].name for number in total.inputs]
    assert total.name == "sum" and names == [""]  # of unknown origin, after the change


def test_overwriting_through_a_view():
    def function(conv, x):
        y = conv(x)
        y[:, 0].zero_()
        return y

    recording = recorded(function)
    (last,) = [node for node in recording.nodes if OUTSIDE in node.users]
    assert last.name == "" and last.inputs


def test_memory_that_a_weight_has_left():
    """A layer may lay out its weight anew when it first runs; what comes to lie there is no other name of it."""

    class Moves(nn.Conv2d):
        def forward(self, x):
            self.weight.data = self.weight.data.clone()
            return F.relu(x, inplace=True)

    model = Moves(3, 3, 1)
    recording = record(model, model.weight.data.view(1, 1, 3, 3))
    assert [node.name for node in recording.nodes] == ["", "relu"] and recording.nodes[1].in_place


def test_constant_that_is_filled_with_values():
    def function(conv, x):
        y = torch.zeros(1, 3, 4, 4)
        y[:, :2] = conv(x)[:, :2]
        return y

    (last,) = [node for node in recorded(function).nodes if OUTSIDE in node.users]
    assert last.inputs


def test_shapes_of_maps_are_constants():
    recording = recorded(lambda conv, x: conv(x) + torch.ones_like(x) * x.shape[1] + x.new_zeros(x.size(0), 1, 1, 1))
    assert [node.name for node in recording.nodes] == ["", "conv2d", "add", "add"]


@pytest.mark.parametrize(
    "random",
    [
        lambda x: torch.rand(1, 3, 1, 1),
        lambda x: torch.randn_like(x),
        lambda x: torch.zeros(1).normal_(),
        torch.bernoulli,
    ],
    ids=["rand", "randn_like", "normal_", "bernoulli"],
)
def test_random_numbers_are_no_constants(random):
    recording = recorded(lambda conv, x: x + random(torch.sigmoid(conv.weight.new_ones(1, 3, 4, 4))))
    assert len(recording.nodes[-1].inputs) == 2


def test_tensors_from_nowhere_are_no_constants():
    hidden = []

    def function(conv, x):
        return conv(x) + hidden[0]

    hidden.append(torch.ones(1, 3, 4, 4))
    assert len(recorded(function).nodes[-1].inputs) == 2


def test_attributes_are_constants():
    model = Runs(lambda conv, x: x + conv.table)
    model.conv.table = torch.ones(3, 1, 1)
    assert [node.inputs for node in record(model, torch.randn(1, 3, 4, 4)).nodes] == [(), (0,)]


def test_several_results_are_several_nodes():
    recording = recorded(lambda conv, x: sum(x.chunk(3, dim=1)))
    assert len({number for node in recording.nodes for number in node.inputs if node.name == "add"}) >= 3


def test_inference_tensors():
    """They count no changes: the recording works on copies, and the example stays as it was."""
    with torch.inference_mode():
        x = torch.randn(1, 3, 4, 4)
        before = x.clone()
        recording = recorded(lambda conv, x: x.relu_() + conv(x), x)
    assert [node.name for node in recording.nodes] == ["", "relu_", "conv2d", "add"]
    assert torch.equal(x, before)


def test_hooks_are_taken_away_after_an_error():
    model = Runs(lambda conv, x: conv(x[:, :2]))
    with pytest.raises(
        ValueError, match=r"Runs does not run on the example \(tensors of \[1, 3, 4, 4\]\): RuntimeError in conv"
    ):
        record(model, torch.randn(1, 3, 4, 4))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_arguments():
    from transformers import BatchFeature

    x = torch.ones(1)
    assert arguments_of(x) == ((x,), {}) and arguments_of((x, 2)) == ((x, 2), {})
    assert arguments_of({"pixel_values": x}) == ((), {"pixel_values": x})
    assert arguments_of(BatchFeature({"pixel_values": x})) == ((), {"pixel_values": x})
