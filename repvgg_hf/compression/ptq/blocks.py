"""Running a model as the chain of blocks that calibration goes through, and finding what goes into each layer."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

PATCH_BYTES = 128 * 2**20  # unfolded patches of a convolution's inputs are made in pieces of this size


def run_blocks(blocks: Iterable[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """Run `x` through the `blocks`, one after the other."""
    for block in blocks:
        x = block(x)
    return x


def check_chain(model: nn.Module, blocks: dict[str, nn.Module], images: torch.Tensor) -> None:
    """Raise `ValueError` if running the `blocks` one after the other on `images` is not what `model` does."""
    outputs = model(images)
    outputs = outputs.logits if "logits" in outputs else outputs[0][-1] if "feature_maps" in outputs else outputs[0]
    if not outputs.isfinite().all():
        raise ValueError(
            f"{type(model).__name__} puts out NaN or infinite values for the first calibration images: look for "
            "extreme values in its weights and batch norms, and train or load it again."
        )
    found = run_blocks(blocks.values(), images)
    if found.dim() == 4 and outputs.dim() == 2:  # without a classifier the logits are the means of the last feature map
        found = found.mean(dim=(2, 3))
    if not torch.allclose(found, outputs, rtol=1e-3, atol=1e-4 * max(1.0, outputs.abs().max().item())):
        raise ValueError(
            f"{type(model).__name__} is no plain chain of blocks, which calibration needs: quantize it without "
            "calibration data."
        )


def quantizable(block_name: str, block: nn.Module) -> list[tuple[str, nn.Module]]:
    """List a block's convolutions and linear layers in the order in which they run, with their names in the model."""
    prefix = f"{block_name}." if block_name else ""
    layers = [(name, layer) for name, layer in block.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    return [(prefix + name, layer) for name, layer in layers]


def patches(layer: nn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a layer's inputs as columns `[G, d, positions]`, in pieces: its output is the weight times them.

    `G` is the number of groups of a convolution, `d` the number of inputs of an output (`in / G * height * width`).
    """
    if isinstance(layer, nn.Linear):
        yield x.reshape(-1, x.shape[-1]).T[None].float()
        return
    size = x[0].numel() * 4 * layer.kernel_size[0] * layer.kernel_size[1] // (layer.stride[0] * layer.stride[1])
    for piece in x.split(max(1, PATCH_BYTES // size)):
        columns = F.unfold(piece.float(), layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        columns = columns.unflatten(1, (layer.groups, -1))  # [batch, G, d, positions]
        yield columns.permute(1, 2, 0, 3).flatten(2)


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
