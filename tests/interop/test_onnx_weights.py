"""Packed codes in an ONNX graph, unpacked by ONNX's reference evaluator."""

import numpy as np
import pytest
import torch

from repvgg_hf.runtime.packing import pack_codes

onnx = pytest.importorskip("onnx")
from repvgg_hf.interop.onnx.graph import GraphWriter  # noqa: E402
from repvgg_hf.interop.onnx.weights import CODES_PER_WORD, pack_words, packed_weight  # noqa: E402


def evaluate(graph: GraphWriter, output: str) -> np.ndarray:
    from onnx.reference import ReferenceEvaluator

    helper = onnx.helper
    value = helper.make_empty_tensor_value_info(output)
    proto = helper.make_graph(graph.nodes, "graph", [], [value], list(graph.initializers.values()))
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return ReferenceEvaluator(model).run(None, {})[0]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
@pytest.mark.parametrize(("shape", "groups"), [((4, 3, 3, 3), 1), ((6, 5), 3), ((1, 1), 1), ((8, 4, 1, 1), 8)], ids=str)
def test_codes_and_codebooks_come_back(bits, dtype, shape, groups):
    random = np.random.RandomState(bits)
    codes = random.randint(0, 2**bits, shape).astype(np.uint8)
    codebook = np.sort(random.randint(-127, 128, (groups, 2**bits)), axis=1).astype(dtype)
    graph = GraphWriter()
    found = evaluate(graph, packed_weight(graph, "layer", codes, codebook, "weight"))
    expected = np.stack([codebook[o * groups // shape[0]][codes[o]] for o in range(shape[0])])
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_bytes_of_one_plane_are_the_checkpoints(bits):
    codes = np.random.RandomState(0).randint(0, 2**bits, 101).astype(np.uint8)
    (plane,) = pack_words(codes, bits).values()
    np.testing.assert_array_equal(plane, pack_codes(torch.from_numpy(codes), bits).numpy())


@pytest.mark.parametrize("bits", range(1, 9))
def test_planes_take_no_more_bits_than_codes(bits):
    planes = pack_words(np.zeros(8 * 1000, np.uint8), bits)
    assert sum(map(len, planes.values())) == 1000 * bits
    assert sum(planes) == bits * CODES_PER_WORD[bits] <= 14
