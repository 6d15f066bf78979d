"""What nobody can measure and only the author of a model can tell, and the picture that shows it at work."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.utils import validate_repo_id
from PIL import Image, ImageOps

LONGEST_SIDE = 256  # pixels of the example on a card
TOP = 3  # classes that are named of it


@dataclass
class About:
    """What the author says of a model.

    Args:
        intended_use (`str`, *optional*): what it is for, and what not, in a sentence or more.
        training_data (`str`, *optional*): what it was trained on.
        training_data_license (`str`, *optional*): the license of these data, in words.
        base_model (`str`, *optional*): Hub id of the model that training started from, or that was quantized.
    """

    intended_use: str = ""
    training_data: str = ""
    training_data_license: str = ""
    base_model: str | None = None

    def __post_init__(self):
        if self.base_model is not None:
            try:
                validate_repo_id(self.base_model)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"base_model {self.base_model!r} is no Hub id: {error} Give 'namespace/name', or leave it out."
                ) from error


@dataclass
class Example:
    """A picture on a card, and what the published model says of it.

    Args:
        path (`str`): the picture's path in the repository.
        labels (`list[str]`): the likeliest classes, the first one first.
        probabilities (`list[float]`): of these classes, 0 to 1.
    """

    path: str
    labels: list[str] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)

    def validate(self, where: str) -> None:
        """Raise `ValueError` for lists that don't belong together."""
        if not self.labels or len(self.labels) != len(self.probabilities):
            raise ValueError(f"{where} has {len(self.labels)} labels and {len(self.probabilities)} probabilities.")


@torch.no_grad()
def make_example(model, processor, picture: str | Path, target: Path, name: str) -> Example:
    """Classify a `picture`, and write it as `plots/<name>-example.png` below `target`, small and without its metadata.

    Raises `ValueError` naming a file that is no picture.
    """
    try:
        with Image.open(picture) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"The example {picture} is no picture that PIL reads ({error}): give another.") from error
    device = next(model.parameters()).device
    pixel_values = processor(image, return_tensors="pt")["pixel_values"].to(device)
    was_training = model.training
    logits = model.eval()(pixel_values).logits[0].float()
    model.train(was_training)
    found = logits.softmax(-1).topk(min(TOP, len(logits)))
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    path = f"plots/{name}-example.png"
    (target / "plots").mkdir(exist_ok=True)
    image.save(target / path)
    labels = [model.config.id2label[place] for place in found.indices.tolist()]
    return Example(path, labels, [round(value, 4) for value in found.values.tolist()])
