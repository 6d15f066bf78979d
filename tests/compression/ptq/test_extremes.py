"""Extreme weights, images and settings: a right result, or an error that names layer, value and fix."""

import math

import pytest
import torch

from repvgg_hf import CalibrationConfig
from repvgg_hf.compression.ptq.data import CalibrationData

LAYER = "repvgg.encoder.stages.0.layers.1.conv"
SMALL = {"hidden_sizes": [12, 16], "depths": [2, 1], "strides": [2, 2]}


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.fixture
def fused(make_model):
    return make_model("deploy", **SMALL).eval()


@pytest.mark.parametrize("options", [{}, {"target_bits_per_weight": 6.0}], ids=["same bits", "mixed"])
def test_a_model_without_classifier(options, tiny_config, images):
    from repvgg_hf import RepVGGForImageClassification

    model = RepVGGForImageClassification(tiny_config(num_labels=0, **SMALL)).eval()
    with torch.no_grad():
        expected = model(images[:4]).logits
        model.quantize(bits=8, calibration=images, calibration_config=CalibrationConfig(**options))
        assert (model(images[:4]).logits - expected).norm() <= 0.1 * expected.norm()


@pytest.mark.parametrize("calibrated", [False, True], ids=["weights only", "calibrated"])
@pytest.mark.parametrize(
    "value, message",
    [
        (math.nan, "has 1 NaN or infinite entries: train or load"),
        (math.inf, "has 1 NaN or infinite entries: train or load"),
        (1e30, r"has entries of up to 1e\+30; .* overflow float32: .* modules_to_not_convert"),
        (3e38, r"has entries of up to 3e\+38; .* overflow float32: .* modules_to_not_convert"),
    ],
)
def test_a_weight_that_nothing_represents_is_named(value, message, calibrated, fused, images):
    with torch.no_grad():
        fused.get_submodule(LAYER).weight.view(-1)[3] = value
    before = tensors(fused)
    with pytest.raises(ValueError, match=f"The weight of '{LAYER}' {message}"):
        fused.quantize(codebook_dtype="int8", calibration=images if calibrated else None)
    after = fused.state_dict()
    assert all(torch.equal(after[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in before.items())


@torch.no_grad()
def test_inputs_that_overflow_are_named(fused, images):
    fused.get_submodule(LAYER).weight.mul_(1e13)
    following = fused.get_submodule("repvgg.encoder.stages.1.layers.0.conv").weight
    following.mul_(1e12)
    with pytest.raises(ValueError, match="'classifier' .*overflow float32|The inputs of .*overflow float32"):
        fused.quantize(calibration=images)


@torch.no_grad()
def test_outputs_that_overflow_are_no_broken_chain(fused, images):
    fused.get_submodule(LAYER).bias.fill_(math.nan)
    with pytest.raises(ValueError, match="puts out NaN or infinite values .* extreme values in its weights"):
        fused.quantize(calibration=images)


@pytest.mark.parametrize(
    "options", [{}, {"codebook_dtype": "int8"}, {"codebook_dtype": "float32", "channel_scale": False}]
)
@pytest.mark.parametrize("factor", [1e-14, 1e-8, 1e5, 1e14])
@pytest.mark.parametrize("calibrated", [False, True], ids=["weights only", "calibrated"])
@torch.no_grad()
def test_scaled_weights_are_quantized_alike(factor, calibrated, options, fused, images):
    layer = fused.get_submodule(LAYER)
    layer.weight.mul_(factor)
    wanted = layer.weight.clone()
    fused.quantize(calibration=images if calibrated else None, **options)
    error = (fused.get_submodule(LAYER).weight - wanted).norm() / wanted.norm()
    assert error < 0.2


@pytest.mark.parametrize("method", ["cluster", "uniform"])
@torch.no_grad()
def test_what_underflows_in_float16_is_refused(method, fused):
    fused.get_submodule(LAYER).weight.mul_(1e-8)
    with pytest.raises(
        ValueError, match=f"'{LAYER}' can't be quantized: its weights are at most .*e-.* float16 .*float32"
    ):
        fused.quantize(method, channel_scale=False)
    fused.quantize(method, channel_scale=False, codebook_dtype="float32")
    assert fused.get_submodule(LAYER).weight.any()


@pytest.mark.parametrize("factor", [1e-20, 1e-30, 1e-40])
@torch.no_grad()
def test_what_vanishes_in_float32_is_refused(factor, fused):
    fused.get_submodule(LAYER).weight.mul_(factor)
    with pytest.raises(ValueError, match=f"'{LAYER}' can't be quantized: its weights are at most .* zero, or name"):
        fused.quantize()


@torch.no_grad()
def test_a_layer_that_is_all_zero_stays_so(fused):
    fused.get_submodule(LAYER).weight.zero_()
    fused.quantize()
    assert not fused.get_submodule(LAYER).weight.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_images_of_any_float_dtype(dtype, make_model, images):
    images = images.to(torch.bfloat16).to(torch.float16).float()  # numbers of all these dtypes
    found = [
        tensors(make_model(**SMALL).eval().quantize(calibration=data, activation_bits=8))
        for data in (images, images.to(dtype))
    ]
    assert_same(*found)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_integer_images_are_not_normalized(dtype, model, images):
    with pytest.raises(
        ValueError, match=r"batch 0 is torch.u?int\d+ \[48, 3, 16, 16\], pixels that are not normalized"
    ):
        model.quantize(calibration=images.to(dtype))


def test_images_beyond_float32():
    with pytest.raises(ValueError, match="batch 0 has NaN or infinite values"):
        CalibrationData(torch.full((1, 3, 4, 4), 1e300, dtype=torch.float64))


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request):
    """A function that runs another with that default dtype."""

    def run(function):
        before = torch.get_default_dtype()
        torch.set_default_dtype(request.param)
        try:
            return function()
        finally:
            torch.set_default_dtype(before)

    return run


OPTIONS = {
    "cluster": {},
    "cluster int8": {"codebook_dtype": "int8"},
    "cluster int8 8 bit": {"codebook_dtype": "int8", "bits": 8},
    "cluster per channel": {"granularity": "per_channel", "bits": 2},
    "cluster 6 bit": {"bits": 6, "channel_scale": False},
    "uniform": {"method": "uniform"},
    "uniform symmetric 1 bit": {"method": "uniform", "symmetric": True, "bits": 1},
    "uniform symmetric": {"method": "uniform", "symmetric": True, "granularity": "per_channel"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("calibrated", [False, True], ids=["weights only", "calibrated"])
def test_quantizing_does_not_depend_on_the_default_dtype(name, calibrated, default_dtype, make_model, images, tmp_path):
    options = dict(OPTIONS[name])
    if calibrated:
        options |= {"calibration": images, "activation_bits": 8}
    one, other = make_model(**SMALL).eval(), make_model(**SMALL).eval()
    one.quantize(**options)
    default_dtype(lambda: other.quantize(**options))
    assert_same(tensors(one), tensors(other))
    one.save_pretrained(tmp_path)
    loaded = default_dtype(lambda: type(one).from_pretrained(tmp_path))
    assert_same(tensors(one), tensors(loaded))
    with torch.no_grad():
        assert torch.equal(default_dtype(lambda: loaded(images[:4]).logits), one(images[:4]).logits)


@pytest.mark.parametrize("name", ["cluster", "cluster 6 bit", "uniform", "uniform symmetric"])
def test_training_does_not_depend_on_the_default_dtype(name, default_dtype, make_model, images, tmp_path):
    from repvgg_hf import update_codebooks

    def trained():
        model.prepare_qat(**OPTIONS[name], activation_bits=8, calibration=images)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(2):
            model.train()(images[:8], labels=labels).loss.backward()
            optimizer.step()
            update_codebooks(model)
            optimizer.zero_grad()
        return tensors(model)

    labels = torch.arange(8) % 4
    model = make_model(**SMALL)
    expected = trained()
    model.save_pretrained(tmp_path)
    loaded = default_dtype(lambda: type(model).from_pretrained(tmp_path))
    assert_same(expected, tensors(loaded))
    frozen = tensors(model.eval().quantize())
    model = make_model(**SMALL)
    assert_same(expected, default_dtype(trained))
    assert_same(frozen, tensors(default_dtype(lambda: model.eval().quantize())))
