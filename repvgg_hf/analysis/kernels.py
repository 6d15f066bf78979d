"""How heavy the tails of a model's kernels are, which decides how many bits they need."""

import torch
from torch import nn


@torch.no_grad()
def kernel_report(model) -> list[dict]:
    """Outlier figures of every fused kernel and linear weight, in the model's order; the model is not changed.

    Each entry holds `name`, `shape`, `std`, `max_over_std` (the largest magnitude in standard deviations) and
    `kurtosis` (the fourth standardised moment, 3 for a normal distribution). Branches are fused for the purpose.
    """
    fused = model.fused_convolutions()
    inside = tuple(f"{name}." for name in fused)
    return [
        {"name": name, **tail_figures(fused.get(name, layer).weight)}
        for name, layer in model.named_modules()
        if name in fused or (isinstance(layer, (nn.Conv2d, nn.Linear)) and not name.startswith(inside))
    ]


def tail_figures(weight: torch.Tensor) -> dict:
    """`shape`, `std`, `max_over_std` and `kurtosis` of a tensor, computed in float64."""
    centred = weight.double() - weight.double().mean()
    variance = centred.square().mean()
    return {
        "shape": list(weight.shape),
        "std": variance.sqrt().item(),
        "max_over_std": (weight.abs().max() / variance.sqrt()).item(),
        "kurtosis": (centred.pow(4).mean() / variance.square()).item(),
    }
