"""The files that a model's weights come from: which they are, whether they are whole, and what to do if not."""

import json
import os
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from .checkpoints import checksum, read_tensors

# of the arguments of `from_pretrained`: they choose other weights than config.json was published with
_OTHER_WEIGHTS = ("variant", "state_dict", "gguf_file")
# deleting the file alone is not enough: it is a link into the cache, which would be made again to the same contents
AGAIN = "Download or save it again: from_pretrained(..., force_download=True) replaces what is in the cache."


def weight_files(name, revision: str | None = None, cache_dir=None, subfolder: str = "", **others) -> list[str]:
    """Paths of the safetensors files of a folder or, in the cache, of a Hub repository; empty if there are none.

    The arguments are those of `from_pretrained`.
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
    """The checksum of all tensors in some weight files."""
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
    """What to say about weights that can't be read: which file is broken, and the fix."""
    broken = []
    for file in weight_files(name, **arguments):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            broken.append(file)
    where = ", ".join(broken) or f"a weight file of {name}"
    return f"The weights of {name} can't be read ({error}): {where} is truncated or damaged. {AGAIN}"


__all__ = ["check_published_weights", "unreadable_weights", "weight_files", "weights_checksum"]
