"""Reading checkpoint files of other code: tensors only, out of whatever a training loop has wrapped them in."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers.utils import logging

# where training loops put a model's weights; averages over the training (EMA) come first, as they are more accurate
_ENTRIES = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "module")
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_SHOWN = 5

logger = logging.get_logger(__name__)


def read_weights(file: str | Path, entry: str | None = None) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint file, by name.

    A `.safetensors` file, or what `torch.save` wrote; nothing in it is run (`weights_only=True`). Weights that a
    training loop put into an entry such as `state_dict` or `model` are found, and prefixes such as `module.` removed.

    Args:
        file (`str` or `Path`): the file.
        entry (`str`, *optional*): the entry to take. By default an average over the training (`state_dict_ema`,
            `model_ema`, `ema`) if there is one; a warning says so if there are others.

    Raises `FileNotFoundError`, or `ValueError` that says what is wrong with the file and what to do.
    """
    if not isinstance(file, (str, Path)):
        raise TypeError(f"weights must be the path of a file or a mapping of tensors, got {type(file).__name__}.")
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no checkpoint file {path}: give the path of a .pth, .pt or .safetensors file."
        )
    if path.suffix == ".safetensors":
        try:
            content = load_file(path)
        except SafetensorError as error:
            raise ValueError(_damaged(path, error)) from error
    else:
        content = _load_pickled(path)
    return unwrap(content, str(path), entry)


def _load_pickled(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        names = _code_in(path)
        if names:
            raise ValueError(
                f"{path} holds more than weights: it would run {', '.join(names[:_SHOWN])}, and only tensors are read. "
                "If you trust it, load it where that code is installed and save the weights alone: "
                "torch.save({'state_dict': model.state_dict()}, path)."
            ) from error
        raise ValueError(_damaged(path, error)) from error


def _code_in(path: Path) -> list[str]:
    """Return the names of classes and functions that loading the file in full would call; none if it is damaged."""
    try:
        return sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # of no use here: the first error is the one to report
        return []


def _damaged(path: Path, error: Exception) -> str:
    size = path.stat().st_size
    reason = str(error).strip().split("\n")[0][:160]
    start = path.open("rb").read(64)
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a pointer of Git LFS and not the file itself: get that with `git lfs pull`."
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return f"{path} is a web page and no checkpoint: download the file itself."
    return (
        f"{path} ({size:,} bytes) can't be read, it is cut off, damaged or no checkpoint: compare its size with the "
        f"original's and download it again. ({type(error).__name__}: {reason})"
    )


def unwrap(content: object, source: str, entry: str | None = None) -> dict[str, torch.Tensor]:
    """Return the tensors by name that are somewhere in the `content` of a file, called `source` in errors."""
    place = source
    if entry is not None:
        if not isinstance(content, Mapping) or entry not in content:
            raise ValueError(f"{source} has no entry {entry!r}: it has {_names(content)}.")
        content, place = content[entry], f"{source}[{entry!r}]"
    while not is_state_dict(content):
        found = [name for name in _ENTRIES if isinstance(content, Mapping) and isinstance(content.get(name), Mapping)]
        if not found:
            raise ValueError(
                f"{place} has no weights: expected tensors by name, or an entry {', '.join(_ENTRIES)} with them; it "
                f"has {_names(content)}."
            )
        if len(found) > 1:
            logger.warning(
                "%s has weights in %s: %s is taken. Name another with `entry`.", place, ", ".join(found), found[0]
            )
        content, place = content[found[0]], f"{place}[{found[0]!r}]"
    return without_prefixes(content)


def is_state_dict(content: object) -> bool:
    """Tell whether `content` is tensors by name."""
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items())
    )


def _names(content: object) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    if not content:
        return "nothing"
    return listed([f"{key} ({type(value).__name__})" for key, value in content.items()])


def without_prefixes(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove what wrappers put before every name, and the counter that an averaged model has beside its weights."""
    names = {key: key for key in state_dict if key != "n_averaged"}
    while prefix := next((p for p in _PREFIXES if names and all(name.startswith(p) for name in names.values())), None):
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
    return {name: state_dict[key] for key, name in names.items()}


def listed(names: list[str]) -> str:
    """Return the first of `names` as a list for a message, and how many there are if not all are shown."""
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}, ... ({len(names)} in all)"


def misfit(
    expected: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    shown: Callable[[str], str] = str,
) -> str | None:
    """Return how `found` differs from the tensors that are `expected`, by names, shapes and kinds; `None` if it fits.

    `shown` turns a name into the one that the file has.
    """
    problems = []
    missing, unknown = [key for key in expected if key not in found], [key for key in found if key not in expected]
    if missing:
        problems.append(f"missing: {listed([shown(key) for key in missing])}")
    if unknown:
        problems.append(f"unknown: {listed([shown(key) for key in unknown])}")
    others = [
        f"{shown(key)} is {list(found[key].shape)} instead of {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    others += [
        f"{shown(key)} is {found[key].dtype} instead of floating point numbers"
        for key, tensor in expected.items()
        if key in found and tensor.is_floating_point() and not found[key].is_floating_point()
    ]
    problems += [listed(others)] if others else []
    return "; ".join(problems) or None


def with_counters(state_dict: dict[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add the batch counters of batch norms, which some tools leave out and inference does not need, as zeros."""
    counters = [key for key in expected if key.endswith(".num_batches_tracked") and key not in state_dict]
    return state_dict | {key: torch.zeros((), dtype=torch.int64) for key in counters}
