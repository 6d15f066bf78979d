"""Computing with a layer's quantized input while the model trains: its range is learned, or follows the values."""

import torch
from torch import nn

from .fake_quantize import power_of_two
from ..codebooks.weights import TINY


class _QuantizeInput(torch.autograd.Function):
    """`x` on the grid of `scale` and `zero_point`, as `ClusterLayer.quantized_input`; the gradients are those of LSQ.

    What is outside of the range passes no gradient to `x`. The scale gets the sum of g * (q - v) over the values inside
    and of g * q over those outside, with v = x / scale and q its integer, divided by the root of the number of values
    in the tensor times the number of integers (arXiv 1902.08153, section 2.2). The scale is a parameter in units of
    `unit`; dividing by its square makes SGD move it as it would without them.
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, unit, highest):
        integers = (x.float() / scale).round_().add_(zero_point).clamp_(0, highest).sub_(zero_point)
        ctx.save_for_backward(x, scale, zero_point, unit)
        ctx.highest = highest
        return integers.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        x, scale, zero_point, unit = ctx.saved_tensors
        values = x.float() / scale
        integers = values.round().clamp_(-zero_point, ctx.highest - zero_point)
        residual = integers - values
        inside = residual.abs() <= 0.5
        grad_scale = None
        if ctx.needs_input_grad[1]:
            total = (grad_output * torch.where(inside, residual, integers)).sum(dtype=torch.float32)
            grad_scale = total * (x.numel() * ctx.highest) ** -0.5 / unit.square()
        return grad_output * inside, grad_scale, None, None, None


class InputFakeQuantize(nn.Module):
    """Rounds a layer's input to integers of `bits` bits.

    Args:
        bits: 2 to 8.
        scale, zero_point: of the range to begin with.
        update: `"gradient"`: the scale is a parameter, the zero point stays (LSQ); `"moving_average"`: the range is a
            moving average of the least and the largest value of a batch, in training mode.
        momentum: of that moving average.
    """

    def __init__(self, bits: int, scale: float, zero_point: int, update: str = "gradient", momentum: float = 0.99):
        super().__init__()
        self.bits, self.update, self.momentum = bits, update, momentum
        self.highest = 2**bits - 1
        self.register_buffer("zero_point", torch.tensor(float(zero_point)))
        scale = torch.tensor(float(scale))
        # a power of two near the scale: Adam moves all parameters by the learning rate, however small they are
        self.register_buffer("unit", power_of_two(scale))
        if update == "gradient":
            self.scale = nn.Parameter(scale / self.unit)
        else:
            self.register_buffer("scale", scale / self.unit)
            self.register_buffer("low", -scale * zero_point)
            self.register_buffer("high", scale * (self.highest - zero_point))

    @torch.no_grad()
    def follow(self, x: torch.Tensor) -> None:
        """Move the range towards that of `x`, any shape; it includes zero."""
        low, high = x.aminmax()
        self.low.lerp_(low.float().clamp_max(0), 1 - self.momentum)
        self.high.lerp_(high.float().clamp_min(0), 1 - self.momentum)
        self.scale.copy_((self.high - self.low) / self.highest / self.unit)
        self.zero_point.copy_((-self.low / self.positive_scale()).round().clamp(0, self.highest))

    def positive_scale(self) -> torch.Tensor:
        """What an integer more stands for, 0-dim."""
        return (self.scale * self.unit).clamp_min(TINY)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.update == "moving_average" and self.training:
            self.follow(x)
        # cloned: a moving average may change it before the gradient is computed, in the next micro-batch
        return _QuantizeInput.apply(x, self.positive_scale(), self.zero_point.clone(), self.unit, self.highest)

    def range(self) -> tuple[float, int]:
        """(scale, zero point), as `ClusterLayer.set_input_range` takes them."""
        return self.positive_scale().item(), int(self.zero_point.item())

    def extra_repr(self) -> str:
        return f"bits={self.bits}, {self.update}"
