"""OABN in a network that was trained without it: what its bound cuts off, and a bound that closes in step by step."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import TrainerCallback

from repvgg_hf.runtime.reparameterization import ReparamConv2d

CLOSING = 0.5  # share of all steps after which the bound has its final value


def closing_steps(steps: int) -> int:
    """Return the step of a training of so many at which the bound has its final value."""
    return math.ceil(CLOSING * steps)


@dataclass(frozen=True)
class Clipping:
    """What the bound of OABN cuts off in the branches of a model.

    Attributes:
        clipped: output channels of branches that contribute more than the bound, over all layers.
        channels: output channels of all bounded branches.
        largest: the largest contribution, in standard deviations of the dense branches' entries, as the threshold is.
    """

    clipped: int
    channels: int
    largest: float


@torch.no_grad()
def find_clipping(model: nn.Module) -> Clipping:
    """Return what the thresholds of a model's blocks cut off; without OABN nothing."""
    clipped, channels, largest = 0, 0, 0.0
    for block in model.modules():
        if not isinstance(block, ReparamConv2d) or block.oabn_threshold is None:
            continue
        deviation = block.outlier_bound() / block.oabn_threshold
        for name in set(block.branches) - set(block.dense_names):
            kernel, _ = block.branches[name].equivalent()
            found = kernel.abs().amax(dim=(1, 2, 3)) / deviation  # [out]
            clipped, channels = clipped + int((found > block.oabn_threshold).sum()), channels + len(found)
            largest = max(largest, found.max().item())
    return Clipping(clipped, channels, largest)


class ClosingBound(TrainerCallback):
    """Lets the bound of OABN close in during the first part of a training, from `start` to the model's own threshold.

    The threshold falls by the same factor with each step, so that it depends on the step alone and an interrupted
    training goes on with the same one. Evaluations of that time are of the model with the final bound, as it is saved.

    Args:
        model: has blocks with thresholds.
        start: the first threshold; one that cuts nothing off is [`find_clipping`]'s `largest`.
    """

    def __init__(self, model: nn.Module, start: float):
        self.blocks = [block for block in model.modules() if isinstance(block, ReparamConv2d)]
        self.start, self.end = start, model.config.oabn_threshold

    def on_step_begin(self, args, state, control, **kwargs):
        done = min(1.0, state.global_step / closing_steps(state.max_steps))
        self._set(max(self.end, self.start ** (1 - done) * self.end**done))

    def on_step_end(self, args, state, control, **kwargs):
        self._set(self.end)

    def _set(self, threshold: float) -> None:
        for block in self.blocks:
            block.oabn_threshold = threshold
