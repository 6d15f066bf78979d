"""TensorRT's rules: files that keep them, and a check that finds what breaks them."""

import numpy as np
import pytest
import torch
from quantized_models import assert_same, images, run, small_repvgg

from repvgg_hf import export_onnx
from repvgg_hf.interop.integers import integer_layers
from repvgg_hf.interop.onnx import read_onnx_weights, tensorrt_problems

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return small_repvgg(activation_scheme="int8_symmetric")


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    return export_onnx(model, tmp_path_factory.mktemp("tensorrt"), "int8", tensorrt=True)


def test_the_file_keeps_the_rules(model, path):
    assert path.name == "model_int8_tensorrt.onnx"
    assert tensorrt_problems(path) == []
    graph = onnx.load(path).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) == 2 * 7 + 6  # inputs of six layers and the last map; weights
    assert all(constants[node.input[2]].dtype == np.int8 and not constants[node.input[2]].any() for node in pairs)
    biases = [node.input[2] for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(biases) == 6 and all(constants[name].dtype == np.float32 for name in biases)


def test_weights_and_outputs(model, path):
    found = read_onnx_weights(path)
    assert all((found[name] == layer.weight.numpy()).all() for name, layer in integer_layers(model).items())
    with torch.no_grad():
        assert_same(run(path, images())["logits"], model(images()).logits)


def test_other_files_break_them(model, tmp_path):
    found = " ".join(tensorrt_problems(export_onnx(model, tmp_path, "packed")))
    for problem in ("must be int8 and 0", "such as a bias", "has a computed bias"):
        assert problem in found


def change_operator(graph):
    graph.node[0].op_type = "DynamicQuantizeLinear"


def change_domain(graph):
    graph.node[0].domain = "com.microsoft"


def change_scale(graph):
    scale = next(tensor for tensor in graph.initializer if tensor.name.endswith(".input_scale"))
    scale.CopyFrom(onnx.numpy_helper.from_array(np.float32(-1), scale.name))


def change_pair(graph):
    node = next(node for node in graph.node if node.op_type == "DequantizeLinear")
    node.input[1] = next(tensor.name for tensor in graph.initializer if tensor.name == "classifier.input_scale")


def compute_scale(graph):
    graph.initializer.remove(next(tensor for tensor in graph.initializer if tensor.name.endswith(".input_scale")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_operator, "computes with integers itself"),
        (change_domain, "domain com.microsoft"),
        (change_scale, "scale must be positive"),
        (change_pair, "must come from a QuantizeLinear with the same scale"),
        (compute_scale, "must be constants"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_breaks_them_is_found(path, change, message):
    proto = onnx.load(path)
    change(proto.graph)
    assert any(message in problem for problem in tensorrt_problems(proto))
