"""Mixed precision: choosing how many bits each layer gets, by what they cost in the outputs and on disk."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging

from ...runtime.packing import packed_size
from ...runtime.quantization_cluster import CODEBOOK_DTYPES, ClusterConfig
from ..layers import quantize_layer
from .blocks import quantizable, run_blocks
from .data import CalibrationData

COST_IMAGES = 128  # a layer's cost is a mean over images, and needs no more of them

MAX_STATES = 200_000  # sizes of a partial allocation that are told apart


def allocate_bits(sizes: dict[str, dict[int, int]], costs: dict[str, dict[int, float]], budget: int) -> dict[str, int]:
    """Choose bits for every layer that cost least and take at most `budget` stored bits in total.

    Args:
        sizes (`dict[str, dict[int, int]]`): stored bits of each layer at each choice of bits.
        costs (`dict[str, dict[int, float]]`): what each choice costs (a loss), for the same layers and choices.
        budget (`int`): stored bits of all layers together.

    This is the multiple-choice knapsack problem, solved exactly by dynamic programming over total size. Sizes are
    rounded up to a 200,000th of the budget if their greatest common divisor is smaller than that, so the budget always
    holds. Raises `ValueError` if even the smallest choices exceed it.
    """
    least = sum(min(choices.values()) for choices in sizes.values())
    if least > budget:
        raise ValueError(f"the smallest allocation takes {least} bits, {budget} are allowed")
    every_size = [size for choices in sizes.values() for size in choices.values()]
    unit = max(math.gcd(*every_size), math.ceil(budget / MAX_STATES))
    states = budget // unit + 1
    best = torch.full((states,), float("inf"), dtype=torch.float64)
    best[0] = 0.0
    chosen = []
    for name, choices in sizes.items():
        totals = torch.full((len(choices), states), float("inf"), dtype=torch.float64)
        for row, (bits, size) in zip(totals, choices.items()):
            step = math.ceil(size / unit)
            if step < states:
                row[step:] = best[: states - step] + costs[name][bits]
        best, choice = totals.min(dim=0)
        chosen.append(choice)
    if best.isinf().all():  # only by rounding up: the smallest choices fit the budget without any slack
        return {name: min(choices, key=choices.get) for name, choices in sizes.items()}
    state = best.argmin().item()
    allocation = {}
    for (name, choices), choice in zip(reversed(sizes.items()), reversed(chosen)):
        bits = list(choices)[choice[state]]
        allocation[name] = bits
        state -= math.ceil(choices[bits] / unit)
    return dict(reversed(allocation.items()))


@torch.no_grad()
def measure_costs(
    blocks: dict[str, nn.Module], data: CalibrationData, config: ClusterConfig, choices: list[int]
) -> dict[str, dict[int, float]]:
    """Measure how far the float model's outputs move when one layer alone is quantized, for each choice of its bits.

    The distance is the Kullback-Leibler divergence of the predictions, or without a classifier the mean squared error
    of the feature map over its mean square. Each layer is measured from its block on, on up to 128 images.
    """
    x = torch.cat(data.batches)[:COST_IMAGES]
    chain = list(blocks.items())
    outputs = run_blocks(blocks.values(), x)
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
                costs[name][bits] = output_distance(run_blocks(rest, x), outputs, has_head="" in blocks).item()
                layer.weight.data = weight
        x = block(x)
    return costs


def with_bits(config: ClusterConfig, bits: int) -> ClusterConfig:
    """Return `config` with the same bits everywhere."""
    config = copy.copy(config)
    config.bits, config.bits_overrides = bits, {}
    return config


def output_distance(outputs: torch.Tensor, wanted: torch.Tensor, has_head: bool) -> torch.Tensor:
    """Return the mean divergence of `outputs`, logits `[batch, classes]`, from the `wanted` ones.

    Without a head it is the relative squared error of feature maps.
    """
    if has_head:
        expected = wanted.log_softmax(dim=1)
        return F.kl_div(outputs.log_softmax(dim=1), expected, log_target=True, reduction="batchmean")
    return F.mse_loss(outputs, wanted) / wanted.square().mean()


def choose_bits(blocks, data: CalibrationData, config: ClusterConfig, target: float) -> ClusterConfig:
    """Return `config` with the `bits_overrides` that lose least at `target` stored bits per weight."""
    costs = measure_costs(blocks, data, config, list(range(1, 9)))
    shapes = {name: layer.weight.shape for block in blocks.items() for name, layer in quantizable(*block)}
    sizes = {name: {bits: stored_bits(name, shapes[name], bits, config) for bits in costs[name]} for name in costs}
    weights = sum(shapes[name].numel() for name in sizes)
    try:
        allocation = allocate_bits(sizes, costs, int(target * weights))
    except ValueError as error:
        raise ValueError(
            f"target_bits_per_weight={target} can't be met with {config.granularity} codebooks ({error}, {weights} "
            "weights): raise it, or store less beside the codes with granularity='per_tensor'."
        ) from error
    config = copy.deepcopy(config)
    config.bits_overrides = allocation
    return config


def stored_bits(name: str, shape: torch.Size, bits: int, config: ClusterConfig) -> int:
    """Count the bits of a layer's codes, codebooks and scales in the checkpoint."""
    codebooks = config.groups_of(name, shape[0]) * 2**bits * 8 * CODEBOOK_DTYPES[config.codebook_dtype].itemsize
    return 8 * packed_size(shape.numel(), bits) + codebooks + 32 * shape[0] * config.channel_scale
