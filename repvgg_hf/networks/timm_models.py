"""Making timm models from a name and a checkpoint file."""

import copy
import difflib
import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .weight_files import misfit, read_weights, with_counters


def import_timm() -> ModuleType:
    """Return timm; raises `ImportError` that says how to install it."""
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ImportError("Models of timm need it: `pip install timm`.") from error


def is_timm_model(model: object) -> bool:
    """Tell whether `model` is a classifier of timm: those have a `pretrained_cfg`, or are made by its code."""
    known = isinstance(model, nn.Module) and type(model).__module__.startswith("timm.")
    return known or (isinstance(model, nn.Module) and hasattr(model, "pretrained_cfg"))


def create_timm_model(
    name: str, checkpoint_file: str | Path | None = None, model_args: Mapping[str, Any] | None = None
) -> nn.Module:
    """Make a timm model, in eval mode, with the weights of a file, or else those that timm publishes.

    Args:
        name (`str`): its name, such as `"mobileone_s0"` or, with a tag, `"mobileone_s0.apple_in1k"`.
        checkpoint_file (`str` or `Path`, *optional*): weights under timm's names, of the model with branches or fused
            by `timm.utils.reparameterize_model`; or under other names that timm can read for this model.
        model_args (`dict`, *optional*): further arguments of `timm.create_model`.

    Raises `ValueError` for an unknown name, or tensors that don't fit, which it lists.
    """
    timm = import_timm()
    arguments = dict(model_args or {})
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(
            f"timm {timm.__version__} has no model {name!r}"
            + (f": did you mean {' or '.join(map(repr, close))}?" if close else ": timm.list_models() has all names.")
        )
    if checkpoint_file is None:
        return timm.create_model(name, pretrained=True, **arguments).eval()
    return load_timm_weights(name, read_weights(checkpoint_file), arguments, str(checkpoint_file))


def load_timm_weights(
    name: str, state_dict: dict[str, torch.Tensor], arguments: Mapping[str, Any], source: str
) -> nn.Module:
    """Make the timm model called `name` with these weights, which are from `source`."""
    timm = import_timm()
    settings = timm.models.get_pretrained_cfg(name)
    arguments = _sizes_in(state_dict, settings) | dict(arguments)
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(name, **arguments).eval()
        problems = _load(model, state_dict)
        if problems is None:
            return model
        if any("reparam" in key for key in state_dict):
            fused = timm.utils.reparameterize_model(copy.deepcopy(model))
            fused_problems = _load(fused, state_dict)
            if fused_problems is None:
                return fused
        try:  # names of other code that timm knows for this network
            overlay = {"state_dict": dict(state_dict), "num_classes": model.num_classes}
            return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()
        except (RuntimeError, KeyError, AttributeError, TypeError):
            pass
    hint = "Give the file of this network"
    if any(".rbr_" in key for key in state_dict):
        hint = "The names are those of the authors' code: repvgg_hf.from_original reads RepVGG's and MobileOne's"
    raise ValueError(f"{source} does not fit timm's {name}: {problems}. {hint}.")


def _sizes_in(state_dict: Mapping[str, torch.Tensor], settings: Any) -> dict[str, int]:
    """Return the numbers of classes and of input channels that the tensors have, where they can be found."""
    sizes = {}
    for field, argument, dimension in (("classifier", "num_classes", 0), ("first_conv", "in_chans", 1)):
        layers = getattr(settings, field, None) or ()
        for layer in [layers] if isinstance(layers, str) else layers:
            weight = state_dict.get(f"{layer}.weight")
            if weight is not None and weight.dim() > dimension:
                sizes[argument] = weight.shape[dimension]
    if sizes.get("in_chans") == 3:
        del sizes["in_chans"]
    return sizes


def _load(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> str | None:
    """Load the tensors; returns what does not fit, in which case nothing is loaded."""
    expected = model.state_dict()
    state_dict = with_counters(state_dict, expected)
    problems = misfit(expected, state_dict)
    if problems is None:
        model.load_state_dict(state_dict)
    return problems
