"""Equalization: scaling channels between layers, so that one range suits all channels of a layer's input.

What a layer puts out is divided by a factor per channel, and the weights that read that channel are multiplied by it:
through a ReLU the network computes what it did (cross-layer equalization, arXiv 1906.04721). Batch norm on an identity
makes channels that are hundreds of times larger than others, which a single range per tensor rounds away.
"""

import inspect

import torch
from torch import nn
from transformers import PreTrainedModel

from ...networks.recording import record
from ...networks.verifying import explains_jumps, largest_rounding, output_error
from ...runtime.logs import get_logger
from .channel_links import Link, find_links
from .data import CalibrationData
from .hooks import every_layer_runs, run_layers
from .model_inputs import ModelInputs

logger = get_logger(__name__)

# channels or weights that are smaller, as a share of the largest, count as this large
_LEAST = 1e-4


@torch.no_grad()
def equalize(model: nn.Module, layers: dict[str, nn.Module], data: CalibrationData, strength: float) -> list[Link]:
    """Scale channels between those of the `layers` that allow it, in place; the float32 `model` computes the same.

    A channel with the range `r`, read by weights of at most `w`, is divided by `r ** strength / w ** (1 - strength)` as
    in SmoothQuant (arXiv 2211.10438): 1 gives all channels the same range, 0 the weights that read them. Returns what
    was scaled.

    Raises `ValueError` if nothing can be, or if it can't be seen what the model does with its maps. It may be scaled
    then, and can't be used.
    """
    try:
        recording = record(model, _example(model, data))
    except ValueError as error:
        raise ValueError(f"equalization needs to see what the model does: leave it out. {error}") from error
    links = find_links(recording, layers)
    if not links:
        raise ValueError(
            f"{type(model).__name__} has no layer whose output goes through nothing but ReLU and pooling to other "
            "quantized layers, so that equalization has nothing to scale: leave it out. If batch norm is in between, "
            "fuse it first: repvgg_hf.fuse(model, example)."
        )
    logger.info("Equalizing the outputs of %d of %d layers.", len(links), len(layers))
    of_each_shape = {batch.described(): batch for batch in reversed(data.batches)}.values()
    before = [_outputs(model, batch) for batch in of_each_shape]
    ranges = _ranges(model, {name: layers[name] for link in links for name in link.readers}, data)
    links = [link for link in links if link.readers[0] in ranges]  # others have nothing to read
    factors = [_factors([layers[name] for name in link.readers], ranges[link.readers[0]], strength) for link in links]
    for link, factor in zip(links, factors):
        _scale_outputs(layers[link.source], 1 / factor)
        for name in link.readers:
            _scale_inputs(layers[name], factor)
    for batch, expected in zip(of_each_shape, before):
        error = output_error(expected, _outputs(model, batch))
        if error > largest_rounding(recording) and not explains_jumps(recording):
            raise ValueError(
                f"{type(model).__name__} computes something else with scaled channels (relative error {error:.2g}): it "
                "reads a map or a weight in a way that a recorded run of two examples does not show. Leave "
                "equalization out."
            )
    return links


def _example(model: nn.Module, data: CalibrationData) -> tuple | dict:
    """Return inputs to record `model` with: a model of Transformers puts out all its maps, none of which may change."""
    batch, kinds = data.first(2)[0], inspect.signature(model.forward).parameters
    open_end = any(kind.kind is inspect.Parameter.VAR_KEYWORD for kind in kinds.values())
    maps = {"output_hidden_states": True}
    if not isinstance(model, PreTrainedModel) or not (open_end or maps.keys() <= kinds.keys()):
        maps = {}
    if not maps and not batch.kwargs:
        return batch.args
    return inspect.signature(model.forward).bind_partial(*batch.args).arguments | batch.kwargs | maps


def _outputs(model: nn.Module, batch: ModelInputs):
    with every_layer_runs():
        return batch.run(model)


def _ranges(model: nn.Module, readers: dict[str, nn.Module], data: CalibrationData) -> dict[str, torch.Tensor]:
    """Return the largest magnitude of each channel that each of the `readers` gets, `[in]`."""
    found: dict[str, torch.Tensor] = {}

    def see(name, x):
        channels = x if isinstance(readers[name], nn.Linear) else x.movedim(x.dim() - _map_rank(readers[name]), -1)
        channels = channels.reshape(-1, channels.shape[-1])
        if not len(channels):
            return
        largest = channels.abs().amax(dim=0)
        found[name] = torch.maximum(found[name], largest) if name in found else largest

    run_layers(model, readers, data.batches, see)
    return found


def _map_rank(layer: nn.Module) -> int:
    """Return how many dimensions of a convolution's input its channels and pixels are."""
    return layer.weight.dim() - 1


def _factors(readers: list[nn.Module], ranges: torch.Tensor, strength: float) -> torch.Tensor:
    """Return what each channel is divided by, `[channels]`: 1 in the geometric mean."""
    weights = torch.stack([_largest_read(layer) for layer in readers]).amax(dim=0)
    alive = (ranges > 0) & (weights > 0)  # others are for nothing
    least = [values.clamp_min(_LEAST * values.max()).clamp_min(1e-30) for values in (ranges, weights)]
    logarithms = strength * least[0].log() - (1 - strength) * least[1].log()
    mean = (logarithms * alive).sum() / alive.sum().clamp_min(1)
    return torch.where(alive, (logarithms - mean).exp(), 1.0)


def _largest_read(layer: nn.Module) -> torch.Tensor:
    """Return the largest weight that reads each input channel, `[in]`.

    Of the weights as they are: beside the largest of its output each counts less where an identity has made one large,
    which was measured to be worse.
    """
    weight = layer.weight.flatten(2) if layer.weight.dim() > 2 else layer.weight[..., None]
    largest = weight.abs().amax(dim=2)  # [out, in / groups]
    return largest.view(getattr(layer, "groups", 1), -1, largest.shape[1]).amax(dim=1).flatten()


def _scale_outputs(layer: nn.Module, factors: torch.Tensor) -> None:
    layer.weight.mul_(factors.view(-1, *[1] * (layer.weight.dim() - 1)))
    if layer.bias is not None:
        layer.bias.mul_(factors)


def _scale_inputs(layer: nn.Module, factors: torch.Tensor) -> None:
    weight, groups = layer.weight, getattr(layer, "groups", 1)
    by_group = factors.view(groups, 1, weight.shape[1]).expand(groups, weight.shape[0] // groups, weight.shape[1])
    weight.mul_(by_group.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2)))
