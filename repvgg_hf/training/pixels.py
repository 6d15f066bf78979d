"""What a model's image processor does to an image: resize, crop the center, normalize.

In two steps, so that images can be kept in memory and augmented as bytes, and normalized a batch at a time. The result
is the processor's own, which is checked against it when it is made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvF
from transformers.image_utils import pil_torch_interpolation_mapping

from repvgg_hf.training.images import convert

Size = tuple[int, int]  # height, width

LARGEST_DIFFERENCE = 1e-5  # between the processor's pixels and ours, on the images that both are tried on
_TRIED = [(40, 70), (77, 51), (9, 9), (251, 200)]


@dataclass(frozen=True)
class Pixels:
    """The pixels of one image processor, see [`pixels_of`].

    Attributes:
        mode: of the PIL images that it takes, `"RGB"` or `"L"`.
        resized: gives the (height, width) that an image of some (height, width) is resized to.
        interpolation: of resizing.
        with_pil: whether PIL resizes, whose pixels differ by a level from those of torchvision.
        start: gives the first row of a crop, from the rows of the image and the crop; negative if rows are padded.
        size: height and width in the end.
        factor, offset: floating `[channels, 1, 1]`; `factor * bytes + offset` is what the model sees.
    """

    mode: str
    resized: Callable[[Size], Size]
    interpolation: InterpolationMode
    with_pil: bool
    start: Callable[[int, int], int]
    size: Size
    factor: torch.Tensor
    offset: torch.Tensor

    @property
    def channels(self) -> int:
        """The channels of an image, 1 or 3."""
        return 1 if self.mode == "L" else 3

    def source(self, image: Image.Image) -> Image.Image | torch.Tensor:
        """Return the whole `image` as what the processor resizes: of PIL, or uint8 `[channels, height, width]`."""
        image = convert(image, self.mode)
        return image if self.with_pil else to_tensor(image)

    def fit(self, image: Image.Image, size: Size | None = None) -> torch.Tensor:
        """Return `image` resized and cropped to its center, uint8 `[channels, height, width]`.

        `size` is another size of the crop, which leaves more of the image for an augmentation.
        """
        source = self.source(image)
        shape = (image.height, image.width)
        if (resized := self.resized(shape)) != shape:
            source = tvF.resize(source, list(resized), interpolation=self.interpolation, antialias=True)
        source = to_tensor(source) if self.with_pil else source
        return window(source, size or self.size, self.start)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Return uint8 `images` `[..., channels, height, width]` as the model sees them, floating."""
        return images.to(torch.float32).mul_(self.factor).add_(self.offset)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return what `processor(image)["pixel_values"][0]` is, floating `[channels, height, width]`."""
        return self.normalize(self.fit(image))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Return an image as uint8 `[channels, height, width]`, of which the channels are next to each other in memory."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def window(image: torch.Tensor, size: Size, start: Callable[[int, int], int]) -> torch.Tensor:
    """Return `size` of an image `[channels, height, width]` from where `start` says, with black beyond its borders."""
    height, width = image.shape[-2:]
    if (height, width) == tuple(size):
        return image
    top, left = start(height, size[0]), start(width, size[1])
    inside = image[..., max(top, 0) : top + size[0], max(left, 0) : left + size[1]]
    missing = [size[1] - inside.shape[-1], size[0] - inside.shape[-2]]
    if not any(missing):
        return inside
    before = [max(-left, 0), max(-top, 0)]
    return F.pad(inside, [before[0], missing[0] - before[0], before[1], missing[1] - before[1]])


def start_of_torchvision_processor(length: int, crop: int) -> int:
    """The first row of a center crop in the processors that use torchvision."""
    return (length - crop) // 2 if length >= crop else -((crop - length) // 2)


def start_of_pil_processor(length: int, crop: int) -> int:
    """The first row of a center crop in the processors that use PIL."""
    return (length - crop) // 2


def start_of_timm(length: int, crop: int) -> int:
    """The first row of a center crop in torchvision's own transform, which timm uses."""
    return round((length - crop) / 2) if length >= crop else -((crop - length) // 2)


def short_side(side: int, shape: Size) -> Size:
    """The size of an image of `shape` whose short side becomes `side`."""
    height, width = shape
    long = int(side * max(shape) / min(shape))
    return (side, long) if height < width else (long, side)


def exactly(size: Size, shape: Size) -> Size:
    """The size of an image that is resized without keeping its proportions."""
    return size


def unchanged(shape: Size) -> Size:
    """The size of an image that is not resized."""
    return shape


def pixels_of(processor) -> Pixels:
    """Return the [`Pixels`] of an image processor of transformers.

    Those that resize by `size`, crop the center, rescale and normalize are known (of Bit, ViT, DeiT, CLIP and others,
    with torchvision or PIL), ConvNext's and ResNet's with their `crop_pct`, and the wrapper of timm. Raises
    `ValueError` that names the processor if it does anything else, or leaves images of several sizes.
    """
    pixels = _of_timm(processor) if hasattr(processor, "val_transforms") else _of_fields(processor)
    _check(pixels, processor)
    return pixels


def _of_fields(processor) -> Pixels:
    size, crop = _field(processor, "size") or {}, _field(processor, "crop_size") or {}
    crop = (crop["height"], crop["width"]) if _field(processor, "do_center_crop") and crop.get("height") else None
    side = size.get("shortest_edge")
    resized = unchanged
    if not _field(processor, "do_resize"):
        pass
    elif side and size.get("longest_edge") is None and _field(processor, "crop_pct"):  # ConvNext
        if side < 384:
            resized, crop = partial(short_side, int(side / processor.crop_pct)), crop or (side, side)
        else:
            resized, crop = partial(exactly, (side, side)), crop or (side, side)
    elif side and size.get("longest_edge") is None:
        resized = partial(short_side, side)
    elif size.get("height") and size.get("width"):
        resized = partial(exactly, (size["height"], size["width"]))
        crop = crop or (size["height"], size["width"])
    else:
        raise _refusal(processor, f"its size is {size}, known are height and width, or shortest_edge")
    if crop is None:
        raise _refusal(processor, "it leaves images of several sizes: set do_center_crop and crop_size")

    mean, std = (
        torch.tensor(_field(processor, name) or [0.0, 0.0, 0.0]).double() for name in ("image_mean", "image_std")
    )
    mode = "L" if mean.numel() == 1 and not _field(processor, "do_convert_rgb") else "RGB"
    scale = _field(processor, "rescale_factor") if _field(processor, "do_rescale") else 1.0
    if not _field(processor, "do_normalize"):
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    with_pil = getattr(processor, "backend", "pil") == "pil"
    return Pixels(
        mode=mode,
        resized=resized,
        interpolation=pil_torch_interpolation_mapping[_field(processor, "resample") or 0],
        with_pil=with_pil,
        start=start_of_pil_processor if with_pil else start_of_torchvision_processor,
        size=(int(crop[0]), int(crop[1])),
        factor=(scale / std).float().reshape(-1, 1, 1),
        offset=(-mean / std).float().reshape(-1, 1, 1),
    )


def _field(processor, name: str):
    """A field of a processor, `None` without it; sizes as plain dictionaries."""
    value = getattr(processor, name, None)
    return dict(value) if name in ("size", "crop_size") and value is not None else value


def _of_timm(processor) -> Pixels:
    steps = list(processor.val_transforms.transforms)
    names = [type(step).__name__ for step in steps]
    known = (["Resize"], ["CenterCrop"], ["ToTensor", "MaybeToTensor"], ["Normalize"])
    if len(names) != len(known) or any(name not in allowed for name, allowed in zip(names, known)):
        raise _refusal(processor, f"its transforms are {', '.join(names)}, known are Resize, CenterCrop, Normalize")
    resize, crop, _, normalize = steps
    # one number is the short side
    side = resize.size if isinstance(resize.size, int) or len(resize.size) > 1 else resize.size[0]
    mean, std = (torch.as_tensor(value).double() for value in (normalize.mean, normalize.std))
    return Pixels(
        mode="L" if mean.numel() == 1 else "RGB",
        resized=partial(short_side, side) if isinstance(side, int) else partial(exactly, tuple(side)),
        interpolation=resize.interpolation,
        with_pil=True,
        start=start_of_timm,
        size=tuple(crop.size),
        factor=(1 / (255 * std)).float().reshape(-1, 1, 1),
        offset=(-mean / std).float().reshape(-1, 1, 1),
    )


def _check(pixels: Pixels, processor) -> None:
    """Raise `ValueError` if the pixels are not the processor's, on random images of several sizes."""
    generator = np.random.default_rng(0)
    for height, width in _TRIED:
        shape = (height, width) if pixels.mode == "L" else (height, width, 3)
        image = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
        expected = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
        found = pixels(image)
        if found.shape != expected.shape:
            raise _refusal(processor, f"it gives {list(expected.shape)} where its fields tell {list(found.shape)}")
        # rounding errors grow with the values, which are 255 and more without do_rescale
        difference = (found - expected).abs().max().item() / max(1.0, expected.abs().max().item())
        if not difference <= LARGEST_DIFFERENCE:
            raise _refusal(processor, f"its pixels differ by {difference:.2g} from what its fields tell")


def _refusal(processor, found: str) -> ValueError:
    return ValueError(
        f"The image processor {type(processor).__name__} can't be followed in training and evaluation: {found}. Save a "
        "BitImageProcessor of the same size, mean and standard deviation with the checkpoint, or give --image_size."
    )
