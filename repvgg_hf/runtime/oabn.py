"""Outlier-aware batch normalization (OABN): the clip that limits what a branch adds to an entry of the fused kernel."""

import torch
from torch import nn

from .tensors import at_least_float32


class _BoundedWeight(torch.autograd.Function):
    """Clip `weight` to `[-limit, limit]`. A clipped entry receives only the gradient that would bring it back inside.

    Plain clipping has no gradient outside the bound: an entry that once left would stay there for good (but for weight
    decay). Passing every gradient would let the parameter drift ever further out while its clipped value stays.
    """

    generate_vmap_rule = True  # and no jvp, which torch.compile can't trace

    @staticmethod
    def forward(weight, limit):
        return torch.maximum(torch.minimum(weight, limit), -limit)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_output):
        weight, limit = ctx.saved_tensors
        # gradient descent subtracts the gradient, so an equal sign means a step towards zero
        keep = (weight.abs() <= limit) | (weight * grad_output > 0)
        return grad_output * keep, None


def outlier_bounded_weight(norm: nn.Module, kernel_max: torch.Tensor | float, bound: torch.Tensor) -> torch.Tensor:
    """Clip the batch norm weight `[out]`, so that the branch adds at most `bound` to any entry of the fused kernel.

    The branch contributes `weight / sqrt(running_var + eps) * W` to the fused kernel. With `kernel_max = max|W|` per
    output channel, the clip is `bound * sqrt(running_var + eps) / kernel_max`.
    """
    deviation = (at_least_float32(norm.running_var) + getattr(norm, "eps", 1e-5)).sqrt()
    weight = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
    return _BoundedWeight.apply(weight, (bound * deviation / kernel_max).to(weight.dtype))


__all__ = ["outlier_bounded_weight"]
