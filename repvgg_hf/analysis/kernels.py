"""Measuring how heavy the tails of a model's kernels are, which decides how many bits they need.

A few bits must cover the whole range of a kernel's entries, so a few entries far from the others (outliers) cost the
precision of all. Fusing adds the kernels of a block's branches, which can make such outliers.
"""

from collections.abc import Iterable

import torch
from torch import nn

from ..runtime.reparameterization import fused_convolutions
from ..runtime.tensors import require_module

BIN_WIDTH = 0.5  # standard deviations


@torch.no_grad()
def kernel_report(model) -> list[dict]:
    """Measure the outliers of every fused kernel and linear weight; the model is not changed.

    Args:
        model (`nn.Module`): any float model. Branches of this package's blocks are fused for the purpose; those of
            other networks are looked at as they are: call `fuse` first.

    Returns a dictionary for each weight, in the model's order: `name`, `shape`, `std` (the standard deviation),
    `max_over_std` (the largest magnitude in standard deviations) and `kurtosis` (the fourth standardized moment, 3 for
    a normal distribution).

    Example:
    ```python
    >>> from repvgg_hf import RepVGGConfig, RepVGGForImageClassification, kernel_report

    >>> model = RepVGGForImageClassification(RepVGGConfig(num_labels=10))
    >>> worst = max(kernel_report(model), key=lambda entry: entry["kurtosis"])
    ```"""
    require_module(model)
    fused = fused_convolutions(model)
    inside = tuple(f"{name}." for name in fused)
    return [
        {"name": name, **tail_figures(fused.get(name, layer).weight)}
        for name, layer in model.named_modules()
        if name in fused or (isinstance(layer, (nn.Conv2d, nn.Linear)) and not name.startswith(inside))
    ]


def tail_figures(weight: torch.Tensor) -> dict:
    """Return `shape`, `std`, `max_over_std` and `kurtosis` of a tensor of any shape, computed in float64."""
    centered = weight.double() - weight.double().mean()
    variance = centered.square().mean()
    return {
        "shape": list(weight.shape),
        "std": variance.sqrt().item(),
        "max_over_std": (weight.abs().max() / variance.sqrt()).item(),
        "kurtosis": (centered.pow(4).mean() / variance.square()).item(),
    }


def kernel_histogram(tensors: torch.Tensor | Iterable[torch.Tensor], name: str = "kernels") -> dict:
    """Count how the entries of a kernel, or of several together, are distributed.

    Each tensor is centered and divided by its standard deviation, since codebooks and ranges are chosen for each.

    Args:
        tensors (`torch.Tensor` or several): kernels of any shape.
        name (`str`, defaults to `"kernels"`): what they are called in errors.

    Returns a dictionary: `first`, `bin_width` and `counts`, where bin `i` begins at `(first + i) * bin_width` standard
    deviations, and `largest`, the largest magnitude. Raises `ValueError` for no, constant or non-finite entries.
    """
    values = _standardized(name, tensors)
    bins = (values / BIN_WIDTH).floor().long()
    first = bins.min().item()
    counts = torch.bincount(bins - first).tolist()
    return {"first": first, "bin_width": BIN_WIDTH, "counts": counts, "largest": values.abs().max().item()}


def _standardized(name: str, tensors: torch.Tensor | Iterable[torch.Tensor]) -> torch.Tensor:
    """Return all entries, float64, with each tensor centered and divided by its standard deviation."""
    tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    parts = []
    for index, tensor in enumerate(tensors):
        values = tensor.detach().double().cpu().flatten()
        if not values.numel() or not values.isfinite().all() or values.min() == values.max():
            raise ValueError(
                f"Kernel {index} of {name!r} has no entries, NaN or infinite ones, or all the same: it has no "
                "distribution. Leave it out."
            )
        parts.append((values - values.mean()) / values.std(correction=0))
    if not parts:
        raise ValueError(f"kernels[{name!r}] is empty: give a kernel or a list of them.")
    return torch.cat(parts)
