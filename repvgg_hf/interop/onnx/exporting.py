"""Writing a quantized model as one ONNX file, see [`export_onnx`]."""

import json
import os
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...compression.qat.layers import qat_layers
from ...runtime.cluster_layers import cluster_layers
from ...runtime.reparameterization import ReparamConv2d
from ...runtime.saving import replace_files
from ...runtime.tensors import require_in_memory
from ..arguments import DIMENSIONS, dynamic_dimensions, image_sides, require_folder, require_model
from ..extras import require
from ..integers import integer_layers, runs_exactly_without_vnni
from .circular import write_out_circular_padding
from .graph import strip
from .layers import LayerStyle
from .placeholders import NamedOutputs, with_placeholders
from .preprocessing import add_preprocessing, image_steps
from .replacing import write_floats, write_integers
from .tensorrt import require_tensorrt_layers, require_tensorrt_rule

WEIGHTS = ("packed", "int8", "float")
LOWEST_OPSET, HIGHEST_OPSET = 18, 25  # of what PyTorch exports, and of what onnxscript converts that to
LARGEST = 2**31 - 1  # bytes of a protobuf message
_SUFFIXES = {8: "quantized"}  # as transformers.js calls files, whose other ones are q4, q2, q1


@torch.no_grad()
def export_onnx(
    model: nn.Module,
    folder: str | os.PathLike,
    weights: str = "packed",
    *,
    preprocess: Any = None,
    tensorrt: bool = False,
    image_size: int | tuple[int, int] | None = None,
    dynamic: Sequence[str] = DIMENSIONS,
    opset: int = LOWEST_OPSET,
    file_name: str | None = None,
) -> Path:
    """Write a quantized model as an ONNX file `<folder>/onnx/<name>.onnx`; returns its path.

    The file appears when it is complete. Its input is called `pixel_values`, its outputs as the model calls them, such
    as `logits`; a model that returns a tensor has `logits`, one that returns a tuple `output_0` and so on.

    Args:
        model (`nn.Module`):
            Any quantized network with one image as its input, fused, on any device. With `weights="float"` it may be
            one that is not quantized.
        folder (`str` or `Path`):
            That of the checkpoint, or any other.
        weights (`str`, defaults to `"packed"`):
            - `"packed"`: codes of 1 to 8 bits, which the engine unpacks when it loads the file and computes with as
              int8. Named as transformers.js does: `model_quantized.onnx` with 8 bits, else `model_q4.onnx` and so on.
            - `"int8"`: the same integers, a byte each, for engines that unpack nothing: `model_int8.onnx`.
            - `"float"`: packed codes that are decoded to float, and inputs that are not rounded: for quantized models
              without activation bits, and for engines without int8 such as WebGPU. `model.onnx`.
        preprocess (*optional*):
            An image processor of Transformers, or the folder of one. The file then takes `image`, uint8
            `[batch, height, width, 3]`, and resizes, crops and normalizes it; it is called `..._image.onnx`.
        tensorrt (`bool`, defaults to `False`):
            Write by TensorRT's rules, with `weights="int8"`: int8 inputs with the zero point 0, float biases. Needs a
            model quantized with `activation_scheme="int8_symmetric"`. Called `model_int8_tensorrt.onnx`.
        image_size (`int` or `(height, width)`, *optional*):
            Of the images that the model is traced with, which counts only where it is not dynamic; by default what the
            model's configuration says, else 224.
        dynamic (sequence of `str`, defaults to `("batch", "height", "width")`):
            Which of these may be of any size.
        opset (`int`, defaults to 18):
            Version of ONNX's operators, from 18 to 25, or to the newest that an older onnx or onnxscript has.
        file_name (`str`, *optional*):
            Another name for the file.

    Raises `ValueError` for a model that has no integers (see [`integer_layers`]), is in train form, or can't be traced
    with these dynamic sizes, `TypeError` if `model` is no network, `ImportError` if `pip install 'repvgg-hf[onnx]'` is
    missing.

    Example:
    ```python
    >>> from repvgg_hf import RepVGGForImageClassification, export_onnx

    >>> model = RepVGGForImageClassification.from_pretrained("my-model-w4")
    >>> export_onnx(model, "my-model-w4")
    PosixPath('my-model-w4/onnx/model_q4.onnx')
    ```"""
    onnx = require("onnx", extra="onnx")
    require("onnxscript", extra="onnx")
    require_model(model)
    dynamic = dynamic_dimensions(dynamic)
    _check_arguments(weights, tensorrt, opset, file_name)
    shape = _image_shape(model, image_size)
    require_folder(folder, "onnx", "export_onnx()")
    _require_fused(model)
    integers = None if weights == "float" else _integers(model)
    if tensorrt:
        require_tensorrt_layers(integers)
    steps = None if preprocess is None else image_steps(preprocess)
    name = file_name or _file_name(model, weights, tensorrt, preprocess is not None)
    target = Path(folder) / "onnx"
    target.mkdir(parents=True, exist_ok=True)

    traced = with_placeholders(model)
    proto = _trace(traced, shape, dynamic, opset)
    strip(proto)
    write_out_circular_padding(proto)
    if integers is None:
        write_floats(proto, cluster_layers(model))
    else:
        style = LayerStyle(packed=weights == "packed", signed=tensorrt, float_bias=tensorrt)
        write_integers(proto, integers, style, by_rule=tensorrt)
    if steps is not None:
        add_preprocessing(proto, steps)
    _describe(proto, weights, integers)
    if tensorrt:
        require_tensorrt_rule(proto)
    if proto.ByteSize() > LARGEST:
        raise ValueError(f"The file would have {proto.ByteSize()} bytes, and one ONNX file holds {LARGEST}.")
    onnx.checker.check_model(proto, full_check=True)
    with replace_files(target) as new:
        (new / name).write_bytes(proto.SerializeToString(deterministic=True))
    return target / name


def _check_arguments(weights: str, tensorrt: bool, opset: int, file_name: str | None) -> None:
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}.")
    if tensorrt and weights != "int8":
        raise ValueError(
            f"tensorrt=True and weights={weights!r} don't fit: TensorRT takes int8 constants, so pass weights='int8'."
        )
    highest = _highest_opset()
    if type(opset) is not int or not LOWEST_OPSET <= opset <= highest:
        raise ValueError(
            f"opset must be an integer from {LOWEST_OPSET} to {highest}, which the installed onnx and onnxscript can "
            f"write, got {opset!r}."
        )
    if file_name is not None and not _is_file_name(file_name):
        raise ValueError(
            f"file_name must be the name of an .onnx file such as 'model.onnx', without folders, got {file_name!r}."
        )


def _highest_opset() -> int:
    converter = getattr(require("onnxscript.version_converter", extra="onnx"), "_version_converter", None)
    known = require("onnx", extra="onnx").defs.onnx_opset_version()
    return min(HIGHEST_OPSET, known, getattr(converter, "SUPPORTED_MAX_ONNX_OPSET", HIGHEST_OPSET))


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and Path(name).suffix == ".onnx"


def _require_fused(model: nn.Module) -> None:
    """Raise `ValueError` for a model that is in train form, has quantized training under way, or is offloaded."""
    if qat_layers(model):
        raise ValueError(
            f"{type(model).__name__} is being trained quantized: call quantize() without arguments, which freezes what "
            "was trained, then export it."
        )
    branches = [name for name, module in model.named_modules() if isinstance(module, ReparamConv2d)]
    if branches:
        raise ValueError(
            f"{type(model).__name__} is in train form ({branches[0]} and {len(branches) - 1} more have branches): "
            "quantize() fuses and quantizes it, reparameterize() only fuses it."
        )
    require_in_memory(model)


def _integers(model: nn.Module) -> dict:
    try:
        return integer_layers(model)
    except ValueError as error:
        raise ValueError(f"{error} Or export it with weights='float', which takes any model.") from error


def _file_name(model: nn.Module, weights: str, tensorrt: bool, with_image: bool) -> str:
    """Return the name that transformers.js looks for, by its `dtype`; bits are those of most weights."""
    stem = {"float": "model", "int8": "model_int8_tensorrt" if tensorrt else "model_int8"}.get(weights)
    if stem is None:
        sizes: dict[int, int] = {}
        for layer in cluster_layers(model).values():
            sizes[layer.bits] = sizes.get(layer.bits, 0) + layer.weight_numel
        bits = max(sizes, key=lambda bits: sizes[bits])
        stem = f"model_{_SUFFIXES.get(bits, f'q{bits}')}"
    return f"{stem}{'_image' if with_image else ''}.onnx"


def _image_shape(model: nn.Module, image_size: int | tuple[int, int] | None) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that a model is traced with."""
    config = getattr(model, "config", None)
    channels, known = getattr(config, "num_channels", 3), getattr(config, "image_size", None)
    timm = getattr(model, "pretrained_cfg", None) or getattr(config, "pretrained_cfg", None) or {}
    if isinstance(timm.get("input_size"), (list, tuple)):
        channels, *known = timm["input_size"]
    if image_size is None and known is not None:
        return channels, *image_sides(known, f"The image_size in the configuration of {type(model).__name__}")
    return channels, *image_sides(224 if image_size is None else image_size)


def _trace(model: NamedOutputs, shape: tuple[int, int, int], dynamic: Sequence[str], opset: int) -> Any:
    """Return the `onnx.ModelProto` of a model with placeholders."""
    images = torch.zeros(2, *shape)  # a batch of one would be taken for a constant
    images = images if "batch" in dynamic else images[:1]
    dimensions: dict[int, Any] = {
        index: torch.export.Dim("batch") if name == "batch" else torch.export.Dim.DYNAMIC
        for name, index in zip(DIMENSIONS, (0, 2, 3))
        if name in dynamic
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for size in _other_sizes(shape, dynamic):
                model(images.new_zeros(len(images), shape[0], *size))
            model(images)  # finds the names of the outputs
            program = torch.export.export(model, (images,), dynamic_shapes=(dimensions,), strict=False)
            exported = torch.onnx.export(
                program, dynamo=True, input_names=["pixel_values"], output_names=model.names, opset_version=opset,
                verbose=False,
            )  # fmt: skip
        except Exception as error:  # of many kinds, from what a model does while it is traced
            raise ValueError(_trace_failure(model, shape, dynamic, error)) from error
    proto = exported.model_proto
    found = {entry.domain: entry.version for entry in proto.opset_import}.get("")
    if found != opset:  # onnxscript says in the log alone that it could not convert
        raise ValueError(
            f"onnxscript could not convert {type(model.model).__name__} to opset {opset} and left it at {found}: pass "
            f"opset={LOWEST_OPSET}, or leave it out."
        )
    _name_dimensions(proto, dynamic)
    return proto


def _other_sizes(shape: tuple[int, int, int], dynamic: Sequence[str]) -> list[tuple[int, int]]:
    """Return a size to try besides that of the tracing, which may pass relations between sizes, if any is dynamic."""
    _, height, width = shape
    larger = (2 * height if "height" in dynamic else height, 3 * width if "width" in dynamic else width)
    return [] if larger == (height, width) else [larger]


def _trace_failure(model: NamedOutputs, shape: tuple, dynamic: Sequence[str], error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    sizes = [name for name in ("height", "width") if name in dynamic]
    fix = (
        f"If the model takes images of one size only, pass image_size= and leave {' and '.join(sizes)} out of dynamic=."
        if sizes
        else "Look at what its forward does that depends on values."
    )
    freely = f" and any {', '.join(dynamic)}" if dynamic else ""
    return (
        f"{type(model.model).__name__} can't be exported with images {list(shape)}{freely} ({type(error).__name__}: "
        f"{first:.300}). {fix}"
    )


def _name_dimensions(proto: Any, dynamic: Sequence[str]) -> None:
    """Give the input's dimensions their names, and drop those of outputs that PyTorch has computed from them."""
    (image,) = proto.graph.input
    for name, index in zip(DIMENSIONS, (0, 2, 3)):
        if name in dynamic:
            image.type.tensor_type.shape.dim[index].dim_param = name
    for output in proto.graph.output:
        for dimension in output.type.tensor_type.shape.dim:
            if dimension.dim_param and dimension.dim_param != "batch":
                dimension.ClearField("dim_param")


def _describe(proto: Any, weights: str, integers: dict | None) -> None:
    """Write into the file what made it, and what its integers are good for."""
    onnx = require("onnx", extra="onnx")
    proto.producer_name, proto.producer_version = "repvgg_hf", version("repvgg-hf")
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)
    proto.graph.name = "repvgg_hf"
    facts = {"weights": weights}
    if integers is not None:
        facts["bits"] = json.dumps(sorted({layer.bits for layer in integers.values()}))
        facts["exact_without_vnni"] = json.dumps(runs_exactly_without_vnni(integers))
    onnx.helper.set_model_props(proto, {f"repvgg_hf.{key}": value for key, value in facts.items()})


__all__ = ["DIMENSIONS", "LOWEST_OPSET", "WEIGHTS", "export_onnx"]
