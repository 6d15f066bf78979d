"""What a model's file takes and gives: an image and logits, or it is no classifier."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# what engines call the dtypes of images
_DTYPES = {
    "tensor(float)": "float32", "tensor(uint8)": "uint8", "f32": "float32", "u8": "uint8", "float32": "float32",
    "uint8": "uint8",
}  # fmt: skip
COLORS = 3
_WANTED = (
    "expected one input, float32 [images, channels, height, width] or uint8 [images, height, width, 3], and the output "
    "'logits' or a single one [images, classes]: give a file that recipes/export.py wrote"
)


@dataclass(frozen=True)
class Tensor:
    """An input or output: its name, dtype as the engine calls it, and sizes, of which those that are free are `None`.

    Engines give names, -1 or nothing for a free size.
    """

    name: str
    dtype: str
    sizes: Sequence

    @property
    def shape(self) -> tuple[int | None, ...]:
        """The sizes, `None` where any will do."""
        return tuple(size if isinstance(size, int) and size > 0 else None for size in self.sizes)

    def __str__(self) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in self.shape)
        return f"{self.name or 'unnamed'} {_DTYPES.get(self.dtype, self.dtype)} [{sizes}]"


@dataclass(frozen=True)
class Ends:
    """The ends of a classifier.

    Attributes:
        image ([`Tensor`]): its input.
        logits (`str`): name of its output.
    """

    image: Tensor
    logits: str

    @property
    def takes_pictures(self) -> bool:
        """Whether it prepares images itself, and so takes uint8 `[images, height, width, 3]`."""
        return _DTYPES[self.image.dtype] == "uint8"

    def require_fitting(self, images: np.ndarray, path: Path) -> None:
        """Raise `ValueError` for images that the model at `path` does not take; any number above 0 will do."""
        dtype, shape = _DTYPES[self.image.dtype], self.image.shape
        pairs = zip(shape[1:], images.shape[1:])
        fits = images.ndim == len(shape) and images.size and all(size in (None, found) for size, found in pairs)
        if images.dtype != dtype or not fits:
            raise ValueError(f"{path} takes {self.image}, got images {images.dtype} {list(images.shape)}.")


def find_ends(path: Path, inputs: list[Tensor], outputs: list[Tensor]) -> Ends:
    """Return the image and the logits of a model. Raises `ValueError` if it has other ends than a classifier."""
    logits = [output for output in outputs if output.name == "logits"] or outputs
    is_image = len(inputs) == 1 and _is_image(inputs[0])
    if not is_image or len(logits) != 1 or len(logits[0].sizes) != 2:
        raise ValueError(
            f"{path} is no image classifier: its inputs are {', '.join(map(str, inputs)) or 'none'}, its outputs "
            f"{', '.join(map(str, outputs)) or 'none'}; {_WANTED}."
        )
    return Ends(inputs[0], logits[0].name)


def _is_image(tensor: Tensor) -> bool:
    dtype = _DTYPES.get(tensor.dtype)
    if len(tensor.sizes) != 4 or dtype is None:
        return False
    return dtype == "float32" or tensor.shape[3] in (None, 1, COLORS)


__all__ = ["Ends", "Tensor", "find_ends"]
