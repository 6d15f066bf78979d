"""A quantized model as a program of `torch.export`, from which other engines' files are made."""

import importlib
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from ..runtime.logs import quiet
from .arguments import image_sides, require_batch_size, require_example, require_model
from .qdq import QDQ, to_qdq

FULL_GRID = 255  # steps of 8 bits


class ClippedQDQ(QDQ):
    """A [`QDQ`] of fewer than 8 bits for engines whose quantize operation ends at 8: it clips first."""

    def __init__(self, grid: QDQ):
        nn.Module.__init__(self)
        self.scale, self.zero_point, self.dtype = grid.scale, grid.zero_point, grid.dtype
        self.low, self.high = (-128, 127) if grid.dtype == torch.int8 else (0, 255)
        self.smallest = (grid.low - grid.zero_point) * grid.scale
        self.largest = (grid.high - grid.zero_point) * grid.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clamp(self.smallest, self.largest))


def clip_to_grids(module: nn.Module) -> nn.Module:
    """Clip inputs that have fewer than 8 bits before they are rounded, in place; returns `module`."""
    for name, child in list(module.named_modules()):
        if type(child) is QDQ and child.high - child.low < FULL_GRID:
            module.set_submodule(name, ClippedQDQ(child))
    return module


def export_program(
    model: nn.Module, example: torch.Tensor, *, dynamic: bool = False, clip: bool = True, **forms
) -> ExportedProgram:
    """Export a quantized model as a program of `quantized_decomposed` operations, with the checkpoint's integers in it.

    It takes images and returns the logits, or what the model returns if it has none.

    Args:
        model (`nn.Module`): a quantized model with activation bits, see
            [`~repvgg_hf.interop.integers.integer_layers`] for what is raised otherwise.
        example (`torch.Tensor`): images `[batch, channels, height, width]`, at least two of them if `dynamic`.
        dynamic (`bool`, defaults to `False`): take any number of images of any size. A network that can't, such as one
            of attention over a fixed number of patches, is an error of PyTorch's.
        clip (`bool`, defaults to `True`): clip inputs of fewer than 8 bits by an operation of its own, since engines
            know the limits of 8 bits only.
        **forms: `signed`, `weight` and `head` of [`~repvgg_hf.interop.qdq.to_qdq`].

    Example:
    ```python
    >>> from repvgg_hf import export_program

    >>> program = export_program(model, torch.zeros(2, 3, 224, 224), dynamic=True)
    >>> torch.export.save(program, "model_int8.pt2")
    ```"""
    require_model(model)
    require_example(example, dynamic)
    module = to_qdq(model, **forms)
    return export_module(clip_to_grids(module) if clip else module, example, dynamic)


def export_module(module: nn.Module, example: torch.Tensor, dynamic: bool = False) -> ExportedProgram:
    """Export what [`~repvgg_hf.interop.qdq.to_qdq`] made; `dynamic` is for any number of images of any size."""
    shapes = None
    if dynamic:
        shapes = {"pixel_values": {0: Dim("batch"), 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}}
    with torch.no_grad():
        return torch.export.export(module, (example,), dynamic_shapes=shapes)


def load_program(path: str | Path) -> ExportedProgram:
    """Read a `.pt2` file of `torch.export.save`, without the traceback that PyTorch logs about a damaged one.

    Raises what `torch.export.load` raises.
    """
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # makes the program's operations known
    with quiet("torch.export"):
        return torch.export.load(path)


def fixed_shape(engine: str, model: nn.Module, image_size, batch_size) -> tuple[int, int, int, int]:
    """Return the shape of the images that a file for an `engine` will take, whose sizes are fixed.

    Raises `ValueError` if they are no positive integers.
    """
    require_model(model)
    why = f": a file for {engine} takes images of one size. Write a file for each, or export_onnx(), which takes any."
    height, width = image_sides(image_size, why=why)
    batch_size = require_batch_size(batch_size, why)
    first = next(module for module in model.modules() if hasattr(module, "in_channels"))
    return batch_size, first.in_channels, height, width


def output_names(outputs) -> list[str]:
    """Return names for the tensors among a model's outputs, in order: its own, numbered in tuples; else `logits`."""
    if isinstance(outputs, torch.Tensor):
        return ["logits"]
    names = []
    for name, value in outputs.items() if hasattr(outputs, "items") else enumerate(outputs):
        inner = [""] if isinstance(value, torch.Tensor) else [f"_{index}" for index in range(len(value))]
        names += [f"{name if isinstance(name, str) else f'output_{name}'}{suffix}" for suffix in inner]
    return names


__all__ = ["clip_to_grids", "export_module", "export_program", "fixed_shape", "load_program", "output_names"]
