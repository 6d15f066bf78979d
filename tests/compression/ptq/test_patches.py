"""A layer's inputs as columns: its weight times them is its output."""

import pytest
import torch
from torch import nn

from repvgg_hf.compression.ptq.patches import patches

LAYERS = {
    "conv": (nn.Conv2d(4, 6, 3, padding=1), (4, 9, 7)),
    "strided, grouped": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9, 7)),
    "1x1": (nn.Conv2d(4, 6, 1), (4, 1, 1)),
    "depthwise, dilated": (nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4), (4, 9, 7)),
    "unlike sides": (nn.Conv2d(4, 6, (1, 5), stride=(2, 1), padding=(0, 2), dilation=(1, 2)), (4, 9, 11)),
    "same": (nn.Conv2d(4, 6, (2, 4), padding="same"), (4, 9, 7)),
    "same, dilated": (nn.Conv2d(4, 6, 2, padding="same", dilation=3), (4, 9, 7)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (4, 9, 7)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (4, 9, 7)),
    "replicate, strided": (nn.Conv2d(4, 6, 3, 2, 1, padding_mode="replicate"), (4, 9, 7)),
    "circular, grouped": (nn.Conv2d(4, 6, 5, padding=2, padding_mode="circular", groups=2), (4, 9, 7)),
    "reflect, same": (nn.Conv2d(4, 6, (4, 3), padding="same", padding_mode="reflect"), (4, 9, 7)),
    "1d": (nn.Conv1d(4, 6, 3, padding=1), (4, 11)),
    "1d, all": (nn.Conv1d(4, 6, 3, stride=2, padding=4, dilation=2, groups=2, padding_mode="circular"), (4, 11)),
    "1d, same": (nn.Conv1d(4, 6, 4, padding="same"), (4, 11)),
    "linear": (nn.Linear(5, 3), (5,)),
    "linear on sequences": (nn.Linear(5, 3), (7, 2, 5)),
}


def output_of(layer: nn.Module, columns: torch.Tensor) -> torch.Tensor:
    """The weight times `columns` `[G, d, positions]`, as `[out, positions]`."""
    return (layer.weight.reshape(len(columns), -1, columns.shape[1]) @ columns).flatten(0, 1)


def channels_first(layer: nn.Module, x: torch.Tensor, has_batch: bool = True) -> torch.Tensor:
    """What `layer` gives for `x`, without its bias, as `[out, positions]`."""
    y = layer(x)
    if isinstance(layer, nn.Linear):
        return (y - layer.bias).reshape(-1, y.shape[-1]).T
    y = (y if has_batch else y[None]).movedim(1, 0)
    return (y - layer.bias.view(-1, *[1] * (y.dim() - 1))).flatten(1)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_weight_times_patches_is_the_output(name, generator, monkeypatch):
    monkeypatch.setattr("repvgg_hf.compression.ptq.patches.PATCH_BYTES", 100)  # so that there are several pieces
    layer, size = LAYERS[name]
    x = torch.randn(5, *size, generator=generator)
    pieces = list(patches(layer, x))
    assert (len(pieces) == 1) == (isinstance(layer, nn.Linear) or name == "1x1")
    assert torch.allclose(output_of(layer, torch.cat(pieces, dim=2)), channels_first(layer, x), atol=1e-5)


@pytest.mark.parametrize("name", ["reflect", "1d, all", "linear"])
@torch.no_grad()
def test_without_a_dimension_for_the_batch(name, generator):
    layer, size = LAYERS[name]
    x = torch.randn(size, generator=generator)
    (columns,) = patches(layer, x)
    assert torch.allclose(output_of(layer, columns), channels_first(layer, x, has_batch=False), atol=1e-5)
