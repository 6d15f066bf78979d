"""Quantizing whole models with calibration data."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from repvgg_hf import ClusterConfig, ClusterConv2d, RepVGGBackbone, RepVGGForImageClassification
from repvgg_hf.analysis import bits_per_weight
from repvgg_hf.runtime.cluster_layers import fake_quantize
from repvgg_hf.compression import calibrated, ptq
from repvgg_hf.compression.ptq.calibrate import CalibrationOptions, stored_bits

QUICK = {"tuning_steps": 0}


@pytest.fixture
def images(generator):
    """Neighboring pixels of an image are alike, as in photographs."""
    noise = torch.randn(48, 3, 6, 6, generator=generator)
    return F.interpolate(noise, size=16, mode="bilinear") + 0.2 * torch.randn(48, 3, 16, 16, generator=generator)


@pytest.fixture
def model(make_model):
    return make_model(hidden_sizes=[12, 16], depths=[2, 1], strides=[2, 2]).eval()


def logits(model, images):
    with torch.no_grad():
        return model(images).logits


def divergence(model, expected, images):
    return F.mse_loss(logits(model, images), expected).item()


def test_each_improvement_brings_the_outputs_nearer_to_the_float_models(model, images):
    fit, held_out = images[:32], images[32:]
    expected = logits(model, held_out)
    steps = [{"sensitivity": "none", "error_compensation": False, "bias_correction": False}]
    steps += [steps[0] | {"error_compensation": True}, {"sensitivity": "none"}]
    errors = []
    for options in steps:
        quantized = copy.deepcopy(model).quantize(bits=2, calibration=fit, **QUICK, **options)
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
    model.quantize(bits=3, calibration=images, activation_bits=8, tuning_steps=2)
    expected = logits(model, images)
    model.save_pretrained(tmp_path)
    reloaded = RepVGGForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(reloaded, images), expected)


def test_backbone_without_a_head(tiny_config, images):
    model = RepVGGBackbone(tiny_config()).eval()
    with torch.no_grad():
        expected = model(images).feature_maps[-1]
        model.quantize(bits=8, calibration=images, tuning_steps=1)
        error = (model(images).feature_maps[-1] - expected).norm() / expected.norm()
    assert error < 0.02


def test_bias_correction_keeps_each_channels_mean(make_model, images):
    """On the calibration images themselves, at the first layer: its mean output is the float layer's, exactly."""
    model = make_model("deploy").eval()
    name = "repvgg.embeddings.layer.conv"
    with torch.no_grad():
        expected = model.get_submodule(name)(images).mean(dim=(0, 2, 3))
        bias = model.get_submodule(name).bias.clone()
        model.quantize(bits=2, calibration=images, **QUICK)
        layer = model.get_submodule(name)
        assert torch.allclose(layer(images).mean(dim=(0, 2, 3)), expected, atol=1e-4)
        assert not torch.allclose(layer.bias, bias, atol=1e-4)


def test_labels_steer_the_fisher_information(model, images):
    """The diagonal Fisher against one gradient after the other, and its use as the importance of weights."""
    from repvgg_hf.compression.ptq.data import CalibrationData
    from repvgg_hf.compression.ptq.sensitivity import diagonal_fisher

    fused = copy.deepcopy(model).reparameterize()
    name = "repvgg.encoder.stages.0.layers.0.conv"
    labels = torch.arange(48) % 4
    data = CalibrationData([(images, labels)])
    found = diagonal_fisher(fused, data, [name])[name]
    expected = torch.zeros_like(found)
    for image, label in zip(images, labels):
        fused.zero_grad()
        F.cross_entropy(fused(image[None]).logits, label[None]).backward()
        expected += fused.get_submodule(name).weight.grad ** 2 / 48
    assert torch.allclose(found, expected, rtol=1e-4)
    predicted = diagonal_fisher(fused, CalibrationData(images), [name])[name]
    assert not torch.allclose(found, predicted, rtol=0.1)

    with_labels = copy.deepcopy(model).quantize(bits=2, calibration=[(images, labels)], sensitivity="fisher", **QUICK)
    without = copy.deepcopy(model).quantize(bits=2, calibration=images, sensitivity="fisher", **QUICK)
    assert not torch.equal(logits(with_labels, images), logits(without, images))


def test_tuning_fits_the_float_outputs_better(model, images):
    expected = logits(model, images)
    untuned = copy.deepcopy(model).quantize(bits=2, calibration=images, tuning_steps=0)
    tuned = copy.deepcopy(model).quantize(bits=2, calibration=images, tuning_steps=60)

    def distance(quantized):
        return F.kl_div(
            logits(quantized, images).log_softmax(1), expected.log_softmax(1), log_target=True, reduction="batchmean"
        ).item()

    assert distance(tuned) < 0.9 * distance(untuned)


@pytest.mark.parametrize("target", [2.2, 3.2, 5.0])
def test_mixed_precision_meets_its_target_and_beats_the_same_bits_everywhere(target, model, images):
    quantized = copy.deepcopy(model).quantize(calibration=images, target_bits_per_weight=target, **QUICK)
    config = quantized.config.quantization_config
    assert bits_per_weight(quantized) <= target
    assert bits_per_weight(quantized) > target - 0.5  # no layer has room for another bit, in a net this small
    layers = [name for name, layer in quantized.named_modules() if hasattr(layer, "weight_codes")]
    assert list(config.bits_overrides) == layers
    assert all(quantized.get_submodule(name).bits == bits for name, bits in config.bits_overrides.items())


def test_stored_bits_are_those_of_the_checkpoint(model, images):
    for options in ({}, {"granularity": "per_channel"}, {"codebook_dtype": "int8"}):
        config = ClusterConfig(bits=3, **options)
        quantized = copy.deepcopy(model).quantize(config)
        layers = [(n, m) for n, m in quantized.named_modules() if hasattr(m, "weight_codes")]
        total = sum(stored_bits(name, torch.Size(layer.weight_shape), 3, config) for name, layer in layers)
        weights = sum(layer.weight_numel for _, layer in layers)
        assert total / weights == pytest.approx(bits_per_weight(quantized))


@pytest.mark.parametrize(
    ("options", "tunes"),
    [
        ({"bits": 2}, False),
        ({"bits": 1}, True),
        ({"bits": 2, "bits_overrides": {"classifier": 1}}, True),
        ({"bits": 4, "activation_bits": 8}, False),
        ({"bits": 4, "activation_bits": 4}, True),
        ({"bits": 1, "tuning_steps": 0}, False),
    ],
    ids=str,
)
def test_tunes_by_default_where_it_helps(options, tunes, model, images, monkeypatch):
    steps = []
    monkeypatch.setattr(calibrated, "tune_network", lambda *args: steps.append(args[-2]) or args[2])
    model.quantize(calibration=images, **options)
    assert steps == ([200] if tunes else [])


def test_inputs_are_rounded_as_packed_layers_will_and_gradients_pass():
    layer = nn.Linear(201, 201, bias=False)
    nn.init.eye_(layer.weight)
    calibrated.quantize_input(layer, scale=0.1, zero_point=3, bits=4)
    x = torch.linspace(-2, 2, 201).requires_grad_()  # many are halves of the scale
    output = layer(x)
    assert torch.equal(output, fake_quantize(x, torch.tensor(0.1), torch.tensor(3, dtype=torch.uint8), 4))
    output.sum().backward()
    assert torch.equal(x.grad, ((x > -0.35) & (x < 1.25)).float())


def test_activations_of_8_bits_change_little_and_of_2_bits_a_lot(model, images):
    expected = logits(model, images)

    def error(**options):
        quantized = copy.deepcopy(model).quantize(bits=8, calibration=images, **QUICK, **options)
        return (logits(quantized, images) - expected).norm() / expected.norm()

    weights_only = error()
    assert weights_only < error(activation_bits=8) < 0.05 < error(activation_bits=2)
    ranges = {method: error(activation_bits=4, activation_range=method).item() for method in ("minmax", "mse")}
    assert ranges["mse"] < 1.2 * ranges["minmax"]


def test_layers_left_out_stay_float(model, images):
    model.quantize(
        bits=2, calibration=images, modules_to_not_convert=["classifier", "embeddings"], activation_bits=8, **QUICK
    )
    assert isinstance(model.classifier, nn.Linear)
    assert isinstance(model.repvgg.embeddings.layer.conv, nn.Conv2d)
    assert isinstance(model.repvgg.encoder.stages[0].layers[0].conv, ClusterConv2d)


def test_same_data_same_codes(model, images):
    first, second = (copy.deepcopy(model).quantize(bits=2, calibration=images, tuning_steps=3) for _ in range(2))
    state = second.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())


def test_activations_on_disk_change_nothing(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    options = QUICK | {"bits": 2, "activation_bits": 8, "calibration": images, "calibration_batch_size": 16}
    expected = copy.deepcopy(model).quantize(**options).state_dict()
    made, make = [], calibrated.Spool
    monkeypatch.setattr(calibrated, "Spool", lambda *args: made.append(make(*args)) or made[-1])
    quantized = copy.deepcopy(model).quantize(**options, activation_memory=0).state_dict()
    assert len(made) == 2 and not any(spool.kept for spool in made)
    assert all(torch.equal(tensor, quantized[name]) for name, tensor in expected.items())
    made.clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sensitivity": "hessian"}, "sensitivity must be one of none, second_moment, fisher, got 'hessian'"),
        ({"activation_range": "max"}, "activation_range must be one of"),
        ({"tuning_steps": -1}, "tuning_steps must be an integer of at least 0, got -1"),
        ({"calibration_batch_size": 0}, "calibration_batch_size must be an integer of at least 1"),
        ({"bias_correction": 1}, "bias_correction must be True or False"),
        ({"damping": 0}, "damping must be a positive number, got 0"),
        ({"activation_memory": -1}, "activation_memory must be a number of GiB, at least 0, got -1"),
        ({"activation_memory": "x"}, "activation_memory must be a number of GiB, at least 0, got 'x'"),
        ({"target_bits_per_weight": 0.9}, "target_bits_per_weight must be from 1 to 8, got 0.9"),
        ({"target_bits_per_weight": 1.0, "granularity": "per_channel"}, "can't be met with per_channel codebooks"),
        ({"target_bits_per_weight": "3"}, "target_bits_per_weight must be from 1 to 8, got '3'"),
        ({"sensitivty": "fisher"}, "Unknown quantization option 'sensitivty': did you mean 'sensitivity'"),
        ({"gran": "per_channel"}, "Unknown quantization option 'gran': there are activation_bits, .*, tuning_steps"),
        ({"granularity": "per_group", "group_size": 7}, "group_size=7 does not divide"),
    ],
)
def test_bad_options_leave_the_model_as_it_is(options, message, model, images):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=message):
        model.quantize(calibration=images, **(QUICK | options))
    state = model.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in before)
    assert not model.config.deploy


@pytest.mark.parametrize(
    "options", [{"bias_correction": True}, {"target_bits_per_weight": 3.0}, {"activation_bits": 8}]
)
def test_options_that_need_data_say_so(options, model):
    with pytest.raises(ValueError, match=f"{next(iter(options))} needs calibration data: pass calibration="):
        model.quantize(bits=4, **options)


def test_images_that_the_model_does_not_take(model, images):
    with pytest.raises(ValueError, match=r"pixel_values must be \[batch, 3, height, width\]"):
        model.quantize(calibration=images[:, :2], **QUICK)


def test_a_layer_whose_inputs_are_all_zero(model, images):
    fused = model.reparameterize()
    layer = fused.repvgg.encoder.stages[0].layers[0].conv
    with torch.no_grad():
        layer.bias.fill_(-1e4)  # the activation lets nothing through
    name = "repvgg.encoder.stages.0.layers.1.conv"
    with pytest.raises(ValueError, match=f"inputs of '{name}' are zero for all calibration images.*modules_to_not"):
        fused.quantize(calibration=images, **QUICK)
    fused.quantize(calibration=images, error_compensation=False, **QUICK)  # as the message says


def test_a_model_that_is_quantized_already(model, images):
    model.quantize(bits=4)
    with pytest.raises(ValueError, match="quantized already"):
        model.quantize(bits=4, calibration=images)


@pytest.mark.parametrize("moment", ["tune_network", "calibrate_layer"])
def test_interrupted_the_model_is_untouched(moment, model, images, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrated, moment, interrupt)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        model.quantize(bits=3, calibration=images, tuning_steps=1)
    state = model.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in before)


def test_another_architecture_is_refused(make_model, images, monkeypatch):
    model = make_model("deploy").eval()
    forward = model.repvgg.encoder.forward
    monkeypatch.setattr(
        type(model.repvgg.encoder), "forward", lambda self, x, **kwargs: forward(2 * x, **kwargs), raising=True
    )
    with pytest.raises(ValueError, match="no plain chain of RepVGG layers"):
        model.quantize(calibration=images, **QUICK)


def test_options_have_the_names_of_quantize(model, images):
    """Every field of the options is an argument of `quantize`."""
    defaults = vars(CalibrationOptions(tuning_steps=0))
    assert copy.deepcopy(model).quantize(bits=3, calibration=images, **defaults).is_quantized
    assert ptq.CalibrationOptions is CalibrationOptions
