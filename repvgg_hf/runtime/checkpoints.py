"""The files of a checkpoint: which they are, what is checked around loading, their checksum, and how they are replaced.

The checksum guards against damage: a truncated or mixed-up download. It is no protection from an adversary, who could
write another one.
"""

import json
import mmap
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from .cluster_layers import ClusterLayer

# as safetensors calls those that we know
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


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


def checksum(crcs: dict[str, int]) -> str:
    """Return a CRC-32 over tensors' names and the CRC-32 of their bytes, whatever their order and files are."""
    lines = [f"{name} {crc:08x}" for name, crc in crcs.items()]
    return f"crc32:{zlib.crc32(chr(10).join(sorted(lines)).encode()):08x}"


def tensors_checksum(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the [`checksum`] of tensors in memory, given with their names."""
    return checksum(
        {
            name: zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
            for name, tensor in tensors
        }
    )


def check_checkpoint(
    layers: dict[str, ClusterLayer], files: list[str], expected_checksum: str | None, base_model_prefix: str
) -> None:
    """Compare the tensors in safetensors `files` with those that cluster `layers` expect, before loading.

    A file of a model with a head may be loaded into the base model and the reverse, so that names are compared without
    `base_model_prefix`.

    Raises `ValueError` naming the tensor and the file for a wrong shape or dtype, a missing tensor, or contents that
    don't fit the checksum.
    """
    prefix = f"{base_model_prefix}."
    layers = {name.removeprefix(prefix): layer for name, layer in layers.items()}
    expected = {f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in layer.stored().items()}
    where = ", ".join(map(str, files))
    tensors = read_tensors(files)
    strays = []  # float weights, or scales that quantization_config doesn't tell of
    for name, tensor in tensors.items():
        layer, _, key = name.removeprefix(prefix).rpartition(".")
        if layer in layers and f"{layer}.{key}" not in expected:
            strays.append(name)
        wanted = expected.pop(f"{layer}.{key}", tensor)
        # a bias is converted to the model's dtype, as in a float model
        if tensor.shape != list(wanted.shape) or (tensor.dtype != wanted.dtype and key != "bias"):
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
    if expected_checksum not in (None, checksum({name: tensor.crc for name, tensor in tensors.items()})):
        raise ValueError(
            f"The tensors in {where} don't fit the checksum in config.json: a file is damaged or of another model. "
            "Download both again with force_download=True, or save both again; if you changed the weights on purpose, "
            "remove checksum from quantization_config."
        )


def replace_files(source: Path, target: Path) -> None:
    """Move the files of `source` into `target`. If anything interrupts it, `target` is as before."""
    new = {path.name for path in source.iterdir()}
    old = {path.name for path in target.iterdir() if path.name in new}
    if new & {"model.safetensors", "model.safetensors.index.json"}:  # else they lie beside: a variant, an adapter
        weights = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
        old |= {path.name for path in target.iterdir() if weights.fullmatch(path.name)}
    backup = source / ".old"
    backup.mkdir()
    try:
        for name in old:
            os.replace(target / name, backup / name)
        for name in new:
            os.replace(source / name, target / name)
    except BaseException:
        for name in new - old:
            (target / name).unlink(missing_ok=True)
        for path in backup.iterdir():
            os.replace(path, target / path.name)
        raise


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
    shards = set() if index is None else set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    return [path for path in map(find, sorted(shards)) if path is not None]


def weights_checksum(files: list[str]) -> str:
    """Return the [`checksum`] of all tensors in some weight files."""
    return checksum({name: tensor.crc for name, tensor in read_tensors(files).items()})


def check_published_weights(name, config, arguments: dict) -> None:
    """Raise `ValueError` unless the weight files are those that `config.weights_checksum`, if any, was made of.

    `name` and the keyword `arguments` are those of `from_pretrained`.
    """
    if config.weights_checksum is None or any(arguments.get(other) for other in _OTHER_WEIGHTS):
        return
    commit = getattr(config, "_commit_hash", None)
    files = weight_files(name, **(arguments | {"revision": commit} if commit else arguments))
    if files and weights_checksum(files) != config.weights_checksum:
        raise ValueError(
            f"The tensors in {', '.join(files)} don't fit weights_checksum in config.json: a file is damaged or of "
            f"another model. {AGAIN} If you changed the weights on purpose, remove weights_checksum from config.json."
        )


def unreadable_weights(name, error: SafetensorError, arguments: dict) -> str:
    """Return the message about weights that can't be read: which file is broken, and the fix."""
    broken = []
    for file in weight_files(name, **arguments):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            broken.append(file)
    where = ", ".join(broken) or f"a weight file of {name}"
    return f"The weights of {name} can't be read ({error}): {where} is truncated or damaged. {AGAIN}"


__all__ = [
    "check_checkpoint",
    "check_checkpoint_form",
    "check_published_weights",
    "replace_files",
    "tensors_checksum",
    "unreadable_weights",
    "weight_files",
    "weights_checksum",
]
