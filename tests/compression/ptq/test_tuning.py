"""Tuning codebooks, scales and biases end to end, after calibration."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repvgg_hf
from repvgg_hf import CalibrationConfig, RepVGGForImageClassification
from repvgg_hf.compression.ptq.tuning import _Decode, _rounding
from repvgg_hf.runtime.cluster_layers import ClusterLayer, fake_quantize
from repvgg_hf.runtime.packing import unpack_codes

TUNED = CalibrationConfig(tuning_steps=40, tuning_learning_rate=0.01)


def divergence(model, reference, images):
    """The squared error of the last feature map: the logits of a random network hardly depend on the image."""
    with torch.no_grad():
        found, expected = (one(images, output_hidden_states=True).hidden_states[-1] for one in (model, reference))
    return F.mse_loss(found, expected).item()


def layers_of(model) -> dict[str, ClusterLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, ClusterLayer)}


def codes_of(layer: ClusterLayer) -> torch.Tensor:
    return unpack_codes(layer.weight_codes, layer.bits, layer.weight_numel)


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_gradients_of_decoding_are_those_of_looking_up(groups, with_scale):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(4, (6, 5, 3, 3), generator=generator, dtype=torch.uint8)
    codebook = torch.randn(groups, 4, generator=generator).sort(dim=1).values.requires_grad_()
    scale = torch.rand(6, generator=generator).add(0.5).requires_grad_() if with_scale else None
    wanted = torch.randn(6, 5, 3, 3, generator=generator)
    inputs = [codebook] + ([scale] if with_scale else [])
    found = torch.autograd.grad(F.mse_loss(_Decode.apply(codebook, scale, codes), wanted), inputs)
    entries = codebook.repeat_interleave(6 // groups, dim=0)
    weight = torch.stack([row[code.long()] for row, code in zip(entries, codes)])
    weight = weight if scale is None else weight * scale[:, None, None, None]
    expected = torch.autograd.grad(F.mse_loss(weight, wanted), inputs)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "per_channel"},
        {"codebook_dtype": "int8"},
        {"method": "uniform", "granularity": "per_channel"},
        {"method": "uniform", "channel_scale": False},
        {"activation_bits": 8},
    ],
    ids=lambda options: " ".join(map(str, options.values())) or "default",
)
def test_it_brings_outputs_nearer_on_images_that_it_has_not_seen(options, model, images):
    fit, held_out = images[:32], images[32:]
    reference = copy.deepcopy(model)
    plain, tuned = (
        copy.deepcopy(model).quantize(bits=2, calibration=fit, calibration_config=config, **options)
        for config in (None, TUNED)
    )
    assert divergence(tuned, reference, held_out) < 0.97 * divergence(plain, reference, held_out)
    again = copy.deepcopy(model).quantize(bits=2, calibration=fit, calibration_config=TUNED, **options)
    for name, tensor in tuned.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    for name, layer in layers_of(tuned).items():
        before = layers_of(plain)[name]
        assert torch.equal(codes_of(layer), codes_of(before)), name  # here no entry has passed another one
        codebook = layer.weight_codebook.float()
        if options.get("codebook_dtype") == "int8" or options.get("channel_scale") is None and "method" in options:
            assert torch.equal(codebook, before.weight_codebook.float()), name
        elif "method" in options:  # still evenly spaced
            shapes = [
                table / table.abs().amax(dim=1, keepdim=True) for table in (codebook, before.weight_codebook.float())
            ]
            torch.testing.assert_close(*shapes, rtol=2e-3, atol=1e-6)


def test_biases_stay_multiples_of_the_integers_step(model, images):
    model.quantize(bits=4, activation_bits=8, codebook_dtype="int8", calibration=images, calibration_config=TUNED)
    for name, layer in layers_of(model).items():
        steps = layer.bias / (layer.input_scale * layer.weight_scale)
        torch.testing.assert_close(steps, steps.round(), rtol=1e-5, atol=1e-3, msg=name)


def test_what_is_tuned_is_saved(model, images, tmp_path):
    model.quantize(bits=2, granularity="per_channel", calibration=images, calibration_config=TUNED)
    model.save_pretrained(tmp_path)
    reloaded = RepVGGForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(reloaded(images).logits, model(images).logits)


def test_a_learning_rate_that_spoils_the_model_is_undone(model, images, caplog):
    plain = copy.deepcopy(model).quantize(bits=4, calibration=images)
    config = CalibrationConfig(tuning_steps=3, tuning_learning_rate=0.9)
    with caplog.at_level(logging.WARNING, logger="repvgg_hf"):
        model.quantize(bits=4, calibration=images, calibration_config=config)
    assert "Tuning for 3 steps has not brought outputs nearer" in caplog.text
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name


class Network(nn.Module):
    """Linear layers, one of them called twice, one without bias; two outputs that are no scores."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4, bias=False)

    def forward(self, x):
        hidden = self.twice(self.twice(self.first(x).relu()).relu()).relu()
        return self.last(hidden), hidden


def test_any_network():
    torch.manual_seed(0)
    network, data = Network().eval(), torch.randn(256, 8)
    plain, tuned = (
        repvgg_hf.quantize(copy.deepcopy(network), bits=2, calibration=data[:128], calibration_config=config)
        for config in (None, TUNED)
    )
    with torch.no_grad():
        expected = network(data[128:])[0]
        errors = [F.mse_loss(one(data[128:])[0], expected).item() for one in (plain, tuned)]
    assert errors[1] < 0.9 * errors[0] and tuned.last.bias is None


class Tied(nn.Module):
    """Two layers that share their weight, an expert, a layer of zeros, and scores that are masked at times."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.gate = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.pruned = nn.Linear(8, 8)
        nn.init.zeros_(self.pruned.weight)
        nn.init.zeros_(self.pruned.bias)

    def forward(self, x):
        hidden = self.second(self.first(x).relu())
        chosen = hidden[:, 0] > 0  # a mixture's expert: how many examples it gets depends on the weights
        routed = hidden.clone()
        routed[chosen] = self.gate(hidden[chosen])
        routed = routed + self.pruned(hidden)
        return torch.cat([routed[:, :7], routed[:, 7:].masked_fill(x[:, :1] > 1, -torch.inf)], dim=1)


@pytest.mark.parametrize("left_float", [[], ["first"]])
def test_shared_weights_experts_and_masks(left_float):
    torch.manual_seed(0)
    network, data = Tied().eval(), torch.randn(128, 8)
    data[:2] = 0  # what is not finite for the first examples is refused
    plain, tuned = (
        repvgg_hf.quantize(
            copy.deepcopy(network), bits=2, calibration=data, calibration_config=config,
            modules_to_not_convert=left_float,
        )
        for config in (None, TUNED)
    )  # fmt: skip
    with torch.no_grad():
        errors = [F.mse_loss(one(data)[:, :7], network(data)[:, :7]).item() for one in (plain, tuned)]
    assert errors[1] < errors[0]  # on what it has seen


def test_a_batch_for_which_a_layer_puts_out_nothing():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16, bias=False), nn.Linear(16, 4)).eval()
    nn.init.zeros_(network[0].bias)
    network[0].weight.data[3:5] = 0  # channels without anything
    data = torch.cat([torch.randn(128, 8), torch.zeros(1, 8)])
    plain, tuned = (
        repvgg_hf.quantize(copy.deepcopy(network), bits=2, calibration=data, calibration_config=config)
        for config in (None, TUNED)
    )
    with torch.no_grad():
        errors = [F.mse_loss(one(data), network(data)).item() for one in (plain, tuned)]
    assert errors[1] < 0.9 * errors[0]


def test_a_forward_pass_without_gradients_is_told_of():
    class Frozen(nn.Sequential):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    with pytest.raises(ValueError, match="The outputs of Frozen have no gradient, .* leave tuning_steps out"):
        network = Frozen(nn.Linear(8, 8), nn.Linear(8, 4)).eval()
        repvgg_hf.quantize(network, bits=2, calibration=torch.randn(64, 8), calibration_config=TUNED)


def test_rounding_is_that_of_the_layers():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3
    expected = fake_quantize(x, torch.tensor(0.05), torch.tensor(40, dtype=torch.uint8), 8)
    assert torch.equal(_rounding(0.05, 40, 8)(x), expected)
