"""Scaling channels between layers: the network computes the same, and one range suits all channels."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repvgg_hf
from repvgg_hf import CalibrationConfig
from repvgg_hf.compression.ptq.channel_links import Link
from repvgg_hf.compression.ptq.data import CalibrationData
from repvgg_hf.compression.ptq.equalize import equalize


def quantizable(model) -> dict[str, nn.Module]:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}


def equalized(model, inputs, strength=0.3, layers=None):
    """An equalized copy, and the links."""
    model = copy.deepcopy(model).eval()
    links = equalize(model, layers and layers(model) or quantizable(model), CalibrationData(inputs, 16), strength)
    return model, links


def chain(*layers) -> nn.Sequential:
    return nn.Sequential(*layers).eval()


@pytest.fixture
def pixels(generator):
    return torch.randn(16, 4, 12, 12, generator=generator)


NETWORKS = {
    "grouped, depthwise, pooled and flattened": (
        chain(
            nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=8),
            nn.LeakyReLU(), nn.Conv2d(8, 6, 1, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Dropout(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3),
        ),
        {"0": ["3"], "3": ["5"], "5": ["10"], "10": ["12"]},
    ),
    "no bias, padded with the border": (
        chain(
            nn.Conv2d(4, 8, 3, bias=False), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", bias=False),
        ),
        {"0": ["2"]},
    ),
    "not through GELU, nor from its last layer": (
        chain(nn.Conv2d(4, 8, 1), nn.GELU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)),
        {"2": ["3"]},
    ),
    "not a map that is flattened": (
        chain(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1), nn.Flatten(), nn.Linear(288, 3)),
        {"0": ["2"]},
    ),
    "not batch norm, which stays as it is": (
        chain(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)),
        {"3": ["5"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_the_same(name, strength, pixels):
    model, expected = NETWORKS[name]
    changed, links = equalized(model, pixels, strength)
    assert {link.source: link.readers for link in links} == expected
    for link in links:
        assert not torch.equal(changed[int(link.source)].weight, model[int(link.source)].weight)
    torch.testing.assert_close(changed(pixels), model(pixels), rtol=1e-4, atol=1e-5)


class Shared(nn.Module):
    """Two layers read a map; one runs twice; a sum reads what another puts out."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = (nn.Conv2d(size, 8, 1) for size in (4, 8, 8))
        self.twice, self.summed, self.last = (nn.Conv2d(8, 8, 1) for _ in range(3))

    def forward(self, x):
        x = self.first(x).relu()
        x = self.left(x) + self.right(x)
        x = self.twice(self.twice(x).relu()).relu()
        x = self.summed(x)
        return self.last(x.relu()) + x


def test_all_readers_are_scaled_and_what_is_read_otherwise_is_not(pixels):
    model = Shared().eval()
    changed, links = equalized(model, pixels)
    assert links == [Link("first", ["left", "right"])]
    torch.testing.assert_close(changed(pixels), model(pixels), rtol=1e-4, atol=1e-5)


class Function(nn.Module):
    """Two layers and what is computed with them."""

    def __init__(self, function, first, second):
        super().__init__()
        self.function, self.a, self.b = function, first, second

    def forward(self, x):
        return self.function(self.a, self.b, x)


@torch.jit.script
def gated(x):
    return x * torch.sigmoid(x)


def convolutions():
    return nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1)


def tied():
    first, second = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1)
    second.bias = first.bias
    return first, second


def on_pixels():
    """As many pixels, 144, as channels."""
    return nn.Conv2d(4, 144, 1), nn.Linear(144, 3)


def on_channels_last():
    return nn.Linear(12, 8), nn.Linear(8, 8)


UNSEEN = {
    "pixels": (on_pixels, lambda a, b, x: b(a(x).relu().flatten(2))),
    "rows": (lambda: (nn.Conv2d(4, 12, 1), nn.Linear(12, 3)), lambda a, b, x: b(a(x).relu())),
    "pooled tokens": (on_channels_last, lambda a, b, x: b(F.max_pool2d(a(x).relu(), 3, 1, 1))),
    "mean of tokens": (on_channels_last, lambda a, b, x: b(a(x.repeat(1, 2, 1, 1)).relu().mean((2, 3)))),
    "tied biases": (tied, lambda a, b, x: b(a(x).relu())),
    "bias read elsewhere": (convolutions, lambda a, b, x: b(a(x).relu()) + a.bias.view(8, 1, 1)),
    "weight read as a number": (convolutions, lambda a, b, x: b(a(x).relu()) * a.weight.norm().item()),
    "weight put out": (convolutions, lambda a, b, x: (b(a(x).relu()), b.weight.norm())),
    "TorchScript beside": (convolutions, lambda a, b, x: b(y := a(x).relu()) + gated(y)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSEEN)
def test_what_may_be_read_in_another_way_is_left_alone(name, pixels):
    make, function = UNSEEN[name]
    with pytest.raises(ValueError, match="^Function has no layer whose output goes through nothing but ReLU"):
        equalized(Function(function, *make()), pixels)


def test_what_a_recording_does_not_show_is_an_error():
    """A layer that runs once on the small image that is recorded, and twice on a larger one."""

    def function(a, b, x):
        x = a(x).relu()
        for _ in range(x.shape[2] // 4):
            x = b(x).relu()
        return x

    model = Function(function, *convolutions()).eval()
    kept = copy.deepcopy(model)
    batches = [torch.randn(4, 4, 4, 4), torch.randn(4, 4, 8, 8)]
    with pytest.raises(ValueError, match="^Function computes something else with scaled channels .* Leave equal"):
        repvgg_hf.quantize(model, calibration=batches, calibration_config=CalibrationConfig(equalization=1.0))
    assert torch.equal(model.a.weight, kept.a.weight)


def test_a_model_of_transformers_that_takes_nothing_else(pixels):
    from transformers import PretrainedConfig, PreTrainedModel

    class Plain(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.a, self.b = convolutions()
            self.post_init()

        def forward(self, pixel_values):
            return self.b(self.a(pixel_values).relu())

    model = Plain(PretrainedConfig())
    changed, links = equalized(model, pixels)
    assert links == [Link("a", ["b"])]
    torch.testing.assert_close(changed(pixels), model.eval()(pixels), rtol=1e-4, atol=1e-5)


def test_what_is_read_is_seen_in_every_batch(pixels):
    """Of one batch no pixel is chosen; vectors of no batch are read as well."""
    chosen = Function(lambda a, b, x: b(a(x.movedim(1, -1)[x[:, 0] > 0]).relu()), nn.Linear(4, 8), nn.Linear(8, 2))
    batches = [pixels, -pixels.abs()]
    kept = copy.deepcopy(chosen).eval()
    assert equalize(chosen.eval(), quantizable(chosen), CalibrationData(batches, 16), 0.3) == [Link("a", ["b"])]
    torch.testing.assert_close(chosen(pixels), kept(pixels), rtol=1e-4, atol=1e-5)
    alone = Function(lambda a, b, x: b(a(x.mean((0, 2, 3))).relu()), nn.Linear(4, 8), nn.Linear(8, 2))
    assert equalized(alone, pixels)[1] == [Link("a", ["b"])]


def test_a_forward_that_looks_at_values(pixels):
    model = Function(lambda a, b, x: b(a(x).relu()) if x.sum() > 0 else x, *convolutions())
    with pytest.raises(ValueError, match="^equalization needs to see what the model does: leave it out. The model"):
        equalized(model, pixels)


def test_a_layer_that_stays_float_is_left_alone(pixels):
    model, _ = NETWORKS["grouped, depthwise, pooled and flattened"]
    kept = copy.deepcopy(model)
    options = {"calibration": pixels, "calibration_config": CalibrationConfig(equalization=0.5)}
    repvgg_hf.quantize(model := copy.deepcopy(model), bits=8, modules_to_not_convert=["5"], **options)
    assert torch.equal(model[5].weight, kept[5].weight) and torch.equal(model[5].bias, kept[5].bias)
    assert (model(pixels) - kept(pixels)).norm() < 0.05 * kept(pixels).norm()


@pytest.mark.parametrize("squeeze", [False, True])
def test_the_maps_of_a_model_stay(squeeze, make_model, images):
    model = make_model(use_squeeze_excitation=squeeze, depths=[3, 2]).eval().reparameterize()
    changed, links = equalized(model, images)
    stages = "repvgg.encoder.stages"
    inside = [
        (f"{stages}.{i}.layers.{j}.conv", [f"{stages}.{i}.layers.{j + 1}.conv"]) for i, j in [(0, 0), (0, 1), (1, 0)]
    ]
    gates = [link for link in links if "attention" in link.source]
    assert [(link.source, link.readers) for link in links if link not in gates] == ([] if squeeze else inside)
    assert len(gates) == (6 if squeeze else 0)
    with torch.no_grad():
        found, expected = (one(images, output_hidden_states=True) for one in (changed, model))
    for one, other in zip((found.logits, *found.hidden_states), (expected.logits, *expected.hidden_states)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_evens_out(pixels):
    """1 gives all channels the same range, 0 the weights that read them."""
    model = chain(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    with torch.no_grad():
        model[0].weight *= torch.logspace(-2, 2, 8).view(8, 1, 1, 1)
        model[0].bias.fill_(0.1)
        model[2].weight.copy_((torch.eye(8) * torch.logspace(1, 0, 8) + 0.1).view(8, 8, 1, 1))
    even, _ = equalized(model, pixels, 1.0)
    ranges = even[:2](pixels).amax(dim=(0, 2, 3))
    torch.testing.assert_close(ranges, ranges[:1].expand(8), rtol=1e-4, atol=0)
    even, _ = equalized(model, pixels, 0.0)
    reads = even[2].weight.abs().amax(dim=(0, 2, 3))
    torch.testing.assert_close(reads, reads[:1].expand(8), rtol=1e-4, atol=0)


def test_dead_channels_stay_finite(pixels):
    model = chain(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0] = 0, 0  # puts out nothing
        model[2].weight[:, 1] = 0  # is not read
        model[2].weight[2] = 0  # reads nothing
    changed, _ = equalized(model, pixels)
    assert all(parameter.isfinite().all() for parameter in changed.parameters())
    torch.testing.assert_close(changed(pixels), model(pixels), rtol=1e-4, atol=1e-5)


def test_channels_of_very_different_size_survive_a_single_range(make_model, images, relative_error):
    """As batch norm on an identity makes them: a channel that is passed on is 300 times larger than others."""
    model = make_model(hidden_sizes=[12], depths=[4], strides=[2]).eval().reparameterize()
    with torch.no_grad():
        for number in range(3):
            layers = model.repvgg.encoder.stages[0].layers
            layers[number].conv.weight[0] *= 300
            layers[number].conv.bias[0] *= 300
            layers[number + 1].conv.weight[:, 0] /= 300
        expected = model(images).logits
        errors = []
        for strength in (None, 0.3):
            options = {"calibration": images, "calibration_config": CalibrationConfig(equalization=strength)}
            quantized = copy.deepcopy(model).quantize(bits=8, activation_bits=8, **options)
            errors.append(relative_error(quantized(images).logits, expected))
    assert errors[1] < 0.2 * errors[0] and errors[1] < 0.1


def test_where_there_is_nothing_to_scale(pixels):
    model = chain(nn.Conv2d(4, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 2, 1))
    with pytest.raises(ValueError, match="^Sequential has no layer whose output goes through nothing but ReLU"):
        repvgg_hf.quantize(model, calibration=pixels, calibration_config=CalibrationConfig(equalization=0.5))
    assert type(model[0]) is nn.Conv2d


def test_training_has_no_use_for_it(pixels):
    model = chain(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    options = {"calibration": pixels, "calibration_config": CalibrationConfig(equalization=0.5)}
    with pytest.raises(ValueError, match=r"^equalization=0.5 does nothing in prepare_qat\(\)"):
        repvgg_hf.prepare_qat(model, activation_bits=8, **options)
