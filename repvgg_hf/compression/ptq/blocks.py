"""Running a model as the chain of blocks that calibration goes through, and finding what goes into each layer.

A chain is the quick way for a model that says that it is one: each block runs on what the one before put out. Any
other network goes by `graph.py`.
"""

from collections.abc import Iterable

import torch
from torch import nn


def run_blocks(blocks: Iterable[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """Run `x` through the `blocks`, one after the other."""
    for block in blocks:
        x = block(x)
    return x


def is_chain(model: nn.Module, blocks: dict[str, nn.Module], images: torch.Tensor) -> bool:
    """Tell whether running the `blocks` one after the other on `images` is what `model` does."""
    outputs = model(images)
    outputs = outputs.logits if "logits" in outputs else outputs[0][-1] if "feature_maps" in outputs else outputs[0]
    found = run_blocks(blocks.values(), images)
    if found.dim() == 4 and outputs.dim() == 2:  # without a classifier the logits are the means of the last feature map
        found = found.mean(dim=(2, 3))
    tolerance = 1e-4 * max(1.0, outputs.abs().max().item())
    return found.shape == outputs.shape and torch.allclose(found, outputs, rtol=1e-3, atol=tolerance)


def quantizable(block_name: str, block: nn.Module) -> list[tuple[str, nn.Module]]:
    """List a block's convolutions and linear layers in the order in which they run, with their names in the model."""
    prefix = f"{block_name}." if block_name else ""
    layers = [(name, layer) for name, layer in block.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    return [(prefix + name, layer) for name, layer in layers]


class _Captured(Exception):
    """The exception that ends a forward pass at the layer whose inputs are wanted."""


def layer_input(block: nn.Module, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return what `layer` gets when `block` runs on `x`."""
    captured = []

    def capture(module, args):
        captured.append(args[0])
        raise _Captured

    handle = layer.register_forward_pre_hook(capture)
    try:
        block(x)
    except _Captured:
        return captured[0]
    finally:
        handle.remove()
    raise RuntimeError(f"The forward pass of {type(block).__name__} does not run its {layer}.")
