"""Training a quantized network on the float network's outputs, with a few hundred images and no labels."""

import math

import torch
from torch import nn
from transformers.utils import logging

from ...runtime.quantization_cluster import CODEBOOK_DTYPES, ClusterConfig
from .data import CalibrationData
from ..qat.fake_quantize import ClusterFakeQuantize
from ..qat.layers import QAT_CLASSES
from .sensitivity import output_distance, run
from ..codebooks.weights import QuantizedWeight

# learning rates, divided by the number of entries: the more bits, the less there is to gain and the more to spoil
KERNEL_RATE = 0.004  # of a kernel's standard deviation
CODEBOOK_RATE = 0.004  # of a codebook's standard deviation, or of a scale's mean
BIAS_RATE = 0.0012
BATCH_SIZE = 32


def tune_network(
    blocks: dict[str, nn.Module],
    float_blocks: dict[str, nn.Module],
    weights: dict[str, QuantizedWeight],
    layers: dict[str, nn.Module],
    data: CalibrationData,
    config: ClusterConfig,
    steps: int,
    seed: int,
) -> dict[str, QuantizedWeight]:
    """Tune kernels, codebooks, scales and biases together on the float model's outputs; returns the new weights.

    Args:
        blocks: the chain of the quantized network, see [`block_chain`]; its layers hold the decoded weights. Biases
            are changed in place.
        float_blocks: that of the float network.
        weights: the quantized weight of each of `layers`, by name.
        layers: the quantized layers in `blocks`.
        data: the images.
        config: what codebooks must keep to.
        steps: of Adam, on batches of 32 images, with a learning rate that falls to zero.
        seed: of the order of images.

    The straight-through gradient moves a kernel that starts at its quantized value until it is nearer to the next
    entry; so codes change only where the outputs gain. It is quantization-aware training by distillation (the loss of
    BRECQ, arXiv 2102.05426, with the whole network as its block).
    """
    groups, dtype = [], CODEBOOK_DTYPES[config.codebook_dtype]
    for name, layer in layers.items():
        layer.weight_fake_quant = ClusterFakeQuantize(
            weights[name], dtype, "gradient", symmetric=config.symmetric, preserve_zero=config.preserve_zero
        )
        layer.__class__ = QAT_CLASSES[type(layer)]
        groups += _parameter_groups(layer, config)
    images = torch.cat(data.batches)
    wanted = torch.cat([run(float_blocks.values(), batch) for batch in data.batches])
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for group in groups for parameter in group["params"]]
    with torch.enable_grad():
        for _ in logging.tqdm(range(steps), desc="Tuning"):
            batch = torch.randperm(len(images), generator=generator)[:BATCH_SIZE].to(images.device)
            loss = output_distance(run(blocks.values(), images[batch]), wanted[batch], has_head="" in blocks)
            gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
    return {name: layer.weight_fake_quant.quantized(layer.weight) for name, layer in layers.items()}


def _parameter_groups(layer: nn.Module, config: ClusterConfig) -> list[dict]:
    """What is trained of a layer, at rates that fit its magnitudes."""
    codebook, scale = layer.weight_fake_quant.codebook, layer.weight_fake_quant.scale
    share = 1 / codebook.shape[1]
    kernel_rate = KERNEL_RATE * share * layer.weight.std().item()
    groups = [{"params": [layer.weight.requires_grad_()], "lr": kernel_rate}]
    if layer.bias is not None:
        groups.append({"params": [layer.bias.requires_grad_()], "lr": BIAS_RATE * share})
    if config.method == "cluster":
        groups.append({"params": [codebook], "lr": CODEBOOK_RATE * share * codebook.detach().std().item()})
    if scale is not None:
        groups.append({"params": [scale], "lr": CODEBOOK_RATE * share * scale.detach().mean().item()})
    return groups
