"""Reading calibration data: images in batches, from anything that gives some."""

from collections.abc import Iterable, Iterator

import torch


class CalibrationData:
    """Calibration images in batches, with labels if they come with them.

    Args:
        data: a `DataLoader` or another iterable of batches (a mapping with `pixel_values` and perhaps `labels`, or a
            tensor `[batch, channels, height, width]`), or a dataset of single examples of that kind. Any float dtype
            will do: the images become float32, as the model is for calibration.
        batch_size (`int`, defaults to 64): images per batch, when `data` holds single examples.
        device (`torch.device` or `str`, defaults to `"cpu"`): where to put them.

    Raises `ValueError` for no images, integer ones, NaN or infinite values, or images of several sizes.
    """

    def __init__(self, data, batch_size: int = 64, device: torch.device | str = "cpu"):
        self.batches: list[torch.Tensor] = []
        self.labels: list[torch.Tensor | None] = []
        for images, labels in _batches(data, batch_size):
            if len(images) == 0:
                continue
            self._check_kind(images, len(self.batches))
            images = images.to(device, torch.float32)
            self._check_values(images, len(self.batches))
            self.batches.append(images.contiguous(memory_format=torch.channels_last))
            self.labels.append(None if labels is None else labels.to(device))
        if not self.batches:
            raise ValueError("The calibration data is empty: pass a few hundred images (no labels are needed).")

    def _check_kind(self, images: torch.Tensor, index: int) -> None:
        if images.dim() == 4 and not images.is_floating_point():
            raise ValueError(
                f"Calibration batch {index} is {images.dtype} {list(images.shape)}, pixels that are not normalized: "
                "pass them through the image processor, which gives floating pixel_values as the model takes them."
            )
        if images.dim() != 4:
            raise ValueError(
                f"Calibration batch {index} is {images.dtype} {list(images.shape)}, expected floating [batch, "
                "channels, height, width]: pass batches from the image processor (pixel_values)."
            )

    def _check_values(self, images: torch.Tensor, index: int) -> None:
        if not images.isfinite().all():
            raise ValueError(f"Calibration batch {index} has NaN or infinite values: check how the images are read.")
        if self.batches and images.shape[1:] != self.batches[0].shape[1:]:
            raise ValueError(
                f"Calibration batch {index} has images {list(images.shape[1:])}, "
                f"those before {list(self.batches[0].shape[1:])}: "
                "resize all to one size with the image processor."
            )

    def __len__(self) -> int:
        return sum(len(batch) for batch in self.batches)


def _batches(data, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Yield (images, labels or None) of each batch in anything that [`CalibrationData`] takes."""
    if isinstance(data, torch.Tensor):
        yield from ((images, None) for images in data.split(batch_size))
        return
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise ValueError(f"calibration must be a DataLoader, a dataset or batches, got {type(data).__name__}.")
    waiting = []
    for item in data if isinstance(data, Iterable) else (data[index] for index in range(len(data))):
        images, labels = _unpack(item)
        if images.dim() == 4:
            yield images, labels
            continue
        waiting.append((images, labels))
        if len(waiting) == batch_size:
            yield _stack(waiting)
            waiting = []
    if waiting:
        yield _stack(waiting)


def _unpack(item) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (images, labels or None) of a batch or a single example."""
    if isinstance(item, torch.Tensor):
        return item, None
    if isinstance(item, (tuple, list)) and item and isinstance(item[0], torch.Tensor):
        return item[0], torch.as_tensor(item[1]) if len(item) > 1 else None
    if not hasattr(item, "keys") or not isinstance(item.get("pixel_values"), torch.Tensor):
        found = f"keys {', '.join(map(str, item.keys()))}" if hasattr(item, "keys") else type(item).__name__
        raise ValueError(
            f"Calibration data must give tensors or mappings with a 'pixel_values' tensor, got {found}: pass images "
            "through the image processor."
        )
    labels = item.get("labels")
    return item["pixel_values"], None if labels is None else torch.as_tensor(labels)


def _stack(examples: list) -> tuple[torch.Tensor, torch.Tensor | None]:
    images, labels = zip(*examples)
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(
            f"Calibration images have several sizes, {sorted(shapes)}: resize all to one with the image processor."
        )
    return torch.stack(images), None if labels[0] is None else torch.stack(labels)
