"""Which layers wait for which, and what hooks see of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from repvgg_hf.compression.ptq.data import CalibrationData
from repvgg_hf.compression.ptq.graph import levels, record_run
from repvgg_hf.compression.ptq.hooks import run_layers
from repvgg_hf.compression.ptq.model_inputs import ModelInputs


class Branching(nn.Module):
    """Two projections of one input; a shortcut; views and writes in place; indices that data choose; a loop."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))
        self.out, self.shortcut, self.chosen, self.twice = (nn.Linear(4, 4) for _ in range(4))
        self.constant, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x + 1)
        attended = F.scaled_dot_product_attention(q, k, v)
        y = torch.zeros_like(x)
        y[:, 1:] = self.out(attended)[:, 1:]
        y += self.shortcut(input=x)
        index = q.sum(dim=2).detach().argmax(dim=1)  # no gradient passes here
        z = self.chosen(x[torch.arange(len(x)), index])
        for _ in range(2):
            y = self.twice(y).relu()
        return y.mean(dim=1) + z + self.constant(torch.ones(1, 4))


def test_what_waits_for_what(generator):
    model = Branching()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    x = torch.randn(2, 3, 4, generator=generator)
    runs = record_run(model, layers, ModelInputs((x,)))
    assert list(runs) == ["query", "key", "value", "out", "shortcut", "chosen", "twice", "constant"]
    qkv = {"query", "key", "value"}
    assert {name: run.waits_for for name, run in runs.items()} == {
        "query": set(), "key": set(), "value": set(), "out": qkv, "shortcut": set(), "chosen": {"query"},
        "twice": qkv | {"out", "shortcut", "twice"}, "constant": set(),
    }  # fmt: skip
    assert {name: run.calls for name, run in runs.items() if run.calls != 1} == {"twice": 2}
    assert {name: run.shares_with for name, run in runs.items() if run.shares_with != name} == {
        "key": "query", "shortcut": "query",
    }  # fmt: skip
    assert levels(runs) == [["query", "key", "value", "shortcut", "constant"], ["out", "chosen"], ["twice"]]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_same_input_changed_in_between_is_another():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            first = self.a(x)
            x.add_(1)
            return first + self.b(x) + self.c(x)

    model = InPlace()
    runs = record_run(model, dict(model.named_children()), ModelInputs((torch.ones(2, 2),)))
    assert [run.shares_with for run in runs.values()] == ["a", "b", "b"]


def test_convolutions_share_columns_only_with_the_same_geometry(generator):
    class Convolutions(nn.ModuleList):
        def forward(self, x):
            return [layer(x) for layer in self]

    model = Convolutions([nn.Conv2d(2, 2, 3), nn.Conv2d(2, 4, 3), nn.Conv2d(2, 2, 3, 2), nn.Conv2d(2, 2, 1)])
    runs = record_run(model, dict(model.named_children()), ModelInputs((torch.ones(2, 2, 5, 5),)))
    assert [run.shares_with for run in runs.values()] == ["0", "0", "2", "3"]


def test_layers_that_wait_for_each_other_are_taken_as_they_run():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            for _ in range(3):
                x = self.b(self.a(x))
            return x

    model = Loop()
    runs = record_run(model, dict(model.named_children()), ModelInputs((torch.ones(2, 2),)))
    assert runs["a"].waits_for == runs["b"].waits_for == {"a", "b"} and runs["a"].calls == 3
    assert levels(runs) == [["a"], ["b"]]
    assert levels({}) == []


def test_a_pass_ends_when_all_is_seen(generator):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    ran = []
    model[2].register_forward_hook(lambda *args: ran.append(2))
    data = CalibrationData(torch.randn(6, 2, generator=generator), 2, model=model)
    seen = []
    run_layers(model, {"1": model[1]}, data.batches, lambda name, x: seen.append(x), calls=1)
    assert not ran and torch.equal(torch.cat(seen), model[0](torch.cat(data.images)))
    run_layers(model, {"1": model[1]}, data.batches, lambda name, x: seen.append(x))
    assert len(ran) == 3 and len(seen) == 6


def test_pytorchs_transformer_layers_are_looked_into(generator):
    """In evaluation they run as one kernel, which calls no layer."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    layers = {"linear1": layer.linear1, "linear2": layer.linear2}
    before = torch.backends.mha.get_fastpath_enabled()
    runs = record_run(layer, layers, ModelInputs((torch.randn(2, 3, 4, generator=generator),)))
    assert list(runs) == ["linear1", "linear2"] and runs["linear2"].waits_for == {"linear1"}
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_data_that_the_model_does_not_take():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^Sequential can't run on the calibration data \(input 0 .*\[1, 3\]\): mat1"):
        record_run(model, {"0": model[0]}, ModelInputs((torch.ones(1, 3),)))
    nn.init.constant_(model[0].weight, float("nan"))
    with pytest.raises(
        ValueError, match="^Sequential puts out NaN or infinite values for the first calibration exampl"
    ):
        record_run(model, {"0": model[0]}, ModelInputs((torch.ones(1, 2),)))
