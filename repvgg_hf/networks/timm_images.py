"""What a timm model says about its images: how they are prepared, and what the classes are called."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.utils import logging

from ..runtime.image_processor_file import ImageProcessorFile

_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # as PIL numbers them

logger = logging.get_logger(__name__)


def timm_image_processor(timm_model: nn.Module) -> ImageProcessorFile | None:
    """Return the image processor that prepares images as timm does for the evaluation of `timm_model`.

    Size, crop, interpolation, mean and standard deviation are those of its `pretrained_cfg`. `None` if it has none, as
    nothing is known then, or, with a warning, if the processor can't do the same.
    """
    if not getattr(timm_model, "pretrained_cfg", None):
        return None
    from timm.data import resolve_model_data_config  # installed, as somebody made the model

    config = resolve_model_data_config(timm_model)
    channels, height, width = config["input_size"]
    mean, std, crop_mode = list(config["mean"]), list(config["std"]), config["crop_mode"]
    edges = [math.floor(side / config["crop_pct"]) for side in (height, width)]
    if crop_mode == "squash":
        size = {"height": edges[0], "width": edges[1]}
    elif crop_mode == "center" and height == width:
        size = {"shortest_edge": edges[0]}
    else:
        return _without(f"crop_mode={crop_mode!r} for images of {height} x {width}")
    if config["interpolation"] not in _RESAMPLE:
        return _without(f"interpolation={config['interpolation']!r}")
    stem = next(module for module in timm_model.modules() if isinstance(module, nn.Conv2d))
    if not len(mean) == len(std) == channels == stem.in_channels:
        return _without(f"a mean of {len(mean)} channels for a model of {stem.in_channels}")
    processor = center_crop_processor(size, (height, width), config["interpolation"], mean, std)
    return ImageProcessorFile(json.dumps(processor, indent=2, sort_keys=True) + "\n")


def center_crop_processor(
    size: dict[str, int], crop: tuple[int, int], interpolation: str, mean: list[float], std: list[float]
) -> dict:
    """Return the configuration of an image processor that resizes to `size`, crops the center and normalizes."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": len(mean) == 3,
        "do_resize": True,
        "size": size,
        "resample": _RESAMPLE[interpolation],
        "do_center_crop": True,
        "crop_size": {"height": crop[0], "width": crop[1]},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def _without(reason: str) -> None:
    logger.warning(
        "timm prepares this model's images with %s, which no image processor does in the same way: none goes along "
        "with the model. Save one beside it, such as transformers.BitImageProcessor(...).save_pretrained(folder).",
        reason,
    )


def timm_label_names(timm_model: nn.Module) -> dict[int, str] | None:
    """Return the names of the classes by index, if `timm_model` has them.

    These are the `label_names` of its `pretrained_cfg` (described by its `label_descriptions`), or, for weights that
    are tagged as ImageNet's 1,000 classes (in1k), those of timm's list. A model with another number of classes than the
    weights were trained for has none.
    """
    config = getattr(timm_model, "pretrained_cfg", None) or {}
    classes = getattr(timm_model, "num_classes", None)
    labels, described = config.get("label_names"), config.get("label_descriptions") or {}
    if not labels and classes == config.get("num_classes") == 1000 and "in1k" in (config.get("tag") or ""):
        return dict(enumerate(imagenet_names()))
    if not labels or len(labels) != classes:
        return None
    labels = [labels[index] for index in range(classes)] if isinstance(labels, dict) else list(labels)
    return dict(enumerate(_described(labels, described)))


def imagenet_names() -> list[str]:
    """Return the names of ImageNet's 1,000 classes, in the order that networks have them; they are timm's list."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return _described(info.label_names(), info.label_descriptions(as_dict=True))


def _described(labels: list[str], described: dict[str, str]) -> list[str]:
    """Return what `labels` are described as, with the label behind it where several have the same description."""
    names = [described.get(label, label) for label in labels]
    times = Counter(names)  # two classes of ImageNet are called crane: the bird and the machine
    return [name if times[name] == 1 else f"{name} ({label})" for name, label in zip(names, labels)]


def timm_image_settings(processor: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what timm has in the `pretrained_cfg` of a model whose image processor has this configuration.

    The opposite of [`timm_image_processor`]; `None`, with a warning, if timm does not prepare images so.
    """
    size, crop = processor.get("size") or {}, processor.get("crop_size") or {}
    height, width, edge = crop.get("height"), crop.get("width"), size.get("shortest_edge")
    interpolation = {number: name for name, number in _RESAMPLE.items()}.get(processor.get("resample"))
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    usual = all(processor.get(step) for step in steps) and abs(processor.get("rescale_factor", 0) * 255 - 1) < 1e-6
    if usual and interpolation and height and width:
        settings = {
            "input_size": [len(processor["image_mean"]), height, width],
            "interpolation": interpolation,
            "mean": list(processor["image_mean"]),
            "std": list(processor["image_std"]),
        }
        if edge and height == width and (share := _crop_share(height, edge)):
            return settings | {"crop_pct": share, "crop_mode": "center"}
        share = _crop_share(height, size.get("height"))
        if share and share == _crop_share(width, size.get("width")):
            return settings | {"crop_pct": share, "crop_mode": "squash"}
    logger.warning(
        "timm can't prepare images as the model's image processor does (size %s, crop %s): the model is saved with "
        "timm's usual settings for its architecture.", size, crop,
    )  # fmt: skip
    return None


def _crop_share(crop: int, edge: int | None) -> float | None:
    """Return the share of an edge that is cropped such that timm computes the edge from it; `None` if there is none."""
    if not edge:
        return None
    shares = (math.floor(crop / edge * 10**digits) / 10**digits for digits in (3, 6, 9, 12))
    return next((share for share in shares if share and math.floor(crop / share) == edge), None)
