"""Any timm model as a `TimmWrapperForImageClassification`, which `from_pretrained` can make again.

Transformers stores a timm model as its name and the arguments of `timm.create_model`. Whether these make the same
network is checked here: by the names and shapes of its tensors, its batch norms, and the logits for an image.
"""

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .repvgg_names import label_fields
from .timm_images import timm_label_names
from .timm_models import import_timm
from .weight_files import misfit

_TOLERANCE = 1e-4  # of logits, relative to the largest: far above rounding, far below another network's
_IMAGES = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
_FIX = "convert the model that timm.create_model makes, or give the arguments that make this one as model_args"

logger = logging.get_logger(__name__)


def wrap_timm_model(timm_model: nn.Module, model_args: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Return a wrapper with copies of the weights of a timm model, in the same mode, in float32 on the CPU.

    `model_args` are arguments of `timm.create_model` that it was made with, beside those that it has noted itself.

    A fused model is stored as such where timm can make it so (`inference_mode=True`). A fused MobileOne, which timm
    can't, gets branches again, for inference: the first one has the fused kernel, the others contribute nothing.

    Raises `ValueError` for a model that name and arguments don't make again.
    """
    architecture = _architecture(timm_model)
    arguments = _arguments(timm_model, model_args)
    fields = label_fields(timm_label_names(timm_model)) or {"num_labels": timm_model.num_classes}
    fields["pretrained_cfg"] = _image_settings(timm_model, architecture, arguments)
    state_dict = {key: tensor.detach().cpu() for key, tensor in timm_model.state_dict().items()}
    model, state_dict = _matching(architecture, arguments, fields, state_dict)
    model.timm_model.load_state_dict(state_dict)
    _check_norms(timm_model, model.timm_model, architecture)
    _check_logits(timm_model, model)
    return model.train(timm_model.training)


def _architecture(timm_model: nn.Module) -> str:
    """Return the name by which timm makes a model; raises `ValueError` if it has none, or no classifier."""
    timm = import_timm()
    name = (getattr(timm_model, "pretrained_cfg", None) or {}).get("architecture")
    if not name or not timm.is_model(name):
        raise ValueError(
            f"This {type(timm_model).__name__} has the architecture {name!r} in its pretrained_cfg, which is no name "
            f"of timm {timm.__version__}, so that it could not be loaded again: give a model that timm.create_model "
            "made, or use the model as it is: repvgg_hf.fuse, quantize and save_quantized take any nn.Module."
        )
    classes = getattr(timm_model, "num_classes", None)
    if not classes:
        raise ValueError(
            f"This {name} has no classifier (num_classes={classes}): create it with num_classes=..., or call "
            "reset_classifier(num_classes)."
        )
    return name


def _arguments(timm_model: nn.Module, model_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` to store: noted by timm, given, and the number of input channels.

    Raises `ValueError` for one that JSON has no value for.
    """
    noted = dict(getattr(timm_model, "_model_args", None) or {})
    if "in_chans" not in noted and (channels := _in_channels(timm_model)) not in (3, None):
        noted["in_chans"] = channels
    arguments = {name: value for name, value in (noted | dict(model_args or {})).items() if name != "num_classes"}
    for name, value in arguments.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"The argument {name}={value!r} of timm.create_model can't be stored in config.json: create the model "
                "with a name, a number or a list for it, such as act_layer='silu'."
            ) from None
    return arguments


def _in_channels(timm_model: nn.Module) -> int | None:
    layers = (getattr(timm_model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    for name in [layers] if isinstance(layers, str) else layers:
        for module_name, module in timm_model.named_modules():
            if module_name == name:
                return getattr(module, "in_channels", None)
    first = next((module for module in timm_model.modules() if isinstance(module, nn.Conv2d)), None)
    return None if first is None else first.in_channels


def _image_settings(timm_model: nn.Module, architecture: str, arguments: Mapping[str, Any]) -> dict | None:
    """Return what Transformers' image processor for timm reads of `config.json`; `None`, with a warning, if unknown."""
    known = timm_model.pretrained_cfg
    config = import_timm().data.resolve_model_data_config(timm_model)
    channels, size = arguments.get("in_chans", 3), arguments.get("img_size")
    if size is not None:
        config["input_size"] = (channels, *((size, size) if isinstance(size, int) else size))
    lengths = {len(config["mean"]), len(config["std"]), config["input_size"][0], channels}
    if len(lengths) != 1:
        logger.warning(
            "timm prepares this model's images with a mean of %d channels, and it has %d: no image processor goes "
            "along with the model. Set model.config.pretrained_cfg to a dictionary of %s.",
            len(config["mean"]), channels, ", ".join(_IMAGES),
        )  # fmt: skip
        return None
    settings = {name: config[name] for name in _IMAGES}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return (
        settings
        | {"architecture": architecture}
        | {name: known[name] for name in ("tag", "license") if known.get(name)}
    )


def _make(architecture: str, arguments: dict[str, Any], fields: dict) -> PreTrainedModel:
    """Make a wrapper with new weights, as `from_pretrained` would."""
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification  # they import timm

    fields = {name: value for name, value in fields.items() if value is not None}
    config = TimmWrapperConfig(architecture=architecture, model_args=arguments, **fields)
    with torch.random.fork_rng(devices=[]):
        return TimmWrapperForImageClassification(config)


def _matching(
    architecture: str, arguments: dict[str, Any], fields: dict, state_dict: dict[str, torch.Tensor]
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """Make a wrapper that takes the tensors, and return it with them; see [`wrap_timm_model`] for fused ones."""
    called = f"timm.create_model({', '.join([repr(architecture), *(f'{k}={v!r}' for k, v in arguments.items())])})"
    try:
        model = _make(architecture, arguments, fields)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{called} fails, {type(error).__name__}: {error}. {_FIX.capitalize()}.") from error
    problems = misfit(model.timm_model.state_dict(), state_dict)
    if problems is None:
        return model, state_dict
    try:
        fused = _make(architecture, arguments | {"inference_mode": True}, fields)
    except (TypeError, RuntimeError, AssertionError):  # most networks have no such argument
        fused = None
    if fused is not None and misfit(fused.timm_model.state_dict(), state_dict) is None:
        return fused, state_dict
    branches = mobileone_branches(model.timm_model, state_dict)
    if misfit(model.timm_model.state_dict(), branches) is None:
        return model, branches
    raise ValueError(
        f"{called} makes other tensors than this model has: {problems}. {_FIX.capitalize()}. timm can't make a fused "
        f"{architecture}: convert it before fusing, and fuse it with repvgg_hf.fuse."
    )


def mobileone_branches(timm_model: nn.Module, fused: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors with which a MobileOne of timm that has branches computes what a fused one does with `fused`.

    Each block's first branch gets the fused kernel, with a batch norm that only adds the bias; kernels and scales of
    the others are zero. In training mode the batch norms compute something else, and the other branches don't learn.
    """
    expected = timm_model.state_dict()
    tensors = {key: tensor for key, tensor in fused.items() if ".reparam_conv." not in key}
    for key, kernel in fused.items():
        block, part, name = key.rpartition(".reparam_conv.")
        if not part or name != "weight":
            continue
        for other, tensor in expected.items():
            if other.startswith(f"{block}.") and other not in fused:
                tensors[other] = torch.ones_like(tensor) if other.endswith("running_var") else torch.zeros_like(tensor)
        first = f"{block}.conv_kxk.0"
        norm = f"{first}.bn"
        if f"{norm}.running_var" not in expected or f"{block}.reparam_conv.bias" not in fused:
            continue
        tensors[f"{first}.conv.weight"] = kernel
        tensors[f"{norm}.bias"] = fused[f"{block}.reparam_conv.bias"]
        tensors[f"{norm}.weight"] = torch.ones_like(expected[f"{norm}.weight"])
        tensors[f"{norm}.running_var"] = tensors[f"{norm}.running_var"] - timm_model.get_submodule(norm).eps
    return tensors


def _check_norms(theirs: nn.Module, ours: nn.Module, architecture: str) -> None:
    """Raise `ValueError` for a batch norm whose epsilon or momentum the logits may not show to be another."""
    others = dict(ours.named_modules())
    for name, module in theirs.named_modules():
        for attribute in ("eps", "momentum"):
            value = getattr(module, attribute, None)
            other = getattr(others.get(name), attribute, value)
            if value != other:
                raise ValueError(
                    f"{name} has {attribute}={value}, and that of timm's {architecture} has {other}: {_FIX}."
                )


@torch.no_grad()
def _check_logits(timm_model: nn.Module, model: PreTrainedModel) -> None:
    """Raise `ValueError` if the wrapper's logits for an image are others than those of the model that it is made of."""
    settings = getattr(model.config, "pretrained_cfg", None) or {}
    channels = (model.config.model_args or {}).get("in_chans", 3)
    size = settings.get("input_size") or [channels, *timm_model.pretrained_cfg.get("input_size", (3, 224, 224))[1:]]
    image = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    expected = copy.deepcopy(timm_model).cpu().float().eval()(image)
    logits = model.eval()(image).logits
    largest = expected.abs().max().clamp_min(1e-30)
    if expected.shape != logits.shape or not torch.allclose(
        logits, expected, rtol=0, atol=(_TOLERANCE * largest).nan_to_num(0.0, 0.0).item(), equal_nan=True
    ):
        raise ValueError(
            f"timm's {model.config.architecture} computes something else with these weights than this model: {_FIX}."
        )
