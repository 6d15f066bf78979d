"""Quantizing whole models with calibration data."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repvgg_hf
from repvgg_hf import CalibrationConfig, ClusterConv2d, RepVGGBackbone, RepVGGForImageClassification
from repvgg_hf.compression.ptq import calibrate
from repvgg_hf.compression.ptq.hooks import round_input
from repvgg_hf.runtime.cluster_layers import fake_quantize


def logits(model, images):
    with torch.no_grad():
        return model(images).logits


def divergence(model, expected, images):
    return F.mse_loss(logits(model, images), expected).item()


def test_each_improvement_brings_the_outputs_nearer_to_the_float_models(model, images):
    fit, held_out = images[:32], images[32:]
    expected = logits(model, held_out)
    steps = [{"sensitivity": "none", "error_compensation": False, "bias_correction": False}]
    steps += [steps[0] | {"error_compensation": True}, {}]
    errors = []
    for options in steps:
        how = CalibrationConfig(**options)
        quantized = copy.deepcopy(model).quantize(bits=2, calibration=fit, calibration_config=how)
        errors.append(divergence(quantized, expected, held_out))
    plain = divergence(copy.deepcopy(model).quantize(bits=2), expected, held_out)
    assert errors[0] == pytest.approx(plain, rel=1e-4)  # calibration that uses nothing changes nothing
    assert errors[1] < 0.7 * plain and errors[2] < 0.7 * plain


@pytest.mark.parametrize("squeeze", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_saves_and_reloads_whatever_the_architecture(squeeze, groups, make_model, images, tmp_path):
    model = make_model(use_squeeze_excitation=squeeze, groups=groups).eval()
    for name, parameter in model.named_parameters():
        if "fc1" in name:  # or the one hidden channel is zero for all images
            parameter.data = torch.ones(1) if name.endswith("bias") else parameter.data * 0.01
    model.quantize(bits=3, calibration=images, activation_bits=8)
    expected = logits(model, images)
    model.save_pretrained(tmp_path)
    reloaded = RepVGGForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(reloaded, images), expected)


def test_backbone_without_a_head(tiny_config, images):
    model = RepVGGBackbone(tiny_config()).eval()
    with torch.no_grad():
        expected = model(images).feature_maps[-1]
        model.quantize(bits=8, calibration=images)
        error = (model(images).feature_maps[-1] - expected).norm() / expected.norm()
    assert error < 0.02


def test_bias_correction_keeps_each_channels_mean(make_model, images):
    """On the calibration images themselves, at the first layer: its mean output is the float layer's, exactly."""
    model = make_model("deploy").eval()
    name = "repvgg.embeddings.layer.conv"
    with torch.no_grad():
        expected = model.get_submodule(name)(images).mean(dim=(0, 2, 3))
        bias = model.get_submodule(name).bias.clone()
        model.quantize(bits=2, calibration=images)
        layer = model.get_submodule(name)
        assert torch.allclose(layer(images).mean(dim=(0, 2, 3)), expected, atol=1e-4)
        assert not torch.allclose(layer.bias, bias, atol=1e-4)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_bias_correction_keeps_each_channels_spread(make_model, images, granularity):
    """On the calibration images themselves, at the first layer, by its scales or by the codebook of each channel."""
    model = make_model("deploy").eval()
    name = "repvgg.embeddings.layer.conv"
    with torch.no_grad():
        expected = model.get_submodule(name)(images).std(dim=(0, 2, 3))
        plain = copy.deepcopy(model).quantize(
            bits=2,
            granularity=granularity,
            calibration=images,
            calibration_config=CalibrationConfig(bias_correction=False),
        )
        model.quantize(bits=2, granularity=granularity, calibration=images)
        actual, without = (one.get_submodule(name)(images).std(dim=(0, 2, 3)) for one in (model, plain))
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=0)
    assert (without / expected - 1).abs().max() > 0.02


def test_two_bits_leave_outputs_where_few_values_pass_each_relu(generator):
    """A chain of layers whose outputs are mostly negative: their means kept alone, all is dead in the end."""
    layers = []
    for _ in range(12):
        layer = nn.Conv2d(32, 32, 3, padding=1)
        nn.init.kaiming_normal_(layer.weight, generator=generator)
        layers += [layer, nn.BatchNorm2d(32), nn.ReLU()]
        nn.init.constant_(layers[-2].bias, -0.3)
    net = nn.Sequential(*layers)
    images = torch.randn(64, 32, 8, 8, generator=generator)
    with torch.no_grad():
        for _ in range(40):
            net.train()(images)
        net.eval()
        repvgg_hf.fuse(net, images[:1])
        expected = net(images)
        actual = repvgg_hf.quantize(copy.deepcopy(net), bits=2, calibration=images)(images)
    assert 0.7 < actual.mean() / expected.mean() < 1.4


def test_inputs_are_rounded_as_packed_layers_will():
    layer = nn.Linear(201, 201, bias=False)
    nn.init.eye_(layer.weight)
    round_input(layer, calibrate._rounding(layer, scale=0.1, zero_point=3, bits=4))
    x = torch.linspace(-2, 2, 201)  # many are halves of the scale
    assert torch.equal(layer(x), fake_quantize(x, torch.tensor(0.1), torch.tensor(3, dtype=torch.uint8), 4))


def test_activations_of_8_bits_change_little_and_of_2_bits_a_lot(model, images):
    expected = logits(model, images)

    def error(calibration_config=None, **options):
        quantized = copy.deepcopy(model).quantize(
            bits=8, calibration=images, calibration_config=calibration_config, **options
        )
        return (logits(quantized, images) - expected).norm() / expected.norm()

    weights_only = error()
    assert weights_only < error(activation_bits=8) < 0.05 < error(activation_bits=2)
    ranges = {
        method: error(CalibrationConfig(activation_range=method), activation_bits=4).item()
        for method in ("minmax", "mse")
    }
    assert ranges["mse"] < 1.2 * ranges["minmax"]


def test_layers_left_out_stay_float(model, images):
    model.quantize(bits=2, calibration=images, modules_to_not_convert=["classifier", "embeddings"], activation_bits=8)
    assert isinstance(model.classifier, nn.Linear)
    assert isinstance(model.repvgg.embeddings.layer.conv, nn.Conv2d)
    assert isinstance(model.repvgg.encoder.stages[0].layers[0].conv, ClusterConv2d)


def test_same_data_same_codes(model, images):
    first, second = (copy.deepcopy(model).quantize(bits=2, calibration=images) for _ in range(2))
    state = second.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())


def test_activations_on_disk_change_nothing(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    options = {"bits": 2, "activation_bits": 8, "calibration": images}
    in_memory = CalibrationConfig(calibration_batch_size=16)
    expected = copy.deepcopy(model).quantize(**options, calibration_config=in_memory).state_dict()
    made, make = [], calibrate.ActivationStore
    monkeypatch.setattr(calibrate, "ActivationStore", lambda *args: made.append(make(*args)) or made[-1])
    on_disk = CalibrationConfig(calibration_batch_size=16, activation_memory=0)
    quantized = copy.deepcopy(model).quantize(**options, calibration_config=on_disk).state_dict()
    assert len(made) == 2 and not any(store.in_memory for store in made)
    assert all(torch.equal(tensor, quantized[name]) for name, tensor in expected.items())
    made.clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "how, options, message",
    [
        ({"target_bits_per_weight": 1.0}, {"granularity": "per_channel"}, "can't be met with per_channel codebooks"),
        ({}, {"granularity": "per_group", "group_size": 7}, "group_size=7 does not divide"),
        ({}, {"bits_overrides": {"head": 8}}, "bits_overrides names 'head', which is no"),
        ({}, {"gran": "per_channel"}, "Quantization has no option 'gran': "),
        ({}, {"damping": 0.1}, r"damping is an option of calibration_config: pass calibration_config=Calibration"),
    ],
    ids=str,
)
def test_bad_options_leave_the_model_as_it_is(how, options, message, model, images):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=message):
        model.quantize(calibration=images, calibration_config=CalibrationConfig(**how), **options)
    state = model.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in before)
    assert not model.config.deploy


@pytest.mark.parametrize(
    "option, value", [("calibration_config", CalibrationConfig()), ("activation_bits", 8)], ids=str
)
def test_options_that_need_data_say_so(option, value, model):
    with pytest.raises(
        ValueError, match=f"^{option} needs calibration data: pass calibration=, a DataLoader or dataset"
    ):
        model.quantize(bits=4, **{option: value})


def test_images_that_the_model_does_not_take(model, images):
    with pytest.raises(ValueError, match=r"pixel_values must be \[batch, 3, height, width\]"):
        model.quantize(calibration=images[:, :2])


def test_a_layer_whose_inputs_are_all_zero(model, images):
    fused = model.reparameterize()
    layer = fused.repvgg.encoder.stages[0].layers[0].conv
    with torch.no_grad():
        layer.bias.fill_(-1e4)  # the activation lets nothing through
    name = "repvgg.encoder.stages.0.layers.1.conv"
    with pytest.raises(ValueError, match=f"inputs of '{name}' are zero for all calibration images.*modules_to_not"):
        fused.quantize(calibration=images)
    how = CalibrationConfig(error_compensation=False)  # as the message says
    fused.quantize(calibration=images, calibration_config=how)


def test_a_model_that_is_quantized_already(model, images):
    model.quantize(bits=4)
    with pytest.raises(ValueError, match="quantized already"):
        model.quantize(bits=4, calibration=images)


@pytest.mark.parametrize("moment", ["is_chain", "calibrate_layer"])
def test_interrupted_the_model_is_untouched(moment, model, images, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, moment, interrupt)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        model.quantize(bits=3, calibration=images)
    state = model.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in before)


def test_a_model_that_is_no_chain_any_more_goes_by_hooks(make_model, images, monkeypatch, caplog):
    model = make_model("deploy").eval()
    forward = model.repvgg.encoder.forward
    monkeypatch.setattr(
        type(model.repvgg.encoder), "forward", lambda self, x, **kwargs: forward(2 * x, **kwargs), raising=True
    )
    expected = logits(model, images)
    plain = copy.deepcopy(model).quantize(bits=2)
    model.quantize(bits=2, calibration=images)
    assert "RepVGGForImageClassification does not compute what its blocks do one after the other" in caplog.text
    assert divergence(model, expected, images) < 0.5 * divergence(plain, expected, images)
