"""Reading calibration data: the inputs of a model in batches, from anything that gives some."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.utils.data import DataLoader

from .model_inputs import ForwardArguments, ModelInputs


class CalibrationData:
    """Calibration data in batches, with labels if they come with them.

    Args:
        data: a `DataLoader` or another iterable of batches, a data set of single examples, or all examples at once as a
            tensor or mapping. A batch is a tensor `[batch, ...]`, a tuple (inputs, then perhaps labels), or a mapping
            of what the model's `forward` takes, such as `pixel_values` and `pixel_mask`, perhaps with `labels`. What
            `forward` does not take is left out. Any float dtype will do: it becomes float32, as the model is for
            calibration.
        batch_size (`int`, defaults to 64): examples per batch, when `data` holds single ones.
        device (`torch.device` or `str`, defaults to `"cpu"`): where to put them.
        model (`nn.Module`, *optional*): what takes them. Without one, and for a model that is a chain of blocks
            (RepVGG), they are images `[batch, channels, height, width]` of one size.

    Raises `ValueError` for no data, inputs that are missing or no tensors, images that are integers, NaN or infinite
    values, or images of several sizes where one is needed.
    """

    def __init__(self, data, batch_size: int = 64, device: torch.device | str = "cpu", model: nn.Module | None = None):
        arguments = ForwardArguments(model)
        self.batches: list[ModelInputs] = []
        for batch in _batches(data, batch_size, arguments):
            if len(batch) == 0:
                continue
            _check_kind(batch, len(self.batches), arguments)
            batch = batch.to(device)
            _check_values(batch, len(self.batches))
            if arguments.images_alone:
                _check_size(batch.main(), self.batches)
                batch.args = (batch.main().contiguous(memory_format=torch.channels_last),)
            self.batches.append(batch)
        if not self.batches:
            raise ValueError("The calibration data is empty: pass a few hundred images (no labels are needed).")

    def __len__(self) -> int:
        return sum(map(len, self.batches))

    @property
    def images(self) -> list[torch.Tensor]:
        """The main input of each batch."""
        return [batch.main() for batch in self.batches]

    def first(self, count: int) -> list[ModelInputs]:
        """Return batches of the first `count` examples."""
        chosen, left = [], count
        for batch in self.batches:
            if left > 0:
                chosen.append(batch.take(slice(left)) if len(batch) > left else batch)
                left -= len(batch)
        return chosen


def _check_kind(batch: ModelInputs, index: int, arguments: ForwardArguments) -> None:
    images = batch.kwargs.get("pixel_values", batch.args[0] if batch.args else None)
    if arguments.main != "pixel_values" or not isinstance(images, torch.Tensor):
        return
    found = f"Calibration batch {index} is {images.dtype} {list(images.shape)}"
    if images.dim() >= 4 and not images.is_floating_point():
        raise ValueError(
            f"{found}, pixels that are not normalized: "
            "pass them through the image processor, which gives floating pixel_values as the model takes them."
        )
    if arguments.images_alone and images.dim() != 4:
        raise ValueError(
            f"{found}, expected floating [batch, channels, height, width]: pass batches from the image processor "
            "(pixel_values)."
        )


def _check_values(batch: ModelInputs, index: int) -> None:
    for name, tensor in batch.tensors().items():
        # a mask may be infinite: it is added to what is not to be looked at
        if tensor.is_floating_point() and "mask" not in name and not tensor.isfinite().all():
            raise ValueError(
                f"Calibration batch {index} has NaN or infinite values ({name}): check how the data is read."
            )


def _check_size(images: torch.Tensor, before: list[ModelInputs]) -> None:
    if before and images.shape[1:] != before[0].main().shape[1:]:
        raise ValueError(
            f"Calibration batch {len(before)} has images {list(images.shape[1:])}, those before "
            f"{list(before[0].main().shape[1:])}: resize all to one size with the image processor."
        )


def _batches(data, batch_size: int, arguments: ForwardArguments) -> Iterator[ModelInputs]:
    """Yield the batches in anything that [`CalibrationData`] takes."""
    if isinstance(data, (torch.Tensor, Mapping)):
        whole = arguments.bind(data)
        yield from (whole.take(slice(start, start + batch_size)) for start in range(0, len(whole), batch_size))
        return
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise ValueError(f"calibration must be a DataLoader, a dataset or batches, got {type(data).__name__}.")
    is_map = hasattr(data, "__getitem__") and not isinstance(data, (list, tuple, DataLoader))
    waiting = []
    for item in data if isinstance(data, Iterable) else (data[index] for index in range(len(data))):
        inputs = arguments.bind(item)
        if not _is_example(inputs, is_map, arguments):
            yield inputs
            continue
        waiting.append(inputs)
        if len(waiting) == batch_size:
            yield _stack(waiting)
            waiting = []
    if waiting:
        yield _stack(waiting)


def _is_example(inputs: ModelInputs, is_map: bool, arguments: ForwardArguments) -> bool:
    """Tell whether these are the inputs of a single example: an image by its dimensions, others by where they are.

    A data set that is indexed gives examples, everything else gives batches.
    """
    if arguments.main == "pixel_values":
        return inputs.kwargs.get("pixel_values", inputs.main()).dim() < 4
    return is_map


def _stack(examples: list[ModelInputs]) -> ModelInputs:
    """Return single examples as one batch."""
    first = examples[0]
    args = tuple(
        _stacked(f"input {index}", [example.args[index] for example in examples]) for index in range(len(first.args))
    )
    kwargs = {name: _stacked(name, [example.kwargs[name] for example in examples]) for name in first.kwargs}
    labels = {name: _stacked_labels([example.labels[name] for example in examples]) for name in first.labels}
    return ModelInputs(args, kwargs, labels)


def _stacked(name: str, values: list):
    if not isinstance(values[0], torch.Tensor):
        return values[0]
    shapes = {tuple(value.shape) for value in values}
    if len(shapes) == 1:
        return torch.stack(values)
    if values[0].is_floating_point() and values[0].dim() == 3:
        raise ValueError(
            f"Calibration images have several sizes, {sorted(shapes)}: resize all to one with the image processor."
        )
    raise ValueError(
        f"Calibration examples have {name!r} of several sizes, {sorted(shapes)}: pad all to one, or pass a DataLoader "
        "that does."
    )


def _stacked_labels(values: list):
    same = all(isinstance(value, torch.Tensor) and value.shape == values[0].shape for value in values)
    return torch.stack(values) if same else values
