"""A layer's inputs as columns, so that its output is its weight times them."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

PATCH_BYTES = 128 * 2**20  # unfolded patches of a convolution's inputs are made in pieces of this size


def patches(layer: nn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a layer's inputs as columns `[G, d, positions]`, in pieces: its output is the weight times them.

    `layer` is an `nn.Linear` with inputs `[..., d]`, an `nn.Conv2d` or an `nn.Conv1d`, with or without a dimension for
    the batch. `G` is the number of groups of a convolution, `d` the number of inputs of an output (`in / G * height *
    width`).
    """
    if isinstance(layer, nn.Linear):
        yield x.reshape(-1, x.shape[-1]).T[None].float()
        return
    kernel_size, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if x.dim() == 1 + len(kernel_size):
        x = x[None]
    x, padding = _padded(layer, x)
    if len(kernel_size) == 1:  # a picture that is one pixel high
        x, kernel_size, stride, dilation = x[:, :, None], (1, *kernel_size), (1, *stride), (1, *dilation)
        padding = (0, *padding)
    size = x[0].numel() * 4 * kernel_size[0] * kernel_size[1] // (stride[0] * stride[1])
    for piece in x.split(max(1, PATCH_BYTES // max(1, size))):
        columns = F.unfold(piece.float(), kernel_size, dilation, padding, stride)
        columns = columns.unflatten(1, (layer.groups, -1))  # [batch, G, d, positions]
        yield columns.permute(1, 2, 0, 3).flatten(2)


def _padded(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return (the input of a convolution, the zeros that are still to be added on both sides of each dimension).

    What is not that is added here: reflected, repeated or circular borders, and those of `padding="same"`, of which
    one side may be wider.
    """
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return x, layer.padding
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    # from the last dimension to the first, as F.pad takes them
    return F.pad(x, layer._reversed_padding_repeated_twice, mode), (0,) * len(layer.kernel_size)
