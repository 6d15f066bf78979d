"""ONNX Runtime's static quantization as a peer: its session's logits, and what its file holds."""

import shutil

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from onnxruntime.quantization import quantize_static
from torch import nn

from repvgg_hf import RepVGGForImageClassification
from repvgg_hf.recipes.peers import onnxruntime_methods, peer_methods


@pytest.fixture(scope="module")
def quantized(tiny_config, randomize_batch_norms, tmp_path_factory):
    """(fused float model, ONNX Runtime's, bytes of its weights, the file's graph)."""
    model = RepVGGForImageClassification(tiny_config())
    model = randomize_batch_norms(model, torch.Generator().manual_seed(0)).eval().reparameterize()
    kept = tmp_path_factory.mktemp("onnx") / "kept.onnx"

    def quantize_and_keep(prepared, path, *args, **kwargs):
        quantize_static(prepared, path, *args, **kwargs)
        shutil.copy(path, kept)

    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime_methods, "quantize_static", quantize_and_keep)
        (method,) = peer_methods("onnxruntime")
        session, stored = method.quantize(model, 8, list(images.split(8)))
    return model, session, stored, onnx.load(kept).graph


def test_its_logits_are_the_float_ones_but_for_rounding(quantized):
    model, session, _, _ = quantized
    images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(32) % 5
    with torch.no_grad():
        expected = model(images).logits
    found = session(images, labels)
    error = (found.logits - expected).norm() / expected.norm()
    assert 0 < error < 0.1
    assert found.loss == F.cross_entropy(found.logits, labels)


def test_its_weights_are_integers_with_a_scale_per_channel(quantized):
    model, _, stored, graph = quantized
    constants = {constant.name: constant for constant in graph.initializer}
    weights = [one for one in constants.values() if one.data_type == onnx.TensorProto.INT8 and len(one.dims) > 1]
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    assert sorted(one.dims[0] for one in weights) == sorted(len(layer.weight) for layer in layers)
    bytes_of_layer = [layer.weight.numel() + 5 * len(layer.weight) for layer in layers]  # a scale and a zero point
    assert stored == sum(bytes_of_layer)
    scales = [numpy_helper.to_array(constants[f"{one.name.removesuffix('_quantized')}_scale"]) for one in weights]
    assert [len(scale) for scale in scales] == [one.dims[0] for one in weights]
