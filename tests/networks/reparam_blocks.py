"""Blocks of parallel branches as their authors' papers describe them, for tests of fusing; none of this package's code.

ACB: arXiv:1908.03930. DBB: arXiv:2103.13425. OREPA: arXiv:2204.00826. QARepVGG: arXiv:2212.01593. UniRepLKNet:
arXiv:2311.15599.
"""

import torch
import torch.nn.functional as F
from torch import nn


def randomize(model: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Give every batch norm statistics, scales and shifts as of a trained one; returns the model in eval mode."""
    generator = generator or torch.Generator().manual_seed(0)

    def normal(tensor, mean, std):
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_mean", None) is None:
                continue
            normal(module.running_mean, 0, 0.2)
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
            if module.weight is not None:
                normal(module.weight, 1, 0.2)
                normal(module.bias, 0, 0.2)
    return model.eval()


def conv_norm(in_channels, out_channels, size, stride=1, groups=1, dilation=1, padding=None) -> nn.Sequential:
    size = size if isinstance(size, tuple) else (size, size)
    padding = tuple(dilation * (length // 2) for length in size) if padding is None else padding
    convolution = nn.Conv2d(in_channels, out_channels, size, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


class SumOf(nn.Module):
    """The sum of branches, then an activation in the same module."""

    def __init__(self, *branches: nn.Module, act: nn.Module | None = None):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.act = act or nn.Identity()

    def forward(self, x):
        return self.act(sum(branch(x) for branch in self.branches))


def acb(channels: int) -> SumOf:
    """An asymmetric convolution block: a square kernel, and its vertical and horizontal skeleton."""
    return SumOf(*(conv_norm(channels, channels, size) for size in ((3, 3), (3, 1), (1, 3))), act=nn.ReLU())


class NormAndPad(nn.Module):
    """Batch norm, then padding with what it makes of zero, as a DBB pads inside of a branch."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.norm, self.padding = nn.BatchNorm2d(channels), padding

    def forward(self, x):
        norm, p = self.norm, self.padding
        value = norm.bias.detach() - norm.running_mean * norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
        value = value.view(1, -1, 1, 1)
        y = F.pad(norm(x), [p] * 4)
        y[:, :, 0:p, :] = value
        y[:, :, -p:, :] = value
        y[:, :, :, 0:p] = value
        y[:, :, :, -p:] = value
        return y


def dbb(in_channels: int, out_channels: int, size: int = 3, stride: int = 1) -> SumOf:
    """A diverse branch block: k x k, 1 x 1, 1 x 1 then average pooling, 1 x 1 then k x k."""
    p = size // 2
    averaged = nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        NormAndPad(out_channels, p),
        nn.AvgPool2d(size, stride, 0),
        nn.BatchNorm2d(out_channels),
    )
    sequence = nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 1, bias=False),
        NormAndPad(in_channels, p),
        *conv_norm(in_channels, out_channels, size, stride, padding=0),
    )
    plain = conv_norm(in_channels, out_channels, size, stride), conv_norm(in_channels, out_channels, 1, stride)
    return SumOf(*plain, averaged, sequence, act=nn.ReLU())


class ZeroPadded(nn.Module):
    """A 1 x 1 and a 3 x 3 convolution in a row that pads with zeros in between: no single convolution at the border."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = conv_norm(channels, channels, 1), conv_norm(channels, channels, 3)

    def forward(self, x):
        return self.second(self.first(x))


class OREPA(nn.Module):
    """Branches that are combined before the convolution, each scaled per channel, with one norm after."""

    def __init__(self, channels: int):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(channels, channels, 3, 3))
        self.point = nn.Parameter(torch.randn(channels, channels, 1, 1))
        self.scales = nn.Parameter(torch.randn(2, channels, 1, 1, 1))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        kernel = self.kernel * self.scales[0] + F.pad(self.point, [1] * 4) * self.scales[1]
        return self.norm(F.conv2d(x, kernel, padding=1))


class QARepVGG(nn.Module):
    """Branches, the bare input one of them, with the norm after the sum, and an activation."""

    def __init__(self, channels: int):
        super().__init__()
        self.dense = conv_norm(channels, channels, 3)
        self.point = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm, self.act = nn.BatchNorm2d(channels), nn.ReLU()

    def forward(self, x):
        return self.act(self.norm(self.dense(x) + self.point(x) + x))


def dilated(channels: int, size: int = 13) -> SumOf:
    """UniRepLKNet's dilated block: a large depthwise kernel and dilated ones inside it."""
    inner = [(5, 1), (7, 2), (3, 3), (3, 4), (3, 5)]
    branches = [conv_norm(channels, channels, length, groups=channels, dilation=step) for length, step in inner]
    return SumOf(conv_norm(channels, channels, size, groups=channels), *branches)


class Scaled(nn.Module):
    """As RepMixer: the input plus a scaled difference of two branches."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.mixer = nn.BatchNorm2d(channels), conv_norm(channels, channels, 3, groups=channels)
        self.scale = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x):
        return x + self.scale * (self.mixer(x) - self.norm(x))


def network(block: nn.Module, channels: int = 8, out_channels: int | None = None) -> nn.Sequential:
    """Put a block between two convolutions with activations, which it can't be fused with."""
    first = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU())
    return randomize(nn.Sequential(first, block, nn.ReLU(), nn.Conv2d(out_channels or channels, 5, 1)))
