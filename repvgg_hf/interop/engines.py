"""One way to run a classifier, whichever engine does it: PyTorch, ONNX Runtime, OpenVINO and others."""

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .engine_ends import Ends
from .engine_files import file_of_checkpoint, finish_saves
from .engine_loaders import LOADERS, Run

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FIRST = ("model_quantized.onnx", "model_q*.onnx", "model_int8.onnx", "model.onnx")  # of several files, in this order


@dataclass(frozen=True)
class EngineKind:
    """An engine: what it is called, which files it takes, and where a checkpoint's folder has them.

    Attributes:
        title (`str`): what people call it.
        suffixes (`tuple[str, ...]`): of its files; none if it takes the checkpoint's folder itself.
        inside (`tuple[str, ...]`): patterns of its files in a checkpoint's folder, the preferred one first.
    """

    title: str
    suffixes: tuple[str, ...]
    inside: tuple[str, ...]


ENGINES = {
    "pytorch": EngineKind("PyTorch", (), ()),
    "inductor": EngineKind("PyTorch, inductor", (), ()),
    "onnxruntime": EngineKind("ONNX Runtime", (".onnx",), tuple(f"onnx/{name}" for name in _FIRST)),
    "openvino": EngineKind("OpenVINO", (".xml", ".onnx"), ("openvino/openvino_model.xml",)),
    "executorch": EngineKind("ExecuTorch", (".pte",), ("executorch/model.pte",)),
    "litert": EngineKind("LiteRT", (".tflite",), ("litert/model.tflite",)),
    "torch": EngineKind("torch.export", (".pt2",), ("torch/model.pt2",)),
}


@dataclass
class Engine:
    """A classifier that an engine runs, see [`load_engine`]; called with images it returns logits.

    Attributes:
        name (`str`): of the engine, one of `ENGINES`.
        path (`Path`): of the file, or the checkpoint's folder.
        ends ([`Ends`]): the image that it takes and what it calls its logits.
        run (`Callable`): what runs it, with as many images as it takes at once.
        folder (`Path`, *optional*): the checkpoint's, in which the file is or which it is beside.
    """

    name: str
    path: Path
    ends: Ends
    run: Run = field(repr=False)
    folder: Path | None = None

    @property
    def title(self) -> str:
        """What people call the engine."""
        return ENGINES[self.name].title

    @property
    def takes_pictures(self) -> bool:
        """Whether it prepares images itself: it takes uint8 `[images, height, width, 3]`, as they are decoded."""
        return self.ends.takes_pictures

    @property
    def file(self) -> str | None:
        """Where the file is in the checkpoint's folder, else its name; `None` for an engine that takes a folder."""
        path = self.path.absolute()
        if path.is_dir():
            return None
        inside = self.folder is not None and path.is_relative_to(self.folder.absolute())
        return path.relative_to(self.folder.absolute()).as_posix() if inside else path.name

    @cached_property
    def labels(self) -> list[str] | None:
        """The names of the classes in the checkpoint's `config.json`; `None` without one."""
        if self.folder is None:
            return None
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        names = {int(index): str(name) for index, name in (config.get("id2label") or {}).items()}
        names = names or {index: f"LABEL_{index}" for index in range(config.get("num_labels", 2))}
        return [names[index] for index in sorted(names)]

    def processor(self) -> Any:
        """Return the checkpoint's image processor. Raises `ValueError` if it has none."""
        from transformers import AutoImageProcessor

        if self.folder is None or not any((self.folder / name).is_file() for name in PROCESSOR_FILES):
            where = self.path.parent if self.folder is None else self.folder
            raise ValueError(
                f"{where} has no {PROCESSOR_FILES[0]}, which says how images for {self.path.name} are prepared: put "
                "the checkpoint's there, or name the folder of an image processor."
            )
        return AutoImageProcessor.from_pretrained(self.folder)

    def __call__(self, images: np.ndarray | torch.Tensor) -> np.ndarray:
        """Return the logits, float32 `[images, classes]`.

        Args:
            images: float32 `[images, channels, height, width]`, or pictures if it `takes_pictures`. Of a file with a
                fixed number of images, any number: they are cut into as many, and the last ones filled up.

        Raises `ValueError` for images of another shape or dtype, with values that are not finite, or that the engine
        fails on.
        """
        array = _as_array(images, self.path)
        self.ends.require_fitting(array, self.path)
        _require_finite(array, self.path)
        size = self.ends.image.shape[0]
        try:
            return self.run(array) if size is None else self._run_in_parts(array, size)
        except Exception as error:  # of a class for each engine
            reason = (str(error).strip().splitlines() or [""])[-1]
            raise ValueError(
                f"{self.title} can't run {self.path} on images {array.dtype} {list(array.shape)} "
                f"({type(error).__name__}: {reason:.300}): give {self.ends.image}, of a size that the model is for."
            ) from error

    def _run_in_parts(self, array: np.ndarray, size: int) -> np.ndarray:
        missing = -len(array) % size
        filled = np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])
        parts = [self.run(filled[first : first + size]) for first in range(0, len(filled), size)]
        return np.concatenate(parts)[: len(array)]


def _as_array(images: np.ndarray | torch.Tensor, path: Path) -> np.ndarray:
    if isinstance(images, torch.Tensor):
        images = images.detach().cpu()
        if images.dtype == torch.bfloat16:
            raise ValueError(f"NumPy has no bfloat16, in which the images for {path} are: pass images.float().")
    try:
        return np.ascontiguousarray(images)
    except ValueError as error:  # a list of images of several sizes
        raise ValueError(f"The images for {path} are no array ({error}): pass those of one size together.") from error


def _require_finite(array: np.ndarray, path: Path) -> None:
    """Raise `ValueError` for NaN or infinity, which integers can't hold: engines give logits that look plausible."""
    with np.errstate(invalid="ignore", over="ignore"):
        if np.isfinite(array.sum()):  # one pass that allocates nothing; the other is for who needs it
            return
    broken = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))
    if len(broken):
        raise ValueError(
            f"{len(broken)} of {len(array)} images for {path} have pixels that are NaN or infinite, the first of them "
            f"image {broken[0]}: look at how they were normalized."
        )


def load_engine(path: str | Path, engine: str | None = None, *, threads: int | None = None) -> Engine:
    """Load a classifier for an engine; the same call for all of them.

    Args:
        path (`str` or `Path`):
            A checkpoint's folder or Hub id, or a file: `.onnx`, OpenVINO's `.xml`, `.pte`, `.tflite`, `.pt2`.
        engine (`str`, *optional*):
            `"pytorch"`, which simulates the integers, `"inductor"` (see [`compile_int8`]), `"onnxruntime"`,
            `"openvino"`, `"executorch"`, `"litert"`, or `"torch"` for a program of `torch.export`. By default the one
            of the file's kind, and PyTorch for a folder. In a folder the others look for what [`export_onnx`] and its
            kind have written there, and take no file with other weights than the checkpoint's, such as one that was
            written before the checkpoint was saved anew. (ExecuTorch's can't be read back.) A file that is given
            itself is run as it is.
        threads (`int`, *optional*):
            How many to compute with; the engine chooses by default. PyTorch has them for all of a process.

    Returns an [`Engine`]: called with float32 images `[images, channels, height, width]` it returns logits; it has
    `labels` and `processor()` from the checkpoint's folder that the file is in or beside.

    Raises `ValueError` for a path that is none of these, a damaged or foreign file, or a folder whose files have other
    weights than its checkpoint, `ImportError` naming the extra of an engine that is missing.

    Example:
    ```python
    >>> from repvgg_hf import load_engine

    >>> engine = load_engine("repvgg-a0-oabn-w4a8/onnx/model_q4.onnx", threads=1)
    >>> engine.labels[engine(pixel_values).argmax()]
    'tabby, tabby cat'
    ```"""
    if engine is not None and engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}.")
    if threads is not None and (type(threads) is not int or threads < 1):
        raise ValueError(f"threads must be a positive integer, or left out, got {threads!r}.")
    finish_saves(Path(path))
    path = find_checkpoint(path)
    engine = engine or _engine_of(path)
    kind = ENGINES[engine]
    folder = _checkpoint_of(path)
    if path.is_dir() and kind.suffixes:
        path = file_of_checkpoint(path, kind.title, kind.inside)
    if (path.suffix if path.is_file() else "") not in (kind.suffixes or ("",)):
        takes = " and ".join(kind.suffixes) or "a checkpoint's folder"
        raise ValueError(f"{kind.title} takes {takes}, got {path}: leave engine out, or give another file.")
    run, ends = LOADERS[engine](path, threads)
    return Engine(engine, path, ends, run, folder)


def find_checkpoint(path: str | Path) -> Path:
    """Return an existing path; of a Hub id the folder that it is downloaded to."""
    found = Path(path)
    if found.exists():
        return found
    if found.suffix in {suffix for kind in ENGINES.values() for suffix in kind.suffixes} or not _HUB_ID.fullmatch(
        str(path)
    ):
        raise ValueError(f"{path} does not exist: give a checkpoint's folder, its Hub id, or a file for an engine.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path)))
    except Exception as error:  # of many kinds: no network, no such repository, no permission
        raise ValueError(
            f"{path} is neither a file nor a folder here, and can't be downloaded as a repository of the Hub "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]:.200})."
        ) from error


def _engine_of(path: Path) -> str:
    if path.is_dir():
        if path.suffix == ".mlpackage":
            raise ValueError(f"{path} is for Core ML, which runs on Apple's systems alone: open it in Xcode or Swift.")
        return "pytorch"
    for name, kind in ENGINES.items():
        if path.suffix in kind.suffixes:
            return name
    suffixes = sorted({suffix for kind in ENGINES.values() for suffix in kind.suffixes})
    raise ValueError(f"{path} is no model's file: give a checkpoint's folder, or a file {', '.join(suffixes)}.")


def _checkpoint_of(path: Path) -> Path | None:
    """Return the folder with the `config.json` that belongs to `path`: itself, where the file is, or the one above."""
    folders = [path] if path.is_dir() else [path.parent, path.absolute().parent.parent]
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


__all__ = ["ENGINES", "Engine", "EngineKind", "find_checkpoint", "load_engine"]
