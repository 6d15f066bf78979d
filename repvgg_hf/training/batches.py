"""Batches of pixels from images: read for each batch, or kept in memory; augmented and normalized a batch at a time."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from torchvision.transforms import v2

from repvgg_hf.training.images import open_image
from repvgg_hf.training.pixels import Pixels, pixels_of, to_tensor
from repvgg_hf.training.splits import DataArguments, ImageSplit

_TOGETHER = 32  # images that a thread reads at once
# of the augmentation `photo`: radians, shares of the side, logarithm of width by height, factors of a color
_TURN, _ZOOM, _BEYOND, _ASPECT, _COLOR = 0.25, (0.6, 1.1), 0.1, 0.15, (0.7, 1.3)


class Augmentation:
    """What happens to training images, in the geometry of evaluation: its resizing, interpolation and crop.

    `crop` moves the crop by up to an eighth of its side, or by all that the processor leaves around it, with black
    beyond the image's center square; `resized_crop` takes a random part of the whole image instead; `photo` turns,
    zooms, moves, mirrors and recolors the crop, for pictures that are few.
    """

    def __init__(self, name: str, pixels: Pixels):
        self.size = pixels.size
        self.flip, self.photo = name.endswith("flip"), name == "photo"
        self.resized_crop = None
        if name.startswith("resized_crop"):
            self.resized_crop = v2.RandomResizedCrop(self.size, interpolation=pixels.interpolation)
        # what is there of every image, whatever its shape, after resizing
        there = [max(side, crop) for side, crop in zip(pixels.resized((max(self.size),) * 2), self.size)]
        spare = [max(1, crop // 8, (side - crop) // 2) for side, crop in zip(there, self.size)]
        self.margins = spare if name.startswith("crop") else [0, 0]
        # what is kept of each image
        reach = [crop + 2 * margin for crop, margin in zip(self.size, self.margins)]
        self.stored = tuple(min(side, far) for side, far in zip(there, reach))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Change uint8 `images` `[batch, channels, *stored]`, each in its own way, to the size of the crop.

        The result is uint8, or of `photo` float32 from 0 to 255.
        """
        if self.photo:
            return recolored(random_view(images))
        if any(self.margins):
            return self.random_crop(images)
        if self.flip:
            flipped = torch.rand(len(images), 1, 1, 1) < 0.5
            return torch.where(flipped, images.flip(3), images)
        return images

    def random_crop(self, images: torch.Tensor) -> torch.Tensor:
        """Move the crop of each of the `images` `[batch, channels, *stored]`, and flip it perhaps."""
        count, borders = len(images), []
        for stored, crop, margin in zip(self.stored, self.size, self.margins):
            missing = crop + 2 * margin - stored
            borders = [missing // 2, missing - missing // 2, *borders]  # from the last dimension on
        padded = F.pad(images, borders)
        if self.margins[0] == self.margins[1]:
            corners = torch.randint(2 * self.margins[0] + 1, (2, count, 1))
        else:
            corners = [torch.randint(2 * margin + 1, (count, 1)) for margin in self.margins]
        rows, columns = (corner + torch.arange(side) for corner, side in zip(corners, self.size))  # [batch, side] each
        if self.flip:
            columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
        images_last = padded.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None]]
        return images_last.permute(0, 3, 1, 2)


def _uniform(count: int, low: float, high: float) -> torch.Tensor:
    return torch.empty(count).uniform_(low, high)


def random_view(images: torch.Tensor) -> torch.Tensor:
    """Return `images` `[batch, channels, height, width]`, turned, zoomed, moved and mirrored at random, float32."""
    count = len(images)
    angle, zoom = _uniform(count, -_TURN, _TURN), _uniform(count, *_ZOOM)
    aspect = _uniform(count, -_ASPECT, _ASPECT).exp()
    mirror = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    width, height = zoom * aspect * mirror, zoom / aspect
    spare = (1 - zoom).clamp(min=0) + _BEYOND  # how far the view may move, in halves of the image
    shift = [_uniform(count, -1, 1) * spare for _ in range(2)]
    # where in the image, which is from -1 to 1, the view's corners are taken from
    across = torch.stack([angle.cos() * width, -angle.sin() * height, shift[0]], 1)
    down = torch.stack([angle.sin() * width, angle.cos() * height, shift[1]], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images.to(torch.float32), grid, padding_mode="reflection", align_corners=False)


def recolored(images: torch.Tensor) -> torch.Tensor:
    """Return float32 `images` of 0 to 255 with brightness, contrast and saturation changed at random, each its own."""
    brightness, contrast, saturation = (_uniform(len(images), *_COLOR).reshape(-1, 1, 1, 1) for _ in range(3))
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * saturation  # of a gray image the same
    mean = gray.mean((2, 3), keepdim=True)
    return ((images - mean) * contrast + mean).mul_(brightness).clamp_(0, 255)


class DecodedImages(Dataset):
    """The pixels and labels of a split, read from its files when asked for.

    With `__getitems__` a `DataLoader` gets a whole batch at once: `pixel_values` floating `[batch, channels, height,
    width]` and `labels` int64 `[batch]`. Its `collate_fn` is [`collate`], which leaves that as it is.

    Args:
        split: the images.
        pixels: what the model's image processor does.
        augmentation: name of what happens to the images besides.
    """

    def __init__(self, split: ImageSplit, pixels: Pixels, augmentation: str = "none"):
        self.split, self.pixels = split, pixels
        self.augmentation = Augmentation(augmentation, pixels)
        self.labels = torch.from_numpy(split.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no image {index}, there are {len(self)}.")
        return {name: values[0] for name, values in self.__getitems__([int(index) % len(self)]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return a whole batch, see the class."""
        pixel_values = self.pixels.normalize(self.augmentation(self.read(indices)))
        return {"pixel_values": pixel_values, "labels": self.labels[torch.as_tensor(indices)]}

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """Return images from their files, uint8 `[batch, channels, height, width]`."""
        resized_crop = self.augmentation.resized_crop
        size = self.pixels.size if resized_crop else self.augmentation.stored
        images = None
        values = self.split.rows[list(indices)][self.split.column]
        for place, (index, value) in enumerate(zip(indices, values)):
            image = open_image(value, self.pixels.mode, self.split.where(index), self.split.folder)
            if resized_crop:
                image = resized_crop(self.pixels.source(image))
                image = to_tensor(image) if self.pixels.with_pil else image
            else:
                image = self.pixels.fit(image, size)
            if images is None:  # in the order of the first one, as turning bytes around takes as long as resizing
                order = torch.channels_last if image.stride(0) == 1 else torch.contiguous_format
                shape = (len(indices), *image.shape)
                images = torch.empty(shape, dtype=torch.uint8, memory_format=order)
            images[place] = image
        return images


class CachedImages(DecodedImages):
    """[`DecodedImages`] that are all read at once and kept as bytes, so that a bad file is found before any work."""

    def __init__(self, split: ImageSplit, pixels: Pixels, augmentation: str = "none"):
        super().__init__(split, pixels, augmentation)
        stored = self.augmentation.stored
        self.images = torch.empty(len(self), pixels.channels, *stored, dtype=torch.uint8)

        def fill(start: int) -> None:
            indices = range(start, min(start + _TOGETHER, len(self)))
            self.images[start : indices.stop] = super(CachedImages, self).read(indices)

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # PIL lets others work while it decodes
            for _ in threads.map(fill, range(0, len(self), _TOGETHER)):
                pass

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        return self.images[torch.as_tensor(indices)]


def training_data(split: ImageSplit, args: DataArguments, processor) -> DecodedImages:
    """The images of `split` with `--augmentation`, kept in memory if they fit `--cache_gigabytes`."""
    pixels = pixels_of(processor)
    kind = CachedImages if _fits(split, Augmentation(args.augmentation, pixels), pixels, args) else DecodedImages
    return kind(split, pixels, args.augmentation)


def evaluation_data(split: ImageSplit, args: DataArguments, processor, cache: bool = False) -> DecodedImages:
    """The images of `split` as `processor` makes them; with `cache` in memory if they fit `--cache_gigabytes`."""
    pixels = pixels_of(processor)
    kind = CachedImages if cache and _fits(split, Augmentation("none", pixels), pixels, args) else DecodedImages
    return kind(split, pixels)


def _fits(split: ImageSplit, augmentation: Augmentation, pixels: Pixels, args: DataArguments) -> bool:
    if augmentation.resized_crop is not None:  # it needs the whole image
        return False
    height, width = augmentation.stored
    return len(split) * pixels.channels * height * width <= args.cache_gigabytes * 2**30


def calibration_images(split: ImageSplit, count: int, args: DataArguments, processor, seed: int) -> DecodedImages:
    """`count` images of `split`, chosen at random, as in evaluation; fewer if there are no more."""
    return evaluation_data(split.sample(count, seed), args, processor)


def collate(batch: dict[str, torch.Tensor] | list[dict]) -> dict[str, torch.Tensor]:
    """Return the batch that a dataset made with `__getitems__`, or stack single examples to one.

    That is `pixel_values` `[batch, channels, height, width]` and `labels` int64 `[batch]`.
    """
    if isinstance(batch, dict):
        return batch
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in batch]),
        "labels": torch.tensor([int(example["labels"]) for example in batch]),
    }


def leaves_one_image(images: int, batch_size: int, processes: int = 1) -> bool:
    """Whether the last batch of an epoch would be a single image: a training then drops it, another one each epoch.

    Batch normalization can't be trained on one value per channel, which the last maps of one small image are. With
    several processes Accelerate fills the last batches up.
    """
    return processes == 1 and images > batch_size > 1 and images % batch_size == 1


def batches_per_epoch(images: int, batch_size: int, processes: int = 1) -> int:
    """The batches of an epoch on each process."""
    return -(-images // (batch_size * processes)) - leaves_one_image(images, batch_size, processes)
