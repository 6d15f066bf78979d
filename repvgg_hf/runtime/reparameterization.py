"""Linear branches that are summed into one convolution, with outlier-aware batch normalization (OABN).

Fusing adds what the branches contribute to one kernel. A branch that contributes much to few entries, as the identity
does on the center of the channel diagonal, makes outliers there, which stretch the range that a few bits must cover.
OABN limits what every such branch contributes to an entry: its *bound*.

A *branch* is a module with these members, on which fusing, OABN, training on the equivalent kernel and analysis work
without asking which network the block is in; [`Branch`] is a base class for them:

    branch.kernel_size                            (height, width), both odd
    branch.diagonal                               whether output channel o reads input channel o alone
    branch(x, bound) -> y                         what it adds to the block's output
    branch.equivalent(bound) -> (kernel, bias)    the same as one convolution, differentiably
    branch.contribution_variance() -> variance    of the entries of its unbounded kernel, 0-dim

`kernel` is `[out, in / groups, height, width]`, of the branch's own size, and `bias` is `[out]`. `bound` is a 0-dim
tensor, the largest magnitude that the branch may contribute to an entry of the fused kernel, or `None`.
"""

import copy
import re
from collections.abc import Sequence
from functools import reduce
from operator import add, iadd

import torch
import torch.nn.functional as F
from torch import nn

from .oabn import outlier_bounded_weight
from .tensors import at_least_float32, kernel_of, require_in_memory, require_unpruned


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


def _scale_and_bias(norm: nn.Module, weight: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(scale, bias)`, both `[out]`, of batch norm in eval mode, which is `y = scale * x + bias`."""
    scale = (1 if weight is None else weight) / (norm.running_var + getattr(norm, "eps", 1e-5)).sqrt()
    return scale, (0 if norm.bias is None else norm.bias) - norm.running_mean * scale


class Branch(nn.Module):
    """Base class of branches: a linear map that [`ReparamConv2d`] adds to others. See the top of this file."""

    kernel_size: tuple[int, int] = (1, 1)
    diagonal = False

    def forward(self, x: torch.Tensor, bound: torch.Tensor | None = None) -> torch.Tensor:
        raise NotImplementedError

    def equivalent(self, bound: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the branch as one convolution in eval mode: `(kernel [out, in / groups, height, width], bias [out])`.

        The kernel is a parameter, or a new tensor: the block adds the other branches' kernels to it in place.
        """
        raise NotImplementedError

    def contribution_variance(self) -> torch.Tensor:
        """Return the variance of the entries of its kernel without a bound, 0-dim."""
        return self.equivalent()[0].var()


class ConvBranch(Branch):
    """A branch that is a convolution without bias, padded to keep the size, then batch normalization."""

    fuses_channels_last = False  # whether its kernel is rearranged for fusing, as quantizing in rows wants it

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, groups=1, eps=1e-5, momentum=0.1):
        super().__init__()
        self.kernel_size = tuple(kernel_size)
        padding = tuple(size // 2 for size in kernel_size)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum)

    def kernel(self) -> torch.Tensor:
        """Return the convolution's kernel, for fusing."""
        kernel = kernel_of(self.conv)
        return kernel.contiguous(memory_format=torch.channels_last) if self.fuses_channels_last else kernel

    def norm_weight(self, bound: torch.Tensor | None) -> torch.Tensor | None:
        if bound is None:
            return self.norm.weight
        kernel_max = at_least_float32(kernel_of(self.conv).detach().abs().amax(dim=(1, 2, 3))).clamp_min(1e-12)
        return outlier_bounded_weight(self.norm, kernel_max, bound)

    def forward(self, x: torch.Tensor, bound: torch.Tensor | None = None) -> torch.Tensor:
        y = self._convolve(x)
        return self.norm(y) if bound is None else batch_norm(self.norm, y, self.norm_weight(bound))

    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        conv = self.conv
        if not isinstance(conv, nn.Conv2d):  # wrapped, as by peft for LoRA: only with the channels first is it safe
            return conv(x if self.kernel_size != (1, 1) else x.contiguous())
        few_channels = conv.in_channels // conv.groups < 16
        if not few_channels or conv.kernel_size != (1, 1) or conv.stride == (1, 1):
            return conv(x)
        # The same as the strided convolution, whose gradient on the CPU writes outside its memory with fewer than 16
        # input channels that come last (torch 2.14, uxlfoundation/oneDNN#6035): a crash, or wrong values in silence.
        step_h, step_w = conv.stride
        return F.conv2d(x[:, :, ::step_h, ::step_w], conv.weight, groups=conv.groups)

    def equivalent(self, bound: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        scale, bias = _scale_and_bias(self.norm, self.norm_weight(bound))
        return self.kernel() * scale.view(-1, 1, 1, 1), bias

    def contribution_variance(self) -> torch.Tensor:
        """Compute the variance from sums per channel, which read the kernel twice and allocate nothing of its size."""
        scale = at_least_float32(_scale_and_bias(self.norm, self.norm.weight)[0])
        weight = at_least_float32(self.kernel())
        total = (scale * weight.sum(dim=(1, 2, 3))).sum()
        square = (scale * torch.linalg.vector_norm(weight, dim=(1, 2, 3))).square().sum()
        return (square - total**2 / weight.numel()).clamp_min(0) / (weight.numel() - 1)


class IdentityBranch(Branch):
    """A branch that is batch normalization of the block's input: a convolution with ones on the channel diagonal."""

    diagonal = True

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
    """Add a `smaller` kernel to the center of `kernel`, in place: no pass over the rest, nor over its gradient."""

    @staticmethod
    def forward(ctx, kernel, smaller):
        ctx.size = smaller.shape[2:]
        ctx.mark_dirty(kernel)
        _center(kernel, ctx.size).add_(smaller)
        return kernel

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, _center(grad_output, ctx.size)


def _add_at_center(kernel: torch.Tensor, smaller: torch.Tensor) -> torch.Tensor:
    """Return `kernel` plus a `smaller` one at its center; `kernel` may be overwritten."""
    if torch.compiler.is_compiling():  # which fuses this, and before torch 2.11 refuses a function in place
        height, width = ((kernel.shape[dim] - smaller.shape[dim]) // 2 for dim in (2, 3))
        return kernel + F.pad(smaller, (width, width, height, height))
    if torch.is_grad_enabled():
        return _AddAtCenter.apply(kernel, smaller)
    _center(kernel, smaller.shape[2:]).add_(smaller)
    return kernel


def _center(kernel: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return the view `[..., height, width]` of that odd `size` in the middle of a `kernel`."""
    for dim, inner in zip((2, 3), size):
        kernel = kernel.narrow(dim, (kernel.shape[dim] - inner) // 2, inner)
    return kernel


def parse_branch(name: str) -> tuple[int, int] | None:
    """Return the kernel size that a branch name such as `"1x3"` states, or `None` for `"identity"`.

    Raises `ValueError` for any other name.
    """
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
        in_channels, out_channels, kernel_size, stride, groups (`int`): those of the convolution that it fuses into,
            whose padding is `kernel_size // 2`.
        branches (`list[str | nn.Module]`): names of branches, see [`parse_branch`], or modules that are branches, see
            the top of this file. At least one is dense: as large as the kernel, and between all channels. `"identity"`
            is left out where the block changes the shape.
        eps, momentum (`float`): those of the batch norms of branches that are given by name.
        oabn_threshold (`float`, *optional*): with a number k, outlier-aware batch normalization: every branch but the
            dense ones contributes at most k standard deviations of the dense branches' contribution to any entry of
            the fused kernel. `None` for plain batch normalization.

    Raises `ValueError` for an unknown name, a branch larger than the kernel, or no dense one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        branches: Sequence[str | nn.Module] = ("3x3", "1x1", "identity"),
        eps: float = 1e-5,
        momentum: float = 0.1,
        oabn_threshold: float | None = None,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.groups = (kernel_size, kernel_size), stride, groups
        self.oabn_threshold = oabn_threshold
        self.branches = nn.ModuleDict()
        for position, entry in enumerate(branches):
            branch = entry if isinstance(entry, nn.Module) else self._named_branch(entry, eps, momentum)
            if branch is None:
                continue
            name = entry if isinstance(entry, str) else type(entry).__name__
            _check_branch(branch, name, self.kernel_size)
            self.branches[name if name not in self.branches else f"{name}_{position}"] = branch
        if not self.dense_names:
            raise ValueError(f"block_branches={tuple(branches)} needs a dense {kernel_size}x{kernel_size} branch.")

    def _named_branch(self, name: str, eps: float, momentum: float) -> Branch | None:
        """Make the branch called `name`; `None` for an identity where the block changes the shape."""
        size = parse_branch(name)
        if size is not None:
            return ConvBranch(self.in_channels, self.out_channels, size, self.stride, self.groups, eps, momentum)
        if self.in_channels == self.out_channels and self.stride == 1:
            return IdentityBranch(self.out_channels, self.groups, eps, momentum)
        return None

    @property
    def dense_names(self) -> list[str]:
        """The names of the branches that are as large as the kernel: their entries measure the others' bound."""
        size = self.kernel_size
        return [name for name, branch in self.branches.items() if branch.kernel_size == size and not branch.diagonal]

    @torch.no_grad()
    def outlier_bound(self) -> torch.Tensor | None:
        """Return `oabn_threshold` times the standard deviation of what the dense branches put into the fused kernel.

        The result is 0-dim, and `None` without OABN.
        """
        if self.oabn_threshold is None:
            return None
        # parallel dense branches are near independent: their variances add
        variance = sum(self.branches[name].contribution_variance() for name in self.dense_names)
        return self.oabn_threshold * variance.sqrt()

    def bounds(self) -> dict[str, torch.Tensor | None]:
        """Return the OABN bound of every branch's contribution, by name; `None` for dense ones and without OABN."""
        dense = self.dense_names
        bound = self.outlier_bound() if len(self.branches) > len(dense) else None
        return {name: None if name in dense else bound for name in self.branches}

    def equivalent(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the fused `(kernel [out, in / groups, k, k], bias [out])`, differentiable in all parameters."""
        bounds = self.bounds()
        parts = [branch.equivalent(bounds[name]) for name, branch in self.branches.items()]
        parts.sort(key=lambda part: part[0].numel(), reverse=True)  # a dense one first
        (kernel, *others), biases = zip(*parts)
        if isinstance(kernel, nn.Parameter):
            kernel = kernel.clone()
        return reduce(_add_at_center, others, kernel), reduce(add, biases)

    def convolve(self, x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Convolve `x` `[batch, in, height, width]` with a fused `kernel` and `bias`, as [`equivalent`] gives them."""
        return F.conv2d(x, kernel, bias, self.stride, self.kernel_size[0] // 2, groups=self.groups)

    def sum_of_branches(self, x: torch.Tensor) -> torch.Tensor:
        """Add up what the branches give for `x` `[batch, in, height, width]`."""
        bounds = self.bounds()
        outputs = (branch(x, bounds[name]) for name, branch in self.branches.items())
        total = next(outputs)
        if total is x:  # of a branch that does nothing
            total = total.clone()
        # in place: batch norm's gradient needs its input, not its output
        return reduce(iadd, outputs, total)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sum_of_branches(x)

    def empty_convolution(self, **kwargs) -> nn.Conv2d:
        """Return an `nn.Conv2d` of the shape that the block fuses into; `kwargs` may be its device and dtype.

        It is in training mode if the block is: quantization-aware training computes other outputs there.
        """
        return nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.kernel_size[0] // 2,
            groups=self.groups, **kwargs,
        ).train(self.training)  # fmt: skip

    @torch.no_grad()
    def fuse(self, tolerance: float = 1e-4) -> nn.Conv2d:
        """Return the equivalent float32 `nn.Conv2d`, checked on a random batch. The block itself is not changed.

        Raises `ValueError` when its output differs from the branches' in eval mode by more than `tolerance`, relative
        to the largest output.
        """
        block = copy.deepcopy(self).float().eval()
        kernel, bias = block.equivalent()
        conv = self.empty_convolution(device="meta")
        conv.weight = nn.Parameter(kernel.contiguous())
        conv.bias = nn.Parameter(bias)
        # checked in float64 on the CPU: a GPU may run float32 convolutions in TF32, too coarse
        sample = torch.randn(2, self.in_channels, 4, 4, generator=torch.Generator().manual_seed(0)).double()
        expected = block.to("cpu", torch.float64).sum_of_branches(sample)
        fused = self.convolve(sample, kernel.cpu().double(), bias.cpu().double())
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


def _check_branch(branch: nn.Module, name: str, block_size: tuple[int, int]) -> None:
    """Raise `ValueError` for a module that is no branch, or one that is larger than the block it is part of."""
    members = ("kernel_size", "diagonal", "equivalent", "contribution_variance")
    missing = [member for member in members if not hasattr(branch, member)]
    if missing:
        raise ValueError(f"{name} is no branch, it has no {missing[0]!r}: derive it from repvgg_hf's Branch.")
    if any(size > block for size, block in zip(branch.kernel_size, block_size)):
        block = "x".join(map(str, block_size))
        raise ValueError(f"Branch {name!r} is larger than the {block} block it is part of.")


@torch.compiler.disable(recursive=False)
def checkpoint_once(checkpoint_function, layer, layer_forward, *args):
    """Run a `layer` under gradient checkpointing without counting its batch twice.

    The layer runs again in the backward pass. Undoing the first run's update of the buffers makes the second one see
    the running statistics (and the OABN bounds from them) that the first one saw, and leaves one update in total.
    `torch.compile` compiles what the layer does, and not this: its own checkpointing computes again with the statistics
    that were updated (torch 2.14).

    `checkpoint_function(layer_forward, *args)` is what Transformers would run.
    """
    reentrant = getattr(checkpoint_function, "keywords", {}).get("use_reentrant") is not False
    needs_gradient = any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)
    # re-entrant checkpointing gives a layer no gradients if its input needs none, as the stem's
    if not torch.is_grad_enabled() or (reentrant and not needs_gradient):
        return layer_forward(*args)
    buffers = list(layer.buffers())
    before = [buffer.clone() for buffer in buffers]
    output = checkpoint_function(layer_forward, *args)
    with torch.no_grad():
        for buffer, value in zip(buffers, before):
            buffer.copy_(value)
    return output


def fused_convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Return the fused `nn.Conv2d` of every `ReparamConv2d` in `model`, by name, in the block's dtype.

    `model` is not changed. Raises `ValueError` naming the block whose fused form is wrong, an offloaded weight,
    or a pruned one.
    """
    require_in_memory(model)
    require_unpruned(model)
    fused = {}
    for name, block in model.named_modules():
        if isinstance(block, ReparamConv2d):
            try:
                fused[name] = block.fuse().to(next(block.parameters()).dtype)
            except ValueError as error:
                raise ValueError(f"Block {name!r} can't be fused. {error}") from error
    return fused


__all__ = ["Branch", "ConvBranch", "IdentityBranch", "ReparamConv2d", "checkpoint_once", "fused_convolutions"]
