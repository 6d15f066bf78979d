"""Which parts of a recorded network are one convolution: *regions* of nodes with one source and one result.

Every node knows the *forms* that it has: for each of the nodes before it from which it is a convolution, what that
convolution would be. A form grows through affine nodes, sums of the same source, and convolutions. It is a candidate
for fusing if one convolution costs no more than those that it takes the place of: in multiplications.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from .operations import Affine, Convolution, Linear, Operation, Sum, operation_of
from .recording import OUTSIDE, Recording

_MAX_FORMS = 8  # of a node; chains of linear nodes are short
_SLACK = 1.0001  # of rounding, when costs are compared


@dataclass(frozen=True)
class Window:
    """What output q of a convolution reads along an axis: `stride * q - padding + dilation * (0 .. size - 1)`."""

    size: int = 1
    dilation: int = 1
    padding: int = 0

    @property
    def extent(self) -> int:
        return self.dilation * (self.size - 1) + 1

    def dense(self) -> "Window":
        """Return the same window without dilation: with the zeros in between."""
        return Window(self.extent, 1, self.padding)

    def union(self, other: "Window") -> "Window":
        """Return the window that covers both, dilated if both are, in step."""
        steps = {window.dilation for window in (self, other) if window.size > 1} or {1}
        step = steps.pop() if len(steps) == 1 else 1
        step = 1 if (self.padding - other.padding) % step else step
        padding = max(self.padding, other.padding)
        last = max(window.extent - 1 - window.padding for window in (self, other))
        return Window((last + padding) // step + 1, step, padding)

    def then(self, stride: int, size: int, dilation: int, padding: int) -> "Window":
        """Return the window of a second convolution's output, if this one's has that `stride`."""
        padding = self.padding + stride * padding
        if self.size == 1:
            return Window(size, stride * dilation, padding) if size > 1 else Window(1, 1, padding)
        if size == 1:
            return replace(self, padding=padding)
        return Window(self.extent + stride * dilation * (size - 1), 1, padding)


@dataclass(frozen=True)
class Form:
    """A node as a convolution of another node, its source.

    Attributes:
        source: number of that node.
        nodes: numbers of the nodes in between, with the node itself and without the source.
        windows: what it reads vertically and horizontally.
        stride, groups, in_channels, out_channels, padding_mode: of the convolution; the mode is "" without padding.
        costs: multiplications per pixel of the source, by the number of the convolution's node.
        has_bias: whether it gives anything but zero for zeros.
        is_closed: whether the kernel follows from the nodes' weights by [`closed_form`](equivalent.py).
    """

    source: int
    in_channels: int
    out_channels: int
    groups: int
    nodes: frozenset[int] = frozenset()
    windows: tuple[Window, Window] = (Window(), Window())
    stride: tuple[int, int] = (1, 1)
    padding_mode: str = ""
    costs: dict[int, float] = field(default_factory=dict, hash=False)
    has_bias: bool = False
    is_closed: bool = True

    @property
    def is_pointwise(self) -> bool:
        """Whether an output reads one pixel, and the first one the first."""
        return all(window == Window() for window in self.windows)

    def cost(self) -> float:
        """Return the multiplications per pixel of the source of the one convolution."""
        taps = math.prod(window.size for window in self.windows)
        return self.out_channels * (self.in_channels // self.groups) * taps / math.prod(self.stride)

    def is_no_dearer(self) -> bool:
        return self.cost() <= _SLACK * sum(self.costs.values())


@dataclass
class Region:
    """A part of a network that is one convolution: the nodes of `form`, of which `result` is the last."""

    result: int
    form: Form


class Graph:
    """A recording with the operation and the forms of every node."""

    def __init__(self, recording: Recording):
        self.recording = recording
        self.live = recording.live()
        self.operations: dict[int, Operation] = {}
        self.forms: dict[int, dict[int, Form]] = {}  # of each node by source, its own trivial one included
        for number, node in enumerate(recording.nodes):
            operation = operation_of(recording, number)
            if operation is not None:
                self.operations[number] = operation
            self.forms[number] = self._forms(number, operation)
            if node.shape is not None and len(node.shape) == 4:
                self.forms[number][number] = _trivial(number, node.shape[1])

    def _forms(self, number: int, operation: Operation | None) -> dict[int, Form]:
        node = self.recording.nodes[number]
        if operation is None:
            return {}
        if isinstance(operation, Sum):
            found = self._sums(number, operation)
        else:
            (before,) = node.inputs
            grow = {Convolution: _convolved, Affine: _scaled, Linear: _filled}[type(operation)]
            found = [grow(form, number, operation) for form in self.forms[before].values()]
        found = [form for form in found if form is not None and self._fits(form, number)]
        if node.in_place:  # what else refers to the source's tensor would miss the change
            found = [form for form in found if form.source not in node.inputs]
        found.sort(key=lambda form: -len(form.nodes))
        return {form.source: form for form in found[:_MAX_FORMS]}

    def _sums(self, number: int, operation: Sum) -> list[Form | None]:
        first, second = self.forms[operation.first], self.forms[operation.second]
        return [_added(first[source], second[source], number) for source in first.keys() & second.keys()]

    def _fits(self, form: Form, number: int) -> bool:
        """Tell whether one convolution, padded alike on both sides, has the size of the node's result."""
        before, after = (self.recording.nodes[place].shape[2:] for place in (form.source, number))
        if not form.is_closed:
            return True  # padding may still be taken away
        for length, result, window, stride in zip(before, after, form.windows, form.stride):
            if (length + 2 * window.padding - window.extent) // stride + 1 != result:
                return False
        return True

    def candidates(self) -> Iterator[Region]:
        """Yield every region that may be worth a fused convolution, the largest first. They overlap."""
        found = []
        for number, forms in self.forms.items():
            for form in forms.values():
                if self._is_worthwhile(form, number):
                    found.append(Region(number, form))
        yield from sorted(found, key=lambda region: (-len(region.form.nodes), -region.result))

    def _is_worthwhile(self, form: Form, number: int) -> bool:
        """Tell whether there is anything to fuse that does not end with a node that changes nothing."""
        operations = [self.operations[node] for node in form.nodes]
        if not any(isinstance(operation, Convolution) and not operation.pools for operation in operations):
            return False
        last = self.operations[number]
        if isinstance(last, Linear) or (isinstance(last, Affine) and last.is_identity and not self._is_inside(number)):
            return False
        if self._belongs_before(form.source) or self._begins_with_identity(form):
            return False
        changing = [op for op in operations if not (isinstance(op, Affine) and op.is_identity)]
        return len(changing) > 1 and form.is_no_dearer()

    def _is_inside(self, number: int) -> bool:
        """Tell whether a node is computed by the module of the one before: a norm whose shift is zero is one whole."""
        node = self.recording.nodes[number]
        return any(self.recording.nodes[source].modules == node.modules for source in node.inputs)

    def _belongs_before(self, source: int) -> bool:
        """Tell whether all that is done with a node is scaling what a convolution gave, which goes into that one."""
        users = self.recording.nodes[source].users
        followed = len(users) == 1 and isinstance(self.operations.get(next(iter(users))), Affine)
        return followed and isinstance(self.operations.get(source), Convolution)

    def _begins_with_identity(self, form: Form) -> bool:
        """Tell whether all that is done with the source first changes nothing: the form without it is as good."""
        first = [number for number in form.nodes if form.source in self.recording.nodes[number].inputs]
        operation = self.operations[first[0]]
        return len(first) == 1 and isinstance(operation, Affine) and operation.is_identity

    def used_outside(self, region: Region) -> list[int]:
        """Return the nodes inside a region, but for its result, whose values others need as well."""
        inner = region.form.nodes - {region.result}
        live = self.live | {OUTSIDE}
        return sorted(number for number in inner if (self.recording.nodes[number].users & live) - region.form.nodes)


def _trivial(number: int, channels: int) -> Form:
    """Return the node as a function of itself."""
    return Form(number, channels, channels, max(channels, 1))


def _scaled(form: Form, number: int, operation: Affine) -> Form:
    has_bias = form.has_bias or bool(operation.shift.any())
    return replace(form, nodes=form.nodes | {number}, has_bias=has_bias)


def _filled(form: Form, number: int, operation: Linear) -> Form:
    """Pad a form, or fill in something: that is a convolution's own padding if the form gives zero for zeros."""
    closed = form.is_closed and operation.is_padding and _may_be_padded(form, "zeros")
    windows = zip(form.windows, form.stride, operation.padding)
    windows = tuple(window.then(stride, 1, 1, padding) for window, stride, padding in windows)
    return replace(form, nodes=form.nodes | {number}, windows=windows, is_closed=closed, padding_mode="zeros")


def _may_be_padded(form: Form, mode: str) -> bool:
    """Tell whether padding the result is the same as padding the source."""
    if mode == "zeros":
        return form.is_pointwise and not form.has_bias
    return form.is_pointwise and form.stride == (1, 1)


def _convolved(form: Form, number: int, operation: Convolution) -> Form | None:
    """Return the form after one more convolution, `None` if they are no single one."""
    padded = any(operation.padding)
    if padded and not _may_be_padded(form, operation.padding_mode) and form.is_closed:
        return None
    size = operation.weight.shape[2:]
    steps = zip(form.windows, form.stride, size, operation.dilation, operation.padding)
    out_channels, _ = operation.weight.shape[:2]
    merged = replace(
        form,
        nodes=form.nodes | {number},
        out_channels=out_channels,
        groups=math.gcd(form.groups, operation.groups),
        windows=tuple(window.then(*step) for window, *step in steps),
        stride=tuple(a * b for a, b in zip(form.stride, operation.stride)),
        padding_mode=operation.padding_mode if padded else form.padding_mode,
        has_bias=form.has_bias or (operation.bias is not None and bool(operation.bias.any())),
    )
    own_cost = operation.weight.numel() / math.prod(merged.stride)
    return replace(merged, costs=form.costs | {number: own_cost})


def _added(first: Form, second: Form, number: int) -> Form | None:
    """Return the sum of two forms of one source, `None` if they don't match."""
    modes = {first.padding_mode, second.padding_mode} - {""}
    if first.stride != second.stride or first.out_channels != second.out_channels or len(modes) > 1:
        return None
    return replace(
        first,
        nodes=first.nodes | second.nodes | {number},
        groups=math.gcd(first.groups, second.groups),
        windows=tuple(a.union(b) for a, b in zip(first.windows, second.windows)),
        padding_mode=next(iter(modes), ""),
        costs=first.costs | second.costs,
        has_bias=first.has_bias or second.has_bias,
        is_closed=first.is_closed and second.is_closed,
    )
