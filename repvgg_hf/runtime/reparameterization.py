"""Linear branches that can be summed into one convolution, with outlier-aware batch normalization (OABN).

A *branch* is a module with two methods:

    branch(x, bound) -> y                         what it adds to the block's output
    branch.equivalent(bound) -> (kernel, bias)    the same as one convolution, differentiably

`kernel` is `[out, in / groups, height, width]`, of the branch's own odd size, and `bias` is `[out]`. Everything else in
the package (fusing, OABN, training on the equivalent kernel, analysis) works on these two and never asks which network
the block is in.
"""

import copy
import re
from functools import reduce
from operator import add, iadd

import torch
import torch.nn.functional as F
from torch import nn


class _BoundedWeight(torch.autograd.Function):
    """Clip `weight` to `[-limit, limit]`. A clipped entry receives only the gradient that would bring it back inside.

    Plain clipping has no gradient outside the bound: an entry that once left would stay there for good (but for weight
    decay). Passing every gradient would let the parameter drift ever further out while its clipped value stays.
    """

    @staticmethod
    def forward(ctx, weight, limit):
        ctx.save_for_backward(weight, limit)
        return torch.maximum(torch.minimum(weight, limit), -limit)

    @staticmethod
    def backward(ctx, grad_output):
        weight, limit = ctx.saved_tensors
        # gradient descent subtracts the gradient, so an equal sign means a step towards zero
        keep = (weight.abs() <= limit) | (weight * grad_output > 0)
        return grad_output * keep, None


def outlier_bounded_weight(norm: nn.Module, kernel_max: torch.Tensor | float, bound: torch.Tensor) -> torch.Tensor:
    """The batch norm weight `[out]`, clipped so that the branch adds at most `bound` to any entry of the fused kernel.

    The branch contributes `weight / sqrt(running_var + eps) * W` to the fused kernel. With `kernel_max = max|W|` per
    output channel, the clip is `bound * sqrt(running_var + eps) / kernel_max`.
    """
    deviation = (norm.running_var + getattr(norm, "eps", 1e-5)).sqrt()
    return _BoundedWeight.apply(norm.weight, bound * deviation / kernel_max)


def batch_norm(norm: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Apply `norm` to `x` with `weight` in the place of its own.

    The norm stays a stock `nn.BatchNorm2d`, so that tools which replace it (SyncBatchNorm, the frozen norms of
    detection models) still find it; whatever they put there runs its own forward with the substituted weight.
    """
    if type(norm) is not nn.BatchNorm2d or norm.momentum is None or not norm.track_running_stats:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))
    if norm.training:
        norm.num_batches_tracked.add_(1)
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, weight, norm.bias, norm.training, norm.momentum, norm.eps
    )


def _scale_and_bias(norm: nn.Module, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch norm in eval mode as `y = scale * x + bias`, both `[out]`."""
    scale = weight / (norm.running_var + getattr(norm, "eps", 1e-5)).sqrt()
    return scale, norm.bias - norm.running_mean * scale


class ConvBranch(nn.Module):
    """A convolution without bias, padded to keep the size, then batch normalization."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, groups=1, eps=1e-5, momentum=0.1):
        super().__init__()
        padding = tuple(size // 2 for size in kernel_size)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum)

    def norm_weight(self, bound: torch.Tensor | None) -> torch.Tensor:
        if bound is None:
            return self.norm.weight
        kernel_max = self.conv.weight.detach().abs().amax(dim=(1, 2, 3)).clamp_min(1e-12)
        return outlier_bounded_weight(self.norm, kernel_max, bound)

    def forward(self, x: torch.Tensor, bound: torch.Tensor | None = None) -> torch.Tensor:
        y = self._convolve(x)
        return self.norm(y) if bound is None else batch_norm(self.norm, y, self.norm_weight(bound))

    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        few_channels = self.conv.in_channels // self.conv.groups < 16
        if not few_channels or self.conv.kernel_size != (1, 1) or self.conv.stride == (1, 1):
            return self.conv(x)
        # The same as the strided convolution, whose gradient on the CPU writes outside its memory with fewer than 16
        # input channels that come last (torch 2.14, uxlfoundation/oneDNN#6035): a crash, or wrong values in silence.
        step_h, step_w = self.conv.stride
        return F.conv2d(x[:, :, ::step_h, ::step_w], self.conv.weight, groups=self.conv.groups)

    def equivalent(self, bound: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        scale, bias = _scale_and_bias(self.norm, self.norm_weight(bound))
        return self.conv.weight * scale.view(-1, 1, 1, 1), bias


class IdentityBranch(nn.Module):
    """Batch normalization of the block's input: a convolution with ones on the center of the channel diagonal."""

    def __init__(self, channels: int, groups: int = 1, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.groups = groups
        self.norm = nn.BatchNorm2d(channels, eps=eps, momentum=momentum)

    def norm_weight(self, bound: torch.Tensor | None) -> torch.Tensor:
        return self.norm.weight if bound is None else outlier_bounded_weight(self.norm, 1.0, bound)

    def forward(self, x: torch.Tensor, bound: torch.Tensor | None = None) -> torch.Tensor:
        return self.norm(x) if bound is None else batch_norm(self.norm, x, self.norm_weight(bound))

    def equivalent(self, bound: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        scale, bias = _scale_and_bias(self.norm, self.norm_weight(bound))
        # output channel o reads input channel o, which is number o % width inside its group
        width = scale.numel() // self.groups
        diagonal = torch.eye(width, dtype=scale.dtype, device=scale.device).repeat(self.groups, 1)  # [out, in/groups]
        return (diagonal * scale[:, None])[:, :, None, None], bias


class _AddAtCenter(torch.autograd.Function):
    """`kernel` with a `smaller` one added to its center, in place: no pass over the rest, nor over its gradient."""

    @staticmethod
    def forward(ctx, kernel, smaller):
        ctx.size = smaller.shape[2:]
        ctx.mark_dirty(kernel)
        _center(kernel, ctx.size).add_(smaller)
        return kernel

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, _center(grad_output, ctx.size)


def _center(kernel: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The view `[..., height, width]` of that odd `size` in the middle of a `kernel`."""
    for dim, inner in zip((2, 3), size):
        kernel = kernel.narrow(dim, (kernel.shape[dim] - inner) // 2, inner)
    return kernel


def parse_branch(name: str) -> tuple[int, int] | None:
    """Kernel size of a branch name such as `"1x3"`; `None` for `"identity"`. Raises `ValueError` for anything else."""
    if name == "identity":
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", name)
    if match is None or any(int(size) % 2 == 0 for size in match.groups()):
        raise ValueError(
            f'Unknown branch {name!r} in block_branches: use "identity" or "<height>x<width>" with odd sizes ("3x3").'
        )
    return int(match[1]), int(match[2])


class ReparamConv2d(nn.Module):
    """A sum of linear branches that fuses into one `nn.Conv2d`.

    Args:
        in_channels, out_channels, kernel_size, stride, groups: of the convolution that it fuses into (padding
            `kernel_size // 2`).
        branches: names of the branches, see [`parse_branch`]. At least one is dense (`kernel_size` both ways);
            `"identity"` is left out where the block changes the shape.
        oabn_threshold: with a number k, outlier-aware batch normalization: every branch but the dense ones contributes
            at most k standard deviations of the dense branches' contribution to any entry of the fused kernel. `None`
            for plain batch normalization.

    `weight_fake_quant`, when set, is a module that maps the fused kernel to its quantized value: the forward pass then
    runs one convolution on the fused kernel, with the batch norm statistics frozen.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        branches: tuple[str, ...] = ("3x3", "1x1", "identity"),
        eps: float = 1e-5,
        momentum: float = 0.1,
        oabn_threshold: float | None = None,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.groups = (kernel_size, kernel_size), stride, groups
        self.oabn_threshold = oabn_threshold
        self.branches = nn.ModuleDict()
        self.dense_names = []
        self.weight_fake_quant: nn.Module | None = None
        for position, name in enumerate(branches):
            size = parse_branch(name)
            key = name if name not in self.branches else f"{name}_{position}"
            if size is None:
                if in_channels == out_channels and stride == 1:
                    self.branches[key] = IdentityBranch(out_channels, groups, eps, momentum)
                continue
            if max(size) > kernel_size:
                raise ValueError(f"Branch {name!r} is larger than the {kernel_size}x{kernel_size} block it is part of.")
            self.branches[key] = ConvBranch(in_channels, out_channels, size, stride, groups, eps, momentum)
            if size == self.kernel_size:
                self.dense_names.append(key)
        if not self.dense_names:
            raise ValueError(f"block_branches={tuple(branches)} needs a dense {kernel_size}x{kernel_size} branch.")

    @torch.no_grad()
    def outlier_bound(self) -> torch.Tensor | None:
        """`oabn_threshold` times the standard deviation of the dense branches' entries in the fused kernel, 0-dim.

        Computed from each kernel's row sums, which reads the kernel twice and allocates nothing of its size.
        """
        if self.oabn_threshold is None:
            return None
        variance = 0.0
        for name in self.dense_names:  # parallel dense branches are near independent: their variances add
            branch = self.branches[name]
            scale, _ = _scale_and_bias(branch.norm, branch.norm.weight)
            weight = branch.conv.weight
            total = (scale * weight.sum(dim=(1, 2, 3))).sum()
            square = (scale * torch.linalg.vector_norm(weight, dim=(1, 2, 3))).square().sum()
            variance = variance + (square - total**2 / weight.numel()).clamp_min(0) / (weight.numel() - 1)
        return self.oabn_threshold * variance.sqrt()

    def bounds(self) -> dict[str, torch.Tensor | None]:
        """The OABN bound of every branch's contribution; `None` for the dense ones and without OABN."""
        bound = self.outlier_bound() if len(self.branches) > len(self.dense_names) else None
        return {name: None if name in self.dense_names else bound for name in self.branches}

    def equivalent(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The fused `(kernel [out, in / groups, k, k], bias [out])`, differentiable in every branch's parameters."""
        bounds = self.bounds()
        parts = [branch.equivalent(bounds[name]) for name, branch in self.branches.items()]
        kernels, biases = zip(*sorted(parts, key=lambda part: part[0].numel(), reverse=True))  # a dense one first
        return reduce(_AddAtCenter.apply, kernels), reduce(add, biases)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight_fake_quant is not None:
            kernel, bias = self.equivalent()
            padding = self.kernel_size[0] // 2
            return F.conv2d(x, self.weight_fake_quant(kernel), bias, self.stride, padding, groups=self.groups)
        return self._sum_of_branches(x)

    def _sum_of_branches(self, x: torch.Tensor) -> torch.Tensor:
        bounds = self.bounds()
        # in place: batch norm's gradient needs its input, not its output
        return reduce(iadd, (branch(x, bounds[name]) for name, branch in self.branches.items()))

    @torch.no_grad()
    def fuse(self, tolerance: float = 1e-4) -> nn.Conv2d:
        """The equivalent float32 `nn.Conv2d`, checked on a random batch. The block itself is not changed.

        Raises `ValueError` when its output differs from the branches' in eval mode by more than `tolerance`, relative
        to the largest output.
        """
        block = copy.deepcopy(self).float().eval()
        kernel, bias = block.equivalent()
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.kernel_size[0] // 2,
            groups=self.groups, device="meta",
        )  # fmt: skip
        conv.weight = nn.Parameter(kernel.contiguous(memory_format=torch.channels_last))
        conv.bias = nn.Parameter(bias)
        # checked in float64 on the CPU: a GPU may run float32 convolutions in TF32, too coarse
        sample = torch.randn(2, self.in_channels, 4, 4, generator=torch.Generator().manual_seed(0)).double()
        expected = block.to("cpu", torch.float64)._sum_of_branches(sample)
        fused = F.conv2d(sample, kernel.cpu().double(), bias.cpu().double(), conv.stride, conv.padding, 1, conv.groups)
        error = ((fused - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
        if not error <= tolerance:  # also true for NaN
            raise ValueError(
                f"The fused convolution differs from its branches by {error:.2e} of the largest output (at most "
                f"{tolerance:.0e} is expected): look for NaN, infinite or extreme values in its weights and norms."
            )
        return conv

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"groups={self.groups}, oabn_threshold={self.oabn_threshold}"
        )


def checkpoint_once(checkpoint_function, layer_forward, *args):
    """Run a layer under gradient checkpointing without counting its batch twice.

    The layer runs again in the backward pass. Undoing the first run's update of the buffers makes the second one see
    the running statistics (and the OABN bounds from them) that the first one saw, and leaves one update in total.
    """
    # re-entrant checkpointing gives a layer no gradients if its input needs none, as the stem's
    if not torch.is_grad_enabled() or not any(arg.requires_grad for arg in args):
        return layer_forward(*args)
    buffers = list(layer_forward.args[0].buffers())
    before = [buffer.clone() for buffer in buffers]
    output = checkpoint_function(layer_forward, *args)
    with torch.no_grad():
        for buffer, value in zip(buffers, before):
            buffer.copy_(value)
    return output


def require_in_memory(model: nn.Module) -> None:
    """Raise `ValueError` naming the first weight of `model` that was offloaded by a `device_map`."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(
                f"{name} is offloaded to disk or another device, and this needs every weight in memory: load the "
                "model without device_map, or with device_map='cpu'."
            )


def fused_convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The fused `nn.Conv2d` of every `ReparamConv2d` in `model`, by name, in the block's dtype.

    `model` is not changed. Raises `ValueError` naming the block whose fused form is wrong, or an offloaded weight.
    """
    require_in_memory(model)
    fused = {}
    for name, block in model.named_modules():
        if isinstance(block, ReparamConv2d):
            try:
                fused[name] = block.fuse().to(next(block.parameters()).dtype)
            except ValueError as error:
                raise ValueError(f"Block {name!r} can't be fused. {error}") from error
    return fused


__all__ = ["ConvBranch", "IdentityBranch", "ReparamConv2d", "checkpoint_once", "fused_convolutions"]
