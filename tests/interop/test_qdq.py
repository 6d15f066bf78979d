"""A quantized model as a module of quantize and dequantize operations, against the model itself."""

import pytest
import torch
import torch.nn.functional as F
from quantized_models import assert_same, images, quantized, small_repvgg
from torch import nn

from repvgg_hf import RepVGGBackbone
from repvgg_hf.interop.integers import integer_layers
from repvgg_hf.interop.qdq import QDQLayer, pad_circularly, to_qdq


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return small_repvgg()


@pytest.mark.parametrize("signed", [False, True], ids=["uint8", "int8"])
@pytest.mark.parametrize("weight", ["folded", "unfolded", "float"])
def test_outputs_are_the_models(model, signed, weight):
    converted = to_qdq(model, signed=signed, weight=weight)
    with torch.no_grad():
        assert_same(converted(images()).numpy(), model(images()).logits)


def test_operations_and_integers_of_an_exported_program(model):
    program = torch.export.export(to_qdq(model, signed=True), (images(2),))
    calls = [node for node in program.graph.nodes if "quantized_decomposed" in str(node.target)]
    activations = [node for node in calls if ".quantize_per_tensor" in str(node.target)]
    assert len(activations) == 7  # the inputs of six layers, and the last map
    assert all(node.args[3:] == (-128, 127, torch.int8) for node in activations)
    grids = {(node.args[1], node.args[2] + 128) for node in activations}
    layers = integer_layers(model).values()
    assert grids == {(layer.input_scale, layer.input_zero_point) for layer in layers} | {
        (layer.output_scale, layer.output_zero_point) for layer in layers if layer.output_scale is not None
    }
    weights = [tensor for name, tensor in program.state_dict.items() if name.endswith("weight_int8")]
    assert len(weights) == 6 and all(torch.equal(w, layer.weight) for w, layer in zip(weights, layers))


def test_unfolded_weights_are_quantized_to_the_same_integers(model):
    layers = integer_layers(model)
    for name, layer in to_qdq(model, weight="unfolded").model.named_modules():
        if isinstance(layer, QDQLayer):
            grid = (layer.weight_scale, layer.weight_zero_point, 0, layer.lowest, 127, torch.int8)
            found = torch.ops.quantized_decomposed.quantize_per_channel.default(layer.weight, *grid)
            assert torch.equal(found, layers[name].weight)


def test_head_of_another_form(model):
    converted = to_qdq(model, head="float").model
    forms = {name: layer.form for name, layer in converted.named_modules() if isinstance(layer, QDQLayer)}
    assert forms.pop("classifier") == "float" and set(forms.values()) == {"folded"}


def test_fewer_activation_bits():
    model = small_repvgg(activation_bits=4)
    with torch.no_grad():
        for signed in (False, True):
            assert_same(to_qdq(model, signed=signed)(images()).numpy(), model(images()).logits)


def test_backbone_and_any_network():
    model = small_repvgg(model_class=RepVGGBackbone, fields={"out_features": ["stage1", "stage2"]})
    with torch.no_grad():
        maps = to_qdq(model)(images()).feature_maps
        for found, expected in zip(maps, model(images()).feature_maps, strict=True):
            assert_same(found.numpy(), expected)
    shared = nn.Linear(8, 8)
    layers = [nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Flatten(2), nn.Conv1d(8, 8, 64)]
    network = quantized(nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), shared, nn.ReLU(), shared), size=8)
    converted = to_qdq(network)
    assert converted.model[6] is converted.model[8]  # a layer of two names
    with torch.no_grad():
        assert_same(converted(images(16, 8, 8)).numpy(), network(images(16, 8, 8)))


@pytest.mark.parametrize("kernel", [3, 4, (1, 2)], ids=str)
def test_circular_padding(kernel):
    layer = nn.Conv2d(3, 4, kernel, padding="same", padding_mode="circular")
    pads = layer._reversed_padding_repeated_twice
    assert torch.equal(pad_circularly(images(), pads), F.pad(images(), pads, "circular"))
    network = quantized(nn.Sequential(layer, nn.ReLU()))
    with torch.no_grad():
        assert_same(to_qdq(network)(images()).numpy(), network(images()))


def test_the_model_is_left_as_it_is(model):
    before = [type(module) for module in model.modules()]
    converted = to_qdq(model.train())
    assert model.training and not converted.training
    assert [type(module) for module in model.modules()] == before
    model.eval()


@pytest.mark.parametrize("argument", ["weight", "head"])
def test_unknown_form(model, argument):
    with pytest.raises(ValueError, match=f"{argument} must be one of folded, unfolded, float, got 'int4'"):
        to_qdq(model, **{argument: "int4"})


def test_a_float_model():
    with pytest.raises(ValueError, match="is not quantized"):
        to_qdq(nn.Sequential(nn.Conv2d(3, 4, 3)))
