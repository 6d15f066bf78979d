"""Calibration of networks that are no chain of blocks, seen by hooks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import make_model as make_tiny_model
from torch import nn

from repvgg_hf import CalibrationConfig, ClusterConfig
from repvgg_hf.compression.layers import quantize_layers
from repvgg_hf.compression.ptq import graph_statistics
from repvgg_hf.compression.ptq.calibrate import calibrate
from repvgg_hf.compression.ptq.data import CalibrationData
from repvgg_hf.compression.ptq.graph import levels

IN_TURN = CalibrationConfig(calibration_batch_size=16)
ONE_PASS = CalibrationConfig(calibration_batch_size=16, order="one_pass")


class Plain(nn.Module):
    """A network that says nothing of its blocks, and puts out a tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.contiguous(memory_format=torch.channels_last)).logits


class Net(nn.Module):
    """Convolutions with all kinds of borders, a shortcut, a sequence, a layer that runs twice, one that never does."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, padding_mode="reflect")
        self.left = nn.Conv2d(8, 8, 3, padding="same", groups=2, padding_mode="circular")
        self.right = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.sequence = nn.Conv1d(8, 8, 3, padding=1, padding_mode="replicate")
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)
        self.unused = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.left(x) + self.right(x)).relu()
        x = self.sequence(x.flatten(2)).relu().mT
        x = self.twice(self.twice(x).relu()).relu()
        return {"scores": self.head(x).mean(dim=1), "count": torch.tensor(len(x))}


def applied(model, found):
    """A copy of `model` with the weights, biases and ranges of quantized layers."""
    model = copy.deepcopy(model)
    for name, quantized in found.items():
        layer = model.get_submodule(name)
        layer.weight.data = quantized.weight.decoded()
        if quantized.bias is not None:
            layer.bias.data = quantized.bias.detach().clone()
    return model


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, layer in first.items():
        other = second[name]
        assert torch.equal(layer.weight.codes, other.weight.codes), name
        assert torch.equal(layer.weight.codebook, other.weight.codebook), name
        assert layer.bias is other.bias is None or torch.equal(layer.bias, other.bias), name
        assert layer.input_range == other.input_range, name


@pytest.fixture
def net(generator):
    torch.manual_seed(3)
    return Net().eval()


@torch.no_grad()
def error(model, found, images):
    expected, actual = model(images)["scores"], applied(model, found)(images)["scores"]
    return (F.mse_loss(actual, expected) / expected.square().mean()).item()


@pytest.mark.parametrize("squeeze", [False, True])
def test_by_hooks_a_chain_of_blocks_gets_the_same_codes(squeeze, make_model, images):
    """Also the same codebooks, biases and input ranges, to the bit; in one pass it does not."""
    model = make_model("deploy", use_squeeze_excitation=squeeze).eval()
    for name, parameter in model.named_parameters():
        if "fc1" in name:  # or the one hidden channel is zero for all images
            parameter.data = torch.ones(1) if name.endswith("bias") else parameter.data * 0.01
    config, plain = ClusterConfig(bits=3, activation_bits=6), Plain(model)
    expected = calibrate(model, config, CalibrationData(images, 16, model=model), IN_TURN)[1]

    def by_hooks(options):
        found = calibrate(plain, config, CalibrationData(images, 16, model=plain), options)[1]
        return {name.removeprefix("model."): layer for name, layer in found.items()}

    assert_same(by_hooks(IN_TURN), expected)
    one_pass = by_hooks(ONE_PASS)
    assert torch.equal(one_pass["repvgg.embeddings.layer.conv"].weight.codes,
                       expected["repvgg.embeddings.layer.conv"].weight.codes)  # fmt: skip
    assert not torch.equal(one_pass["classifier"].bias, expected["classifier"].bias)
    assert_same(calibrate(model, config, CalibrationData(images, 16, model=model), ONE_PASS)[1], one_pass)


@pytest.mark.parametrize("options", [IN_TURN, ONE_PASS], ids=["in turn", "one pass"])
def test_nearer_to_the_float_network_than_without_data(options, net, images, caplog):
    fit, held_out = images[:32], images[32:]
    config = ClusterConfig(bits=2)
    _, found = calibrate(net, config, CalibrationData(fit, 16, model=net), options)
    assert error(net, found, held_out) < 0.6 * error(net, quantize_layers(dict(layers_of(net)), config), held_out)
    # what no data reaches has codes all the same
    assert found.keys() == dict(layers_of(net)).keys()
    assert_same({"unused": found["unused"]}, quantize_layers({"unused": net.unused}, config))
    assert "No calibration data reaches unused: quantized for the weights alone. To leave them float" in caplog.text


def layers_of(net):
    return [
        (name, layer) for name, layer in net.named_modules() if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear))
    ]


def test_bias_correction_keeps_the_mean_of_every_layer(net, images):
    """In turn, and for a layer that runs twice the mean over both calls."""

    @torch.no_grad()
    def means(model):
        seen = {}
        for name, layer in layers_of(model):
            layer.register_forward_hook(lambda layer, args, y, name=name: seen.setdefault(name, []).append(y))
        model(images)
        dims = {"stem": (0, 2, 3), "left": (0, 2, 3), "right": (0, 2, 3), "sequence": (0, 2)}
        return {name: torch.stack(ys).mean(dim=0).mean(dim=dims.get(name, (0, 1))) for name, ys in seen.items()}

    expected = means(copy.deepcopy(net))
    _, found = calibrate(net, ClusterConfig(bits=2), CalibrationData(images, 16, model=net), IN_TURN)
    actual = means(applied(net, found))
    for name in ("stem", "left", "right", "sequence", "head"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)
    plain = means(applied(net, quantize_layers(dict(layers_of(net)), ClusterConfig(bits=2))))
    off = {name: (values - expected["twice"]).norm() for name, values in
           {"calibrated": actual["twice"], "plain": plain["twice"]}.items()}  # fmt: skip
    assert off["calibrated"] < 0.5 * off["plain"]  # its second inputs are of the layer before it was quantized


def test_moments_are_bounded_by_what_one_pass_gathers(net, images, monkeypatch):
    """No more of them than fit, or those of a single input; nothing changes but the number of passes."""
    gathered, gather = [], graph_statistics._gather
    monkeypatch.setattr(
        graph_statistics,
        "_gather",
        lambda model, names, *args, **kwargs: gathered.append(names) or gather(model, names, *args, **kwargs),
    )
    data, config = CalibrationData(images, 16, model=net), ClusterConfig(bits=2)
    expected = calibrate(net, config, data, ONE_PASS)[1]
    assert [len(names) for names in gathered] == [6]
    gathered.clear()
    little = CalibrationConfig(order="one_pass", activation_memory=4 * 72**2 / 2**30)
    assert_same(calibrate(net, config, data, little)[1], expected)
    assert gathered == [["stem", "left"], ["right"], ["sequence", "twice", "head"]]
    gathered.clear()
    assert_same(calibrate(net, config, data, CalibrationConfig(order="one_pass", activation_memory=0))[1], expected)
    assert [len(names) for names in gathered] == [1] * 6
    gathered.clear()
    calibrate(net, config, data, CalibrationConfig(activation_memory=4))
    assert gathered == [
        ["stem", "left", "right", "sequence", "twice", "head"],  # of the float network: their means
        ["stem"], ["left", "right"], ["sequence"], ["twice"], ["head"],
    ]  # fmt: skip


def test_input_ranges(net, images):
    """A layer that runs twice is observed in both calls; one that does not run has no range."""
    config = ClusterConfig(bits=8, activation_bits=8)
    data = CalibrationData(images, 16, model=net)
    with pytest.raises(ValueError, match="No calibration data reaches unused, and activation_bits needs the range"):
        calibrate(net, config, data, IN_TURN)
    config.modules_to_not_convert = ["unused"]
    minmax = CalibrationConfig(activation_range="minmax", order="one_pass")
    found = calibrate(net, config, data, minmax)[1]
    seen = []
    net.twice.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    with torch.no_grad():
        net(images)
    assert len(seen) == 2 and seen[0].max() != seen[1].max()
    largest = max(x.max().item() for x in seen)
    assert found["twice"].input_range == pytest.approx((largest / 255, 0), rel=1e-5)


def test_tied_weights_are_quantized_one_by_one(images):
    """What the first becomes is not what the second is quantized from, nor changes it before its turn."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
            self.second.weight, self.second.bias = self.first.weight, self.first.bias

        def forward(self, x):
            return self.second(self.first(x).relu())

    model = Tied()
    before = model.first.weight.clone()
    untied = copy.deepcopy(model)
    untied.second.weight = nn.Parameter(model.first.weight.detach().clone())
    untied.second.bias = nn.Parameter(model.first.bias.detach().clone())
    results = []
    for net in (model, untied):
        for how in ({}, {"target_bits_per_weight": 4.0}):
            data = CalibrationData(images, 16, model=net)
            results.append(calibrate(net, ClusterConfig(bits=2), data, CalibrationConfig(**how)))
    for (config, found), (other_config, other) in zip(results[:2], results[2:]):
        assert_same(found, other)
        assert config.bits_overrides == other_config.bits_overrides
    assert torch.equal(model.first.weight, before) and model.first.weight is model.second.weight
    assert not torch.equal(results[0][1]["first"].weight.codes, results[0][1]["second"].weight.codes)


def test_mixed_precision_gives_bits_to_where_they_matter(net, images):
    with torch.no_grad():
        net.left.weight *= 1e-3  # beside the other branch it does next to nothing
        net.left.bias.zero_()
    data = CalibrationData(images, 16, model=net)
    how = CalibrationConfig(target_bits_per_weight=5.0)
    config, found = calibrate(net, ClusterConfig(bits=3), data, how)
    bits = config.bits_overrides
    assert bits.keys() == found.keys() and bits["unused"] == 3  # as nothing is known of it
    assert bits["left"] < min(bits["stem"], bits["right"], bits["sequence"])
    assert all(len(layer.weight.codebook[0]) == 2 ** bits[name] for name, layer in found.items())


def test_fisher_counts_in_clustering(net, images):
    data = CalibrationData(images, 16, model=net)
    options = {"error_compensation": False, "bias_correction": False}
    config = ClusterConfig(bits=2)
    plain, weighted = (
        calibrate(net, config, data, CalibrationConfig(sensitivity=kind, **options))[1] for kind in ("none", "fisher")
    )
    assert_same({"unused": plain["unused"]}, {"unused": weighted["unused"]})
    assert all(
        not torch.equal(plain[name].weight.codebook, weighted[name].weight.codebook) for name in ("stem", "head")
    )
    assert error(net, weighted, images) < error(net, plain, images)
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("family", ["upernet", "rtdetr"])
def test_layers_of_a_level_get_the_same_codes_as_one_by_one(family, images, monkeypatch):
    """In a detector choices depend on data that no gradient follows, and heads run several times."""
    model = make_tiny_model(family)
    data = CalibrationData(F.interpolate(images[:8], size=64), 4, model=model)
    config, passes = ClusterConfig(bits=3), []

    def in_levels(runs):
        passes.append(levels(runs))
        return passes[-1]

    def one_by_one(runs):
        twins = {run.shares_with for run in runs.values()}
        return [[name for name, run in runs.items() if run.shares_with == twin] for twin in runs if twin in twins]

    monkeypatch.setattr(graph_statistics, "levels", in_levels)
    found = calibrate(model, config, data, CalibrationConfig())[1]
    monkeypatch.setattr(graph_statistics, "levels", one_by_one)
    assert_same(found, calibrate(model, config, data, CalibrationConfig())[1])
    assert len(passes[0]) < 0.8 * len(found)  # many are taken together


def test_several_inputs_by_name(generator):
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.text, self.out = nn.Conv2d(3, 4, 3), nn.Embedding(5, 4), nn.Linear(4, 4)

        def forward(self, pixel_values, input_ids, mask=None):
            x = self.image(pixel_values).flatten(2).mT
            x = torch.cat([x, self.text(input_ids)], dim=1)
            return (None, self.out(x if mask is None else x * mask[:, :, None]))

    model = TwoInputs()
    data = CalibrationData(
        {
            "pixel_values": torch.randn(6, 3, 4, 4, generator=generator),
            "input_ids": torch.randint(5, (6, 3), generator=generator),
            "mask": torch.ones(6, 7),
            "labels": torch.zeros(6),
        },
        batch_size=4,
        model=model,
    )
    _, found = calibrate(model, ClusterConfig(bits=8), data, CalibrationConfig())
    with torch.no_grad():
        expected, actual = (
            torch.cat([batch.run(net)[1] for batch in data.batches]) for net in (model, applied(model, found))
        )
    assert list(found) == ["image", "out"]
    assert (actual - expected).norm() < 0.05 * expected.norm() and not torch.equal(actual, expected)
