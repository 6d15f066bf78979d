"""Learned step size quantization (LSQ, arXiv 1902.08153; with an offset as in LSQ+, arXiv 2004.09576)."""

import torch
from torch import nn

from ...runtime.quantization_cluster import ClusterConfig
from ..codebooks.codes import TINY, decode, from_rows, to_rows
from ..codebooks.uniform import largest_of
from ..codebooks.weights import QuantizedWeight
from .config import QATConfig
from .fake_quantize import FakeQuantize, power_of_two


class _LearnedStep(torch.autograd.Function):
    """The `decoded` rows as the kernel's quantized value; the gradients are those of LSQ.

    With v = (w - offset) / step and q the nearest integer of the grid: a weight w outside the grid gets no gradient;
    the step gets the sum of g * (q - v) over the weights inside and of g * q over those outside, the offset that of g
    over those outside. Both are divided by the root of the number of weights times the largest integer. The step is a
    parameter in units of `unit` `[sets]`; dividing by its square makes SGD move it as it would without them.
    """

    @staticmethod
    def forward(ctx, kernel, step, offset, unit, integers, decoded, spacing, largest):
        ctx.save_for_backward(kernel, step, offset, unit, integers)
        ctx.spacing, ctx.largest = spacing, largest
        return from_rows(decoded, kernel.shape).to(kernel.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        kernel, step, offset, unit, integers = ctx.saved_tensors
        sets = len(step)
        gradient = to_rows(grad_output).reshape(sets, -1)
        values = to_rows(kernel).reshape(sets, -1).float()
        values = (values if offset is None else values - offset[:, None]) / step[:, None]
        integers = integers.view(sets, -1).float()
        residual = integers - values
        inside = residual.abs() <= ctx.spacing / 2
        scale = (gradient.shape[1] * ctx.largest) ** -0.5
        grad_step = (gradient * torch.where(inside, residual, integers)).sum(dim=1) * scale / unit.square()
        grad_offset = None if offset is None else (gradient * ~inside).sum(dim=1) * scale
        grad_kernel = from_rows((gradient * inside).view(len(kernel), -1), kernel.shape)
        return grad_kernel, grad_step, grad_offset, None, None, None, None, None


class UniformFakeQuantize(FakeQuantize):
    """Maps a kernel `[out, ...]` to the nearest points of evenly spaced grids whose steps are parameters.

    Args:
        weight: how post-training quantization codes the kernel; its grid is the start.
        config: how weights are quantized. With `symmetric` a grid has an exact zero and no offset.
        qat_config: how they train.

    With a channel scale there is a step for each channel, `[out]`, else one for each codebook, `[groups]`. The
    parameter `scale` is the step over a power of two near its start: Adam, which moves all parameters by the learning
    rate, would throw a step of 0.001 about.
    """

    def __init__(self, weight: QuantizedWeight, config: ClusterConfig, qat_config: QATConfig):
        super().__init__(config, qat_config)
        self.groups, self.k = weight.codebook.shape
        symmetric = config.symmetric
        self.spacing = 2 if symmetric and self.k == 2 else 1  # one bit: -1 and 1
        self.first = 0 if not symmetric else -1 if self.k == 2 else -(self.k // 2)
        last = self.first + self.spacing * (self.k - 1)
        limit = largest_of(config, self.k)
        self.ends = (self.first, last) if limit is None else (max(self.first, -limit), min(last, limit))
        self.largest = self.k - 1 if not symmetric else self.ends[1]
        self.channel_scale = weight.scale is not None
        first, last = weight.codebook.float()[:, 0], weight.codebook.float()[:, -1]
        step = weight.scale.clone() if self.channel_scale else (last - first) / (self.k - 1) / self.spacing
        self.register_buffer("unit", power_of_two(step))
        self.scale = nn.Parameter(step / self.unit)
        self.offset = None if symmetric else nn.Parameter(first.clone())

    def step_size(self) -> torch.Tensor:
        """The positive distance between integers, `[out]` or `[groups]`."""
        return (self.scale * self.unit).clamp_min(TINY)

    @torch.no_grad()
    def stored(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        integers = torch.arange(self.k, dtype=torch.float32, device=self.scale.device) * self.spacing + self.first
        step = self.step_size()
        if self.channel_scale:
            return integers.clamp_(*self.ends).repeat(self.groups, 1).to(self.codebook_dtype), step
        codebook = integers * step[:, None]
        return (codebook if self.offset is None else codebook + self.offset[:, None]).to(self.codebook_dtype), None

    @torch.no_grad()
    def codes(self, rows: torch.Tensor) -> torch.Tensor:
        step = self.step_size()
        values = rows.reshape(len(step), -1)
        values = (values if self.offset is None else values - self.offset[:, None]) / step[:, None]
        lowest, highest = ((end - self.first) // self.spacing for end in self.ends)
        return ((values - self.first) / self.spacing).round_().clamp_(lowest, highest).to(torch.uint8).view(rows.shape)

    def fake_quantize(self, kernel: torch.Tensor) -> torch.Tensor:
        codebook, scale = self.stored()
        codes = self.codes(to_rows(kernel.detach()).float())
        decoded = decode(codes, codebook.float(), scale)
        integers = codes.to(torch.int16) * self.spacing + self.first
        step = self.step_size()
        return _LearnedStep.apply(kernel, step, self.offset, self.unit, integers, decoded, self.spacing, self.largest)

    def extra_repr(self) -> str:
        offset = "" if self.offset is None else ", offset"
        return f"steps={len(self.scale)}, integers={self.ends[0]}..{self.ends[1]}{offset}"
