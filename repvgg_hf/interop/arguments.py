"""The checks of what exporters are given, which name the argument, what was found, and what was expected."""

import os
from collections.abc import Collection
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import nn

DIMENSIONS = ("batch", "height", "width")  # in the order of an input's dimensions, without its channels
_SIZES = "a positive integer or two of them, (height, width)"


def require_model(model: Any) -> None:
    """Raise `TypeError` for what is no network, such as the path of one."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a network (torch.nn.Module), got {_described(model)}: load it first, as "
            "RepVGGForImageClassification.from_pretrained() does."
        )


def image_sides(image_size: Any, name: str = "image_size", why: str = "") -> tuple[int, int]:
    """Return (height, width) of what is one positive integer, for square images, or two of them.

    Raises `ValueError` for anything else; `why` is appended to what it says.
    """
    sides = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(sides) != 2 or not all(_is_positive(side) for side in sides):
        raise ValueError(f"{name} must be {_SIZES}, got {image_size!r}{why or '.'}")
    return int(sides[0]), int(sides[1])


def require_batch_size(batch_size: Any, why: str = "") -> int:
    """Return a positive integer as `int`; raises `ValueError` for anything else."""
    if not _is_positive(batch_size):
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}{why or '.'}")
    return int(batch_size)


def dynamic_dimensions(dynamic: Any) -> tuple[str, ...]:
    """Return those of batch, height and width that are `dynamic`; raises `ValueError` for others, and for no list."""
    listed = isinstance(dynamic, Collection) and not isinstance(dynamic, (str, bytes))
    if not listed or not all(isinstance(name, str) and name in DIMENSIONS for name in dynamic):
        raise ValueError(
            f"dynamic must be a list of some of {', '.join(DIMENSIONS)}, got {dynamic!r}: () makes all of them fixed."
        )
    return tuple(name for name in DIMENSIONS if name in dynamic)


def require_folder(folder: Any, inside: str, function: str) -> Path:
    """Return the path `<folder>/<inside>` that a `function` writes into; it may be missing.

    Raises `TypeError` for what is no path, `ValueError` if a file is in the place of a folder.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder must be a path (str or Path), got {_described(folder)}.")
    target = Path(folder) / inside
    for path in (target, *target.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(
                f"{path} is a file: {function} writes into a folder `{inside}` in the one given, so give another or "
                "remove the file."
            )
    return target


def require_example(example: Any, dynamic: bool = False) -> None:
    """Raise `TypeError` for an example that is no tensor, `ValueError` if it can't be traced with `dynamic` sizes."""
    if not isinstance(example, torch.Tensor):
        raise TypeError(
            f"example must be a tensor of images [batch, channels, height, width], got {_described(example)}."
        )
    if dynamic and (example.dim() != 4 or 1 in example.shape[:1] + example.shape[2:] or 0 in example.shape):
        raise ValueError(
            "example must be images [batch, channels, height, width], with dynamic=True at least two, of at least 2 x "
            f"2 pixels, since PyTorch takes sizes of one for constants; got {list(example.shape)}: give "
            "torch.zeros(2, 3, 224, 224), say, or dynamic=False."
        )


def _is_positive(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


def _described(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {value!r:.100}"


__all__ = [
    "DIMENSIONS", "dynamic_dimensions", "image_sides", "require_batch_size", "require_example", "require_folder",
    "require_model",
]  # fmt: skip
