"""Checkpoints of the networks' authors: RepVGG (DingXiaoH/RepVGG) and MobileOne (apple/ml-mobileone)."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..runtime.configuration_repvgg import VARIANTS, RepVGGConfig
from ..runtime.image_processor_file import ImageProcessorFile
from ..runtime.modeling_repvgg import RepVGGForImageClassification
from .repvgg_names import Naming, config_of, label_fields, make_repvgg
from .timm_images import center_crop_processor
from .timm_models import import_timm
from .timm_wrapper import mobileone_branches, wrap_timm_model
from .weight_files import listed, misfit, read_weights, unwrap, with_counters

REPVGG_NAMES = Naming(
    stem="stage0",
    layer="stage{stage}.{layer}",
    first_stage=1,
    parts={
        "rbr_dense.conv": "conv.branches.3x3.conv",
        "rbr_dense.bn": "conv.branches.3x3.norm",
        "rbr_1x1.conv": "conv.branches.1x1.conv",
        "rbr_1x1.bn": "conv.branches.1x1.norm",
        "rbr_identity": "conv.branches.identity.norm",
        "rbr_reparam": "conv",
        "se.down": "attention.fc1",
        "se.up": "attention.fc2",
    },
    classifier="linear",
)
_MOBILEONE_BLOCK = re.compile(r"(?:stage0|stage([1-9])\.(\d+))\.(rbr_conv\.\d+|[a-z_]+(?:\.reduce|\.expand)?)\.(.+)")
_MOBILEONE_PARTS = {  # a block's parts, in the authors' names and in timm's
    "rbr_scale": "conv_scale",
    "rbr_skip": "identity",
    "reparam_conv": "reparam_conv",
    "se.reduce": "attn.fc1",
    "se.expand": "attn.fc2",
}
_MOBILEONES = ("mobileone_s0", "mobileone_s1", "mobileone_s2", "mobileone_s3", "mobileone_s4")
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_COMPARED = ("num_channels", "stem_hidden_size", "hidden_sizes", "depths", "groups", "use_squeeze_excitation")


def from_original(
    weights: str | Path | Mapping[str, torch.Tensor],
    variant: str | None = None,
    *,
    entry: str | None = None,
    strides: Sequence[int] | None = None,
    label_names: Sequence[str] | None = None,
) -> PreTrainedModel:
    """Make a Transformers model of a checkpoint that the authors' code of RepVGG or MobileOne wrote.

    RepVGG becomes a [`RepVGGForImageClassification`], with branches or fused, as the file is. MobileOne becomes a
    `TimmWrapperForImageClassification` with timm's `mobileone_s0` to `mobileone_s4` (which needs timm), and has
    branches: a fused one gets them again, for inference: the first has the fused kernel, the others contribute
    nothing, and `repvgg_hf.fuse` fuses them to the same kernel.

    Sizes are inferred from the tensors. A network of 1,000 classes comes with the image processor of the authors'
    evaluation on ImageNet. The model is in eval mode, and its batch normalization is plain: see [`from_timm`] for
    training it further with OABN.

    Args:
        weights (`str`, `Path` or `dict[str, torch.Tensor]`): a `.pth`, `.pt` or `.safetensors` file, or its tensors.
            Only tensors are read. What training loops put around them is removed: entries such as `state_dict` and
            `model_ema`, and prefixes such as `module.`.
        variant (`str`, *optional*): the published network that it must be, such as `"RepVGG-B1g4"` or
            `"mobileone_s1"`.
        entry (`str`, *optional*): the entry of the file with the weights; an average over the training by default.
        strides (`list[int]`, *optional*): strides of RepVGG's stem and of each stage's first layer, which no tensor
            shows; 2 each by default, as the authors have them.
        label_names (`list[str]`, *optional*): names of the classes, in order.

    Raises `ValueError` that names the tensors that are missing, unknown, or of other shapes, and says what to do.

    Example:
    ```python
    >>> from repvgg_hf import from_original

    >>> model = from_original("RepVGG-A0-train.pth", "RepVGG-A0")
    >>> model.reparameterize().save_pretrained("repvgg-a0")
    ```"""
    if isinstance(weights, Mapping):
        source, state_dict = "The mapping", unwrap(weights, "The mapping", entry)
    else:
        source, state_dict = str(weights), read_weights(weights, entry)
    if any(".blocks." in key or ".post_se." in key for key in state_dict):
        raise ValueError(
            f"{source} is a RepVGGplus (it has {next(k for k in state_dict if '.blocks.' in k or '.post_se.' in k)}), "
            "another network than RepVGG: only RepVGG and MobileOne are read."
        )
    try:
        if any(".rbr_conv." in key or ".reparam_conv." in key for key in state_dict):
            return _mobileone(state_dict, variant, strides, label_names)
        if any(".rbr_dense." in key or ".rbr_reparam." in key for key in state_dict):
            return _repvgg(state_dict, variant, strides, label_names)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    raise ValueError(
        f"{source} has no layers of RepVGG (stage1.0.rbr_dense.conv.weight, or fused stage1.0.rbr_reparam.weight) or "
        f"MobileOne (stage1.0.rbr_conv.0.conv.weight, or fused stage1.0.reparam_conv.weight): it has "
        f"{listed(list(state_dict))}. Weights under timm's names are read by repvgg_hf.from_timm."
    )


def _repvgg(
    state_dict: dict[str, torch.Tensor],
    variant: str | None,
    strides: Sequence[int] | None,
    label_names: Sequence[str] | None,
) -> RepVGGForImageClassification:
    renamed, unknown = REPVGG_NAMES.rename(state_dict)
    if unknown:
        raise ValueError(
            f"unknown names {listed(unknown)}. A RepVGG has stage<number>.<number>. and rbr_dense, rbr_1x1, "
            "rbr_identity, rbr_reparam, se.down or se.up, and linear: remove others if they are no part of it."
        )
    config = config_of(renamed, REPVGG_NAMES)
    for field, value in _labels(label_names, config.num_labels).items():
        setattr(config, field, value)
    if strides is not None:
        if len(strides) != 1 + len(config.depths):
            raise ValueError(
                f"strides has {len(strides)} entries: expected {1 + len(config.depths)}, for the stem and each stage."
            )
        config.stem_stride, config.strides = strides[0], list(strides[1:])
        config.validate()
    if variant is not None:
        _check_variant(config, variant)
    _check_strides(renamed, config)
    model = make_repvgg(renamed, config, REPVGG_NAMES)
    if config.num_labels == 1000 and config.num_channels == 3:
        model.image_processor_file = _processor(config)
    return model.eval()


def _labels(names: Sequence[str] | None, classes: int) -> dict:
    """Return the fields of a configuration that hold these names; raises `ValueError` for another number of them."""
    if names is None:
        return {}
    if len(names) != classes or len(set(names)) != classes:
        raise ValueError(
            f"label_names has {len(names)} names ({len(set(names))} different ones), and the classifier {classes} "
            "classes: give a name of its own for each."
        )
    return label_fields(dict(enumerate(names)))


def _check_variant(config: RepVGGConfig, variant: str) -> None:
    """Raise `ValueError` naming what another published network has than the one called `variant`."""
    published = RepVGGConfig.from_variant(variant)
    for name in _COMPARED:
        found, expected = getattr(config, name), getattr(published, name)
        if (list(found) if isinstance(found, (list, tuple)) else found) != (
            list(expected) if isinstance(expected, (list, tuple)) else expected
        ):
            raise ValueError(
                f"these are not the weights of {variant}: {name} is {found}, and there {expected}. Leave the variant "
                f"out, or name the right one of {', '.join(VARIANTS)}."
            )


def _check_strides(state_dict: Mapping[str, torch.Tensor], config: RepVGGConfig) -> None:
    """Raise `ValueError` for a stage whose first layer has an identity branch, and yet is to have another stride."""
    for stage, stride in enumerate(config.strides):
        key = f"repvgg.encoder.stages.{stage}.layers.0.conv.branches.identity.norm.weight"
        if stride != 1 and key in state_dict:
            raise ValueError(
                f"{REPVGG_NAMES.theirs(key)} is there, so that this layer has stride 1, and {stride} is expected: give "
                f"strides=[stem, stage 1, ...] with a 1 in place {stage + 1}, as the network was trained."
            )


def _processor(config: RepVGGConfig) -> ImageProcessorFile:
    """Return the image processor of the authors' evaluation: of 224 pixels, and of 320 for the largest network."""
    crop, edge = (320, 320) if config.use_squeeze_excitation else (224, 256)
    processor = center_crop_processor({"shortest_edge": edge}, (crop, crop), "bilinear", **_IMAGENET)
    return ImageProcessorFile(json.dumps(processor, indent=2, sort_keys=True) + "\n")


def _mobileone(
    state_dict: dict[str, torch.Tensor],
    variant: str | None,
    strides: Sequence[int] | None,
    label_names: Sequence[str] | None,
) -> PreTrainedModel:
    timm = import_timm()
    if strides is not None:
        raise ValueError("strides is an option for RepVGG: timm's MobileOne has those of the authors.")
    names = {key: mobileone_name(key) for key in state_dict}
    unknown = [key for key, name in names.items() if name is None]
    if unknown:
        raise ValueError(
            f"unknown names {listed(unknown)}. A MobileOne has stage<number>.<number>. and rbr_conv, rbr_scale, "
            "rbr_skip, reparam_conv, se.reduce or se.expand, and linear: remove others if they are no part of it."
        )
    renamed = {name: state_dict[key] for key, name in names.items()}
    classifier = renamed.get("head.fc.weight")
    if classifier is None or classifier.dim() != 2:
        raise ValueError("linear.weight [classes, channels], of the classifier, is missing: give the whole network.")
    stem = next(
        (t for name, t in renamed.items() if re.fullmatch(r"stem\.(conv_kxk\.0\.|reparam_)conv.*weight", name)), None
    )
    if stem is None or stem.dim() != 4:
        raise ValueError("stage0.rbr_conv.0.conv.weight, or fused stage0.reparam_conv.weight, is missing.")
    arguments = {} if stem.shape[1] == 3 else {"in_chans": stem.shape[1]}
    tried = {}
    for name in _variants_of_mobileone(variant):
        with torch.random.fork_rng(devices=[]):
            timm_model = timm.create_model(name, num_classes=classifier.shape[0], **arguments).eval()
        expected = timm_model.state_dict()
        tensors = with_counters(mobileone_branches(timm_model, renamed), expected)
        problems = misfit(expected, tensors, their_name)
        if problems is None:
            timm_model.load_state_dict(tensors)
            return _wrapped(timm_model, label_names)
        fitting = sum(key in tensors and tensors[key].shape == tensor.shape for key, tensor in expected.items())
        tried[name] = fitting / len(expected), problems
    nearest = max(tried, key=lambda name: tried[name][0])
    raise ValueError(
        f"these are not the weights of {', '.join(tried)}. Beside {nearest}: {tried[nearest][1]}. Leave the variant "
        "out, or convert a file of a published network."
    )


def _wrapped(timm_model: torch.nn.Module, label_names: Sequence[str] | None) -> PreTrainedModel:
    """Wrap a MobileOne; without ImageNet's 1,000 classes nothing is known about how its images are prepared."""
    model = wrap_timm_model(timm_model)
    for field, value in _labels(label_names, timm_model.num_classes).items():
        setattr(model.config, field, value)
    if timm_model.num_classes != 1000 and hasattr(model.config, "pretrained_cfg"):
        del model.config.pretrained_cfg
    return model


def _variants_of_mobileone(variant: str | None) -> Sequence[str]:
    if variant is None:
        return _MOBILEONES
    name = f"mobileone_{variant.lower().replace('mobileone', '').strip('-_')}"
    if name not in _MOBILEONES:
        raise ValueError(f"unknown MobileOne {variant!r}: choose one of {', '.join(_MOBILEONES)}.")
    return [name]


def mobileone_name(key: str) -> str | None:
    """Return timm's name of a tensor of MobileOne that the authors call `key`; `None` if they have no such."""
    if key in ("linear.weight", "linear.bias"):
        return key.replace("linear", "head.fc")
    match = _MOBILEONE_BLOCK.fullmatch(key)
    if match is None:
        return None
    stage, block, part, name = match.groups()
    place = "stem" if stage is None else f"stages.{int(stage) - 1}.{block}"
    if part.startswith("rbr_conv."):
        return f"{place}.conv_kxk.{part.removeprefix('rbr_conv.')}.{name}"
    return f"{place}.{_MOBILEONE_PARTS[part]}.{name}" if part in _MOBILEONE_PARTS else None


def their_name(key: str) -> str:
    """Return the authors' name of a tensor of MobileOne that timm calls `key`, for errors."""
    key = key.replace("head.fc", "linear").replace("conv_kxk.", "rbr_conv.").replace("stem.", "stage0.")
    key = re.sub(r"^stages\.(\d+)\.", lambda match: f"stage{int(match[1]) + 1}.", key)
    for theirs, ours in _MOBILEONE_PARTS.items():
        key = key.replace(f".{ours}.", f".{theirs}.")
    return key
