"""RepVGG and MobileOne as their papers describe them, with their authors' names for the parts; none of this package's.

RepVGG: arXiv:2101.03697, MobileOne: arXiv:2206.04040. `fuse` computes kernels by sending unit impulses through the
branches, in float64, which knows nothing of how the package computes them.
"""

import torch
from torch import nn


def conv_bn(in_channels: int, out_channels: int, size: int, stride: int, groups: int) -> nn.Sequential:
    parts = nn.Sequential()
    conv = nn.Conv2d(in_channels, out_channels, size, stride, size // 2, groups=groups, bias=False)
    parts.add_module("conv", conv)
    parts.add_module("bn", nn.BatchNorm2d(out_channels))
    return parts


class Gate(nn.Module):
    """Squeeze-and-excitation, with the names that each of the two codes gives to its layers."""

    def __init__(self, channels: int, first: str, second: str):
        super().__init__()
        self.names = first, second
        self.add_module(first, nn.Conv2d(channels, channels // 16, 1))
        self.add_module(second, nn.Conv2d(channels // 16, channels, 1))

    def forward(self, x):
        first, second = (getattr(self, name) for name in self.names)
        return x * torch.sigmoid(second(torch.relu(first(x.mean((2, 3), keepdim=True)))))


class Block(nn.Module):
    """A block: branches, or one convolution; a gate or none; ReLU."""

    fused_name = ""

    def __init__(self, in_channels, out_channels, size, stride, groups, gate=None):
        super().__init__()
        self.shape = in_channels, out_channels, size, stride, groups
        self.se = nn.Identity() if gate is None else gate

    def has_identity(self) -> bool:
        in_channels, out_channels, _, stride, _ = self.shape
        return in_channels == out_channels and stride == 1

    def forward(self, x):
        fused = getattr(self, self.fused_name, None)
        return torch.relu(self.se(self.branches(x) if fused is None else fused(x)))

    @torch.no_grad()
    def fuse(self):
        in_channels, out_channels, size, stride, groups = self.shape
        width, place = in_channels // groups, size // 2  # of the output that is looked at
        middle = place * stride  # of what it sees
        self.double().eval()
        zeros = torch.zeros(width, in_channels, *[middle + place + 1] * 2, dtype=torch.float64)
        bias = self.branches(zeros)[0, :, place, place]
        kernel = torch.zeros(out_channels, width, size, size, dtype=torch.float64)
        for row in range(size):
            for column in range(size):
                impulses = zeros.clone()
                for channel in range(width):  # number `channel` of every group
                    impulses[channel, channel::width, middle + row - size // 2, middle + column - size // 2] = 1
                kernel[:, :, row, column] = (self.branches(impulses)[:, :, place, place] - bias).T
        fused = nn.Conv2d(in_channels, out_channels, size, stride, size // 2, groups=groups)
        fused.weight.copy_(kernel)
        fused.bias.copy_(bias)
        for name in [name for name, _ in self.named_children() if name.startswith("rbr_")]:
            delattr(self, name)
        self.add_module(self.fused_name, fused)
        self.float()


class RepVGGBlock(Block):
    fused_name = "rbr_reparam"

    def __init__(self, in_channels, out_channels, stride, groups=1, gated=False):
        super().__init__(
            in_channels, out_channels, 3, stride, groups, Gate(out_channels, "down", "up") if gated else None
        )
        self.rbr_identity = nn.BatchNorm2d(in_channels) if self.has_identity() else None
        self.rbr_dense = conv_bn(in_channels, out_channels, 3, stride, groups)
        self.rbr_1x1 = conv_bn(in_channels, out_channels, 1, stride, groups)

    def branches(self, x):
        total = self.rbr_dense(x) + self.rbr_1x1(x)
        return total if self.rbr_identity is None else total + self.rbr_identity(x)


class RepVGG(nn.Module):
    """Every second layer after the stem has `groups`; every stage halves the image, but for `first_stride`."""

    def __init__(self, stem, widths, depths, groups=1, gated=False, classes=5, channels=3, first_stride=2):
        super().__init__()
        self.stage0 = RepVGGBlock(channels, stem, 2, gated=gated)
        before, number = stem, 0
        for stage, (width, depth) in enumerate(zip(widths, depths), 1):
            layers = []
            for layer in range(depth):
                number += 1
                stride = (first_stride if stage == 1 else 2) if layer == 0 else 1
                layers.append(RepVGGBlock(before, width, stride, groups if number % 2 == 0 else 1, gated))
                before = width
            setattr(self, f"stage{stage}", nn.Sequential(*layers))
        self.stages = len(widths)
        self.linear = nn.Linear(before, classes)

    def forward(self, x):
        for stage in range(self.stages + 1):
            x = getattr(self, f"stage{stage}")(x)
        return self.linear(x.mean((2, 3)))


class MobileOneBlock(Block):
    fused_name = "reparam_conv"

    def __init__(self, in_channels, out_channels, size, stride=1, groups=1, copies=1, gated=False):
        gate = Gate(out_channels, "reduce", "expand") if gated else None
        super().__init__(in_channels, out_channels, size, stride, groups, gate)
        self.rbr_skip = nn.BatchNorm2d(in_channels) if self.has_identity() else None
        self.rbr_conv = nn.ModuleList(conv_bn(in_channels, out_channels, size, stride, groups) for _ in range(copies))
        self.rbr_scale = conv_bn(in_channels, out_channels, 1, stride, groups) if size > 1 else None

    def branches(self, x):
        others = [branch for branch in (self.rbr_skip, self.rbr_scale) if branch is not None]
        return sum(branch(x) for branch in [*self.rbr_conv, *others])


# name: (width multipliers, copies of the large branch, gated blocks at the end of each stage)
MOBILEONES = {
    "s0": ((0.75, 1.0, 1.0, 2.0), 4, (0, 0, 0, 0)),
    "s1": ((1.5, 1.5, 2.0, 2.5), 1, (0, 0, 0, 0)),
    "s2": ((1.5, 2.0, 2.5, 4.0), 1, (0, 0, 0, 0)),
    "s3": ((2.0, 2.5, 3.0, 4.0), 1, (0, 0, 0, 0)),
    "s4": ((3.0, 3.5, 3.5, 4.0), 1, (0, 0, 5, 1)),
}


class MobileOne(nn.Module):
    """Stages of a depthwise and a pointwise block in turn."""

    def __init__(self, variant: str, classes: int = 5, channels: int = 3):
        super().__init__()
        multipliers, copies, gated = MOBILEONES[variant]
        before = min(64, int(64 * multipliers[0]))
        self.stage0 = MobileOneBlock(channels, before, 3, 2)
        for stage, (base, multiplier, depth) in enumerate(zip((64, 128, 256, 512), multipliers, (2, 8, 10, 1)), 1):
            width, blocks = int(base * multiplier), []
            for index in range(depth):
                gate = index >= depth - gated[stage - 1]
                blocks.append(MobileOneBlock(before, before, 3, 2 if index == 0 else 1, before, copies, gate))
                blocks.append(MobileOneBlock(before, width, 1, 1, 1, copies, gate))
                before = width
            setattr(self, f"stage{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(before, classes)

    def forward(self, x):
        for stage in range(5):
            x = getattr(self, f"stage{stage}")(x)
        return self.linear(x.mean((2, 3)))


def fuse(model: nn.Module) -> nn.Module:
    """Fuse every block, in place; returns the model."""
    for block in list(model.modules()):
        if isinstance(block, Block):
            block.fuse()
    return model


@torch.no_grad()
def trained(model: nn.Module, image: torch.Tensor, generator: torch.Generator) -> nn.Module:
    """Give every norm scales and shifts, and statistics of what it sees, so that the image matters to the end.

    With arbitrary statistics a deep network forgets its input, and its logits would agree with anything's.
    """
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.copy_(0.6 + 0.4 * torch.rand(norm.weight.shape, generator=generator))
            norm.bias.copy_(0.2 * torch.randn(norm.bias.shape, generator=generator))
            norm.momentum = None  # the mean of all batches: here of one
    model.train()(image)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.1
    return model.eval()
