"""Blocks of branches of other networks as this package's own, which can be trained on, also with quantized weights."""

from collections.abc import Iterable

import torch
from torch import nn

from ..runtime.reparameterization import Branch, ConvBranch, IdentityBranch, ReparamConv2d
from .branch_sums import BranchSum, NormedBranch, SumFinder
from .recording import Recording


class BlockMaker:
    """Makes a [`ReparamConv2d`] of a region that is a sum of branches in batch norms; of the same parameters."""

    def __init__(self, model: nn.Module, recording: Recording):
        self.modules = dict(model.named_modules())  # as they are before they are replaced
        self.sums = {_modules_of(branches): branches for branches in SumFinder(model, recording).normed}

    def make(self, parts: Iterable[str], convolution: nn.Conv2d) -> ReparamConv2d | None:
        """Return the block that computes what the modules among `parts` do, which fuses into `convolution`.

        `None` where that isn't known: if more than normalized convolutions, and norms, is in the region, or a kernel is
        padded in another way than to keep the size.
        """
        branches = self.sums.get(frozenset(name for name in parts if not name.endswith("()")))
        if branches is None or not _has_side(convolution):
            return None
        made = [self._branch(branch, convolution) for branch in (*branches.dense, *branches.others)]
        if None in made:
            return None
        block = ReparamConv2d(
            convolution.in_channels, convolution.out_channels, convolution.kernel_size[0], convolution.stride[0],
            convolution.groups, made,
        )  # fmt: skip
        return block.train(convolution.training) if _is_the_same(block, convolution) else None

    def _branch(self, branch: NormedBranch, whole: nn.Conv2d) -> Branch | None:
        norm = _plain_norm(self.modules[branch.norm])
        if norm is None:
            return None
        if branch.convolution is None:
            made = IdentityBranch(whole.out_channels, whole.groups, norm.eps)
        else:
            conv = self.modules[branch.convolution]
            if not _keeps_size(conv) or conv.groups != whole.groups or conv.stride != whole.stride:
                return None
            made = ConvBranch(1, 1, conv.kernel_size, eps=norm.eps)
            made.conv = conv
        made.norm = norm
        return made


def _modules_of(branches: BranchSum) -> frozenset[str]:
    every = (*branches.dense, *branches.others)
    return frozenset(name for branch in every for name in (branch.norm, branch.convolution) if name is not None)


def _has_side(convolution: nn.Conv2d) -> bool:
    """Tell whether a convolution has one kernel size and one stride for both sides, as blocks have."""
    return len(set(convolution.kernel_size)) == len(set(convolution.stride)) == 1 and _keeps_size(convolution)


def _keeps_size(conv: nn.Module) -> bool:
    """Tell whether a convolution without stride would keep the size, and has no bias that a branch has not."""
    return (
        type(conv) is nn.Conv2d
        and all(size % 2 and padding == size // 2 for size, padding in zip(conv.kernel_size, conv.padding))
        and set(conv.dilation) == {1}
        and conv.padding_mode == "zeros"
    )


def _plain_norm(norm: nn.Module) -> nn.BatchNorm2d | None:
    """Return a batch norm as PyTorch has it, with the parameters and buffers of one that may have an activation."""
    if type(norm) is nn.BatchNorm2d:
        return norm
    if not isinstance(norm, nn.BatchNorm2d) or not norm.track_running_stats:
        return None
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum).train(norm.training)
    plain.weight, plain.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers(recurse=False):
        plain.register_buffer(name, buffer)
    return plain


def _is_the_same(block: ReparamConv2d, convolution: nn.Conv2d) -> bool:
    """Tell whether a block fuses into a convolution: it adds all branches, and no bias of a convolution is lost."""
    with torch.no_grad():
        pairs = zip(block.equivalent(), (convolution.weight, convolution.bias))
        return all((one - other).abs().max() <= 1e-4 * other.abs().max() for one, other in pairs)
