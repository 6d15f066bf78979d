"""Converting models of timm, into this package's RepVGG or a wrapper of Transformers, and RepVGG back to timm."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..runtime.configuration_repvgg import VARIANTS, RepVGGConfig
from ..runtime.modeling_repvgg import RepVGGForImageClassification
from ..runtime.reparameterization import ReparamConv2d
from ..runtime.tensors import require_in_memory
from .repvgg_names import Naming, config_of, label_fields, make_repvgg
from .timm_images import timm_image_processor, timm_label_names
from .timm_models import create_timm_model, is_timm_model
from .timm_wrapper import wrap_timm_model
from .weight_files import listed

TIMM_NAMES = Naming(
    stem="stem",
    layer="stages.{stage}.{layer}",
    first_stage=0,
    parts={
        "conv_kxk.conv": "conv.branches.3x3.conv",
        "conv_kxk.bn": "conv.branches.3x3.norm",
        "conv_1x1.conv": "conv.branches.1x1.conv",
        "conv_1x1.bn": "conv.branches.1x1.norm",
        "identity": "conv.branches.identity.norm",
        "reparam_conv": "conv",
        "attn.fc1": "attention.fc1",
        "attn.fc2": "attention.fc2",
    },
    classifier="head.fc",
)
_SHAPE = ("stem_hidden_size", "hidden_sizes", "depths", "groups", "use_squeeze_excitation")


def convert_timm_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the tensors of a timm RepVGG for [`RepVGGForImageClassification`].

    Args:
        state_dict (`dict[str, torch.Tensor]`): what the timm model's `state_dict()` returned.

    Returns the same tensors under our names. Raises `ValueError` naming the keys that no RepVGG of timm has.
    """
    converted, unknown = TIMM_NAMES.rename(state_dict)
    if unknown:
        raise ValueError(
            f"Not a RepVGG of timm: unknown keys {', '.join(unknown[:5])} ({len(unknown)} of {len(state_dict)}). Give "
            "the state dict of a model such as timm.create_model('repvgg_a0')."
        )
    return converted


def from_timm(
    timm_model: nn.Module | str,
    checkpoint_file: str | Path | None = None,
    *,
    model_args: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Make a Transformers model with the weights of a timm model, in the form that it has.

    A RepVGG becomes a [`RepVGGForImageClassification`], with branches or fused. Any other model (MobileOne, FastViT,
    RepViT, GhostNetV3, ...) becomes a `TimmWrapperForImageClassification`, ready for `repvgg_hf.fuse`,
    `repvgg_hf.add_oabn`, `repvgg_hf.quantize` and `save_pretrained`. The image processor (size, crop, interpolation,
    mean and standard deviation of timm's `pretrained_cfg`) is saved with the model, and the names of the classes come
    over if timm has them.

    Batch normalization is plain, as timm's is. To train a RepVGG further with outlier-aware batch normalization (OABN),
    which bounds what small branches add to the fused kernel, save the model and load it with
    `from_pretrained(folder, oabn=True)`; for others see `repvgg_hf.add_oabn`.

    Args:
        timm_model (`nn.Module` or `str`): a model that `timm.create_model` made, or its name there. A model is not
            changed, and shares no tensor with the new one.
        checkpoint_file (`str` or `Path`, *optional*): with a name, a file with the weights (`.safetensors`, `.pth`,
            `.pt`); by default those that timm publishes. Only tensors are read from it. The number of classes is its
            classifier's.
        model_args (`dict`, *optional*): with a name, further arguments of `timm.create_model`; with a model, those that
            it was made with, where an older timm has not noted them. They are stored in `config.json`.

    Raises `ValueError` for a model that can't be made again from its name and arguments, as Transformers would when it
    loads it, for a file that does not fit, and for a RepVGG that computes something else with its weights: another
    activation than ReLU, other pooling than the mean, dilation. Dropout and stochastic depth of a RepVGG are left out.

    Example:
    ```python
    >>> import timm
    >>> from repvgg_hf import from_timm

    >>> model = from_timm(timm.create_model("repvgg_a0", pretrained=True))
    >>> model = from_timm("mobileone_s0", "mobileone.safetensors")
    ```"""
    if isinstance(timm_model, str):
        timm_model = create_timm_model(timm_model, checkpoint_file, model_args)
    elif checkpoint_file is not None:
        raise ValueError(
            f"checkpoint_file={str(checkpoint_file)!r} goes with the name of a timm model: give that, or load the file "
            "into the model before."
        )
    if not is_timm_model(timm_model):
        raise TypeError(
            f"{type(timm_model).__name__} is no model of timm: give one that timm.create_model made, or its name."
        )
    require_in_memory(timm_model)
    if not _is_repvgg(timm_model):
        return wrap_timm_model(timm_model, model_args)
    state_dict = convert_timm_state_dict(timm_model.state_dict())
    _check_function(timm_model)
    model = make_repvgg(state_dict, _config_of(timm_model, state_dict), TIMM_NAMES)
    model.image_processor_file = timm_image_processor(timm_model)
    return model.train(timm_model.training)


def _is_repvgg(timm_model: nn.Module) -> bool:
    """Tell whether all blocks of a timm model are RepVGG's."""
    stages = getattr(timm_model, "stages", None)
    if type(timm_model).__name__ != "ByobNet" or not stages:
        return False
    blocks = [timm_model.stem, *(block for stage in stages for block in stage)]
    return all(type(block).__name__ == "RepVggBlock" for block in blocks)


def _check_function(timm_model: nn.Module) -> None:
    """Raise `ValueError` naming the part of the model that the new one would compute otherwise."""
    for block in (timm_model.stem, *(block for stage in timm_model.stages for block in stage)):
        if type(block.act) is not nn.ReLU:
            raise ValueError(f"The activation is {type(block.act).__name__}: only models with ReLU are converted.")
        if not isinstance(block.attn, nn.Identity):
            functions = [type(part).__name__ for part in (block.attn.act, block.attn.gate)]  # timm has a Sigmoid too
            if functions != ["ReLU", "Sigmoid"]:
                raise ValueError(
                    f"The squeeze-and-excitation has {' and '.join(functions)}: only those with ReLU and Sigmoid are "
                    "converted."
                )
    for name, module in timm_model.named_modules():
        if isinstance(module, nn.Conv2d) and set(module.dilation) != {1}:
            raise ValueError(
                f"{name} has dilation {tuple(module.dilation)}, and the layers here have none: create the timm model "
                "with output_stride=32."
            )
    kind = timm_model.head.global_pool.pool_type
    if kind not in ("avg", "fast", "fastavg"):
        raise ValueError(
            f"The head has global_pool={kind!r}, and the classifier here takes the mean of the feature map: only "
            "models with global_pool='avg' are converted."
        )
    if not isinstance(timm_model.head.fc, (nn.Linear, nn.Identity)):
        raise ValueError(
            f"The classifier is {type(timm_model.head.fc).__name__}: only models with nn.Linear, or none, are "
            "converted."
        )


def _config_of(timm_model: nn.Module, state_dict: dict[str, torch.Tensor]) -> RepVGGConfig:
    """Return the configuration that the shapes describe; strides and epsilon, in no shape, come from the modules."""
    norms = [module for module in timm_model.modules() if isinstance(module, nn.BatchNorm2d)]
    return config_of(
        state_dict,
        TIMM_NAMES,
        stem_stride=_stride(timm_model.stem),
        strides=[_stride(stage[0]) for stage in timm_model.stages],
        batch_norm_eps=norms[0].eps if norms else 1e-5,
        **label_fields(timm_label_names(timm_model)),
    )


def _stride(layer: nn.Module) -> int:
    """Return the stride of a layer's convolutions."""
    return max(module.stride[0] for module in layer.modules() if isinstance(module, nn.Conv2d))


@torch.no_grad()
def to_timm_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the weights of a model under timm's names, for `load_state_dict` of the same model in timm.

    Args:
        model ([`RepVGGForImageClassification`] or `TimmWrapperForImageClassification`): the model, with branches or
            fused, not quantized. It is not changed.

    Returns copies that give the same logits in eval mode. Those with branches fit what `timm.create_model` makes (such
    as `repvgg_a0`), fused ones what `timm.utils.reparameterize_model` then makes of that. timm has no outlier-aware
    batch normalization (OABN): scales that it bounds are bounded in the copies, as they are now.

    Raises `ValueError` for a model that is quantized or prepared for it, or that no RepVGG of timm can be.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a model of Transformers, got {type(model).__name__}.")
    _check_float(model)
    if model.config.model_type == "timm_wrapper":
        own = "timm_model."  # asked of the whole model, as add_oabn bounds weights when its state is taken
        return _copies({key.removeprefix(own): tensor for key, tensor in model.state_dict().items()})
    if not isinstance(model, RepVGGForImageClassification):
        raise TypeError(
            f"{type(model).__name__} has no counterpart in timm: give a RepVGGForImageClassification or a "
            "TimmWrapperForImageClassification."
        )
    if model.config.hidden_act != "relu":
        raise ValueError(f"hidden_act is {model.config.hidden_act!r}: timm's RepVGG has 'relu' alone.")
    state_dict = model.state_dict()
    for name, block in model.named_modules():
        if isinstance(block, ReparamConv2d):
            for branch, bound in block.bounds().items():
                if bound is not None:
                    state_dict[f"{name}.branches.{branch}.norm.weight"] = block.branches[branch].norm_weight(bound)
    names = {key: TIMM_NAMES.theirs(key) for key in state_dict}
    unknown = [key for key, name in names.items() if name is None]
    branches = tuple(model.config.block_branches)
    if unknown or not (model.config.deploy or sorted(branches) == ["1x1", "3x3", "identity"]):
        raise ValueError(
            f"The blocks have branches {', '.join(branches)}, and timm's have 3x3, 1x1 and identity: reparameterize() "
            f"the model first{', as it has ' + listed(unknown) if unknown else ''}."
        )
    return _copies({name: state_dict[key] for key, name in names.items()})


def _check_float(model: PreTrainedModel) -> None:
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("The model is quantized, and timm has no such layers: dequantize() it first.")
    if getattr(model.config, "qat_config", None) is not None:
        raise ValueError("The model is prepared for training with quantized weights: quantize() and dequantize() it.")
    if getattr(model, "fused_structure", None):
        raise ValueError(
            "The model was fused by repvgg_hf.fuse, and timm has no such layers: convert the model before that."
        )
    require_in_memory(model)


def _copies(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state_dict.items()}


def timm_architecture(config: RepVGGConfig) -> str:
    """Return the name in timm of the RepVGG that `config` describes.

    Raises `ValueError` for one that was not published, or not with these strides, epsilon or form.
    """
    shape = {name: _plain(getattr(config, name)) for name in _SHAPE}
    for variant in VARIANTS:
        published = RepVGGConfig.from_variant(variant)
        if shape != {name: _plain(getattr(published, name)) for name in _SHAPE}:
            continue
        for name in ("stem_stride", "strides", "batch_norm_eps", "squeeze_ratio"):
            value, expected = _plain(getattr(config, name)), _plain(getattr(published, name))
            if value != expected:
                raise ValueError(f"{name} is {value}, and timm's repvgg_{variant} has {expected}: it can't be made.")
        return f"repvgg_{variant}"
    described = ", ".join(f"{name}={value}" for name, value in shape.items())
    raise ValueError(
        f"timm has no RepVGG with {described}: its are {', '.join(f'repvgg_{name}' for name in VARIANTS)}."
    )


def _plain(value):
    return list(value) if isinstance(value, (list, tuple)) else value
