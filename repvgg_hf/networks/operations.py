"""What a recorded node computes, if that is part of a convolution: which of four kinds, and with what numbers.

A convolution (average pooling is one, and so is taking every second pixel), an *affine* node (`y = scale * x + shift`
with numbers per channel), a *sum* of two nodes, or a *linear* node, of which only the whole region can show whether it
is part of a convolution (padding, filling in a border). Anything else ends a region.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from .recording import RANDOM, SAME, Node, Recording, Ref

_SUMS = {"add", "add_", "sub", "sub_", "__add__", "__radd__", "__iadd__", "__sub__", "__isub__"}
_DIFFERENCES = {"sub", "sub_", "__sub__", "__isub__", "subtract"}
# a node that changes the dtype ends a region, so that SAME changes nothing
_AFFINE = _SUMS | SAME | {
    "__rsub__", "rsub", "subtract", "mul", "mul_", "multiply", "div", "div_", "divide", "true_divide", "neg", "neg_",
    "positive", "__mul__", "__rmul__", "__imul__", "__truediv__", "__itruediv__", "__neg__", "addcmul", "addcdiv",
    "lerp", "batch_norm", "dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
    "feature_dropout", "feature_alpha_dropout",
}  # fmt: skip
# Python's operators with a number or tensor; a branch that gives nothing may pass through them
OPERATORS = {"mul", "mul_", "div", "div_", "neg", "add", "add_", "__mul__", "__rmul__", "__truediv__", "__neg__"}
_PROBES = (0.0, 1.0, -3.7, 1234.5)  # an affine function is known from two values; the others tell whether it is one


@dataclass(eq=False)
class Convolution:
    """A node that is a convolution, with `weight` `[out, in / groups, height, width]` and `bias` `[out]` or `None`."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str = "zeros"
    pools: bool = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, [padding[1]] * 2 + [padding[0]] * 2, mode=self.padding_mode), 0
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def exact(self, recording: Recording) -> "Convolution":
        """Return it with weight and bias in float64, on the CPU."""
        return replace(self, weight=recording.exact(self.weight), bias=recording.exact(self.bias))


@dataclass(eq=False)
class Affine:
    """A node that computes `scale * x + shift`, both `[channels]` in float64."""

    scale: torch.Tensor
    shift: torch.Tensor

    @property
    def is_identity(self) -> bool:
        return bool((self.scale == 1).all() and (self.shift == 0).all())


@dataclass
class Sum:
    """A node that is `first + factor * second`, of two other nodes."""

    first: int
    second: int
    factor: float


@dataclass
class Linear:
    """A node that fills in values, or pads: by `padding` pixels at each side; with zeros alone if `is_padding`."""

    padding: tuple[int, int] = (0, 0)
    is_padding: bool = False


Operation = Convolution | Affine | Sum | Linear


def run(recording: Recording, node: Node, value_of: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """Compute a node in float64 from the values of its inputs. One that works in place changes its first input."""

    def get(value):
        if isinstance(value, Ref):
            return value_of(int(value))
        if type(value) in (tuple, list):
            return type(value)(map(get, value))
        return recording.exact(value)

    args = get(node.args)
    if node.name in SAME:
        return args[0]
    result = node.function(*args, **{key: get(value) for key, value in node.kwargs.items()})
    return args[0] if node.in_place else result


def operation_of(recording: Recording, number: int) -> Operation | None:
    """Return what the node computes, `None` if that is no part of a convolution."""
    node = recording.nodes[number]
    sources = [recording.nodes[source] for source in node.inputs]
    maps = [node, *sources]
    if not node.name or not sources or any(other.shape is None or len(other.shape) != 4 for other in maps):
        return None
    if len({other.dtype for other in maps}) > 1 or not node.dtype.is_floating_point:
        return None
    if node.name == "conv2d":
        return _convolution(node)
    if node.name == "avg_pool2d":
        return _pooling(node)
    if node.name == "__getitem__":
        return _every_nth(node)
    if node.name in _SUMS and len(node.inputs) == 2:
        return _sum(recording, node)
    if len(node.inputs) == 1 and node.name in _AFFINE and sources[0].shape == node.shape:
        affine = _affine(recording, node)
        return Linear() if affine is None and node.name in _SUMS else affine
    if len(node.inputs) == 1 and node.name == "pad":
        return _padding(node)
    fills = node.name == "__setitem__" and node.in_place and len(node.inputs) == 1 and isinstance(node.args[0], Ref)
    return Linear() if fills else None


def _named(node: Node, *names: str) -> dict[str, Any]:
    """Return a call's arguments by their names."""
    return dict(zip(names, node.args)) | node.kwargs


def _pair(value) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return pair * 2 if len(pair) == 1 else pair


def _convolution(node: Node) -> Convolution | None:
    given = _named(node, "input", "weight", "bias", "stride", "padding", "dilation", "groups")
    weight, bias = given["weight"], given.get("bias")
    if not isinstance(given["input"], Ref) or isinstance(weight, Ref) or isinstance(bias, Ref):
        return None
    dilation, padding, mode = _pair(given.get("dilation", 1)), given.get("padding", 0), "zeros"
    if node.padded_by is not None:
        left_right_top_bottom = node.padded_by._reversed_padding_repeated_twice
        if left_right_top_bottom[::2] != left_right_top_bottom[1::2]:
            return None
        padding, mode = tuple(left_right_top_bottom[::-2]), node.padded_by.padding_mode
    if isinstance(padding, str):
        padding = _padding_in_words(padding, weight.shape[2:], dilation)
    if padding is None:
        return None
    padding = _pair(padding)
    mode = mode if any(padding) else "zeros"
    return Convolution(weight, bias, _pair(given.get("stride", 1)), padding, dilation, given.get("groups", 1), mode)


def _padding_in_words(padding: str, size, dilation: tuple[int, int]) -> tuple[int, ...] | None:
    """Return the numbers that "valid" and "same" stand for, `None` if one side has more than the other."""
    if padding == "valid":
        return (0, 0)
    total = [step * (length - 1) for step, length in zip(dilation, size)]
    return None if any(number % 2 for number in total) else tuple(number // 2 for number in total)


def _pooling(node: Node) -> Convolution | None:
    names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    given = _named(node, *names)
    size, padding = _pair(given["kernel_size"]), _pair(given.get("padding", 0))
    stride = given.get("stride")
    stride = size if stride is None or stride == [] else _pair(stride)
    if given.get("ceil_mode") or (any(padding) and not given.get("count_include_pad", True)):
        return None  # windows at the border are divided by other numbers
    channels, divisor = node.shape[1], given.get("divisor_override") or math.prod(size)
    weight = torch.full((channels, 1, *size), 1 / divisor, dtype=torch.float64)
    return Convolution(weight, None, stride, padding, (1, 1), channels, pools=True)


def _every_nth(node: Node) -> Convolution | None:
    """Read `x[:, :, ::m, ::n]` as a convolution with a stride."""
    index, whole = node.args[1], slice(None)
    steps = index[2:] if isinstance(index, tuple) and index[:2] == (whole, whole) and len(index) == 4 else ()
    if not steps or any(not isinstance(step, slice) or step.start or step.stop is not None for step in steps):
        return None
    stride = tuple(step.step or 1 for step in steps)
    weight = torch.ones(node.shape[1], 1, 1, 1, dtype=torch.float64)
    return Convolution(weight, None, stride, (0, 0), (1, 1), node.shape[1], pools=True)


def _sum(recording: Recording, node: Node) -> Sum | None:
    if any(recording.nodes[source].shape != node.shape for source in node.inputs):
        return None
    if not all(isinstance(value, Ref) for value in node.args[:2]) or len(node.args) != 2:
        return None
    factor = node.kwargs.get("alpha", 1) * (-1 if node.name in _DIFFERENCES else 1)
    if isinstance(factor, torch.Tensor) or set(node.kwargs) - {"alpha"}:
        return None
    return Sum(int(node.args[0]), int(node.args[1]), factor)


def uses_batch_statistics(node: Node) -> bool:
    """Tell whether a batch norm computes mean and variance from its input, which is then no affine function."""
    return bool(_named(node, "input", "mean", "variance", "weight", "bias", "training").get("training"))


def is_random(node: Node) -> bool:
    """Tell whether a node computes something else in every pass."""
    drops = "dropout" in node.name and bool(_named(node, "input", "p", "training").get("training", True))
    return drops or node.name.startswith(RANDOM) or node.name.removesuffix("_").endswith(RANDOM)


def _affine(recording: Recording, node: Node) -> Affine | None:
    """Compute the node for maps of one pixel with constant values: all channels at once, each on its own."""
    channels = node.shape[1]
    if node.name == "batch_norm" and uses_batch_statistics(node):
        return None
    if is_random(node):
        return None
    results = []
    for probe in _PROBES:
        x = torch.full((1, channels, 1, 1), probe, dtype=torch.float64)
        try:
            result = run(recording, node, lambda number, x=x: x)
        except (RuntimeError, TypeError, ValueError):  # constants of the size of the map
            return None
        if not isinstance(result, torch.Tensor) or result.shape != x.shape:
            return None
        results.append(result.flatten().clone())
    shift, scale = results[0], results[1] - results[0]
    for probe, result in zip(_PROBES[2:], results[2:]):
        largest = shift.abs() + abs(probe) * scale.abs() + results[1].abs()
        if not ((result - (scale * probe + shift)).abs() <= 1e-12 * largest * abs(probe)).all():
            return None
    return Affine(scale, shift)


def _padding(node: Node) -> Linear | None:
    given = _named(node, "input", "pad", "mode", "value")
    sides = list(given["pad"]) + [0] * (4 - len(given["pad"]))
    if given.get("mode", "constant") != "constant" or len(sides) != 4 or min(sides) < 0:
        return None
    if sides[0] != sides[1] or sides[2] != sides[3]:
        return None
    return Linear((sides[2], sides[0]), is_padding=not given.get("value"))
