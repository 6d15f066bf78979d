"""What the weights that a run ends with depend on: only the same run may go on from what it has saved.

A record is a flat dictionary with a line for each of these things, in words that an error can list. Data and models
are compared by what is in them, not by their paths: a folder may move.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn

LISTED = 8  # differences that an error names
SAMPLED = 16  # images of a dataset whose pixels are compared, evenly spaced, with the first and the last one
# options that change no weights, or that name what is compared by its content
UNRELATED = {
    "model_name_or_path", "pretrained", "dataset_name", "dataset_config_name", "train_dir", "validation_dir",
    "image_column_name", "label_column_name", "output_dir", "resume_from_checkpoint", "report_to",
    "per_device_eval_batch_size",
}  # fmt: skip


def run_record(options: Iterable[Any], model: nn.Module, processor, images: dict[str, tuple], **more) -> dict[str, Any]:
    """Return the record of a run.

    Args:
        options: the dataclasses of its options, or dictionaries of them.
        model: what it begins with, before any training.
        processor: the image processor.
        images: for each split (dataset of its `pixel_values` as in evaluation, its labels as integers).
        more: further things that the weights depend on, by their names.
    """
    record: dict[str, Any] = {}
    for given in options:
        values = given if isinstance(given, dict) else asdict(given)
        record |= {f"--{name}": value for name, value in values.items() if name not in UNRELATED}
    record |= {f"the name of class {index}": name for index, name in sorted(model.config.id2label.items())}
    record["the model to begin with"] = _model_digest(model)
    record |= {f"{name} of the image processor": value for name, value in processor.to_dict().items()}
    for split, (dataset, labels) in images.items():
        labels = np.asarray(labels, dtype=np.int64)
        chosen = sorted({round(index) for index in np.linspace(0, len(labels) - 1, SAMPLED)})
        pixels = [np.asarray(dataset[index]["pixel_values"], dtype=np.float32) for index in chosen]
        record[f"the number of {split} images"] = len(labels)
        record[f"the labels of {split} images"] = _digest([labels])
        record[f"the pixels of {split} images"] = _digest(pixels)
    record |= {name.replace("_", " "): value for name, value in more.items()}
    return json.loads(json.dumps(record, default=str))  # as it is when it has been saved and read


def check_same_run(saved: dict, wanted: dict, where: str) -> None:
    """Raise `ValueError` that names what differs between two records, of which the first was saved at `where`."""
    names = [name for name in wanted | saved if saved.get(name) != wanted.get(name)]
    if not names:
        return
    listed = [f"{name} was {_short(saved.get(name))}, now {_short(wanted.get(name))}" for name in names[:LISTED]]
    if len(names) > LISTED:
        listed.append(f"and {len(names) - LISTED} more")
    raise ValueError(
        f"{where} is of another run ({'; '.join(listed)}): give the same to go on, or choose another --output_dir, or "
        "leave out --resume_from_checkpoint to begin anew there."
    )


def file_digest(path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _of_blocks(file)


def _of_blocks(file) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _model_digest(model: nn.Module) -> str:
    """A checksum of a model's tensors and of its configuration, without its name and those of its classes."""
    fields = model.config.to_dict()
    for name in ("id2label", "label2id", "_name_or_path", "transformers_version"):
        fields.pop(name, None)
    tensors = [tensor.detach().cpu().contiguous() for tensor in model.state_dict().values()]
    # bytes, since numpy has no bfloat16
    arrays = [tensor.reshape(-1).view(torch.uint8).numpy() for tensor in tensors]
    described = [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    text = repr((sorted(fields.items(), key=lambda item: item[0]), described))
    return _digest([np.frombuffer(text.encode(), dtype=np.uint8), *arrays])


def _digest(arrays: list[np.ndarray]) -> str:
    """A checksum of the shapes, dtypes and bytes of `arrays`."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _short(value: Any) -> str:
    text = "not given" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
