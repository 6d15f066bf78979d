"""Mixed precision: choosing how many bits each layer gets, by what they cost in the outputs and on disk."""

import copy
import math
from collections.abc import Callable

import torch
from torch import nn
from transformers.utils import logging

from ...runtime.logs import quiet
from ...runtime.packing import packed_size
from ...runtime.quantization_cluster import CODEBOOK_DTYPES, ClusterConfig
from ..layers import quantize_layer
from .blocks import quantizable, run_blocks
from .data import CalibrationData
from .hooks import every_layer_runs
from .outputs import class_distance, comparable_outputs, logits_of, relative_error

COST_EXAMPLES = 128  # a layer's cost is a mean over examples, and needs no more of them
CHOICES = range(1, 9)  # of the bits of a layer

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
def measure_block_costs(
    blocks: dict[str, nn.Module], data: CalibrationData, config: ClusterConfig
) -> dict[str, dict[int, float]]:
    """Measure how far the outputs of a chain of float blocks move when one layer alone is quantized.

    Returns the cost of each layer at each of its [`CHOICES`]. The distance is the Kullback-Leibler divergence of the
    predictions, or without a classifier the mean squared error of the feature map over its mean square. Each layer is
    measured from its block on, on up to 128 images.
    """
    x = torch.cat(data.images)[:COST_EXAMPLES]
    chain = list(blocks.items())
    outputs = run_blocks(blocks.values(), x)
    costs = {}
    for position, (block_name, block) in enumerate(logging.tqdm(chain, desc="Bits against loss")):
        rest = [later for _, later in chain[position:]]

        def cost(rest=rest, x=x):
            found = run_blocks(rest, x)
            return class_distance(found, outputs) if "" in blocks else relative_error([found], [outputs])

        for name, layer in quantizable(block_name, block):
            if config.converts(name):
                costs[name] = _costs_of(name, layer, config, cost)
        x = block(x)
    return costs


@torch.no_grad()
def measure_costs(
    model: nn.Module, layers: dict[str, nn.Module], data: CalibrationData, config: ClusterConfig
) -> dict[str, dict[int, float]]:
    """Measure the same as [`measure_block_costs`] for the `layers` of any float network, by running all of it.

    Outputs are compared as [`comparable_outputs`] says; theirs is the mean over the batches.
    """
    batches = data.first(COST_EXAMPLES)
    examples = sum(map(len, batches))
    with every_layer_runs():
        wanted = [comparable_outputs(model, batch.run(model)) for batch in batches]

        def cost():
            total = 0.0
            for batch, expected in zip(batches, wanted):
                outputs = batch.run(model)
                if logits_of(model, outputs) is not None:
                    distance = class_distance(logits_of(model, outputs), expected[0])
                else:
                    distance = relative_error(comparable_outputs(model, outputs), expected)
                total = total + distance * len(batch) / examples
            return total

        progress = logging.tqdm(layers.items(), desc="Bits against loss")
        return {name: _costs_of(name, layer, config, cost) for name, layer in progress}


def _costs_of(name: str, layer: nn.Module, config: ClusterConfig, cost: Callable[[], torch.Tensor]) -> dict[int, float]:
    """Return the `cost` with this layer quantized, for each of its [`CHOICES`]; the layer stays as it is."""
    weight, costs = layer.weight, {}
    try:
        for bits in CHOICES:
            with quiet(quantize_layer.__module__):  # of bit-widths that are only tried
                decoded = quantize_layer(name, layer, with_bits(config, bits)).decoded()
            # a new parameter: the old one may be that of another layer, too
            layer.weight = nn.Parameter(decoded, requires_grad=False)
            costs[bits] = cost().item()
            layer.weight = weight
    finally:
        layer.weight = weight
    return costs


def with_bits(config: ClusterConfig, bits: int) -> ClusterConfig:
    """Return `config` with the same bits everywhere."""
    config = copy.copy(config)
    config.bits, config.bits_overrides = bits, {}
    return config


def choose_bits(
    costs: dict[str, dict[int, float]], layers: dict[str, nn.Module], config: ClusterConfig, target: float
) -> ClusterConfig:
    """Return `config` with the `bits_overrides` that lose least at `target` stored bits per weight.

    One of the `layers` without costs, as it does not run, keeps the bits that it has in `config`.
    """
    costs = {name: costs.get(name, {config.bits_of(name): 0.0}) for name in layers}
    shapes = {name: layer.weight.shape for name, layer in layers.items()}
    sizes = {name: {bits: stored_bits(name, shapes[name], bits, config) for bits in costs[name]} for name in costs}
    weights = sum(shapes[name].numel() for name in sizes)
    try:
        allocation = allocate_bits(sizes, costs, int(target * weights))
    except ValueError as error:
        less = "channel_scale=False" if config.granularity == "per_tensor" else "granularity='per_tensor'"
        raise ValueError(
            f"target_bits_per_weight={target} can't be met with {config.granularity} codebooks ({error}, {weights} "
            f"weights): raise it, or store less beside the codes with {less}."
        ) from error
    config = copy.deepcopy(config)
    config.bits_overrides = allocation
    return config


def stored_bits(name: str, shape: torch.Size, bits: int, config: ClusterConfig) -> int:
    """Count the bits of a layer's codes, codebooks and scales in the checkpoint."""
    codebooks = config.groups_of(name, shape[0]) * 2**bits * 8 * CODEBOOK_DTYPES[config.codebook_dtype].itemsize
    return 8 * packed_size(shape.numel(), bits) + codebooks + 32 * shape[0] * config.channel_scale
