"""Equalization: scaling channels between layers, so that one range suits all channels of a layer's input.

What a layer puts out is divided by a factor per channel, and the weights that read that channel are multiplied by it:
through a ReLU the network computes what it did (cross-layer equalization, arXiv 1906.04721). Batch norm on an identity
makes channels that are hundreds of times larger than others, which a single range per tensor rounds away.
"""

import inspect
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ...networks.recording import OUTSIDE, Node, Recording, record
from ...runtime.logs import get_logger
from .data import CalibrationData
from .hooks import run_layers

logger = get_logger(__name__)

# of these a channel that is scaled by a positive factor comes out scaled, and no channel depends on another one
_PASS_ON = {
    "relu", "relu_", "leaky_relu", "leaky_relu_", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d",
    "adaptive_max_pool2d", "mean", "flatten", "dropout", "dropout_", "contiguous",
}  # fmt: skip
_LAYERS = {"conv1d", "conv2d", "linear"}
# channels or weights that are smaller, as a share of the largest, count as this large
_LEAST = 1e-4


@dataclass
class Link:
    """A layer of which each output channel is read by these `readers` alone, by their names."""

    source: str
    readers: list[str]


@torch.no_grad()
def equalize(model: nn.Module, layers: dict[str, nn.Module], data: CalibrationData, strength: float) -> list[Link]:
    """Scale channels between those of the `layers` that allow it, in place; the float32 `model` computes the same.

    A channel with the range `r`, read by weights of at most `w`, is divided by `r ** strength / w ** (1 - strength)` as
    in SmoothQuant (arXiv 2211.10438): 1 gives all channels the same range, 0 the weights that read them. Returns what
    was scaled.

    Raises `ValueError` if nothing can be, or if what the model does depends on values that it reads.
    """
    links = find_links(record(model, _example(model, data)), layers)
    if not links:
        raise ValueError(
            f"{type(model).__name__} has no layer whose output goes through nothing but ReLU and pooling to other "
            "quantized layers, so that equalization has nothing to scale: leave it out."
        )
    logger.info("Equalizing the outputs of %d of %d layers.", len(links), len(layers))
    ranges = _ranges(model, {name: layers[name] for link in links for name in link.readers}, data)
    factors = [_factors([layers[name] for name in link.readers], ranges[link.readers[0]], strength) for link in links]
    for link, factor in zip(links, factors):
        _scale_outputs(layers[link.source], 1 / factor)
        for name in link.readers:
            _scale_inputs(layers[name], factor)
    return links


def _example(model: nn.Module, data: CalibrationData) -> tuple | dict:
    """Return inputs to record `model` with: a model of Transformers puts out all its maps, none of which may change."""
    batch = data.first(2)[0]
    if not isinstance(model, PreTrainedModel):
        return batch.args or batch.kwargs
    named = inspect.signature(model.forward).bind_partial(*batch.args).arguments
    return named | batch.kwargs | {"output_hidden_states": True}


def find_links(recording: Recording, layers: dict[str, nn.Module]) -> list[Link]:
    """Return the links between `layers` of a recorded model, in the order in which their sources run."""
    calls = _single_calls(recording, layers)
    links = []
    for number, name in calls.items():
        readers: list[str] = []
        if _follow(recording, number, calls, readers) and _fit(layers[name], [layers[reader] for reader in readers]):
            links.append(Link(name, readers))
    return links


def _single_calls(recording: Recording, layers: dict[str, nn.Module]) -> dict[int, str]:
    """Return the layer that each node is the call of, if that is its only one and no other node reads its weight."""
    weights = {name: id(layer.weight) for name, layer in layers.items()}
    reads = defaultdict(int)
    for node in recording.nodes:
        for weight in node.weights:
            reads[weight] += 1
    return {
        number: node.modules[-1]
        for number, node in enumerate(recording.nodes)
        if node.name in _LAYERS and node.modules and reads[weights.get(node.modules[-1])] == 1
    }


def _follow(recording: Recording, number: int, calls: dict[int, str], readers: list[str]) -> bool:
    """Add the layers that read the node to `readers`; tell whether nothing else does."""
    node = recording.nodes[number]
    if not node.users:
        return False
    for user in sorted(node.users):
        if user == OUTSIDE:
            return False
        if user in calls and recording.nodes[user].inputs == (number,):
            readers.append(calls[user])
        elif not _passes_on(recording.nodes[user], node) or not _follow(recording, user, calls, readers):
            return False
    return True


def _passes_on(node: Node, source: Node) -> bool:
    """Tell whether the `node` keeps the channels of its `source` apart, and scaled as they are."""
    if node.name not in _PASS_ON or len(node.inputs) != 1 or node.shape is None or source.shape is None:
        return False
    if node.shape == source.shape:
        return True
    if len(source.shape) != 4 or node.shape[:2] != source.shape[:2]:  # in a map channels are the second dimension
        return False
    if node.name == "mean":
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        return isinstance(dims, (tuple, list)) and sorted(dim % 4 for dim in dims) == [2, 3]
    return True


def _fit(source: nn.Module, readers: list[nn.Module]) -> bool:
    """Tell whether the readers' inputs are the channels of the source: a map that was flattened has more."""
    takes_vectors = [isinstance(layer, nn.Linear) for layer in (source, *readers)]
    same_kind = not takes_vectors[0] or all(takes_vectors)  # a convolution's channels are not the last dimension
    return same_kind and all(_inputs(reader) == source.weight.shape[0] for reader in readers)


def _inputs(layer: nn.Module) -> int:
    """Return the number of a layer's input channels."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _ranges(model: nn.Module, readers: dict[str, nn.Module], data: CalibrationData) -> dict[str, torch.Tensor]:
    """Return the largest magnitude of each channel that each of the `readers` gets, `[in]`."""
    found: dict[str, torch.Tensor] = {}

    def see(name, x):
        channels = x if isinstance(readers[name], nn.Linear) else x.movedim(x.dim() - _map_rank(readers[name]), -1)
        largest = channels.flatten(0, -2).abs().amax(dim=0)
        found[name] = torch.maximum(found[name], largest) if name in found else largest

    run_layers(model, readers, data.batches, see)
    return found


def _map_rank(layer: nn.Module) -> int:
    """Return how many dimensions of a convolution's input its channels and pixels are."""
    return layer.weight.dim() - 1


def _factors(readers: list[nn.Module], ranges: torch.Tensor, strength: float) -> torch.Tensor:
    """Return what each channel is divided by, `[channels]`: 1 in the geometric mean."""
    weights = torch.stack([_largest_read(layer) for layer in readers]).amax(dim=0)
    alive = (ranges > 0) & (weights > 0)  # others are for nothing
    least = [values.clamp_min(_LEAST * values.max()).clamp_min(1e-30) for values in (ranges, weights)]
    logarithms = strength * least[0].log() - (1 - strength) * least[1].log()
    mean = (logarithms * alive).sum() / alive.sum().clamp_min(1)
    return torch.where(alive, (logarithms - mean).exp(), 1.0)


def _largest_read(layer: nn.Module) -> torch.Tensor:
    """Return the largest weight that reads each input channel, `[in]`.

    Of the weights as they are: beside the largest of its output each counts less where an identity has made one large,
    which was measured to be worse.
    """
    weight = layer.weight.flatten(2) if layer.weight.dim() > 2 else layer.weight[..., None]
    largest = weight.abs().amax(dim=2)  # [out, in / groups]
    return largest.view(getattr(layer, "groups", 1), -1, largest.shape[1]).amax(dim=1).flatten()


def _scale_outputs(layer: nn.Module, factors: torch.Tensor) -> None:
    layer.weight.mul_(factors.view(-1, *[1] * (layer.weight.dim() - 1)))
    if layer.bias is not None:
        layer.bias.mul_(factors)


def _scale_inputs(layer: nn.Module, factors: torch.Tensor) -> None:
    weight, groups = layer.weight, getattr(layer, "groups", 1)
    by_group = factors.view(groups, 1, weight.shape[1]).expand(groups, weight.shape[0] // groups, weight.shape[1])
    weight.mul_(by_group.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2)))
