"""The integers of a model: what they stand for is what the model computes, and a model without any says why."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repvgg_hf
from repvgg_hf import RepVGGForImageClassification
from repvgg_hf.interop.integers import integer_layers, runs_exactly_without_vnni
from repvgg_hf.runtime.cluster_layers import cluster_layers

ASSETS = Path(__file__).parents[1] / "assets"


@pytest.fixture
def make_model(tiny_config, randomize_batch_norms):
    def make(**fields) -> RepVGGForImageClassification:
        torch.manual_seed(1)
        model = RepVGGForImageClassification(tiny_config(**fields))
        return randomize_batch_norms(model, torch.Generator().manual_seed(1)).eval()

    return make


@pytest.fixture
def images(generator):
    return torch.randn(16, 3, 16, 16, generator=generator)


def run_integers(model, pixels: torch.Tensor) -> torch.Tensor:
    """The logits of a plain RepVGG, with all sums in int64: floats are only what is rounded."""
    layers = list(integer_layers(model).values())

    def quantize(x, scale, zero_point):
        highest, step = 2 ** layers[0].activation_bits - 1, torch.tensor(scale, dtype=torch.float32)
        return ((x * step.reciprocal()).round() + zero_point).clamp(0, highest).long() - zero_point

    def scaled(sums, layer):
        return sums.float() * layer.bias_scale.view(-1, *[1] * (sums.dim() - 2))

    x = pixels
    for layer in layers[:-1]:
        q = quantize(x, layer.input_scale, layer.input_zero_point)
        conv = layer.layer
        sums = F.conv2d(
            q.double(), layer.weight.double(), None, conv.stride, conv.padding, conv.dilation, conv.groups
        ).long()  # float64 holds integers up to 2**53 exactly
        x = scaled(sums + layer.bias.view(-1, 1, 1), layer)
        if layer.output_scale is not None:
            x = quantize(x, layer.output_scale, layer.output_zero_point) * torch.tensor(layer.output_scale)
        x = x.relu()
    head = layers[-1]
    q = quantize(x.mean(dim=(2, 3)), head.input_scale, head.input_zero_point)
    return scaled(q @ head.weight.long().T + head.bias, head)


@pytest.mark.parametrize("scheme", ["affine", "int8_symmetric"])
@pytest.mark.parametrize("options", [
    {"bits": 4}, {"bits": 8}, {"bits": 2, "granularity": "per_channel"}, {"method": "uniform", "bits": 3},
    {"bits": 4, "activation_bits": 4, "granularity": "per_group", "group_size": 4, "quantize_last_map": False},
    {"bits": 3, "bits_overrides": {"classifier": 8}},
], ids=str)  # fmt: skip
def test_the_model_computes_these_integers(options, scheme, make_model, images):
    options = {"activation_bits": 8, "activation_scheme": scheme} | options
    model = make_model(num_labels=8).quantize(calibration=images, **options)
    with torch.no_grad():
        expected = model(images).logits
    actual = run_integers(model, images)
    assert expected.std() > 0.01
    # a float sum that falls on the other side of a half moves a later integer by one
    close = (actual - expected).abs().amax(dim=1) < 1e-5 * expected.std()
    assert close.float().mean() >= 0.9
    torch.testing.assert_close(actual, expected, atol=0.05 * expected.std().item(), rtol=0)


def test_what_is_described_is_what_is_stored(make_model, images):
    model = make_model().quantize(bits=3, activation_bits=8, calibration=images)
    layers = integer_layers(model)
    assert list(layers) == list(cluster_layers(model))
    for name, found in layers.items():
        layer = model.get_submodule(name)
        assert found.name == name and found.layer is layer and found.bits == 3
        assert found.weight.dtype == torch.int8 and found.codes.dtype == torch.uint8
        assert torch.equal(found.codebook[0][found.codes.long()], found.weight)
        shape = (-1, *[1] * (layer.weight.dim() - 1))
        assert torch.equal(found.weight.float() * found.weight_scale.view(shape), layer.weight)
        assert found.bias.dtype == torch.int32
        assert torch.equal(found.bias.float() * found.bias_scale, layer.bias)
    outputs = {name: layer.output_scale for name, layer in layers.items() if layer.output_scale is not None}
    assert list(outputs) == ["repvgg.encoder.stages.1.layers.1.conv"]


def test_the_file_of_integers(tmp_path):
    """Its biases are written as integers in the test of the format."""
    shutil.copy(ASSETS / "golden_w3a8-int8.safetensors", tmp_path / "model.safetensors")
    shutil.copy(ASSETS / "golden_w3a8-int8_config.json", tmp_path / "config.json")
    layers = integer_layers(RepVGGForImageClassification.from_pretrained(tmp_path))
    assert [layer.bias.tolist() for layer in layers.values()] == [
        list(range(9, 9 + 7 * count, 7)) for count in (4, 4, 6, 4)
    ]
    assert [layer.input_zero_point for layer in layers.values()] == [121, 0, 0, 0]
    last = layers["repvgg.encoder.stages.1.layers.0.conv"]
    assert (last.output_scale, last.output_zero_point) == (pytest.approx(0.012), 3)


@pytest.mark.parametrize("change, expected", [
    ({}, True), ({"bits": 6}, True), ({"bits": 7}, False), ({"bits": 8}, False), ({"reduce_range": False}, False),
    ({"bits": 8, "reduce_range": True}, True), ({"bits_overrides": {"classifier": 8}}, False),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("method", ["cluster", "uniform"])
def test_which_models_every_cpu_computes_exactly(method, change, expected, make_model, images):
    if method == "uniform":  # whose grids of few bits are small anyway
        expected = expected or change.keys() == {"reduce_range"}
    options = {"method": method, "bits": 4, "activation_bits": 8, "calibration": images} | change
    layers = integer_layers(make_model().quantize(**options))
    assert runs_exactly_without_vnni(layers) is expected


def test_a_layer_without_a_bias_and_a_plain_module(generator):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1))
    images = torch.randn(8, 3, 8, 8, generator=generator)
    layers = integer_layers(repvgg_hf.quantize(net, activation_bits=8, calibration=images))
    assert list(layers) == ["0", "2"] and layers["0"].bias is None and layers["2"].bias.dtype == torch.int32


class TestModelsWithoutIntegers:
    def check(self, model, message):
        with pytest.raises(ValueError, match=message):
            integer_layers(model)

    def test_float(self, make_model):
        self.check(make_model(), "^RepVGGForImageClassification is not quantized: call quantize")

    def test_in_training(self, make_model, images):
        model = make_model().prepare_qat(activation_bits=8, calibration=images)
        self.check(model, "is being trained quantized, .* call quantize")

    def test_float_codebooks(self, make_model, images):
        name = "'repvgg.embeddings.layer.conv'"
        self.check(
            make_model().quantize(bits=4), f"codebook of {name} is float16, .*activation_bits=8 and calibration="
        )
        model = make_model().quantize(activation_bits=8, codebook_dtype="float32", calibration=images)
        self.check(model, f"codebook of {name} is float32, and engines compute with int8")

    def test_weights_only(self, make_model):
        model = make_model().quantize(codebook_dtype="int8")
        self.check(model, r"input of 'repvgg.embeddings.layer.conv' is not quantized \(activation_bits=None\)")

    def test_biases_off_the_grid(self, make_model, images):
        model = make_model().quantize(activation_bits=8, calibration=images)
        model.repvgg.embeddings.layer.conv.bias.data[3] *= 1.001
        self.check(model, "1 of the 8 biases of 'repvgg.embeddings.layer.conv' are no multiples of .*channel 3: ")
        model = make_model().quantize(activation_bits=8, calibration=images)
        self.check(model.to(torch.bfloat16), "biases of 'repvgg.embeddings.layer.conv' .*stored in half precision")

    def test_a_bias_too_large_for_int32(self, make_model, images):
        model = make_model().quantize(activation_bits=8, calibration=images)
        conv = model.repvgg.embeddings.layer.conv
        conv.bias.data[0] = conv.input_scale * conv.weight_scale[0] * 2.0**33
        self.check(model, "^A bias of 'repvgg.embeddings.layer.conv' is 8.59e.09 steps, more than int32")

    def test_offloaded(self, make_model, images, tmp_path):
        make_model().quantize(activation_bits=8, calibration=images).save_pretrained(tmp_path)
        model = RepVGGForImageClassification.from_pretrained(
            tmp_path, device_map={"repvgg": "disk", "classifier": "cpu"}, offload_folder=tmp_path, offload_buffers=True
        )
        self.check(model, "^'repvgg.embeddings.layer.conv' is offloaded: load the model without device_map")


@pytest.mark.parametrize("step", ["quantize", "save"])
def test_half_biases_are_told_of(make_model, images, step, tmp_path, caplog):
    model = make_model()
    if step == "quantize":
        model.half().quantize(bits=4, activation_bits=8, calibration=images)
    else:
        model.quantize(bits=4, activation_bits=8, calibration=images)
        assert "half" not in caplog.text and "can't hold multiples" not in caplog.text
        model.to(torch.float16).save_pretrained(tmp_path)
    assert "biases of the quantized model are float16" in caplog.text
