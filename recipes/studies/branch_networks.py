"""Small networks of blocks with parallel branches, for images of 32 pixels: what the study of generalization trains."""

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models.byobnet import MobileOneBlock, RepVggBlock
from timm.models.repvit import RepVggDw
from torch import nn

STEM, WIDTHS, DEPTHS = 32, (48, 96, 160, 192), (1, 2, 3, 1)


def conv_norm(inputs: int, outputs: int, size=(3, 3), stride: int = 1, padding=None) -> nn.Sequential:
    """Make a convolution followed by batch normalization."""
    padding = tuple(side // 2 for side in size) if padding is None else padding
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding, bias=False)
    return nn.Sequential(OrderedDict(conv=convolution, norm=nn.BatchNorm2d(outputs)))


class Branches(nn.Module):
    """The sum of some modules, with batch normalization after it if wanted."""

    def __init__(self, branches: list[nn.Module], norm: nn.Module | None = None):
        super().__init__()
        self.branches, self.norm = nn.ModuleList(branches), nn.Identity() if norm is None else norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return self.norm(total)


class PaddedNorm(nn.BatchNorm2d):
    """Batch normalization, then padding by one pixel with what it gives for zeros, as DBB pads between convolutions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.pad(super().forward(x), [1] * 4)
        border = self.bias - self.running_mean * self.weight / (self.running_var + self.eps).sqrt()
        border = border.detach().view(1, -1, 1, 1)
        y[:, :, 0:1, :] = y[:, :, -1:, :] = border
        y[:, :, :, 0:1] = y[:, :, :, -1:] = border
        return y


def repvgg(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Make a block of RepVGG (timm's, with the activation outside): 3x3, 1x1 and identity, each normalized."""
    block = RepVggBlock(inputs, outputs, stride=stride)
    block.act = nn.Identity()
    return block


def mobileone(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Make MobileOne's pair (timm's): a depthwise block, then a pointwise one, with two convolutions each."""
    depthwise = MobileOneBlock(inputs, inputs, 3, stride, group_size=1, num_conv_branches=2)
    pointwise = MobileOneBlock(inputs, outputs, 1, num_conv_branches=2)
    pointwise.act = nn.Identity()
    return nn.Sequential(depthwise, pointwise)


def acb(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Make an asymmetric convolution block: 3x3, 1x3 and 3x1 (arXiv 1908.03930)."""
    return Branches([conv_norm(inputs, outputs, size, stride) for size in ((3, 3), (1, 3), (3, 1))])


def dbb(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Make a diverse branch block: 3x3, 1x1, 1x1 then 3x3, and 1x1 then the mean of 3x3 (arXiv 2103.13425)."""
    serial = [nn.Conv2d(inputs, inputs, 1, bias=False), PaddedNorm(inputs)]
    pooled = [nn.Conv2d(inputs, outputs, 1, bias=False), PaddedNorm(outputs), nn.AvgPool2d(3, stride)]
    branches = [
        conv_norm(inputs, outputs, (3, 3), stride),
        conv_norm(inputs, outputs, (1, 1), stride),
        nn.Sequential(*serial, *conv_norm(inputs, outputs, (3, 3), stride, padding=0)),
        nn.Sequential(*pooled, nn.BatchNorm2d(outputs)),
    ]
    return Branches(branches)


def qarepvgg(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Make a block of QARepVGG: only the 3x3 is normalized, and the sum (arXiv 2212.01593)."""
    branches = [conv_norm(inputs, outputs, (3, 3), stride), nn.Conv2d(inputs, outputs, 1, stride, bias=False)]
    if inputs == outputs and stride == 1:
        branches.append(nn.Identity())
    return Branches(branches, nn.BatchNorm2d(outputs))


class _MLP(nn.Module):
    """RepViT's mixing of channels, around which the input is added."""

    def __init__(self, channels: int):
        super().__init__()
        wide = conv_norm(channels, 2 * channels, (1, 1))
        self.layers = nn.Sequential(wide, nn.GELU(), conv_norm(2 * channels, channels, (1, 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


def repvit(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Make a block of RepViT (timm's token mixer): depthwise branches normalized after the sum, then mixed channels."""
    before = [] if inputs == outputs and stride == 1 else [conv_norm(inputs, outputs, (3, 3), stride)]
    return nn.Sequential(*before, RepVggDw(outputs, 3), _MLP(outputs))


BLOCKS = {
    "RepVGG": repvgg,
    "MobileOne": mobileone,
    "ACB": acb,
    "DBB": dbb,
    "QARepVGG": qarepvgg,
    "RepViT": repvit,
}


def build_network(block: Callable[[int, int, int], nn.Module], classes: int) -> nn.Module:
    """Make a network for images of 32 pixels: a stem, four stages of such blocks, the last three with stride 2."""
    layers, inputs = [*conv_norm(3, STEM), nn.ReLU()], STEM
    for stage, (width, depth) in enumerate(zip(WIDTHS, DEPTHS)):
        for position in range(depth):
            stride = 2 if stage and not position else 1
            layers += [block(inputs, width, stride), nn.ReLU()]
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
