"""How much a model's outputs depend on each weight, and on each layer's bits."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging

from ...runtime.quantization_cluster import ClusterConfig
from .data import CalibrationData, quantizable
from ..layers import quantize_layer

COST_IMAGES = 128  # a layer's cost is a mean over images, and needs no more of them


def diagonal_fisher(model: nn.Module, data: CalibrationData, names: list[str]) -> dict[str, torch.Tensor]:
    """Mean squared gradient of the loss in each weight of the layers `names`, of the weight's shape.

    The diagonal of the empirical Fisher information (SqueezeLLM, arXiv 2306.07629, equation 4): one backward pass an
    image, as a batch would average before squaring. Images without labels take what the model predicts. Raises
    `ValueError` for a model without a classifier.
    """
    if not isinstance(getattr(model, "classifier", None), nn.Linear):
        raise ValueError(
            f"sensitivity='fisher' needs a loss, and {type(model).__name__} has no classifier: use 'second_moment'."
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


@torch.no_grad()
def measure_costs(
    blocks: dict[str, nn.Module], data: CalibrationData, config: ClusterConfig, choices: list[int]
) -> dict[str, dict[int, float]]:
    """How far the float model's outputs move when one layer alone is quantized, for each layer and choice of bits.

    The Kullback-Leibler divergence of the predictions, or without a classifier the mean squared error of the feature
    map over its mean square. Each layer is measured from its block on, on up to 128 images.
    """
    x = torch.cat(data.batches)[:COST_IMAGES]
    chain = list(blocks.items())
    outputs = run(blocks.values(), x)
    costs = {}
    for position, (block_name, block) in enumerate(logging.tqdm(chain, desc="Bits against loss")):
        rest = [later for _, later in chain[position:]]
        for name, layer in quantizable(block_name, block):
            if not config.converts(name):
                continue
            costs[name] = {}
            weight = layer.weight.data
            for bits in choices:
                layer.weight.data = quantize_layer(name, layer, with_bits(config, bits)).decoded()
                costs[name][bits] = output_distance(run(rest, x), outputs, has_head="" in blocks).item()
                layer.weight.data = weight
        x = block(x)
    return costs


def with_bits(config: ClusterConfig, bits: int) -> ClusterConfig:
    """`config` with the same bits everywhere."""
    config = copy.copy(config)
    config.bits, config.bits_overrides = bits, {}
    return config


def run(blocks, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = block(x)
    return x


def output_distance(outputs: torch.Tensor, wanted: torch.Tensor, has_head: bool) -> torch.Tensor:
    """Mean divergence of predictions from `wanted` logits `[batch, classes]`, or relative error of feature maps."""
    if has_head:
        expected = wanted.log_softmax(dim=1)
        return F.kl_div(outputs.log_softmax(dim=1), expected, log_target=True, reduction="batchmean")
    return F.mse_loss(outputs, wanted) / wanted.square().mean()
