"""Folding batch norms into the layers before them that are no convolution of images: linear, one- or three-dimensional,
transposed; and into linear layers after them.

Such a layer stays what it is, with the norm's scale in its weight and the shift in its bias; the norm becomes an
identity. A convolution of images takes in more than its norm, see `regions.py`.
"""

import copy
import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ..runtime.fused_structure import with_bias
from .operations import run, uses_batch_statistics
from .placement import Found, Placement
from .recording import OUTSIDE, Node
from .regions import Graph
from .report import FusedRegion

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = {  # by the function that computes them
    "linear": nn.Linear,
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,  # such as one that pads more on one side, which is no operation of a region
    "conv3d": nn.Conv3d,
    **{f"conv_transpose{number}d": kind for number, kind in enumerate(_TRANSPOSED, start=1)},
}


def fold_norms(
    graph: Graph, placement: Placement, tolerance: float, refused: Mapping[frozenset[int], str]
) -> Iterator[tuple[frozenset[int], Found | FusedRegion]]:
    """Yield the nodes of each such layer and its norm, with the folded layer, or with a report of why it is left.

    `refused` has the nodes of those that are to be left, with the reason.
    """
    for number, norm in enumerate(graph.recording.nodes):
        if norm.name != "batch_norm" or uses_batch_statistics(norm) or not norm.modules or len(norm.inputs) != 1:
            continue
        before, after = norm.inputs[0], min(norm.users & graph.live, default=OUTSIDE)
        if _takes_norms(graph, before, tuple(_LAYERS)):
            chosen = before
        elif after != OUTSIDE and len(norm.shape) == 2 and _takes_norms(graph, after, ("linear",)):
            chosen = after
        else:
            continue
        nodes = frozenset((chosen, number))
        yield nodes, _fold(graph, placement, chosen, number, tolerance, refused.get(nodes))


def _takes_norms(graph: Graph, number: int, layers: tuple[str, ...]) -> bool:
    node = graph.recording.nodes[number]
    return node.name in layers and bool(node.modules) and number not in graph.operations


def _fold(
    graph: Graph, placement: Placement, place: int, number: int, tolerance: float, reason: str | None
) -> Found | FusedRegion:
    """Fold the norm at `number` into the layer at `place`, before or after it."""
    layer, norm = graph.recording.nodes[place], graph.recording.nodes[number]
    names = (layer.modules[-1], norm.modules[-1])
    parts = names if place < number else names[::-1]
    reason = reason or _reason_to_leave(graph, placement, place, number)
    if reason is not None:
        return FusedRegion(names[0], parts, left=reason)
    folded = _folded(graph, layer, norm, placement.modules[names[0]], before=place < number)
    error = _error(graph, *((layer, norm) if place < number else (norm, layer)), folded)
    if not error <= tolerance:
        reason = f"the folded layer differs from both by {error:.1e} in float64, more than {tolerance:.0e}"
        return FusedRegion(names[0], parts, "closed form", error, reason)
    like = placement.modules[names[0]].weight
    entries = [{"name": names[0], "kind": "biased"}, {"name": names[1], "kind": "identity"}]
    for name in names:
        others = [other for other in placement.names[id(placement.modules[name])] if other != name]
        entries += [{"name": other, "kind": "alias", "of": name} for other in others]
    region = FusedRegion(names[0], parts, "closed form", error)
    folded = folded.to(like.device, like.dtype).train(placement.modules[names[0]].training)
    folded.weight.requires_grad_(like.requires_grad)
    source = graph.recording.nodes[min(place, number)].inputs[0]
    return Found(frozenset((place, number)), source, region, entries, folded)


def _reason_to_leave(graph: Graph, placement: Placement, place: int, number: int) -> str | None:
    layer, norm = graph.recording.nodes[place], graph.recording.nodes[number]
    first = layer if place < number else norm
    if first.users & (graph.live | {OUTSIDE}) != {max(place, number)}:
        return f"what {first.modules[-1]} gives is used elsewhere as well"
    if layer.name == "linear" and len(layer.shape) != 2:
        return "the norm is over another dimension than the layer's features"
    if layer.name != "linear" and len(layer.shape) != int(layer.name[-2]) + 2:
        return "its input is no batch, so that the norm is over another dimension than the layer's channels"
    for node, result, kinds in ((layer, place, _LAYERS[layer.name]), (norm, number, nn.modules.batchnorm._BatchNorm)):
        name = node.modules[-1]
        module, calls = placement.modules[name], placement.calls[name]
        for outer in node.modules:
            if len(placement.calls[outer]) > 1:
                return f"{outer} runs {len(placement.calls[outer])} times in one pass, with the same weights"
        plain = type(module) is kinds if node is layer else isinstance(module, kinds)
        if calls[0].result != result or not plain:
            return f"{name} is a {type(module).__name__}, which may do more than a plain {kinds.__name__.strip('_')}"
        if any(placement.owners[id(tensor)] > 1 for tensor in module._parameters.values() if tensor is not None):
            return f"{name} shares a weight with another module"
        reason = placement.reason_to_keep(name, module, frozenset((place, number)))
        if reason is not None:
            return reason
    return None


def _folded(graph: Graph, layer: Node, norm: Node, module: nn.Module, before: bool) -> nn.Module:
    """Return a copy of the layer in float64, on the CPU, with what the norm does in its weight and bias.

    The layer is `before` the norm, or is linear and after it.
    """
    folded = with_bias(copy.deepcopy(module).to("cpu", torch.float64))
    channels = norm.shape[1]
    probes = [torch.full((1, channels, *[1] * (len(norm.shape) - 2)), value, dtype=torch.float64) for value in (0, 1)]
    shift, one = (run(graph.recording, norm, lambda number, x=x: x).flatten() for x in probes)
    scale = one - shift
    if not before:
        folded.bias.data += folded.weight.data @ shift
        folded.weight.data *= scale
        return folded
    if isinstance(module, _TRANSPOSED):  # [in, out / groups, ...]
        weight = folded.weight.data.unflatten(0, (module.groups, -1))
        weight *= scale.view(module.groups, 1, -1, *[1] * (weight.dim() - 3))
    else:
        folded.weight.data *= scale.view(-1, *[1] * (folded.weight.dim() - 1))
    folded.bias.data = folded.bias.data * scale + shift
    return folded


def _error(graph: Graph, first: Node, second: Node, folded: nn.Module) -> float:
    """Return the largest difference between a layer and a norm in a row and the folded layer, by the largest output."""
    source = graph.recording.nodes[first.inputs[0]]
    x = torch.randn(source.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = run(graph.recording, first, lambda number: x)
    expected = run(graph.recording, second, lambda number: y)
    layer = second if first.name == "batch_norm" else first
    args = (x, folded.weight, folded.bias, *layer.args[3:])
    kwargs = {key: value for key, value in layer.kwargs.items() if key not in ("input", "weight", "bias")}
    difference = (layer.function(*args, **kwargs) - expected).abs().max()
    error = (difference / expected.abs().max().clamp_min(1e-300)).item()
    return error if math.isfinite(error) else math.inf
