"""Quantizing whole models after training."""

import copy

import pytest
import torch
from torch import nn

from repvgg_hf import ClusterConfig, ClusterConv2d, ClusterLinear, RepVGGForImageClassification
from repvgg_hf.compression import layers

FORMATS = {
    "per_tensor": {"granularity": "per_tensor"},
    "per_channel": {"granularity": "per_channel"},
    "per_group int8": {"granularity": "per_group", "group_size": 4, "codebook_dtype": "int8"},
    "uniform": {"method": "uniform"},
    "uniform per_channel": {"method": "uniform", "granularity": "per_channel"},
    "uniform int8": {"method": "uniform", "codebook_dtype": "int8"},
}


@pytest.fixture
def pixel_values(generator):
    return torch.randn(2, 3, 24, 24, generator=generator)


@pytest.fixture
def model(tiny_config, randomize_batch_norms, generator):
    """In train form, with a layer count in the fused form of 5 convolutions and the classifier."""
    return randomize_batch_norms(RepVGGForImageClassification(tiny_config(num_labels=8)), generator).eval()


def cluster_layers(model) -> dict:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (ClusterConv2d, ClusterLinear))}


def logits(model, pixel_values) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values).logits


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_quantizing_branches_is_fusing_then_quantizing(options, model, pixel_values):
    fused_first = copy.deepcopy(model).reparameterize().quantize(bits=3, **options)
    assert model.quantize(bits=3, **options) is model
    assert model.config.deploy
    assert torch.equal(logits(model, pixel_values), logits(fused_first, pixel_values))
    state, expected = model.state_dict(), fused_first.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_every_convolution_and_the_classifier_are_quantized(options, model, pixel_values, relative_error):
    expected = logits(model, pixel_values)
    fused = {name: conv.weight for name, conv in model.fused_convolutions().items()}
    model.quantize(bits=8, **options)
    assert cluster_layers(model).keys() == {*fused, "classifier"}
    assert not [module for module in model.modules() if type(module) in (nn.Conv2d, nn.Linear)]
    for name, weight in fused.items():
        assert relative_error(model.get_submodule(name).weight, weight) < 0.02
    assert relative_error(logits(model, pixel_values), expected) < 0.05


def test_more_bits_come_closer(model, pixel_values, relative_error):
    expected = logits(model, pixel_values)
    errors = [
        relative_error(logits(copy.deepcopy(model).quantize(bits=bits), pixel_values), expected)
        for bits in (1, 2, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)


def test_the_arguments_and_a_config_are_the_same(model, pixel_values):
    config = ClusterConfig(bits=3, method="uniform", granularity="per_channel", bits_overrides={"classifier": 8})
    options = {"bits": 3, "granularity": "per_channel", "bits_overrides": {"classifier": 8}}
    by_config = copy.deepcopy(model).quantize(config)
    model.quantize("uniform", **options)
    assert torch.equal(logits(model, pixel_values), logits(by_config, pixel_values))
    assert model.config.quantization_config.to_dict() == config.to_dict()
    assert by_config.config.quantization_config is not config  # saving writes a checksum into the model's own


def test_the_default_is_4_bit_clusters_per_tensor(model):
    config = model.quantize().config.quantization_config
    assert (config.bits, config.method, config.granularity, config.channel_scale) == (4, "cluster", "per_tensor", True)


def test_quantized_models_are_marked_as_transformers_marks_them(model):
    model.quantize()
    assert model.is_quantized and model.quantization_method == "cluster"
    assert model.hf_quantizer.quantization_config is model.config.quantization_config
    assert model.hf_quantizer.is_serializable() and model.hf_quantizer.is_compileable


def test_bits_overrides_and_modules_to_not_convert(model, pixel_values):
    plain = model.fused_convolutions()["repvgg.encoder.stages.1.layers.0.conv"]
    model.quantize(
        bits=2,
        bits_overrides={"classifier": 8, "encoder.stages.0": 3, "repvgg.encoder.stages.0.layers.1": 5},
        modules_to_not_convert=["repvgg.encoder.stages.1.layers.0"],
    )
    bits = {name.removeprefix("repvgg."): layer.bits for name, layer in cluster_layers(model).items()}
    assert bits == {
        "embeddings.layer.conv": 2,
        "encoder.stages.0.layers.0.conv": 3,
        "encoder.stages.0.layers.1.conv": 5,
        "encoder.stages.1.layers.1.conv": 2,
        "classifier": 8,
    }
    kept = model.repvgg.encoder.stages[1].layers[0].conv
    assert type(kept) is nn.Conv2d and torch.equal(kept.weight, plain.weight)
    assert logits(model, pixel_values).isfinite().all()


def test_squeeze_excitation_is_quantized_too(tiny_config, randomize_batch_norms, generator, pixel_values):
    model = RepVGGForImageClassification(tiny_config(use_squeeze_excitation=True, squeeze_ratio=4)).eval()
    randomize_batch_norms(model, generator).quantize(bits=8)
    assert sum(name.endswith(("fc1", "fc2")) for name in cluster_layers(model)) == 10
    assert logits(model, pixel_values).isfinite().all()


def poison(model):
    model.classifier.weight.data[0, 0] = float("nan")


def interrupt(*args):
    raise KeyboardInterrupt


FAILURES = {
    "NaN": ({}, r"The weight of 'classifier' has 1 NaN or infinite entries", ValueError),
    "NaN in a branch": ({}, r"Block 'repvgg.encoder.stages.1.layers.1.conv' can't be fused", ValueError),
    "group_size": ({"granularity": "per_group", "group_size": 3}, r"group_size=3 does not divide", ValueError),
    "unknown layer": ({"bits_overrides": {"head": 8}}, r"bits_overrides names 'head', which is no", ValueError),
    "interrupt": ({}, None, KeyboardInterrupt),
}  # fmt: skip


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize("failure", FAILURES)
def test_an_error_leaves_the_model_as_it_was(failure, form, model, pixel_values, monkeypatch):
    options, message, error = FAILURES[failure]
    if form == "deploy":
        model.reparameterize()
    last_block = model.repvgg.encoder.stages[1].layers[1].conv
    if failure == "NaN":
        poison(model)
    elif failure == "NaN in a branch":
        weight = next(parameter for parameter in last_block.parameters() if parameter.dim() == 4)
        weight.data[0, 0] = float("nan")
        if form == "deploy":
            message = r"The weight of 'repvgg.encoder.stages.1.layers.1.conv' has 9 NaN or infinite entries"
    elif failure == "interrupt":
        calls, quantize_layer = [], layers.quantize_layer

        def interrupted(*args):
            calls.append(args)
            return quantize_layer(*args) if len(calls) < 4 else interrupt()

        monkeypatch.setattr(layers, "quantize_layer", interrupted)
    modules = dict(model.named_modules())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    with pytest.raises(error, match=message):
        model.quantize(bits=4, **options)
    assert dict(model.named_modules()) == modules
    assert model.config.to_dict() == config and not getattr(model, "is_quantized", False)
    after = model.state_dict()
    assert all(torch.equal(after[name].nan_to_num(7), tensor.nan_to_num(7)) for name, tensor in state.items())
    if failure not in ("NaN", "NaN in a branch"):
        monkeypatch.undo()
        assert model.quantize(bits=4).is_quantized


@pytest.mark.parametrize("method", [4, {"bits": 4}, nn.Identity()], ids=["number", "dict", "module"])
def test_a_method_that_is_none_is_refused(method, model):
    with pytest.raises(ValueError, match="method must be 'cluster' or 'uniform', or a ClusterConfig, got"):
        model.quantize(method)


def test_a_config_and_arguments_are_refused(model):
    with pytest.raises(ValueError, match="Give either a whole ClusterConfig or its arguments, not both"):
        model.quantize(ClusterConfig(), bits=3)
    with pytest.raises(ValueError, match="Give either a whole ClusterConfig or its arguments, not both"):
        model.quantize(ClusterConfig(), granularity="per_channel")


def test_a_quantized_model_is_refused(model):
    model.quantize()
    with pytest.raises(ValueError, match="quantized already: quantize the float model, or call model.dequantize"):
        model.quantize(bits=2)


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_dequantize_gives_a_float_model_with_the_same_outputs(options, model, pixel_values, tmp_path):
    model.quantize(bits=3, **options)
    expected = logits(model, pixel_values)
    assert model.dequantize() is model
    assert not cluster_layers(model) and not getattr(model, "is_quantized", False)
    assert torch.equal(logits(model, pixel_values), expected)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    loaded = RepVGGForImageClassification.from_pretrained(tmp_path)
    assert {type(layer) for layer in loaded.modules()} & {nn.Conv2d, nn.Linear} == {nn.Conv2d, nn.Linear}
    assert torch.equal(logits(loaded, pixel_values), expected)


def test_a_dequantized_model_can_be_quantized_to_the_same_again(model, pixel_values):
    model.quantize(bits=3, granularity="per_channel")
    expected = logits(model, pixel_values)
    model.dequantize().quantize(bits=3, granularity="per_channel")
    assert torch.equal(logits(model, pixel_values), expected)


def test_more_clusters_than_weights_lose_nothing_and_say_so(tiny_config, pixel_values, relative_error, caplog):
    model = RepVGGForImageClassification(tiny_config(deploy=True)).eval()
    expected = logits(model, pixel_values)
    with caplog.at_level("WARNING"):
        model.quantize(bits=8, granularity="per_channel", codebook_dtype="float32")
    assert torch.equal(logits(model, pixel_values), expected)  # 16 * 9 weights a channel at most
    assert "classifier has 16 weights for each codebook of 256 entries" in caplog.text


def test_a_bfloat16_model_stays_one_and_keeps_its_codebooks_exact(model, pixel_values, relative_error):
    model.reparameterize().to(torch.bfloat16)
    in_float32 = copy.deepcopy(model).float().quantize(bits=4)
    model.quantize(bits=4)
    expected = cluster_layers(in_float32)
    for name, layer in cluster_layers(model).items():
        assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
        for stored in ("weight_codes", "weight_codebook", "weight_scale"):
            assert getattr(layer, stored).dtype == getattr(expected[name], stored).dtype
            assert torch.equal(getattr(layer, stored), getattr(expected[name], stored))
        assert torch.equal(layer.weight, expected[name].weight.bfloat16())
    output = logits(model, pixel_values.bfloat16())
    assert output.dtype == torch.bfloat16
    assert relative_error(output, logits(in_float32, pixel_values)) < 0.05


def test_branches_in_bfloat16_are_fused_and_quantized(model, pixel_values, relative_error):
    expected = logits(copy.deepcopy(model).quantize(bits=8), pixel_values)
    model.to(torch.bfloat16).quantize(bits=8)
    assert relative_error(logits(model, pixel_values.bfloat16()), expected) < 0.1


def test_biases_train_and_codes_do_not(model, pixel_values):
    model.quantize(bits=4)
    before = copy.deepcopy(model.state_dict())
    assert {name.rsplit(".", 1)[1] for name, _ in model.named_parameters()} == {"bias"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(pixel_values, labels=torch.tensor([1, 2])).loss.backward()
    optimizer.step()
    changed = {name.rsplit(".", 1)[1] for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {"bias"}


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_the_same_weights_give_the_same_codes(options, model):
    first, second = (copy.deepcopy(model).quantize(bits=3, **options).state_dict() for _ in range(2))
    assert any(name.endswith("weight_codes") for name in first)
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("range_method", ["minmax", "mse"])
@pytest.mark.parametrize("grid", [{}, {"channel_scale": True}, {"symmetric": False}], ids=str)
@pytest.mark.parametrize(
    "granularity", [{}, {"granularity": "per_channel"}, {"granularity": "per_group", "group_size": 4}], ids=str
)
def test_more_bits_bring_every_uniform_grid_closer(granularity, grid, range_method, model, pixel_values):
    plain = {name: conv.weight for name, conv in model.fused_convolutions().items()}
    plain["classifier"] = model.classifier.weight
    errors = []
    for bits in (2, 3, 4, 8):
        options = {"range_method": range_method, **granularity, **grid}
        quantized = copy.deepcopy(model).quantize("uniform", bits=bits, **options)
        differences = [(layer.weight - plain[name]).square().sum() for name, layer in cluster_layers(quantized).items()]
        errors.append(sum(differences).item())
        assert logits(quantized, pixel_values).isfinite().all()
    assert all(fewer > 2 * more for fewer, more in zip(errors, errors[1:]))


LARGE = {"hidden_sizes": [32, 64], "depths": [1, 2]}  # the last layers as large as usual ones: 64 * 9 weights a channel


@pytest.mark.parametrize("range_method", ["mse", "minmax"])
@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_a_symmetric_grid_per_channel_is_one_codebook(bits, range_method, make_model, tmp_path):
    """Of integers, times a step for each channel: no less exact than a stored codebook for each channel."""
    model = make_model("deploy", **LARGE)
    options = {"method": "uniform", "bits": bits, "granularity": "per_channel", "range_method": range_method}
    quantized = copy.deepcopy(model).quantize(**options)
    channelwise = copy.deepcopy(model).quantize(**options, channel_scale=False)
    integers = torch.tensor([-1.0, 1.0]) if bits == 1 else torch.arange(2.0**bits) - 2 ** (bits - 1)
    errors = {"one": 0.0, "each": 0.0}
    for name, layer in cluster_layers(quantized).items():
        weight, other = model.get_submodule(name).weight, channelwise.get_submodule(name)
        out = weight.shape[0]
        assert layer.weight_codebook.shape == (1, 2**bits) and other.weight_codebook.shape == (out, 2**bits)
        assert torch.equal(layer.weight_codebook[0].float(), integers)
        assert layer.weight_scale.shape == (out,) and (layer.weight_scale > 0).all() and other.weight_scale is None
        codes = layer.codes().long()
        scale = layer.weight_scale.view(-1, *[1] * (codes.dim() - 1))
        assert torch.equal(layer.weight, scale * integers[codes])
        errors["one"] += (layer.weight - weight).square().sum().item()
        errors["each"] += (other.weight - weight).square().sum().item()
    assert errors["one"] <= errors["each"] * (1 + 1e-4)

    last = quantized.repvgg.encoder.stages[1].layers[1].conv
    assert last.weight_numel == 64 * 64 * 9
    stored = 8 * sum(tensor.nbytes for name, tensor in last.stored().items() if name != "bias") / last.weight_numel
    assert stored == pytest.approx(bits + (16 * 2**bits + 32 * 64) / last.weight_numel)
    quantized.save_pretrained(tmp_path)
    reloaded = RepVGGForImageClassification.from_pretrained(tmp_path)
    state = reloaded.state_dict()
    for name, tensor in quantized.state_dict().items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor)
    for name, layer in cluster_layers(quantized).items():
        assert torch.equal(reloaded.get_submodule(name).weight, layer.weight)


def test_8_bits_per_channel_take_little_more_than_8_bits(tiny_config):
    """A layer of A0's third stage, 192 channels: 8.05 bits per weight, where a codebook each takes over 10."""
    model = RepVGGForImageClassification(
        tiny_config(hidden_sizes=[192], depths=[2], strides=[2], groups=1, deploy=True)
    )
    only = {"modules_to_not_convert": ["classifier", "embeddings", "encoder.stages.0.layers.0"], "bits": 8}
    options = only | {"method": "uniform", "granularity": "per_channel"}

    def bits_of_the_layer(**more):
        layer = copy.deepcopy(model).quantize(**options, **more).repvgg.encoder.stages[0].layers[1].conv
        return 8 * sum(tensor.nbytes for name, tensor in layer.stored().items() if name != "bias") / layer.weight_numel

    assert 8 < bits_of_the_layer() < 8.05
    assert bits_of_the_layer(channel_scale=False) > 10
