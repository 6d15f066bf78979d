"""Measuring how much a model's loss depends on each weight."""

import torch
from torch import nn
from transformers.utils import logging

from .data import CalibrationData
from .hooks import every_layer_runs
from .outputs import calibration_loss


def diagonal_fisher(model: nn.Module, data: CalibrationData, names: list[str]) -> dict[str, torch.Tensor]:
    """Return the mean squared gradient of the loss in each weight of the layers `names`, of the weight's shape.

    This is the diagonal of the empirical Fisher information (SqueezeLLM, arXiv 2306.07629, equation 4), of the
    [`calibration_loss`]. It takes one backward pass per example, as a batch would average before squaring. A layer
    that does not run is left out.
    """
    weights = [model.get_submodule(name).weight for name in names]
    trainable = [weight.requires_grad for weight in weights]
    total: list[torch.Tensor | None] = [None] * len(weights)
    generator = torch.Generator().manual_seed(0)
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad(), every_layer_runs():
            for batch in logging.tqdm(data.batches, desc="Sensitivity"):
                for index in range(len(batch)):
                    loss = calibration_loss(model, batch.take(slice(index, index + 1)), generator)
                    _add_squares(total, torch.autograd.grad(loss, weights, allow_unused=True), len(data))
    finally:
        for weight, choice in zip(weights, trainable):
            weight.requires_grad_(choice)
    return {name: squares for name, squares in zip(names, total) if squares is not None}


def _add_squares(total: list, gradients: tuple, count: int) -> None:
    """Add the squares of `gradients`, over `count`, to the `total` of each weight."""
    for index, gradient in enumerate(gradients):
        if gradient is not None:
            square = gradient.square() / count
            total[index] = square if total[index] is None else total[index].add_(square)
