"""What a network must be before it is recorded, with errors that say what to do otherwise."""

import math

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..runtime.cluster_layers import ClusterLayer
from ..runtime.tensors import require_bare, require_in_memory, require_module
from .recording import arguments_of, tensors_in

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_FOLLOWS_BATCHES = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)  # other than in eval mode


def check_can_be_fused(model: nn.Module, tolerance: float) -> None:
    """Raise `TypeError` or `ValueError` for a model that can't be fused, or a tolerance that is none."""
    require_module(model)
    if not isinstance(tolerance, (int, float)) or isinstance(tolerance, bool) or not tolerance > 0:
        raise ValueError(f"tolerance must be a positive number, got {tolerance!r}.")
    check_can_be_recorded(model)
    check_not_quantized(model)
    for name, module in model.named_modules():
        if module.training and (not name or isinstance(module, _FOLLOWS_BATCHES)):
            raise ValueError(
                f"{name or 'The model'} ({type(module).__name__}) is in training mode, in which batch norms follow "
                "each batch and nothing can be fused: call model.eval() first."
            )


def check_example(example) -> None:
    """Raise `ValueError` for an example without a value in any tensor, on which nothing can be verified."""
    _, shapes = arguments_of(example), [list(tensor.shape) for tensor in tensors_in(example)]
    if not any(map(math.prod, shapes)):
        raise ValueError(
            f"The example is empty (tensors of {', '.join(map(str, shapes))}), so that the fused model can't be "
            "compared with the one before: give at least one input, such as torch.randn(1, 3, 224, 224)."
        )


def check_can_be_recorded(model: nn.Module) -> None:
    """Raise `ValueError` naming the first module or weight with which no forward pass can be recorded."""
    require_bare(model)
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(parameter):
            raise ValueError(
                f"{name} is uninitialized, as its module is a lazy one: run the model once on an input, which gives "
                "it its shape."
            )
    require_in_memory(model)
    for name, module in model.named_modules():
        mode = getattr(module, "padding_mode", "zeros")
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and mode not in _PADDING_MODES:
            known = ", ".join(_PADDING_MODES)
            raise ValueError(f"{name} has the unknown padding_mode {mode!r}: PyTorch's convolutions know {known}.")


def check_not_quantized(model: nn.Module) -> None:
    """Raise `ValueError` for a model that this package or another quantized, or prepared for it."""
    config = getattr(model, "quantization_config", None)
    config = config or getattr(getattr(model, "config", None), "quantization_config", None)
    if config is not None or getattr(model, "is_quantized", False):
        method = getattr(config, "quant_method", None) or (config.get("quant_method") if type(config) is dict else None)
        by = f" ({getattr(method, 'value', method)})" if method else ""
        raise ValueError(f"The model is quantized already{by}: take the float model, and quantize what comes of it.")
    for name, module in model.named_modules():
        prepared = any(getattr(module, kind, None) is not None for kind in ("weight_fake_quant", "input_fake_quant"))
        if prepared or isinstance(module, ClusterLayer):
            raise ValueError(f"{name} is quantized, or prepared for it: take the float model before it was.")
        weight = getattr(module, "weight", None) if isinstance(module, nn.Conv2d) else None
        if weight is not None and not (weight.is_floating_point() and type(weight.data) is torch.Tensor):
            raise ValueError(
                f"{name}.weight is a {type(weight.data).__name__} of {weight.dtype}, no plain float tensor: another "
                "library quantized or sharded it. Take the float model before it was."
            )
