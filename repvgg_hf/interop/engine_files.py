"""Which file in a checkpoint's folder an engine runs: one that has the checkpoint's weights, never an older one's."""

import importlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..runtime.cluster_layers import cluster_layers
from ..runtime.saving import finish
from .engine_loaders import load_checkpoint
from .formats import FORMATS, compare_weights

_PACKED = {8: "quantized"}  # what export_onnx calls the bits in the names of files; others are q4, q2 and so on
_WRITERS = {"onnx": "export_onnx", "openvino": "export_openvino", "executorch": "export_executorch",
            "litert": "export_litert"}  # fmt: skip


def finish_saves(path: Path) -> None:
    """Finish what interrupted saves have left complete of a checkpoint and its files, given it or one of its files.

    A file of several parts, such as OpenVINO's, may else have one of the old and one of the new.
    """
    path = path.absolute()
    folders = [path, *(path / format for format in FORMATS)] if path.is_dir() else [path.parent, path.parent.parent]
    for folder in folders:
        if folder.is_dir():
            finish(folder)


def file_of_checkpoint(folder: Path, title: str, patterns: Iterable[str]) -> Path:
    """Return the file that `patterns` find in a checkpoint's folder and that has the checkpoint's weights.

    That with the checkpoint's bits comes first, then they come in the order of the patterns. A folder without weights
    of its own has nothing to compare with: there it is the one with the bits of `config.json`, or the first.

    Raises `ValueError` if there is none, or all have other weights, with the first layer that differs in each.
    """
    paths = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if "_image" not in path.stem]
    paths = sorted(dict.fromkeys(paths), key=lambda path: path.name != _packed_name(folder))  # else in order
    if not paths:
        raise ValueError(
            f"{folder} has no file for {title} ({' or '.join(patterns)}): write one with recipes/export.py."
        )
    if not any(folder.glob("*.safetensors")):
        return _without_weights(folder, title, paths)
    model, faults = load_checkpoint(folder), []
    for path in paths:
        fault = _fault_of(model, path)
        if fault is None:
            return path
        faults.append(f"{path} {fault}")
    calls = " or ".join(dict.fromkeys(_write_again(path) for path in paths))
    raise ValueError(
        f"{'; '.join(faults)}. Files for engines are not written by save_pretrained(): write them again with {calls}, "
        f"or give the file itself to run it as it is."
    )


def _without_weights(folder: Path, title: str, paths: list[Path]) -> Path:
    packed = [path.name for path in paths if path.stem.startswith("model_q")]
    if len(packed) > 1 and paths[0].name != _packed_name(folder):
        raise ValueError(
            f"{folder} has several files for {title}, {', '.join(packed)}, and neither weights nor bits in config.json "
            "that tell which is meant: give the file itself."
        )
    return paths[0]


def _packed_name(folder: Path) -> str | None:
    """Return how [`export_onnx`] calls a file with packed weights of the checkpoint's bits; `None` of a float one."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    bits = (config.get("quantization_config") or {}).get("bits")
    return None if bits is None else f"model_{_PACKED.get(bits, f'q{bits}')}.onnx"


def _fault_of(model, path: Path) -> str | None:
    """Return how the weights in a file differ from the model's; `None` if they don't, or can't be compared."""
    try:
        equal = compare_weights(model, path.parent.name, path) or {}
        scale = _other_scale(model, path)
    except ImportError:
        raise
    except Exception as error:  # of a kind for each format
        return f"can't be read ({(str(error).strip().splitlines() or [type(error).__name__])[-1]:.300})"
    different = [name for name, same in equal.items() if not same]
    if not different:
        return None if scale is None else f"has another {scale} than the checkpoint"
    others = f" and in {len(different) - 1} more of {len(equal)} layers" if different[1:] else ""
    return f"has other weights than the checkpoint in {different[0]!r}{others}"


def _other_scale(model, path: Path) -> str | None:
    """Return the first scale or zero point in a file that is not the model's; of what is called as in the checkpoint.

    A model that is calibrated anew may have the same codes.
    """
    constants = _CONSTANTS[path.suffix](path) if path.suffix in _CONSTANTS else {}
    for layer_name, layer in cluster_layers(model).items():
        for kind in _SCALES:
            name, stored = f"{layer_name}.{kind}", layer.stored().get(kind)
            if name in constants and (stored is None or not _is_same(constants[name], stored.cpu().numpy())):
                return name
    return None


def _is_same(found: np.ndarray, stored: np.ndarray) -> bool:
    return np.array_equal(found.reshape(-1), stored.reshape(-1))


def _onnx_constants(path: Path) -> dict[str, np.ndarray]:
    onnx = importlib.import_module("onnx")  # the weights were read with it
    tensors = [tensor for tensor in onnx.load(path).graph.initializer if tensor.name.endswith(_SCALES)]
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in tensors}


def _openvino_constants(path: Path) -> dict[str, np.ndarray]:
    nodes = importlib.import_module("openvino").Core().read_model(path).get_ordered_ops()
    constants = [node for node in nodes if node.get_type_name() == "Constant"]
    return {
        node.get_friendly_name(): node.data.copy() for node in constants if node.get_friendly_name().endswith(_SCALES)
    }


_SCALES = ("input_scale", "input_zero_point", "weight_scale", "output_scale", "output_zero_point")
_CONSTANTS = {".onnx": _onnx_constants, ".xml": _openvino_constants}


def _write_again(path: Path) -> str:
    format, folder = path.parent.name, path.parent.parent
    if format not in _WRITERS:
        return f"recipes/export.py --formats {format}"
    forms = {"model.onnx": ', "float"', "model_int8.onnx": ', "int8"'}
    return f'{_WRITERS[format]}(model, "{folder}"{forms.get(path.name, "")})'


__all__ = ["file_of_checkpoint", "finish_saves"]
