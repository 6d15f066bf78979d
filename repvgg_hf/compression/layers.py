"""Which layers of a model are quantized, and how."""

import copy
import dataclasses
import difflib
import inspect

import torch
from torch import nn
from transformers.utils import logging

from ..runtime.quantization_cluster import ClusterConfig
from .codebooks.weights import QuantizedWeight, quantize_weight

logger = logging.get_logger(__name__)


def resolve_config(method: str | ClusterConfig | None, bits: int | None, options: dict) -> ClusterConfig:
    """A [`ClusterConfig`] from the arguments of `quantize` and `prepare_qat`."""
    if isinstance(method, str) or method is None:
        method = ClusterConfig(method=method or "cluster", bits=4 if bits is None else bits, **options)
        bits, options = None, {}
    if not hasattr(method, "bits_of"):  # no isinstance: it may be of a copy of the code that came with a checkpoint
        raise ValueError(f"method must be 'cluster', 'uniform' or a ClusterConfig, got {method!r}.")
    if bits is not None or options:
        raise ValueError("Give either a whole ClusterConfig or its arguments, not both.")
    return copy.deepcopy(method)  # saving writes a checksum into the model's own


def split_options(options: dict, *classes) -> list[dict]:
    """`options` by the dataclass in `classes` that has them as fields; at the end those of [`ClusterConfig`].

    Raises `TypeError` naming one that nobody has, and what it may have been meant to be.
    """
    names = [[field.name for field in dataclasses.fields(options_class)] for options_class in classes]
    parameters = inspect.signature(ClusterConfig).parameters.values()
    names.append([parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD])
    known = sum(names, [])
    for name in options:
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {similar[0]!r}?" if similar else f"there are {', '.join(sorted(set(known)))}."
            raise TypeError(f"Unknown quantization option {name!r}: {hint}")
    return [{name: options[name] for name in own if name in options} for own in names]


@torch.no_grad()
def fused_layers(model) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """(the fused convolutions of the blocks of branches, all layers once these are in place), both by name.

    The model itself is not changed.
    """
    fused = model.fused_convolutions()
    plain = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and not any(name.startswith(f"{block}.") for block in fused)
    }
    return fused, fused | plain


def require_finite(name: str, layer: nn.Module) -> None:
    """Raise `ValueError` naming the layer if its weight has NaN or infinite entries."""
    count = (~layer.weight.isfinite()).sum().item()
    if count:
        raise ValueError(f"The weight of {name!r} has {count} NaN or infinite entries: train or load the model again.")


def quantize_layer(
    name: str, layer: nn.Module, config: ClusterConfig, importance: torch.Tensor | None = None
) -> QuantizedWeight:
    """Quantize one layer's weight for the least squared error, weighted by `importance` of the weight's shape.

    Raises `ValueError` naming the layer if that can't be done.
    """
    require_finite(name, layer)
    bits, groups = config.bits_of(name), config.groups_of(name, layer.weight.shape[0])
    if layer.weight.numel() // groups < 2**bits:
        logger.warning(
            "%s has %d weights for each codebook of %d entries: fewer bits or codebooks would store it in less space.",
            name, layer.weight.numel() // groups, 2**bits,
        )  # fmt: skip
    try:
        return quantize_weight(layer.weight, bits, groups, config, importance)
    except ValueError as error:
        raise ValueError(f"{name!r} can't be quantized: {error}") from error
