"""Computing with a layer's quantized input, or output, while the model trains: the scale of its range is learned."""

import torch
from torch import nn

from ..codebooks.codes import TINY
from .fake_quantize import power_of_two


class _QuantizeInput(torch.autograd.Function):
    """`x` on the grid of `scale` and `zero_point`, as `ClusterLayer.quantized_input`; the gradients are those of LSQ.

    What is outside of the range passes no gradient to `x`. The scale gets the sum of g * (q - v) over the values inside
    and of g * q over those outside, with v = x / scale and q its integer, divided by the root of the number of values
    in the tensor times the number of integers (arXiv 1902.08153, section 2.2). The scale is a parameter in units of
    `unit`; dividing by its square makes SGD move it as it would without them.
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, unit, highest):
        integers = (x.float() * scale.reciprocal()).round_().add_(zero_point).clamp_(0, highest).sub_(zero_point)
        ctx.save_for_backward(x, scale, zero_point, unit)
        ctx.highest = highest
        return integers.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        x, scale, zero_point, unit = ctx.saved_tensors
        values = x.float() * scale.reciprocal()
        integers = values.round().clamp_(-zero_point, ctx.highest - zero_point)
        residual = integers - values
        inside = residual.abs() <= 0.5
        total = (grad_output * torch.where(inside, residual, integers)).sum(dtype=torch.float32)
        grad_scale = total * (x.numel() * ctx.highest) ** -0.5 / unit.square()
        return grad_output * inside, grad_scale, None, None, None


class InputFakeQuantize(nn.Module):
    """Rounds a layer's input, or output, to integers of a few bits, in a range whose scale is learned (LSQ).

    Args:
        bits: bits of an integer, 2 to 8.
        scale: what an integer more stands for, to begin with.
        zero_point: the integer that stands for zero; it stays.

    The parameter `scale` is kept in units of a power of two near its start: Adam moves all parameters by the learning
    rate, however small they are.
    """

    def __init__(self, bits: int, scale: float, zero_point: int):
        super().__init__()
        self.bits, self.highest = bits, 2**bits - 1
        self.register_buffer("zero_point", torch.tensor(float(zero_point), dtype=torch.float32))
        scale = torch.tensor(float(scale), dtype=torch.float32)
        self.register_buffer("unit", power_of_two(scale))
        self.scale = nn.Parameter(scale / self.unit)

    def positive_scale(self) -> torch.Tensor:
        """What an integer more stands for, 0-dim."""
        return (self.scale * self.unit).clamp_min(TINY)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _QuantizeInput.apply(x, self.positive_scale(), self.zero_point, self.unit, self.highest)

    def range(self) -> tuple[float, int]:
        """(scale, zero point), as `ClusterLayer.set_input_range` takes them."""
        return self.positive_scale().item(), int(self.zero_point.item())

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
