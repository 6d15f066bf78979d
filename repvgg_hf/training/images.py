"""Reading one image, in the form that a model's image processor takes: eight bits, upright, gray or RGB."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_CURE = "replace it by an image that PIL can open, or remove it from the data"


def open_image(value, mode: str, where: str, folder: Path | None = None) -> Image.Image:
    """Return the upright image that a cell of a dataset holds.

    Args:
        value: a path, the bytes of a file, or a mapping with `bytes` or `path`, which is how `datasets` stores images.
        mode: `"RGB"` or `"L"`, which is gray.
        where: the place in the data, for errors.
        folder: what relative paths may start from.

    Raises `ValueError` that names the place and the file, if it can't be read.
    """
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, value)
    if isinstance(path, (bytes, bytearray)):
        content, path = path, None
    named = where if path is None else f"{where}, file {path},"
    if content is None and path is None:
        raise ValueError(f"{where} is empty (null): {_CURE}.")
    source = io.BytesIO(content) if content is not None else _find(str(path), folder)
    try:
        with Image.open(source) as image:
            upright = ImageOps.exif_transpose(image) if _is_turned(image) else image
            return convert(upright, mode)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{named} has more pixels than PIL opens ({error}): make it smaller, such as with "
            "`mogrify -resize 1024x1024`, or remove it from the data."
        ) from error
    except FileNotFoundError as error:
        below = f", nor below {folder}" if folder is not None else ""
        raise ValueError(f"{named} does not exist{below}: correct the path, or remove the row.") from error
    except Exception as error:  # a decoder may raise anything for a damaged file
        raise ValueError(f"{named} can't be read ({type(error).__name__}: {error}): {_CURE}.") from error


def image_sides(value, folder: Path | None = None) -> tuple[int, int] | None:
    """Return (width, height) that the file of an image states, without decoding it; `None` if it states none.

    `value` and `folder` are those of [`open_image`].
    """
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, value)
    try:
        with Image.open(io.BytesIO(content) if content is not None else _find(str(path), folder)) as image:
            return image.size
    except Exception:  # a damaged file is an error where it is read
        return None


def _find(path: str, folder: Path | None) -> str:
    """Return `path`, which may be relative to `folder` or else to the working directory."""
    below = None if folder is None else folder / path
    return str(below) if below is not None and below.exists() else path


def _is_turned(image: Image.Image) -> bool:
    return image.getexif().get(274, 1) not in (0, 1)  # the tag of the orientation


def convert(image: Image.Image, mode: str) -> Image.Image:
    """Return `image` in `mode`, `"RGB"` or `"L"`, with 8 bits; transparent pixels on white, as in transformers.

    Gray of 16 bits is 0 to 65535, whatever the values of one image are: its brightness may tell the class. PIL opens it
    in the modes `I;16` and `I`. Floats (mode `F`) are 0 to 1, or 0 to 255 if one is above 1, or 0 to 65535 if one is
    above 255. Raises `ValueError` for values beyond those.
    """
    if image.mode in (*_SIXTEEN_BITS, "F"):
        image = _eight_bits(image)
    if image.mode == mode:
        image.load()
        return image
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"its gray values (mode {image.mode}) are from {values.min()} to {values.max()}, expected 0 to 65535, or "
            "floats from 0 to 1: store 8 or 16 bits"
        )
    largest = 65535
    if image.mode == "F" and values.max() <= 255:
        largest = 1 if values.max() <= 1 else 255
    return Image.fromarray((values * (255 / largest)).round().astype(np.uint8))
