"""ONNX files in ONNX Runtime: the checkpoint's integers, the simulation's outputs, and operators that are fused."""

import copy
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_models import (
    assert_same,
    error,
    images,
    operators,
    quantized,
    run,
    session,
    small_repvgg,
    with_statistics,
)
from torch import nn

from repvgg_hf import (
    CalibrationConfig,
    RepVGGBackbone,
    RepVGGConfig,
    RepVGGForImageClassification,
    RepVGGModel,
    export_onnx,
    fuse,
)
from repvgg_hf.interop.integers import integer_layers
from repvgg_hf.interop.onnx import read_onnx_weights
from repvgg_hf.runtime.cluster_layers import cluster_layers

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
sys.path.insert(0, str(Path(__file__).parents[1] / "compression"))  # of tiny_models


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return small_repvgg(bits=3)


@pytest.fixture(scope="module", params=["packed", "int8"])
def integer_file(request, model, tmp_path_factory) -> Path:
    return export_onnx(model, tmp_path_factory.mktemp("onnx"), request.param)


@pytest.fixture(scope="module")
def float_file(model, tmp_path_factory) -> Path:
    return export_onnx(model, tmp_path_factory.mktemp("onnx"), "float")


class TestIntegers:
    def test_weights_are_the_checkpoints(self, model, integer_file):
        layers, found = integer_layers(model), read_onnx_weights(integer_file)
        assert found.keys() == layers.keys() and len(found) == 6
        for name, layer in layers.items():
            assert found[name].dtype == np.int8
            np.testing.assert_array_equal(found[name], layer.weight.numpy())

    def test_the_reader_would_see_another_weight(self, model, integer_file, tmp_path):
        proto = onnx.load(integer_file)
        stored = [tensor for tensor in proto.graph.initializer if ".weight_codes" in tensor.name] or [
            tensor for tensor in proto.graph.initializer if tensor.name.endswith(".weight_int8")
        ]
        stored[0].raw_data = bytes([stored[0].raw_data[0] ^ 1]) + stored[0].raw_data[1:]
        onnx.save(proto, tmp_path / "changed.onnx")
        found, layers = read_onnx_weights(tmp_path / "changed.onnx"), integer_layers(model)
        assert sum((found[name] != layer.weight.numpy()).sum() for name, layer in layers.items()) == 1

    def test_everything_is_computed_with_integers(self, integer_file, tmp_path):
        found = operators(integer_file, tmp_path)
        # one rounding of the image and one of the mean, one way back for the mean; no float convolution
        assert found == {
            "QuantizeLinear": 2, "Transpose": 2, "QLinearConv": 5, "DequantizeLinear": 1, "ReduceMean": 1, "QGemm": 1,
        }  # fmt: skip

    @pytest.mark.parametrize("shape", [(1, 32, 32), (16, 32, 48), (16, 57, 31)], ids=str)
    def test_outputs_are_the_simulations(self, model, integer_file, shape):
        pixel_values = images(*shape)
        with torch.no_grad():
            expected = model(pixel_values).logits
        for optimize in (True, False):
            found = run(integer_file, pixel_values, optimize=optimize)
            assert list(found) == ["logits"]
            assert_same(found["logits"], expected)

    def test_unpacking_takes_operators_of_opset_13(self, model, tmp_path):
        proto = onnx.load(export_onnx(model, tmp_path))
        assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 18)]
        first = next(i for i, node in enumerate(proto.graph.node) if node.op_type == "Conv")
        unpacking = {node.op_type for node in proto.graph.node[:first]}
        since = {name: onnx.defs.get_schema(name, 13).since_version for name in unpacking}  # raises if there is none
        assert max(since.values()) <= 13
        assert unpacking <= {
            "Range", "Reshape", "Div", "Mod", "Mul", "Cast", "Gather", "Add", "Slice", "QuantizeLinear",
            "DequantizeLinear",
        }  # fmt: skip

    def test_packed_files_are_smaller(self, model, tmp_path):
        sizes = {}
        for weights in ("packed", "int8"):
            proto = onnx.load(export_onnx(model, tmp_path, weights))
            stored = [t for t in proto.graph.initializer if ".weight_codes" in t.name or ".weight_int8" in t.name]
            sizes[weights] = sum(len(tensor.raw_data) for tensor in stored)
        weights = sum(layer.weight_numel for layer in cluster_layers(model).values())
        assert sizes["int8"] == weights
        # 3 bits each; the last byte of each of two planes of a layer is padded
        assert 3 * weights / 8 <= sizes["packed"] <= 3 * weights / 8 + 2 * len(cluster_layers(model))


@pytest.mark.parametrize("bits", [1, 2, 5, 6, 7, 8])
def test_codes_of_all_widths(bits, tmp_path):
    """Three and four are the other tests'."""
    model = small_repvgg(bits, fields={"hidden_sizes": [8], "depths": [1], "strides": [2]})
    path = export_onnx(model, tmp_path)
    assert path == tmp_path / "onnx" / {8: "model_quantized.onnx"}.get(bits, f"model_q{bits}.onnx")
    for name, layer in integer_layers(model).items():
        np.testing.assert_array_equal(read_onnx_weights(path)[name], layer.weight.numpy())
    with torch.no_grad():
        assert_same(run(path, images())["logits"], model(images()).logits)


OPTIONS = {
    "codebook per channel": {"granularity": "per_channel"},
    "codebook per group": {"granularity": "per_group", "group_size": 4, "modules_to_not_convert": ["classifier"]},
    "uniform": {"method": "uniform"},
    "wide and narrow codes": {"bits_overrides": {"classifier": 8, "embeddings": 7}},
    "inputs of 5 bits": {"activation_bits": 5},
    "float last map": {"quantize_last_map": False},
    "zero point 0 in int8": {"activation_scheme": "int8_symmetric"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_quantization(options, tmp_path):
    model = small_repvgg(**options)
    path = export_onnx(model, tmp_path)
    found = read_onnx_weights(path)
    assert all((found[name] == layer.weight.numpy()).all() for name, layer in integer_layers(model).items())
    with torch.no_grad():
        assert_same(run(path, images())["logits"], model(images()).logits)
    last = 4 if "quantize_last_map" in options else 5
    assert operators(path, tmp_path)["QLinearConv"] == last


class TestFloat:
    @pytest.mark.parametrize("codebook_dtype", ["float16", "float32", "int8"])
    @pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
    def test_any_codebook_without_activation_bits(self, codebook_dtype, granularity, tmp_path):
        scaled = codebook_dtype == "int8" or granularity == "per_tensor"
        options = {"codebook_dtype": codebook_dtype, "granularity": granularity, "channel_scale": scaled}
        model = small_repvgg(activation_bits=None, **options)
        path = export_onnx(model, tmp_path, "float")
        assert path.name == "model.onnx"
        found = read_onnx_weights(path)
        for name, layer in cluster_layers(model).items():
            np.testing.assert_array_equal(found[name], layer.decoded().numpy())
        with torch.no_grad():
            assert_same(run(path, images())["logits"], model(images()).logits)

    def test_of_a_model_with_activation_bits_it_rounds_no_input(self, model, float_file):
        found = run(float_file, images())["logits"]
        with torch.no_grad():
            rounded = model(images()).logits
        assert 1e-4 < error(found, rounded) < 0.2
        assert {node.op_type for node in onnx.load(float_file).graph.node}.isdisjoint(
            {"QuantizeLinear", "DequantizeLinear"}
        )

    def test_weights_are_decoded_once(self, float_file, tmp_path):
        """When the file is loaded, so that nothing but the float network is left."""
        assert operators(float_file, tmp_path).keys() <= {
            "Conv", "FusedConv", "Gemm", "ReduceMean", "ReorderInput", "ReorderOutput", "Relu",
        }  # fmt: skip

    def test_a_float_model(self, tmp_path):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)).eval()
        with torch.no_grad():
            expected = model(images(2, 8, 8))
        path = export_onnx(model, tmp_path, "float", image_size=8, dynamic=["batch"])
        assert_same(run(path, images(2, 8, 8))["logits"], expected)


class TestTopologies:
    def check(self, model, path, pixel_values, names, **converted):
        """The outputs are the simulation's, under these names."""
        with torch.no_grad():
            outputs = model(pixel_values)
        found = run(path, pixel_values)
        assert list(found) == names
        for name, output in found.items():
            base, _, index = name.rpartition("_")
            expected = outputs if isinstance(outputs, torch.Tensor) else outputs.get(name)
            expected = outputs[base][int(index)] if expected is None else expected
            assert_same(output, expected)
        weights = read_onnx_weights(path)
        assert all((weights[name] == layer.weight.numpy()).all() for name, layer in integer_layers(model).items())

    def test_squeeze_excitation(self, tmp_path):
        model = small_repvgg(fields={"use_squeeze_excitation": True, "squeeze_ratio": 1})
        path = export_onnx(model, tmp_path)
        self.check(model, path, images(16, 32, 48), ["logits"])
        assert operators(path, tmp_path)["QLinearConv"] == 5  # the gates' first layers; float is what gates multiply

    def test_backbone(self, tmp_path):
        """Its feature maps are not rounded, while the next layer's input is."""
        model = small_repvgg(model_class=RepVGGBackbone, fields={"out_features": ["stem", "stage1", "stage2"]})
        path = export_onnx(model, tmp_path)
        self.check(model, path, images(16, 32, 48), ["feature_maps_0", "feature_maps_1", "feature_maps_2"])
        assert operators(path, tmp_path)["QLinearConv"] == 2

    def test_base_model(self, tmp_path):
        model = small_repvgg(model_class=RepVGGModel)
        path = export_onnx(model, tmp_path)
        self.check(model, path, images(16, 32, 48), ["last_hidden_state", "pooler_output"])
        assert operators(path, tmp_path)["QLinearConv"] == 4

    def test_resnet_of_timm(self, tmp_path):
        timm = pytest.importorskip("timm")
        torch.manual_seed(0)
        block = timm.models.resnet.BasicBlock
        network = with_statistics(
            timm.models.resnet.ResNet(block, [1, 1, 1, 1], num_classes=5, channels=(8, 8, 16, 16))
        )
        fuse(network, images(2, 64, 64))
        model = quantized(network, size=64)
        path = export_onnx(model, tmp_path)
        self.check(model, path, images(8, 64, 96), ["logits"])
        found = operators(path, tmp_path)
        # the stem, behind which a MaxPool stands, and the first of each block; what is added stays float
        assert found["QLinearConv"] == 5 and found["QGemm"] == 1

    def test_resnet_of_transformers(self, tmp_path):
        from tiny_models import make_model

        network = make_model("resnet")
        fuse(network, {"pixel_values": images(2, 64, 64)})
        model = quantized(network, size=64)
        path = export_onnx(model, tmp_path, "int8")
        self.check(model, path, images(8, 64, 96), ["logits"])
        assert operators(path, tmp_path)["QLinearConv"] == 4  # two of each block

    def test_vision_transformer_of_one_size(self, tmp_path):
        """Linear layers on sequences."""
        from tiny_models import make_model

        model = quantized(make_model("vit"), size=64)
        path = export_onnx(model, tmp_path, dynamic=["batch"])
        self.check(model, path, images(8, 64, 64), ["logits"])
        assert operators(path, tmp_path)["MatMulIntegerToFloat"] == 6

    def test_borders_shapes_and_a_layer_that_runs_twice(self, tmp_path):
        model = quantized(Net().eval(), size=16)
        path = export_onnx(model, tmp_path, image_size=16)
        self.check(model, path, images(16, 16, 24), ["logits"])

    def test_clamp_at_six(self, tmp_path):
        """The rounding of what follows clamps, at the integer that six is rounded to."""
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3), nn.ReLU6(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3)]
        network = nn.Sequential(*layers)
        network[0].weight.data *= 20  # beyond six
        model = quantized(network, size=16)
        layer = model[2]
        layer.set_input_range(0.03, 7)  # of which six is number 207
        unit = (layer.input_scale * layer.weight_scale).double()
        layer.bias.data = ((layer.bias / unit).round() * unit).float()
        path = export_onnx(model, tmp_path, "int8", image_size=16)
        with torch.no_grad():
            assert_same(run(path, images(16, 16, 16))["logits"], model(images(16, 16, 16)))


class Net(nn.Module):
    """Convolutions with all kinds of borders, a sequence, a layer that runs twice, outputs that are read twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, padding_mode="reflect")
        self.even = nn.Conv2d(8, 8, 4, padding="same", groups=2)
        self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False)
        self.round = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.sequence = nn.Conv1d(8, 8, 3, padding=1, padding_mode="replicate")
        self.twice = nn.Linear(8, 8)
        self.also_twice = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.even(x) + self.wide(x)).relu()
        x = self.also_twice(self.also_twice(self.round(x).relu()))
        x = self.sequence(x.flatten(2)).relu().mT
        x = self.twice(self.twice(x).relu()).relu()
        return self.head(x).mean(dim=1)


@pytest.mark.parametrize("weights", ["packed", "float"])
@pytest.mark.parametrize("opset", [18, 19, 21, 23, 25])
def test_the_file_has_the_opset_asked_for(model, weights, opset, tmp_path):
    path = export_onnx(model, tmp_path, weights, opset=opset)
    assert [(entry.domain, entry.version) for entry in onnx.load(path).opset_import] == [("", opset)]
    if weights == "packed":
        with torch.no_grad():
            assert_same(run(path, images())["logits"], model(images()).logits)


@pytest.mark.parametrize("weights", ["packed", "float"])
@pytest.mark.parametrize("kernel", [3, 4, (1, 2)], ids=str)
def test_circular_padding_needs_no_mode_of_its_own(kernel, weights, tmp_path):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, kernel, padding="same", padding_mode="circular"), nn.ReLU()]
    layers += [nn.Conv2d(8, 4, kernel, padding="same", padding_mode="circular")]
    network = nn.Sequential(*layers).eval()
    if weights == "packed":
        network = quantized(network, modules_to_not_convert=["2"])  # one layer stays float
    path = export_onnx(network, tmp_path, weights)
    assert not {"Pad", "Constant"} & {node.op_type for node in onnx.load(path).graph.node}
    for size in ((32, 32), (8, 20)):
        pixel_values = images(4, *size)
        with torch.no_grad():
            assert error(run(path, pixel_values)["logits"], network(pixel_values)) < 1e-5


def test_fixed_and_dynamic_dimensions(model, tmp_path):
    path = export_onnx(model, tmp_path, dynamic=["batch"], image_size=(32, 48), file_name="fixed.onnx")
    assert path.name == "fixed.onnx"
    (image,) = session(path).get_inputs()
    assert (image.name, image.shape) == ("pixel_values", ["batch", 3, 32, 48])
    (image,) = session(export_onnx(model, tmp_path)).get_inputs()
    assert image.shape == ["batch", 3, "height", "width"]
    fixed = export_onnx(model, tmp_path, dynamic=[], image_size=32)
    assert session(fixed).get_inputs()[0].shape == [1, 3, 32, 32]
    assert session(fixed).get_outputs()[0].shape == [1, 5]


def test_the_file_says_what_it_is(model, tmp_path):
    proto = onnx.load(export_onnx(model, tmp_path))
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    assert facts == {"repvgg_hf.weights": "packed", "repvgg_hf.bits": "[3]", "repvgg_hf.exact_without_vnni": "true"}
    assert proto.producer_name == "repvgg_hf" and not any(node.metadata_props for node in proto.graph.node)


def test_the_model_is_left_as_it_is(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    model.train()
    export_onnx(model, tmp_path)
    assert model.training and [type(module) for module in model.modules()] == modules
    model.eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_exporting_twice_gives_the_same_bytes(model, tmp_path):
    first = export_onnx(model, tmp_path).read_bytes()
    assert export_onnx(model, tmp_path).read_bytes() == first
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["model_q3.onnx"]


@pytest.mark.slow
def test_size_and_load_time_of_a0(tmp_path):
    """They are of RepVGG-A0 against its checkpoint in safetensors."""
    torch.manual_seed(0)
    network = RepVGGForImageClassification(RepVGGConfig(deploy=True)).eval()
    quick = CalibrationConfig(error_compensation=False)
    for bits, ratio in {4: 1.02, 3: 1.03, 2: 1.05}.items():
        model = quantized(copy.deepcopy(network), bits, size=32, calibration_config=quick)
        model.save_pretrained(tmp_path)
        path = export_onnx(model, tmp_path)
        assert path.stat().st_size <= ratio * (tmp_path / "model.safetensors").stat().st_size
        start = time.process_time()
        session(path)
        assert time.process_time() - start <= 0.2
