"""The kernel and bias of a region, in float64: in closed form where there is one, else by a Jacobian; and its check."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .operations import Affine, Convolution, Sum, run
from .regions import Form, Graph, Region, Window

_BYTES = 2**27  # of the copies of the input that one pass of a Jacobian takes
_UNEVEN = 1e-3  # of a result for zeros: rounding makes less


@dataclass
class Kernel:
    """A convolution in float64: `weight` `[out, in / groups, h, w]` and `bias` `[out]`; sizes are those of a `Form`."""

    weight: torch.Tensor
    bias: torch.Tensor
    groups: int
    windows: tuple[Window, Window]
    stride: tuple[int, int]

    def __call__(self, x: torch.Tensor, padding_mode: str) -> torch.Tensor:
        padding, dilation = ([getattr(window, name) for window in self.windows] for name in ("padding", "dilation"))
        convolution = Convolution(
            self.weight, self.bias, self.stride, tuple(padding), tuple(dilation), self.groups, padding_mode or "zeros"
        )
        return convolution(x)


def replay(graph: Graph, region: Region, x: torch.Tensor) -> torch.Tensor:
    """Compute the region's nodes for another source `x`, in float64."""
    values = {region.form.source: x.clone()}
    for number in sorted(region.form.nodes):
        node, operation = graph.recording.nodes[number], graph.operations[number]
        if isinstance(operation, Convolution) and node.padded_by is not None:
            values[number] = operation.exact(graph.recording)(values[node.inputs[0]])
        else:
            values[number] = run(graph.recording, node, values.__getitem__)
    return values[region.result]


def closed_form(graph: Graph, region: Region) -> Kernel:
    """Compute a region of convolutions, affine nodes and sums from their weights."""
    form = region.form
    kernels = {form.source: _identity(form.in_channels)}
    for number in sorted(form.nodes):
        node, operation = graph.recording.nodes[number], graph.operations[number]
        if isinstance(operation, Sum):
            kernels[number] = _add(kernels[operation.first], kernels[operation.second], operation.factor)
            continue
        before = kernels[node.inputs[0]]
        if isinstance(operation, Convolution):
            kernels[number] = _convolve(before, operation.exact(graph.recording))
        elif isinstance(operation, Affine):
            kernels[number] = _scale(before, operation)
        else:
            windows = zip(before.windows, before.stride, operation.padding)
            windows = tuple(window.then(stride, 1, 1, padding) for window, stride, padding in windows)
            kernels[number] = Kernel(before.weight, before.bias, before.groups, windows, before.stride)
    return kernels[region.result]


def _identity(channels: int) -> Kernel:
    weight = torch.ones(channels, 1, 1, 1, dtype=torch.float64)
    return Kernel(weight, torch.zeros(channels, dtype=torch.float64), channels, (Window(), Window()), (1, 1))


def _scale(kernel: Kernel, affine: Affine) -> Kernel:
    weight = kernel.weight * affine.scale.view(-1, 1, 1, 1)
    return Kernel(weight, kernel.bias * affine.scale + affine.shift, kernel.groups, kernel.windows, kernel.stride)


def in_groups(weight: torch.Tensor, before: int, groups: int) -> torch.Tensor:
    """Return the kernel `[out, in / before, h, w]` of a convolution of `before` groups as one of fewer `groups`."""
    if before == groups:
        return weight
    out, width, *size = weight.shape
    per = before // groups  # old groups in a new one: a block diagonal
    blocks = weight.new_zeros(groups, per, out // before, per, width, *size)
    index = torch.arange(per, device=weight.device)
    blocks[:, index, :, index] = weight.view(groups, per, out // before, width, *size).transpose(0, 1)
    return blocks.view(out, per * width, *size)


def _within(weight: torch.Tensor, windows: tuple[Window, Window], own: tuple[Window, Window]) -> torch.Tensor:
    """Return the view of a kernel with `windows` of what smaller windows inside them read."""
    places = []
    for window, inner in zip(windows, own):
        start = (window.padding - inner.padding) // window.dilation
        step = inner.dilation // window.dilation if inner.size > 1 else 1
        places.append(slice(start, start + (inner.size - 1) * step + 1, step))
    return weight[:, :, places[0], places[1]]


def _placed(kernel: Kernel, windows: tuple[Window, Window], groups: int) -> torch.Tensor:
    """Return a kernel inside larger windows and fewer groups, with zeros around and in between; a new tensor."""
    weight = in_groups(kernel.weight, kernel.groups, groups)
    if windows == kernel.windows:
        return weight.clone()
    out = weight.new_zeros(*weight.shape[:2], *(window.size for window in windows))
    _within(out, windows, kernel.windows).copy_(weight)
    return out


def _add(first: Kernel, second: Kernel, factor: float) -> Kernel:
    windows = tuple(a.union(b) for a, b in zip(first.windows, second.windows))
    groups = math.gcd(first.groups, second.groups)
    weight = _placed(first, windows, groups)
    added = in_groups(second.weight, second.groups, groups)
    _within(weight, windows, second.windows).add_(added, alpha=factor)
    return Kernel(weight, first.bias + factor * second.bias, groups, windows, first.stride)


def _convolve(kernel: Kernel, operation: Convolution) -> Kernel:
    """Return the kernel of `operation`, in float64, after `kernel`."""
    own = operation.weight
    groups = math.gcd(kernel.groups, operation.groups)
    steps = zip(kernel.windows, kernel.stride, own.shape[2:], operation.dilation, operation.padding)
    windows = tuple(window.then(*step) for window, *step in steps)
    stride = tuple(a * b for a, b in zip(kernel.stride, operation.stride))
    bias = own.new_zeros(len(own)) if operation.bias is None else operation.bias
    if kernel.groups == len(kernel.bias) and kernel.weight.shape[1:] == (1, 1, 1):  # a scale per channel
        per_input = kernel.weight.view(operation.groups, 1, -1)
        weight = own.view(operation.groups, -1, *own.shape[1:]) * per_input[..., None, None]
        bias = bias + _sum_over(own, operation.groups, kernel.bias)
        return Kernel(in_groups(weight.view(own.shape), operation.groups, groups), bias, groups, windows, stride)
    bias = bias + _sum_over(own, operation.groups, kernel.bias)
    first = _placed(kernel, tuple(window.dense() for window in kernel.windows), groups)  # [middle, in / groups, ..]
    own = in_groups(own, operation.groups, groups)  # [out, middle / groups, ..]
    # tap b of the second reads the first's taps from stride * dilation * b on: a transposed convolution of the two
    out, width = own.shape[:2]
    own = own.view(groups, out // groups, width, *own.shape[2:]).transpose(0, 1).flatten(1, 2)
    spread = tuple(a * b for a, b in zip(kernel.stride, operation.dilation))
    full = F.conv_transpose2d(own, first, stride=spread, groups=groups)  # [out / groups, in, ..]
    full = full.view(out // groups, groups, -1, *full.shape[2:]).transpose(0, 1).flatten(0, 1)
    taps = [slice(None, None, window.dilation) for window in windows]
    return Kernel(full[:, :, taps[0], taps[1]].contiguous(), bias, groups, windows, stride)


def _sum_over(weight: torch.Tensor, groups: int, values: torch.Tensor) -> torch.Tensor:
    """Return what a convolution makes of a map that has `values` `[in]` everywhere, borders aside."""
    totals = weight.sum(dim=(2, 3)).view(groups, -1, weight.shape[1])  # [groups, out / groups, in / groups]
    return torch.einsum("goi,gi->go", totals, values.view(groups, -1)).flatten()


def jacobian(graph: Graph, region: Region) -> Kernel:
    """Compute a region's kernel as the derivative of one pixel in the middle of its result, which holds everywhere.

    The map has the size of the recorded one, as constants in the region may. Where already the result for zeros is not
    the same everywhere, the kernel is that of zeros: no kernel would do.
    """
    form = region.form
    size, shape = graph.recording.nodes[form.source].shape[2:], graph.recording.nodes[region.result].shape[2:]
    place = [length // 2 for length in shape]
    per_pass = max(1, _BYTES // (8 * form.in_channels * math.prod(size)))
    zeros = torch.zeros(1, form.in_channels, *size, dtype=torch.float64)
    bias = replay(graph, region, zeros)[0]
    even = bias - bias[:, place[0], place[1]].view(-1, 1, 1)
    bias = bias[:, place[0], place[1]]
    if even.abs().max() > _UNEVEN * bias.abs().max():
        taps = [window.size for window in form.windows]
        weight = zeros.new_zeros(form.out_channels, form.in_channels // form.groups, *taps)
        return Kernel(weight, bias, form.groups, form.windows, form.stride)
    rows = []
    for start in range(0, form.out_channels, per_pass):
        outputs = range(start, min(start + per_pass, form.out_channels))
        x = torch.zeros(len(outputs), form.in_channels, *size, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            y = replay(graph, region, x)[:, :, place[0], place[1]]  # [outputs, out]
            (gradient,) = torch.autograd.grad(y[range(len(outputs)), outputs].sum(), x)
        rows.append(_taps(gradient, form, place))
    weight = torch.cat(rows)
    width = form.in_channels // form.groups
    blocks = weight.view(form.groups, -1, form.in_channels, *weight.shape[2:])
    weight = torch.cat([block[:, group * width : (group + 1) * width] for group, block in enumerate(blocks)])
    return Kernel(weight, bias, form.groups, form.windows, form.stride)


def _taps(gradient: torch.Tensor, form: Form, place: list[int]) -> torch.Tensor:
    """Cut the window of the output pixel `place` out of a gradient `[outputs, in, height, width]`."""
    lengths, starts = gradient.shape[2:], []
    for window, stride, position in zip(form.windows, form.stride, place):
        starts.append(stride * position - window.padding)
    sides = []
    for window, start, length in zip(form.windows, starts, lengths):
        sides.append((max(0, -start), max(0, start + window.extent - length)))
    gradient = F.pad(gradient, [*sides[1], *sides[0]])
    cuts = []
    for window, start, side in zip(form.windows, starts, sides):
        cuts.append(slice(start + side[0], start + side[0] + window.extent, window.dilation))
    return gradient[:, :, cuts[0], cuts[1]]


def error_of(graph: Graph, region: Region, kernel: Kernel) -> float:
    """Return the largest difference between `kernel` and the region on a random map, relative to the largest output.

    Both compute in float64. Infinite if their outputs have other shapes, or aren't finite.
    """
    form = region.form
    recorded = graph.recording.nodes[form.source].shape[2:]
    size = recorded
    if form.is_closed:  # any size does: borders on both sides, and every remainder of the stride the recorded one has
        size = [window.extent + step for window, step in zip(form.windows, form.stride)]
        size = [length + (full - length) % step for length, full, step in zip(size, recorded, form.stride)]
    x = torch.randn(1, form.in_channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, fused = replay(graph, region, x), kernel(x, form.padding_mode)
    if expected.shape != fused.shape:
        return math.inf
    error = ((fused - expected).abs().max() / expected.abs().max().clamp_min(1e-300)).item()
    return error if math.isfinite(error) else math.inf


def convolution_of(kernel: Kernel, form: Form, like: torch.Tensor) -> nn.Conv2d:
    """Return the `nn.Conv2d` of a kernel, of the dtype and on the device of the tensor `like`."""
    padding, dilation = (tuple(getattr(window, name) for window in kernel.windows) for name in ("padding", "dilation"))
    convolution = nn.Conv2d(
        form.in_channels, form.out_channels, tuple(kernel.weight.shape[2:]), kernel.stride, padding, dilation,
        kernel.groups, padding_mode=form.padding_mode or "zeros", device="meta",
    )  # fmt: skip
    trains = like.requires_grad or not isinstance(like, nn.Parameter)
    weight, bias = (tensor.to(like.device, like.dtype).contiguous() for tensor in (kernel.weight, kernel.bias))
    convolution.weight, convolution.bias = nn.Parameter(weight, trains), nn.Parameter(bias, trains)
    return convolution


def kernel_of(graph: Graph, region: Region) -> tuple[Kernel, str]:
    """Return a region's kernel, and by which method it was found."""
    method: Callable[[Graph, Region], Kernel] = closed_form if region.form.is_closed else jacobian
    return method(graph, region), "closed form" if region.form.is_closed else "Jacobian"
