"""The files that engines take, as one list: what writes each, what reads its weights back, and which engine runs it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..compression.codebooks.codes import decode
from ..runtime.cluster_layers import ClusterLayer, cluster_layers
from ..runtime.saving import replace_files
from .coreml import export_coreml, read_coreml
from .executorch import export_executorch
from .litert import export_litert, read_litert
from .onnx import export_onnx, read_onnx_weights
from .openvino import export_openvino, read_openvino
from .programs import export_program, fixed_shape

PACKED, INT8, FLOAT = "packed", "int8", "float"
ONNX_WEIGHTS = (PACKED, INT8, FLOAT)


@dataclass(frozen=True)
class Format:
    """A kind of file for engines.

    Attributes:
        title (`str`): what people call it.
        weights (`tuple[str, ...]`): the forms of weights that it can have, the usual one first.
        engine (`str`, *optional*): which of `ENGINES` runs it; `None` if none of this system does.
        write (`Callable`): `(model, folder, weights, image_size)` -> path of the file, in a folder of its own.
        read (`Callable`, *optional*): path -> the weights in it, by layer or in the order of the layers.
    """

    title: str
    weights: tuple[str, ...]
    engine: str | None
    write: Callable[[nn.Module, Path, str, Any], Path]
    read: Callable[[Path], dict[str, np.ndarray] | list[np.ndarray]] | None


@dataclass(frozen=True)
class ExportedFile:
    """A file that was written for an engine.

    Attributes:
        format (`str`), weights (`str`): which of `FORMATS`, and in which form its weights are.
        path (`Path`): of the file, or the package's folder.
        bytes (`int`): its size, with that of files that belong to it.
    """

    format: str
    weights: str
    path: Path
    bytes: int


def export_format(
    model: nn.Module, folder: str | Path, format: str, weights: str | None = None, *, image_size=None
) -> ExportedFile:
    """Write a quantized model as a file of one `format`, into a folder of its own in `folder`.

    Args:
        model (`nn.Module`): a quantized, fused model; with `weights="float"` it may be float.
        folder (`str` or `Path`): the checkpoint's, or another.
        format (`str`): one of `FORMATS`.
        weights (`str`, *optional*): the form of the weights, of those that the format has; its usual one by default.
        image_size (`int` or `(height, width)`, *optional*): of the images, which formats without free sizes need.

    Raises what the function raises that writes the format, such as `ImportError` naming the extra that is missing.
    """
    check_formats([format])
    kind = FORMATS[format]
    weights = weights or kind.weights[0]
    if weights not in kind.weights:
        raise ValueError(f"weights of {format} must be one of {', '.join(kind.weights)}, got {weights!r}.")
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = kind.write(model, Path(folder), weights, image_size)
    return ExportedFile(format, weights, path, file_bytes(path))


def check_formats(formats: Sequence[str]) -> None:
    """Raise `ValueError` for what is no list of names of formats."""
    unknown = [formats] if isinstance(formats, str) else [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"formats must be a list of some of {', '.join(FORMATS)}, got {unknown[0]!r}.")


def file_bytes(path: Path) -> int:
    """Return the size of a file with what belongs to it: an `.xml` has a `.bin`, and a package is a folder."""
    if path.is_dir():
        return sum(inner.stat().st_size for inner in path.rglob("*") if inner.is_file())
    return sum(part.stat().st_size for part in parts_of(path))


def parts_of(path: Path) -> list[Path]:
    """Return the files that one consists of: itself, and of OpenVINO's the weights beside it."""
    beside = path.with_suffix(".bin")
    return [path, beside] if path.suffix == ".xml" and beside.is_file() else [path]


def equal_weights(model: nn.Module, file: ExportedFile) -> tuple[int, int] | None:
    """Return how many quantized layers of `model` have the very same weights in a file, and how many there are.

    `None` if nothing is quantized, or weights can't be read back from this format, see [`compare_weights`].
    """
    equal = compare_weights(model, file.format, file.path) if cluster_layers(model) else None
    return None if equal is None else (sum(equal.values()), len(equal))


def compare_weights(model: nn.Module, format: str, path: Path) -> dict[str, bool] | None:
    """Tell for each quantized layer, of `model` or in a file, whether both have the very same weights.

    These are integers, or of a file with decoded weights float32, whatever dtype `model` computes in.

    Args:
        model (`nn.Module`): of the checkpoint that the file is to be of.
        format (`str`), path (`Path`): of the file.

    Returns a `dict` by the layers' names; `None` if weights can't be read back from this format. Raises what reading
    raises, such as `ImportError` naming the extra that is missing.
    """
    read = FORMATS[format].read
    if read is None:
        return None
    layers = cluster_layers(model)
    found = _quantized_weights(read, path)
    if not isinstance(found, dict):  # in the file's order, which need not be the model's
        return {name: any(_has_weight(layer, weight) for weight in found) for name, layer in layers.items()}
    equal = {name: name in found and _has_weight(layer, found[name]) for name, layer in layers.items()}
    return equal | {name: False for name in found if name not in layers}


def _quantized_weights(read: Callable, path: Path) -> dict[str, np.ndarray] | list[np.ndarray]:
    """Return the weights in a file; none of a float model's, whose names are not those of quantized layers."""
    try:
        return read(path)
    except ValueError as error:
        if "has no weights that export_onnx wrote" not in str(error):
            raise
        return {}


@torch.no_grad()
def _has_weight(layer: ClusterLayer, found: np.ndarray) -> bool:
    """Tell whether an array is a layer's weight: its integers, or decoded in float32."""
    if found.shape[:1] != layer.weight_shape[:1] or found.size != layer.weight_numel:
        return False
    integers, stored = np.issubdtype(found.dtype, np.integer), layer.stored()
    if integers and stored["weight_codebook"].dtype != torch.int8:
        return False
    scale = None if integers else stored.get("weight_scale")
    expected = decode(layer.codes(), stored["weight_codebook"], scale)
    return np.array_equal(found.reshape(len(found), -1), expected.flatten(1).cpu().numpy())


def _write_onnx(model: nn.Module, folder: Path, weights: str, image_size) -> Path:
    return export_onnx(model, folder, weights, image_size=image_size)


def _write_openvino(model: nn.Module, folder: Path, weights: str, image_size) -> Path:
    return export_openvino(model, folder, image_size=image_size)


def _fixed(image_size):
    """Return the size of images for a file that takes one only: that of ImageNet's networks if none was given."""
    return 224 if image_size is None else image_size


def _write_coreml(model: nn.Module, folder: Path, weights: str, image_size) -> Path:
    return export_coreml(model, folder, image_size=_fixed(image_size))


def _write_torch(model: nn.Module, folder: Path, weights: str, image_size) -> Path:
    """Write a program of `torch.export` for any number of images of any size, `<folder>/torch/model.pt2`."""
    example = torch.zeros(fixed_shape("torch", model, _fixed(image_size), 2))
    program = export_program(model, example, dynamic=True)
    with replace_files(folder) as staging:
        (staging / "torch").mkdir()
        torch.export.save(program, staging / "torch" / "model.pt2")
    return folder / "torch" / "model.pt2"


def _write_executorch(model: nn.Module, folder: Path, weights: str, image_size) -> Path:
    return export_executorch(model, folder, image_size=_fixed(image_size))


def _write_litert(model: nn.Module, folder: Path, weights: str, image_size) -> Path:
    return export_litert(model, folder, image_size=_fixed(image_size))


def _read_coreml(path: Path) -> dict[str, np.ndarray]:
    return {name: weight.integers for name, weight in read_coreml(path).items()}


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    end, found = ".weight_int8", torch.export.load(path).state_dict
    return {name.removeprefix("model.").removesuffix(end): found[name].numpy() for name in found if name.endswith(end)}


FORMATS = {
    "onnx": Format("ONNX", ONNX_WEIGHTS, "onnxruntime", _write_onnx, read_onnx_weights),
    "openvino": Format("OpenVINO IR", (PACKED,), "openvino", _write_openvino, read_openvino),
    "coreml": Format("Core ML", (PACKED,), None, _write_coreml, _read_coreml),
    "torch": Format("torch.export", (INT8,), "torch", _write_torch, _read_torch),
    "executorch": Format("ExecuTorch", (INT8,), "executorch", _write_executorch, None),
    "litert": Format("LiteRT", (INT8,), "litert", _write_litert, read_litert),
}

__all__ = ["FORMATS", "ONNX_WEIGHTS", "ExportedFile", "Format", "check_formats", "compare_weights", "equal_weights",
           "export_format", "file_bytes", "parts_of"]  # fmt: skip
