"""Freezing weights that oscillate between two codes (Nagel et al. 2022, arXiv 2203.11086, section 4.3)."""

import torch
from torch import nn


class OscillationFreezing(nn.Module):
    """Fixes the codes of weights whose code changes to and fro more often than `threshold`.

    A step in which a code moves against its last move is an oscillation. Its frequency is a moving average with
    `momentum` over optimizer steps; once it is above the threshold, the weight keeps the code that it was nearest to on
    average. The kernel itself trains on, it may be a function of branches; only its quantized value stays.

    State a weight, persistent: its last code, average code, last direction, frequency, and whether it is frozen.
    """

    def __init__(self, codes: torch.Tensor, threshold: float, momentum: float = 0.99):
        super().__init__()
        self.threshold, self.momentum = threshold, momentum
        rows = codes.reshape(len(codes), -1)
        self.register_buffer("last", rows.clone())
        self.register_buffer("average", rows.float())
        self.register_buffer("direction", torch.zeros_like(rows, dtype=torch.int8))
        self.register_buffer("frequency", torch.zeros_like(rows, dtype=torch.float32))
        self.register_buffer("frozen", torch.zeros_like(rows, dtype=torch.bool))

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """uint8 `codes` `[out, n]`, those of frozen weights replaced."""
        return torch.where(self.frozen, self.last, codes)

    def observe(self, codes: torch.Tensor) -> None:
        """Count the oscillations of an optimizer step that led to uint8 `codes` `[out, n]`; freeze what is due."""
        codes = self(codes)
        move = (codes > self.last).to(torch.int8) - (codes < self.last).to(torch.int8)
        oscillates = (move * self.direction) < 0
        self.frequency.lerp_(oscillates.float(), 1 - self.momentum)
        self.average.lerp_(codes.float(), 1 - self.momentum)
        self.direction.copy_(torch.where(move == 0, self.direction, move))
        new = (self.frequency > self.threshold) & ~self.frozen
        self.last.copy_(torch.where(new, self.average.round().to(torch.uint8), codes))
        self.frozen |= new

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, momentum={self.momentum}"
