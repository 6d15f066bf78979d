"""Weights in an ONNX graph as packed codes, which the graph looks up in their codebook.

Some codes together are a *word* of 8 to 14 bits, and a word is cut into *planes* of 8, 4 and 2 bits, of which a byte
holds one, two or four. Four codes a, b, c, d of 3 bits, the first of two words whose upper planes share a byte:

    plane of 8 bits, a byte for each word     plane of 4 bits, a byte for two
    c1 c0 b2 b1 b0 a2 a1 a0                   .. .. .. .. d2 d1 d0 c2
    7                     0                   7         4 3         0

Gather unpacks a plane, in a table of what each byte holds, and decodes a word, in a table of the entries that each
stands for. Both tables are computed in the graph. All operators are of opset 13 and read constants only: an engine runs
them once, when it loads the file. (Shifts of uint8 would be simpler, and OpenVINO gets them wrong.)
"""

import numpy as np

from .graph import GraphWriter

CODES_PER_WORD = {1: 8, 2: 4, 3: 4, 4: 2, 5: 2, 6: 2, 7: 2, 8: 1}  # by the bits of a code
PLANES = (8, 4, 2)


def packed_weight(graph: GraphWriter, name: str, codes: np.ndarray, codebook: np.ndarray, output: str) -> str:
    """Add a weight as packed codes; returns `output`, the name of the value.

    Args:
        graph ([`GraphWriter`]): where to.
        name (`str`): of the layer, which the names of initializers begin with.
        codes (`numpy.ndarray`): uint8, of the weight's shape.
        codebook (`numpy.ndarray`): `[codebooks, 2**bits]`, each for as many consecutive output channels.
        output (`str`): name of the weight, which has the dtype of `codebook`.
    """
    groups, entries = codebook.shape
    bits = entries.bit_length() - 1
    words = _unpacked_words(graph, name, codes, bits)
    book = graph.constant(f"{name}.weight_codebook", codebook.reshape(-1))
    per_word = CODES_PER_WORD[bits]
    codes_of_words = _fields(graph, bits * per_word, bits)
    if groups == 1:
        entries_of_words = graph.add("Gather", [book, codes_of_words])
        weight = _only(graph, graph.add("Gather", [entries_of_words, words]), per_word, codes.size)
    else:
        indices = _only(graph, graph.add("Gather", [codes_of_words, words]), per_word, codes.size)
        first = (np.arange(groups, dtype=np.int32) * entries)[:, None]
        indices = graph.add("Reshape", [indices, graph.shared(np.array([groups, -1], np.int64))])
        weight = graph.add("Gather", [book, graph.add("Add", [indices, graph.shared(first)])])
    return graph.add("Reshape", [weight, graph.shared(np.array(codes.shape, np.int64))], output)


def pack_words(codes: np.ndarray, bits: int) -> dict[int, np.ndarray]:
    """Pack uint8 `codes` of any shape into the planes of their words, by the bits of a plane; the last is padded."""
    words = _join(codes.reshape(-1).astype(np.int32), bits, CODES_PER_WORD[bits])
    planes, done = {}, 0
    for width in PLANES:
        if bits * CODES_PER_WORD[bits] & width:
            plane = words >> done & (2**width - 1)
            planes[width] = _join(plane, width, 8 // width).astype(np.uint8)
            done += width
    return planes


def _join(fields: np.ndarray, width: int, count: int) -> np.ndarray:
    """Put `count` fields of `width` bits each into one number, the first in the lowest bits."""
    fields = np.append(fields, np.zeros(-len(fields) % count, np.int32)).reshape(-1, count)
    return (fields << np.arange(count) * width).sum(axis=1)


def _unpacked_words(graph: GraphWriter, name: str, codes: np.ndarray, bits: int) -> str:
    """Add the planes of a layer's codes and nodes that put its words together; returns the value's name, int32."""
    count, done, words = -(-codes.size // CODES_PER_WORD[bits]), 0, None
    for width, packed in pack_words(codes, bits).items():
        constant = graph.constant(f"{name}.weight_codes" + (f"_{width}" if done else ""), packed)
        part = graph.cast(constant, "int32")
        if width < 8:
            rows = graph.add("Gather", [_fields(graph, 8, width, shift=done), part])
            part = _only(graph, rows, 8 // width, count)
        words = part if words is None else graph.add("Add", [words, part])
        done += width
    return words


def _only(graph: GraphWriter, rows: str, columns: int, count: int) -> str:
    """Add nodes that make a vector of `rows`, which have so many columns, and cut off all after the first `count`."""
    flat = graph.add("Reshape", [rows, graph.shared(np.array([-1], np.int64))])
    if count % columns == 0:
        return flat
    bounds = [graph.shared(np.array([bound], np.int64)) for bound in (0, count)]
    return graph.add("Slice", [flat, *bounds])


def _fields(graph: GraphWriter, bits: int, width: int, shift: int = 0) -> str:
    """Return the name of the fields of `width` bits in each number of `bits` bits, times `2**shift`, as a table.

    It is int32 `[2**bits, bits / width]`, the same for all layers.
    """
    key = ("fields", bits, width, shift)
    if key not in graph.made:
        scalars = [graph.shared(np.array(number, np.int32)) for number in (0, 2**bits, 1)]
        numbers = graph.add("Reshape", [graph.add("Range", scalars), graph.shared(np.array([-1, 1], np.int64))])
        places = graph.shared(2 ** np.arange(0, bits, width, dtype=np.int32))
        fields = graph.add("Mod", [graph.add("Div", [numbers, places]), graph.shared(np.array(2**width, np.int32))])
        graph.made[key] = graph.add("Mul", [fields, graph.shared(np.array(2**shift, np.int32))]) if shift else fields
    return graph.made[key]


__all__ = ["CODES_PER_WORD", "pack_words", "packed_weight"]
