"""Saving a model in timm's own form: a folder that `timm.create_model("local-dir:<folder>", pretrained=True)` loads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .timm import timm_architecture, to_timm_state_dict
from .timm_images import timm_image_settings
from .timm_models import import_timm
from .weight_files import misfit

_TOLERANCE = 1e-4  # of logits, relative to the largest: far above rounding, far below another network's


def save_for_timm(model: PreTrainedModel, folder: str | Path) -> None:
    """Save a RepVGG or a wrapped timm model in a folder, as timm's repositories on the Hub are.

    Weights go to `model.safetensors`; architecture, arguments, names of the classes and how images are prepared to
    `config.json`. The folder is loaded by timm, and the logits for a random image are compared, before this returns.

    Args:
        model ([`RepVGGForImageClassification`] or `TimmWrapperForImageClassification`): the model, not quantized. A
            RepVGG has branches: timm makes no fused one from a name.
        folder (`str` or `Path`): an existing folder.

    Raises `ValueError` for a model that timm can't make.
    """
    timm = import_timm()
    state_dict = to_timm_state_dict(model)
    name, arguments, settings = _description(model)
    if not timm.is_model(name):
        raise ValueError(
            f"timm {timm.__version__} has no {name}: a newer one may have, or save with save_pretrained()."
        )
    with torch.random.fork_rng(devices=[]):
        timm_model = timm.create_model(name, num_classes=model.config.num_labels, **arguments)
    problems = misfit(timm_model.state_dict(), state_dict)
    if problems is not None:
        raise ValueError(
            f"timm's {name} has other tensors: {problems}. timm makes models with branches from a name: save the model "
            "as it was before fusing, and call timm.utils.reparameterize_model where it is used."
        )
    timm_model.load_state_dict(state_dict)
    config: dict[str, Any] = {"pretrained_cfg": settings}
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    if names != [f"LABEL_{index}" for index in range(len(names))]:
        config["label_names"] = names
    timm.models.save_for_hf(
        timm_model, str(folder), model_config=config, model_args=arguments or None, safe_serialization=True
    )
    _check_logits(timm.create_model(f"local-dir:{folder}", pretrained=True), model)


def _description(model: PreTrainedModel) -> tuple[str, dict[str, Any], Mapping[str, Any]]:
    """Return a model's name in timm, the arguments of `timm.create_model`, and how its images are prepared."""
    file = getattr(model, "image_processor_file", None)
    processor = None if file is None or file.text is None else json.loads(file.text)
    settings = timm_image_settings(processor) if processor is not None else None
    if model.config.model_type != "timm_wrapper":
        channels = model.config.num_channels
        return timm_architecture(model.config), {} if channels == 3 else {"in_chans": channels}, settings or {}
    settings = settings or dict(getattr(model.config, "pretrained_cfg", None) or {})
    settings = {name: value for name, value in settings.items() if name not in ("architecture", "num_classes")}
    return model.config.architecture, dict(model.config.model_args or {}), settings


@torch.no_grad()
def _check_logits(timm_model: nn.Module, model: PreTrainedModel) -> None:
    channels = next(module.in_channels for module in timm_model.modules() if isinstance(module, nn.Conv2d))
    size = timm_model.pretrained_cfg["input_size"][1:]
    parameter = next(model.parameters())
    image = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))
    training = model.training
    expected = model.eval()(image.to(parameter.device, parameter.dtype)).logits.cpu().float()
    model.train(training)
    error = (timm_model.eval()(image) - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    limit = _TOLERANCE if parameter.dtype in (torch.float32, torch.float64) else 0.1
    if error > limit:
        raise ValueError(f"timm's model gives other logits, by {error:.1e} of the largest: they can't be exchanged.")
