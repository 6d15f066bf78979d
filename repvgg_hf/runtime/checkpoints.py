"""The files of a checkpoint: which they are, what is checked around loading, and their checksum.

The checksum is over the name, dtype, shape and bytes of every tensor, and over the fields of the configuration that
change what the model computes. It guards against damage: a truncated or mixed-up download, a flipped bit, a slip in an
editor. It is no protection from an adversary, who could write another one.
"""

import json
import mmap
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from .checksum_settings import settings_of, stored_settings
from .cluster_layers import ClusterLayer
from .marker import is_marker

# as safetensors calls those that we know
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_checkpoint_form(missing, unexpected, deploy: bool) -> None:
    """Raise `ValueError` if checkpoint keys are of another form (branches, fused, quantized, QAT) than the model's.

    `missing` and `unexpected` are the model's keys that the checkpoint lacks and the reverse.
    """
    # fake quantizers alone may be those of a head that this model doesn't have: then its weight is unexpected, too
    plain = [key for key in unexpected if "_fake_quant." not in key]
    prepared = {key.partition(".weight_fake_quant.")[0] for key in unexpected if ".weight_fake_quant." in key}
    if any(not any(key.startswith(f"{layer}.") for key in plain) for layer in prepared):
        raise ValueError(
            "This is a checkpoint of quantization-aware training: build the model, call prepare_qat() with the "
            "options it was trained with, then load_state_dict(); or load the result of quantize() instead."
        )
    # codes alone may be those of a head that this model doesn't have
    if any(key.endswith(".weight_codes") for key in unexpected) and any(key.endswith(".weight") for key in missing):
        raise ValueError(
            "This is a quantized checkpoint and the model is not: load it with from_pretrained(), keep the "
            "quantization_config of its config.json, and leave out the argument quantization_config=None."
        )
    if any(key.endswith(".weight_codes") for key in missing):
        raise ValueError(
            "The model is quantized and the checkpoint is not: load the checkpoint into a float model, then "
            "quantize() it."
        )
    if deploy and any(".conv.branches." in key for key in unexpected):
        raise ValueError(
            "This is a train-form checkpoint (its keys hold branches) and the model is fused (deploy=True): load it "
            "with deploy=False, then call model.reparameterize()."
        )
    if (
        not deploy
        and any(".conv.branches." in key for key in missing)
        and any(key.endswith(".conv.weight") for key in unexpected)
    ):
        raise ValueError(
            "This is a fused checkpoint (its keys hold no branches) and the model has branches (deploy=False): load "
            "it with deploy=True. Branches can't be recovered from a fused kernel."
        )


@dataclass
class StoredTensor:
    """The dtype and shape that a file states for a tensor, and the CRC-32 of its bytes."""

    dtype: torch.dtype | str
    shape: list[int]
    crc: int


def read_tensors(files: list[str]) -> dict[str, StoredTensor]:
    """Describe every tensor in some safetensors files, by name, without making tensors: that takes twice as long.

    A file begins with the length of its header (8 bytes, little-endian), then the header in JSON, then the tensors'
    bytes. Raises `SafetensorError` for a damaged header.
    """
    tensors = {}
    for path in files:
        with (
            safe_open(path, framework="pt"),
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as data,
        ):
            start = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(bytes(data[8:start]))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin, end = (start + offset for offset in entry["data_offsets"])
                dtype = _DTYPES.get(entry["dtype"], entry["dtype"])
                tensors[name] = StoredTensor(dtype, entry["shape"], zlib.crc32(data[begin:end]))
    return tensors


def checksum(tensors: dict[str, StoredTensor], settings: dict) -> str:
    """Return a CRC-32 over tensors by name, whatever their order and files are, and a configuration's `settings`."""
    lines = [
        f"{name} {_DTYPE_NAMES.get(tensor.dtype, tensor.dtype)} {tensor.shape} {tensor.crc:08x}"
        for name, tensor in tensors.items()
    ]
    lines = [*sorted(lines), json.dumps(settings, sort_keys=True)]
    return f"crc32:{zlib.crc32(chr(10).join(lines).encode()):08x}"


def tensors_checksum(tensors: Iterable[tuple[str, torch.Tensor]], settings: dict) -> str:
    """Return the [`checksum`] of tensors in memory, given with their names."""
    stored = {}
    for name, tensor in tensors:
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        stored[name] = StoredTensor(tensor.dtype, list(tensor.shape), zlib.crc32(data))
    return checksum(stored, settings)


def fits(there: str, tensors: dict[str, StoredTensor], files: list[str], config: PreTrainedConfig) -> bool:
    """Tell whether `there` is the [`checksum`] of the `tensors` of some `files` and of the `config.json` beside them.

    Reading that again takes longer than all other checks of a small model: first `config` is tried, which was read from
    it, and which arguments of `from_pretrained` may have changed.
    """
    if there == checksum(tensors, settings_of(config, config.dtype)):
        return True
    return there == checksum(tensors, stored_settings(files, config))


def check_checkpoint(
    layers: dict[str, ClusterLayer], tensors: dict[str, StoredTensor], names: dict[str, str], files: list[str], model
) -> None:
    """Compare the `tensors` of safetensors `files` with those that cluster `layers` of `model` expect, before loading.

    `names` are what the model calls them, see `names_in_model`.

    Raises `ValueError` naming the tensor and the file for a wrong shape or dtype, a missing tensor, or contents or a
    configuration that don't fit the checksum.
    """
    where = ", ".join(map(str, files))
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    check_tensors(
        {name.removeprefix(prefix): layer for name, layer in layers.items()},
        {names[name].removeprefix(prefix): (name, tensor) for name, tensor in tensors.items()},
        where,
    )
    config = model.config
    checksum_there = config.quantization_config.checksum
    if checksum_there is not None and not fits(checksum_there, tensors, files, config):
        raise ValueError(
            f"The tensors in {where} don't fit the checksum in config.json, or fields of config.json were changed: a "
            "file is damaged or of another model. Download both again with force_download=True, or save both again; if "
            "you changed weights or fields on purpose, remove checksum from quantization_config."
        )


def check_tensors(layers: dict[str, ClusterLayer], tensors: dict[str, tuple[str, StoredTensor]], where: str) -> None:
    """Compare `tensors`, each with its name in the file, with those that `layers` expect, both by name in the model.

    `where` is the file, for messages. Raises `ValueError` naming the first tensor that differs, lacks or is too many.
    """
    expected = {f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in layer.stored().items()}
    strays = []  # float weights, or scales that quantization_config doesn't tell of
    for full_name, (name, tensor) in tensors.items():
        layer, _, key = full_name.rpartition(".")
        if layer in layers and full_name not in expected and not is_marker(full_name, tensor.shape):
            strays.append(name)
        wanted = expected.pop(full_name, tensor)
        # a bias is converted to the model's dtype, as in a float model
        converted = key == "bias" and tensor.dtype in _FLOATS
        if tensor.shape != list(wanted.shape) or (tensor.dtype != wanted.dtype and not converted):
            raise ValueError(
                f"{name} in {where} is {tensor.dtype} {tensor.shape}, but quantization_config asks for "
                f"{wanted.dtype} {list(wanted.shape)}: config.json and the weights are not of the same model, or one "
                "of them was edited. Download both again, or quantize the float model again."
            )
    if expected:
        raise ValueError(
            f"{next(iter(expected))} ({len(expected)} tensors in all) is not in {where}: these are not the quantized "
            "weights that config.json describes. Remove quantization_config from it to load a float checkpoint, or "
            "quantize again."
        )
    if strays:
        raise ValueError(
            f"{strays[0]} in {where} is none of the tensors that quantization_config asks for: config.json and the "
            "weights are not of the same model, or one of them was edited. Download both again, or quantize the float "
            "model again."
        )


# of the arguments of `from_pretrained`: they choose other weights than config.json was published with
_OTHER_WEIGHTS = ("variant", "state_dict", "gguf_file")
# deleting the file alone is not enough: it is a link into the cache, which would be made again to the same contents
AGAIN = "Download or save it again: from_pretrained(..., force_download=True) replaces what is in the cache."


def weight_files(name, revision: str | None = None, cache_dir=None, subfolder: str = "", **others) -> list[str]:
    """Return the paths of the safetensors files of a folder or, in the cache, of a Hub repository.

    The arguments are those of `from_pretrained`. The list is empty if there are no such files.
    """
    name = str(name)

    def find(file: str) -> str | None:
        file = f"{subfolder}/{file}" if subfolder else file
        if os.path.isdir(name):
            path = os.path.join(name, file)
            return path if os.path.isfile(path) else None
        path = try_to_load_from_cache(name, file, cache_dir=cache_dir, revision=revision)
        return path if isinstance(path, str) else None  # the cache may know that there is no such file

    whole = find("model.safetensors")
    if whole is not None:
        return [whole]
    index = find("model.safetensors.index.json")
    shards = set() if index is None else set(_weight_map(index).values())
    return [path for path in map(find, sorted(shards)) if path is not None]


def _weight_map(index: str) -> dict[str, str]:
    """Return the file of every tensor, as the `index` of a sharded checkpoint has it."""
    try:
        found = json.loads(Path(index).read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{index} can't be read ({error}): it is truncated or damaged. {AGAIN}") from error
    names = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ValueError(f"{index} has no weight_map that names the file of every tensor: it is damaged. {AGAIN}")
    return names


def weights_checksum(files: list[str], config: PreTrainedConfig) -> str:
    """Return the [`checksum`] of all tensors in some weight files and of the `config.json` beside them.

    `config` is of its class.
    """
    return checksum(read_tensors(files), stored_settings(files, config))


def check_published_weights(name, config: PreTrainedConfig, arguments: dict) -> None:
    """Raise `ValueError` unless weights and `config.json` are those that `config.weights_checksum`, if any, is of.

    `name` and the keyword `arguments` are those of `from_pretrained`.
    """
    if config.weights_checksum is None or any(arguments.get(other) for other in _OTHER_WEIGHTS):
        return
    commit = getattr(config, "_commit_hash", None)
    files = weight_files(name, **(arguments | {"revision": commit} if commit else arguments))
    if files and not fits(config.weights_checksum, read_tensors(files), files, config):
        raise ValueError(
            f"The tensors in {', '.join(files)} don't fit weights_checksum in config.json, or fields of config.json "
            f"were changed: a file is damaged or of another model. {AGAIN} If you changed weights or fields on "
            "purpose, remove weights_checksum from config.json."
        )


def require_readable(name, files: list[str]) -> None:
    """Raise `ValueError` naming the first of the safetensors `files` of the checkpoint `name` that can't be read."""
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"The weights of {name} can't be read ({error}): {file} is truncated or damaged, or no safetensors "
                f"file. {AGAIN}"
            ) from error


__all__ = [
    "check_checkpoint",
    "check_checkpoint_form",
    "check_published_weights",
    "check_tensors",
    "read_tensors",
    "require_readable",
    "tensors_checksum",
    "weight_files",
    "weights_checksum",
]
