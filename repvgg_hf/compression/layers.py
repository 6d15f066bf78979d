"""Finding the layers of a model that are quantized, and what becomes of each."""

from dataclasses import dataclass

import torch
from torch import nn

from ..runtime.layer_swaps import LastMap, is_plain, last_map_of, layers_left_float, require_quantizable
from ..runtime.logs import get_logger
from ..runtime.quantization_cluster import ClusterConfig
from ..runtime.reparameterization import fused_convolutions
from .codebooks.weights import QuantizedWeight, quantize_weight

logger = get_logger(__name__)

LARGEST = 1e15  # magnitude of a weight that is quantized: sums of the squares of larger ones overflow float32


@dataclass
class QuantizedLayer:
    """The quantized form of a float layer.

    Attributes:
        weight ([`QuantizedWeight`]): its codes (indices of a few bits), codebook (the values that they select) and
            channel scale (a factor for each output channel).
        bias (`torch.Tensor`, *optional*): `[out]` if it changes, else `None`.
        input_range (`tuple[float, int]`, *optional*): (scale, zero point) of its input if that is quantized.
        output_range (`tuple[float, int]`, *optional*): the same of its output.
    """

    weight: QuantizedWeight
    bias: torch.Tensor | None = None
    input_range: tuple[float, int] | None = None
    output_range: tuple[float, int] | None = None


@torch.no_grad()
def fused_layers(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Return (the fused convolutions of the blocks of branches, all layers once these are in place), both by name.

    The model itself is not changed. Raises `ValueError` naming the layer if the model can't be quantized.
    """
    require_quantizable(model)
    # a model whose code came with its checkpoint has blocks of that code
    fused = model.fused_convolutions() if hasattr(model, "fused_convolutions") else fused_convolutions(model)
    inside = tuple(f"{block}." for block in fused)
    plain = {
        name: layer
        for name, layer in model.named_modules()
        # one that is prepared for QAT is of a class of its own
        if (is_plain(layer) or hasattr(layer, "weight_fake_quant")) and not f"{name}.".startswith(inside)
    }
    if not fused and not plain:
        raise ValueError(
            f"{type(model).__name__} has no plain nn.Linear, nn.Conv1d or nn.Conv2d layer, which are what is quantized."
        )
    return fused, fused | plain


def settle_last_map(model: nn.Module, layers: dict[str, nn.Module], config: ClusterConfig) -> LastMap | None:
    """Decide whether the last feature map of `model` is rounded, write that into `config`, and return which one it is.

    `layers` are those of the fused model. By default the map is rounded in a classifier of this package if activations
    are, and the convolution that makes it is quantized. Raises `ValueError` where `config.quantize_last_map` asks for
    what can't be.
    """
    place = last_map_of(model) if getattr(model, "rounds_last_map", False) else None
    possible = place is not None and place.layer in layers and config.converts(place.layer)
    if config.quantize_last_map and not possible:
        problem = "has no last feature map that a convolution alone makes and a mean alone takes"
        if place is not None:
            problem = f"leaves {place.layer!r}, which makes the last feature map, float"
        raise ValueError(
            f"{type(model).__name__} {problem}, as quantize_last_map=True asks for: leave quantize_last_map out. It is "
            "for RepVGGForImageClassification without squeeze-excitation."
        )
    if config.quantize_last_map is None and config.activation_bits is not None and possible:
        config.quantize_last_map = True
    return place if config.quantize_last_map else None


def warn_of_float_layers(model: nn.Module) -> None:
    """Log which layers of `model` with a weight matrix are of a kind that is not quantized."""
    kinds = {}
    for name, kind in layers_left_float(model).items():
        kinds.setdefault(kind, []).append(name)
    if kinds:
        found = "; ".join(f"{len(names)} {kind} ({', '.join(names)})" for kind, names in kinds.items())
        logger.warning(
            "%d layers stay float, as only plain nn.Linear, nn.Conv1d and nn.Conv2d layers are quantized: %s.",
            sum(map(len, kinds.values())), found,
        )  # fmt: skip


def require_finite(name: str, layer: nn.Module) -> None:
    """Raise `ValueError` naming the layer if its weight has NaN or infinite entries, or ones beyond [`LARGEST`]."""
    count = (~layer.weight.isfinite()).sum().item()
    if count:
        raise ValueError(f"The weight of {name!r} has {count} NaN or infinite entries: train or load the model again.")
    largest = layer.weight.abs().max().item()
    if largest > LARGEST:
        raise ValueError(
            f"The weight of {name!r} has entries of up to {largest:.3g}; sums of squares of more than {LARGEST:.0e} "
            "overflow float32: train or load the model again, or name the layer in modules_to_not_convert."
        )


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


def quantize_layers(layers: dict[str, nn.Module], config: ClusterConfig) -> dict[str, QuantizedLayer]:
    """Quantize those of the fused `layers` that `config` converts, for the least weight error."""
    chosen = {name: layer for name, layer in layers.items() if config.converts(name)}
    return {name: QuantizedLayer(quantize_layer(name, layer, config)) for name, layer in chosen.items()}
