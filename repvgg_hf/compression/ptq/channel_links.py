"""Which layers alone read what a layer puts out, channel by channel, found in one recorded forward pass."""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from ...networks.recording import OUTSIDE, Node, Recording

# of these a channel that is scaled by a positive factor comes out scaled, and no value depends on another one
_POINTWISE = {"relu", "relu_", "leaky_relu", "leaky_relu_", "dropout", "dropout_", "contiguous"}
# these mix the pixels of each channel of a map
_SPATIAL = {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "flatten"}
_LAYERS = {"conv1d", "conv2d", "linear"}


@dataclass
class Link:
    """A layer of which each output channel is read by these `readers` alone, by their names."""

    source: str
    readers: list[str]


def find_links(recording: Recording, layers: dict[str, nn.Module]) -> list[Link]:
    """Return the links between `layers` of a recorded model, in the order in which their sources run."""
    calls = _single_calls(recording, layers)
    nowhere = [n for n in range(recording.inputs, len(recording.nodes)) if _from_nowhere(recording.nodes[n])]
    links = []
    for number, name in calls.items():
        readers: list[str] = []
        walk = _Walk(recording, calls, layers, isinstance(layers[name], nn.Linear))
        hidden = any(later > number for later in nowhere)  # and may have read what the layer put out
        if not hidden and walk.follow(number, readers) and _fit(layers[name], [layers[one] for one in readers]):
            links.append(Link(name, readers))
    return links


def _from_nowhere(node: Node) -> bool:
    """Tell whether the node is of a tensor that came from code that the recording does not see."""
    return not node.name and not node.inputs


def _single_calls(recording: Recording, layers: dict[str, nn.Module]) -> dict[int, str]:
    """Return the layer that each node is the call of, if that is its only one and nothing else reads its parameters."""
    reads = Counter(weight for node in recording.nodes for weight in node.weights)
    reads.update(recording.weights_read)  # as numbers, or they are put out
    alone = {
        name: id(layer.weight)
        for name, layer in layers.items()
        if all(reads[id(parameter)] == 1 for parameter in layer.parameters(recurse=False))
    }
    return {
        number: node.modules[-1]
        for number, node in enumerate(recording.nodes)
        if node.name in _LAYERS and node.modules and alone.get(node.modules[-1]) in node.weights
    }


@dataclass
class _Walk:
    """The way of what a layer puts out to `calls` of the `layers`; `last` tells that its channels come last."""

    recording: Recording
    calls: dict[int, str]
    layers: dict[str, nn.Module]
    last: bool

    def follow(self, number: int, readers: list[str]) -> bool:
        """Add the layers that read the node to `readers`; tell whether nothing else does."""
        node = self.recording.nodes[number]
        if not node.users:
            return False
        for user in sorted(node.users):
            if user == OUTSIDE:
                return False
            if user in self.calls and self.recording.nodes[user].inputs == (number,):
                is_linear = isinstance(self.layers[self.calls[user]], nn.Linear)
                if is_linear and not self.last and len(node.shape or ()) != 2:  # it reads pixels
                    return False
                readers.append(self.calls[user])
            elif not self._passes_on(self.recording.nodes[user], node) or not self.follow(user, readers):
                return False
        return True

    def _passes_on(self, node: Node, source: Node) -> bool:
        """Tell whether the `node` keeps the channels of its `source` apart, and scaled as they are."""
        if len(node.inputs) != 1 or node.shape is None or source.shape is None:
            return False
        if node.name in _POINTWISE:
            return node.shape == source.shape
        if node.name not in _SPATIAL or self.last or len(source.shape) != 4 or node.shape[:2] != source.shape[:2]:
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
