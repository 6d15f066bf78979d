"""Small networks with branches to bound, or that look as if they had."""

import torch
from torch import nn


class Normed(nn.Module):
    """A convolution with batch norm."""

    def __init__(self, channels, size=(3, 3), groups=1):
        super().__init__()
        padding = (size[0] // 2, size[1] // 2)
        self.conv = nn.Conv2d(channels, channels, size, padding=padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.norm(self.conv(x))


class Asymmetric(nn.Module):
    """A block of an ACNet: 3x3, 1x3 and 3x1 side by side."""

    def __init__(self, channels=8):
        super().__init__()
        self.square, self.row, self.column = (Normed(channels, size) for size in ((3, 3), (1, 3), (3, 1)))

    def forward(self, x):
        return self.square(x) + self.row(x) + self.column(x)


class NormAfterSum(nn.Module):
    """A block of a QARepVGG: only the dense branch has a norm of its own, and the sum has one."""

    def __init__(self, channels=8):
        super().__init__()
        self.dense, self.point = Normed(channels), nn.Conv2d(channels, channels, 1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.norm(self.dense(x) + self.point(x) + x)


class Decides(Asymmetric):
    """A block that reads the values of its input."""

    def forward(self, x):
        return super().forward(x) if x.mean() > 100 else x


def padded_by(mode: str) -> nn.Module:
    layer = nn.Conv2d(8, 8, 3)
    layer.padding_mode = mode
    return layer


class Residual(nn.Module):
    """Branches inside of a residual connection, after another one: the sum's source is a sum."""

    def __init__(self, channels=8):
        super().__init__()
        self.first, self.block, self.identity = Normed(channels), Normed(channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        x = x + self.first(x)
        return x + (self.block(x) + self.identity(x))


def frozen(block: Asymmetric) -> Asymmetric:
    block.row.norm.weight.requires_grad_(False)
    return block


def network(block: nn.Module, channels=8) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), block, nn.ReLU())


def widen(model: nn.Module) -> None:
    """Give batch norms weights and statistics with which branches exceed their bounds."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.weight, 1.0, 9.0), (module.running_var, 0.1, 2.0)):
                tensor.data = low + (high - low) * torch.rand(tensor.shape, generator=generator)
