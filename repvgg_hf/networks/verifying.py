"""Seeing that a network with fused convolutions computes what it did: that only regions have become convolutions.

Its outputs alone are no evidence: rounding may change what it selects (a detector the best of thousands of boxes), and
a wrong network may give similar ones. So the fused network is recorded too, and the two graphs are compared; outputs
must agree as well, unless the network selects.
"""

import math
from typing import Any

import torch
from torch import nn

from .operations import OPERATORS, Affine, is_random, operation_of
from .recording import SAME, Recording, tensors_in
from .regions import Graph

_ROUNDS = {"round", "round_", "floor", "floor_", "ceil", "ceil_", "trunc", "trunc_", "fix", "sign", "sign_", "frac"}


def find_difference(graph: Graph, after: Recording, fused: dict[int, tuple[int, nn.Conv2d]]) -> str | None:
    """Return where the recording `after` fusing differs from the one before, `None` if only regions were fused.

    Args:
        graph: of the recording before.
        fused: source and convolution of every fused region, by the number of its result.
    """
    before = graph.recording
    if len(before.results) != len(after.results):
        return f"it gives {len(after.results)} tensors instead of {len(before.results)}"
    waiting = [pair for pair in zip(before.results, after.results) if pair != (None, None)]
    matched: dict[int, int] = {}
    while waiting:
        pair = waiting.pop()
        if None in pair:
            return "an output does not depend on the input any more"
        old, new = _skip_before(graph, pair[0], fused), _skip_after(after, pair[1])
        if old in matched and matched[old] == new:
            continue
        if old in matched or not _is_same(graph, after, old, new, fused):
            return f"it computes {_label(after, new)} in the place of {_label(before, old)}"
        matched[old] = new
        inputs = (fused[old][0],) if old in fused else before.nodes[old].inputs
        waiting += zip(inputs, after.nodes[new].inputs)
    return None


def _is_same(graph: Graph, after: Recording, old: int, new: int, fused: dict[int, tuple[int, nn.Conv2d]]) -> bool:
    """Tell whether two nodes do the same, their inputs aside."""
    first, second = graph.recording.nodes[old], after.nodes[new]
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    if old in fused:
        return len(second.args) > 1 and second.args[1] is fused[old][1].weight
    is_input = not first.inputs and not first.name
    if is_input and len(second.inputs) == 0:  # the inputs come first in both, in the same order
        return old == new or min(old, new) >= after.inputs
    return (
        first.name == second.name
        and len(first.inputs) == len(second.inputs)
        and all(map(_is_same_number, _numbers(first.args), _numbers(second.args)))
    )


def _numbers(value: Any) -> list:
    """Return the plain numbers among a node's arguments, in order."""
    if type(value) in (tuple, list):
        return [number for entry in value for number in _numbers(entry)]
    return [value] if type(value) in (int, float, bool) else []


def _is_same_number(first: float, second: float) -> bool:
    return first == second or (first != first and second != second)


def _skip_before(graph: Graph, number: int, fused: dict[int, tuple[int, nn.Conv2d]]) -> int:
    """Go back over nodes that change nothing, such as `y + 0`: branches that became nothing leave none."""
    while number not in fused:
        operation = graph.operations.get(number)
        if not isinstance(operation, Affine) or not operation.is_identity:
            break
        number = graph.recording.nodes[number].inputs[0]
    return number


def _skip_after(recording: Recording, number: int) -> int:
    while True:
        node = recording.nodes[number]
        may_change_nothing = node.name in OPERATORS or node.name in SAME or node.name == "dropout"
        operation = operation_of(recording, number) if may_change_nothing and len(node.inputs) == 1 else None
        if not isinstance(operation, Affine) or not operation.is_identity:
            return number
        number = node.inputs[0]


def _label(recording: Recording, number: int) -> str:
    node = recording.nodes[number]
    where = node.modules[-1] if node.modules else ""
    return f"{node.name or 'an input'}() in {where or 'the model'}" if node.name else "an input"


def explains_jumps(recording: Recording) -> bool:
    """Tell whether outputs may differ by more than rounding: the network selects, rounds, or draws at random."""
    for number in recording.live():
        node = recording.nodes[number]
        sources = [recording.nodes[source] for source in node.inputs]
        discrete = node.dtype is not None and not (node.dtype.is_floating_point or node.dtype.is_complex)
        from_real = any(source.dtype is not None and source.dtype.is_floating_point for source in sources)
        from_nowhere = not sources and number >= recording.inputs
        unknown = from_nowhere and not recording.repeats
        if (discrete and from_real) or node.name in _ROUNDS or unknown or is_random(node):
            return True
    return False


def largest_rounding(recording: Recording) -> float:
    """Return what outputs may differ by where nothing is selected, relative to the largest, in the coarsest dtype."""
    dtypes = {recording.nodes[number].dtype for number in recording.live()}
    coarsest = max(
        (torch.finfo(dtype).eps for dtype in dtypes if dtype is not None and dtype.is_floating_point), default=0
    )
    return max(1e-2, 2 * math.sqrt(coarsest))


def output_error(expected: Any, outputs: Any) -> float:
    """Return the largest difference between the tensors of two outputs, each relative to its largest value.

    Infinite if there are other ones, or of other shapes or dtypes.
    """
    pairs = list(tensors_in(expected)), list(tensors_in(outputs))
    shapes = [[(tensor.shape, tensor.dtype) for tensor in tensors] for tensors in pairs]
    if shapes[0] != shapes[1]:
        return math.inf
    worst = 0.0
    for want, got in zip(*pairs):
        if not want.is_floating_point():
            continue
        difference = torch.where((want == got) | (want.isnan() & got.isnan()), 0, (want - got).abs())
        finite = want[want.isfinite()].abs()
        largest = finite.max().item() if finite.numel() else 0.0
        error = difference.max().item() / max(largest, 1e-30) if difference.numel() else 0.0
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst
