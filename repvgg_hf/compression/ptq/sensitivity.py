"""Measuring how much a model's loss depends on each weight."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging

from .data import CalibrationData


def diagonal_fisher(model: nn.Module, data: CalibrationData, names: list[str]) -> dict[str, torch.Tensor]:
    """Return the mean squared gradient of the loss in each weight of the layers `names`, of the weight's shape.

    This is the diagonal of the empirical Fisher information (SqueezeLLM, arXiv 2306.07629, equation 4). It takes one
    backward pass per image, as a batch would average before squaring. Images without labels take what the model
    predicts. Raises `ValueError` for a model without a classifier.
    """
    if "logits" not in model(data.batches[0][:1]) or not model.config.num_labels:
        raise ValueError(
            f"sensitivity='fisher' needs a loss, and {type(model).__name__} has no classifier: use 'none'."
        )
    weights = [model.get_submodule(name).weight for name in names]
    total = [torch.zeros_like(weight) for weight in weights]
    with torch.enable_grad():
        for images, labels in logging.tqdm(list(zip(data.batches, data.labels)), desc="Sensitivity"):
            for index in range(len(images)):
                logits = model(images[index : index + 1]).logits
                target = logits.argmax(dim=1) if labels is None else labels[index : index + 1]
                loss = F.cross_entropy(logits, target)
                for mean, gradient in zip(total, torch.autograd.grad(loss, weights)):
                    mean += gradient.square() / len(data)
    return dict(zip(names, total))
