"""LiteRT files: int8 operations, the checkpoint's weights, the model's logits in its interpreter."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_models import NEAR, SIZE, agreement, pictures, residual_network, trained, trained_float
from quantized_models import repvgg

from repvgg_hf import RepVGGBackbone, export_litert
from repvgg_hf.interop.integers import integer_layers
from repvgg_hf.interop.litert import read_litert
from repvgg_hf.interop.tflite_graph import LAYERS, TFLiteGraph

pytestmark = pytest.mark.filterwarnings("ignore")

FORMATS = {
    "W4A8": {},
    "W8A8": {"bits": 8},
    "W2A8 per channel": {"bits": 2, "granularity": "per_channel"},
    "A4": {"activation_bits": 4},
    "squeeze and excitation": {"squeeze_excitation": True},
    "int8_symmetric": {"activation_scheme": "int8_symmetric"},
    "float classifier": {"modules_to_not_convert": ["classifier"]},
}


@pytest.fixture
def litert():
    return pytest.importorskip("litert_torch")


def run(path: Path, images: torch.Tensor) -> list[torch.Tensor]:
    interpreter = pytest.importorskip("ai_edge_litert.interpreter").Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], images.numpy())
    interpreter.invoke()
    outputs = interpreter.get_output_details()
    return [torch.from_numpy(interpreter.get_tensor(output["index"]).copy()) for output in outputs]


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_weights_and_logits_are_the_models(options, litert, tmp_path):
    model, images = trained(**options), pictures(64, seed=3)[0]
    path = export_litert(model, tmp_path, image_size=SIZE, batch_size=len(images))
    assert path == tmp_path / "litert" / "model.tflite"
    (logits,) = run(path, images)
    with torch.no_grad():
        expected = model(images).logits
    same, near = agreement(logits, expected)
    assert same == 1 and near >= NEAR - 1 / 64
    assert expected.argmax(1).unique().numel() == 4
    found = read_litert(path)
    layers = {name: layer.weight.numpy() for name, layer in integer_layers(model).items()}
    for weight, name in zip(found, layers, strict=True):  # operations are in the order of the model
        assert np.array_equal(weight, layers[name]), name


def dtypes(path: Path) -> dict[str, list[tuple]]:
    """The types of input, weight, bias and output of every layer in a file, by kind of operation."""
    graph = TFLiteGraph(path.read_bytes())
    types = {code: name for name, code in vars(graph.schema.TensorType).items() if isinstance(code, int)}
    found = []
    for operation in graph.operations:
        if graph.kind(operation) in LAYERS:
            tensors = [*operation.inputs, *operation.outputs]
            found.append((graph.kind(operation), *(types[graph.subgraph.tensors[tensor].type] for tensor in tensors)))
    return Counter(found)


def test_layers_between_integers_are_integer_operations(litert, tmp_path):
    path = export_litert(trained(), tmp_path, image_size=SIZE)
    assert dtypes(path) == {
        ("CONV_2D", "INT8", "INT8", "INT32", "INT8"): 5,
        ("FULLY_CONNECTED", "FLOAT32", "FLOAT32", "FLOAT32", "FLOAT32"): 1,
    }
    path = export_litert(trained(quantize_last_map=False), tmp_path, image_size=SIZE)
    assert dtypes(path)["CONV_2D", "INT8", "INT8", "INT32", "INT8"] == 4


def test_grids_in_the_file_are_the_models(litert, tmp_path):
    model = trained()
    graph = TFLiteGraph(export_litert(model, tmp_path, image_size=SIZE).read_bytes())
    convolutions = [operation for operation in graph.operations if graph.kind(operation) == "CONV_2D"]
    for operation, layer in zip(convolutions, integer_layers(model).values()):
        scale, zero_point = graph.grid(operation.inputs[0])
        assert scale.item() == np.float32(layer.input_scale) and zero_point.item() == layer.input_zero_point - 128
        assert np.array_equal(graph.grid(operation.inputs[1])[0], layer.weight_scale)
        assert np.array_equal(graph.constant(operation.inputs[2]), layer.bias)
        assert np.allclose(graph.grid(operation.inputs[2])[0], layer.bias_scale, rtol=1e-6)


def test_nothing_is_left_over(litert, tmp_path):
    """Neither the float weights that were quantized in the graph, nor tensors that nothing takes."""
    path = export_litert(trained(), tmp_path, image_size=SIZE)
    graph = TFLiteGraph(path.read_bytes())
    used = {tensor for operation in graph.operations for tensor in (*operation.inputs, *operation.outputs)}
    assert used == set(range(len(graph.subgraph.tensors)))
    weights = sum(layer.weight.numel() for layer in integer_layers(trained()).values())
    assert sum(len(buffer.data) for buffer in graph.model.buffers if buffer.data is not None) < 1.3 * weights


def test_a_backbone_gives_its_feature_maps(litert, tiny_config, tmp_path):
    model = repvgg(tiny_config(out_features=["stage1", "stage2"]), model_class=RepVGGBackbone)
    images = torch.randn(1, 3, 32, 32)
    outputs = run(export_litert(model, tmp_path, image_size=32), images)
    with torch.no_grad():
        expected = model(images).feature_maps
    for one, other in zip(outputs, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-2 * other.abs().max())


def test_another_network(litert, tmp_path):
    model, images = residual_network(), pictures(64, seed=3)[0]
    (logits,) = run(export_litert(model, tmp_path, image_size=SIZE, batch_size=len(images)), images)
    with torch.no_grad():
        same, near = agreement(logits, model(images).logits)
    assert same == 1 and near >= NEAR


class TestBadInput:
    @pytest.mark.parametrize("sizes", [{"image_size": None}, {"batch_size": 0}])
    def test_sizes_that_are_not_fixed(self, sizes, tmp_path):
        with pytest.raises(ValueError, match=f"{next(iter(sizes))} must be a positive integer.*LiteRT takes images"):
            export_litert(trained(), tmp_path, **sizes)

    def test_no_integers(self, tmp_path):
        with pytest.raises(ValueError, match="is not quantized"):
            export_litert(trained_float(), tmp_path)
        with pytest.raises(ValueError, match="being trained quantized"):
            export_litert(trained_float().prepare_qat(bits=4), tmp_path)
        assert not any(tmp_path.iterdir())

    def test_no_litert(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "litert_torch", None)
        with pytest.raises(ImportError, match=r"repvgg-hf\[litert\]"):
            export_litert(trained(), tmp_path)
        assert not any(tmp_path.iterdir())

    def test_no_litert_file(self, litert, tmp_path):
        (tmp_path / "model.tflite").write_bytes(b"something else")
        with pytest.raises(ValueError, match="is no LiteRT file"):
            read_litert(tmp_path / "model.tflite")


def test_it_is_imported_only_when_asked_for():
    code = "import sys, repvgg_hf; repvgg_hf.export_litert; print('litert_torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.stdout.strip() == "False", result.stderr
