"""Mixed precision: which layer gets how many bits."""

import math

import torch

MAX_STATES = 200_000  # sizes of a partial allocation that are told apart


def allocate_bits(sizes: dict[str, dict[int, int]], costs: dict[str, dict[int, float]], budget: int) -> dict[str, int]:
    """Bits for every layer with the least total cost, of at most `budget` stored bits in total.

    Args:
        sizes: stored bits of each layer at each choice of bits.
        costs: what each choice costs (a loss), for the same layers and choices.
        budget: stored bits of all layers together.

    The multiple-choice knapsack problem, solved exactly by dynamic programming over total size; sizes are rounded up
    to a 200,000th of the budget if their greatest common divisor is smaller than that, so the budget always holds.
    Raises `ValueError` if even the smallest choices exceed it.
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
