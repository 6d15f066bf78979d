"""Putting cluster layers into a model of any architecture, and float layers back.

Quantized are plain `nn.Linear`, `nn.Conv1d` and `nn.Conv2d` layers: what a subclass, a parametrization or a hook that
makes the weight (weight norm) computes is not known here, so that these stay float, and so do other kinds of layers.
Other hooks of a layer go with it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin

from .cluster_layers import CODEBOOK_DTYPES, LAYER_CLASSES, ClusterConv, ClusterLayer, cluster_layers
from .fused_structure import rebuild_fused
from .logs import get_logger
from .reparameterization import ReparamConv2d
from .tensors import require_in_memory

logger = get_logger(__name__)

# layers with weight matrices of their own, of which those that are no key of LAYER_CLASSES stay float
_WITH_WEIGHTS = (_ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase)
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_QUANTIZED_BY_TORCH = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.", "torchao.")


def is_plain(layer: nn.Module) -> bool:
    """Tell whether `layer` is of a kind that is quantized, and computes with the weight that it stores."""
    return type(layer) in LAYER_CLASSES and layer._parameters.get("weight") is not None


def all_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return the names of every module of `model`, most of which have one."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def convertible_layers(model: nn.Module, config) -> dict[str, nn.Module]:
    """Return the layers of a fused `model` that `config`, a `ClusterConfig`, converts, by their first names."""
    return {name: layer for name, layer in model.named_modules() if is_plain(layer) and config.converts(name)}


@dataclass(frozen=True)
class LastMap:
    """The last feature map of a network, which a convolution makes and nothing but a mean or the like follows.

    Attributes:
        layer: the name of that convolution.
        rectified: whether a ReLU follows it, so that negative values don't matter.
    """

    layer: str
    rectified: bool


def last_map_of(model: nn.Module) -> LastMap | None:
    """Return the last feature map of a `model` that says which one it is (`last_map()`), else `None`."""
    return model.last_map() if hasattr(model, "last_map") else None


def layers_left_float(model: nn.Module) -> dict[str, str]:
    """Return the kind of each layer of a fused `model` that has a weight matrix and can't be quantized, by name."""
    found, inside = {}, []
    for name, module in model.named_modules():
        if not isinstance(module, _WITH_WEIGHTS) or is_plain(module) or name.startswith(tuple(inside)):
            continue
        # a parametrized layer is of a class that was made for it; the name of the one before says more
        kind = type(module).__bases__[0] if hasattr(module, "parametrizations") else type(module)
        plain = "with a computed weight" if kind in LAYER_CLASSES else ""
        found[name] = f"{kind.__name__} {plain}".strip()
        if isinstance(module, nn.MultiheadAttention):
            inside.append(f"{name}.")  # its output layer is part of it
    return found


def require_quantizable(model: nn.Module) -> None:
    """Raise `ValueError` naming the layer that keeps `model` from being quantized.

    That is one without weights yet, with weights that are not in memory, that are quantized already or no plain
    tensors, or with an unknown padding.
    """
    for name, module in model.named_modules():
        kind = type(module)
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            raise ValueError(
                f"{name!r} is a {kind.__name__} that has no weights yet: run the model once on an example, so that "
                "lazy layers get their shapes, then quantize it."
            )
        if isinstance(module, ClusterLayer):
            raise ValueError(
                f"{name!r} is quantized already: quantize the float model, or dequantize this one first "
                "(repvgg_hf.dequantize)."
            )
        if kind.__module__.startswith(_QUANTIZED_BY_TORCH):
            raise ValueError(
                f"{name!r} is a {kind.__module__}.{kind.__name__}, quantized by another library: quantize the float "
                "model that it was made from."
            )
        if isinstance(module, (_ConvNd, nn.Linear)):
            weight = module._parameters.get("weight")
            if weight is not None and not (type(weight) is nn.Parameter and weight.is_floating_point()):
                raise ValueError(
                    f"The weight of {name!r} is a {type(weight).__name__} of {weight.dtype}, no float tensor: it was "
                    "quantized or spread over devices by another library. Quantize the float model, in one process."
                )
            mode = getattr(module, "padding_mode", "zeros")
            if mode not in PADDING_MODES:
                raise ValueError(
                    f"{name!r} has padding_mode={mode!r}, which is none of {', '.join(PADDING_MODES)}: set it to one "
                    "of these, or pad in a layer before."
                )
    require_in_memory(model)


def replace_with_cluster_layers(model: nn.Module, config) -> dict[str, ClusterLayer]:
    """Put empty cluster layers in the place of those that `config`, a `ClusterConfig`, converts; returns them by name.

    Converted are the plain convolutions and linear layers of a fused `model`. A layer that has several names is put
    under all of them. Layers that shared a weight (tied ones) are independent of each other afterwards.
    """
    found, names = convertible_layers(model, config), all_names(model)
    last = last_map_of(model) if config.quantize_last_map else None
    layers = {
        name: LAYER_CLASSES[type(layer)](
            layer,
            bits=config.bits_of(name),
            num_codebooks=config.groups_of(name, layer.weight.shape[0]),
            channel_scale=config.channel_scale,
            codebook_dtype=CODEBOOK_DTYPES[config.codebook_dtype],
            on_the_fly=config.decode == "on_the_fly",
            activation_bits=config.activation_bits,
            rounds_output=last is not None and name == last.layer,
        ).train(layer.training)
        for name, layer in found.items()
    }
    for name, layer in layers.items():
        for other in names[found[name]]:
            model.set_submodule(other, layer)
    _untie(model, layers)
    if config.activation_bits is not None:
        choose_fast_path(model, False)
    return layers


def _untie(model: nn.Module, layers: dict[str, ClusterLayer]) -> None:
    """Give every layer a bias of its own, and make Transformers forget which of its tensors were tied to others.

    It ties parameters only, and empties what a checkpoint lacks as tied to another.
    """
    seen = set()
    for layer in layers.values():
        if layer.bias is not None and id(layer.bias) in seen:
            layer.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
        seen.add(id(layer.bias))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in list(tied.items()):
        if target.rpartition(".")[0] in layers or source.rpartition(".")[0] in layers:
            del tied[target]


def choose_fast_path(model: nn.Module, allowed: bool) -> None:
    """Choose whether PyTorch's transformer layers in `model` may run as one kernel, in evaluation.

    It takes the weights of their linear layers and does not call these, so that they would round no input. In its place
    PyTorch runs the layers one by one when it does not know the activation function.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and hasattr(module, "use_nested_tensor"):
            # nested tensors, which it makes of padded sequences, are for that kernel: few operations take them
            before = module.__dict__.pop("nested_tensor_before", module.use_nested_tensor)
            module.use_nested_tensor = before if allowed else False
            if not allowed:
                module.nested_tensor_before = before
        if isinstance(module, nn.TransformerEncoderLayer):
            activation = module.activation
            known = 1 if activation is F.relu or isinstance(activation, nn.ReLU) else 0
            known = 2 if activation is F.gelu or isinstance(activation, nn.GELU) else known
            module.activation_relu_or_gelu = known if allowed else 0


def rebuild_structure(model: nn.Module, config) -> None:
    """Give a float `model` as its class makes it the structure that a quantized one has, without values.

    That is what `config.fused_structure` tells of, and a convolution in the place of each block of branches.
    """
    if config.fused_structure:
        rebuild_fused(model, config.fused_structure)
    for name, block in list(model.named_modules()):
        if isinstance(block, ReparamConv2d):
            parameter = next(block.parameters())
            model.set_submodule(name, block.empty_convolution(device=parameter.device, dtype=parameter.dtype))


def warn_of_half_biases(model: nn.Module) -> None:
    """Warn of a model whose integers engines could not run, as its biases are in half precision, and so rounded."""
    for name, layer in cluster_layers(model).items():
        integers = layer.activation_bits is not None and layer.weight_codebook.dtype == torch.int8
        if integers and layer.bias is not None and layer.bias.dtype in (torch.float16, torch.bfloat16):
            logger.warning(
                "The biases of the quantized model are %s (such as that of %s), which can't hold multiples of "
                "input_scale * weight_scale: engines refuse such a checkpoint. Quantize the model in float32 "
                "(model.float()), save that, and cast only what computes in PyTorch.",
                str(layer.bias.dtype).removeprefix("torch."),
                name,
            )
            return


@torch.no_grad()
def dequantize_layers(model: nn.Module) -> None:
    """Replace every cluster layer in `model` by the float layer with the decoded weight, which rounds no input."""
    require_in_memory(model)
    names = all_names(model)
    for layer in cluster_layers(model).values():
        dense = layer.float_layer().train(layer.training)
        if isinstance(layer, ClusterConv):
            dense._reversed_padding_repeated_twice = layer.pads
        dense.weight, dense.bias = nn.Parameter(layer.decoded().contiguous()), layer.bias
        for name in names[layer]:
            model.set_submodule(name, dense)
    choose_fast_path(model, True)


__all__ = [
    "LastMap",
    "all_names",
    "choose_fast_path",
    "convertible_layers",
    "dequantize_layers",
    "is_plain",
    "last_map_of",
    "layers_left_float",
    "rebuild_structure",
    "replace_with_cluster_layers",
    "require_quantizable",
    "warn_of_half_biases",
]
