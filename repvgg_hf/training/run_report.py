"""What a training's report shows: its course, which classes are confused, and the pictures that are taken for others.

`report_page.py` makes a page of it, and `report_picture.py` an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from repvgg_hf.training.images import open_image
from repvgg_hf.training.splits import ImageSplit

MATRIX_CLASSES = 12  # classes of the confusion matrix, the most confused ones of more
WORST, PAIRS, PER_PAIR = 12, 6, 4  # pictures, pairs of classes, and pictures of each pair
THUMBNAIL = 128  # pixels, the longest side


@dataclass(frozen=True)
class Guess:
    """A picture that was taken for another class.

    Attributes:
        image: the picture, made small.
        label, guess: names of its class, and of the one it was taken for.
        confidence: the model's probability of its guess, 0 to 1.
        file: its file and the folder that is in, if it has one.
    """

    image: Image.Image
    label: str
    guess: str
    confidence: float
    file: str = ""


@dataclass(frozen=True)
class Pair:
    """Two classes of which the first is taken for the second.

    Attributes:
        label, guess: names of the two.
        count, images: how many of the first class's pictures.
        guesses: a few of them, the most confident first.
    """

    label: str
    guess: str
    count: int
    images: int
    guesses: list[Guess]


@dataclass(frozen=True)
class Evaluation:
    """A point of a training's course; `None` for what was not measured there."""

    epoch: float
    loss: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class RunReport:
    """What a report shows.

    Attributes:
        sentence: what the training came to.
        facts: further lines about it.
        course: its evaluations, in order.
        classes: names of the classes of the confusion matrix.
        matrix: int64 `[classes, classes]`, pictures by their class and by what they are taken for.
        all_classes: the number of classes that the model has.
        worst: pictures that were taken for others, the most confident ones first.
        pairs: pairs of classes, the most confused ones first.
    """

    sentence: str
    facts: list[str]
    course: list[Evaluation]
    classes: list[str]
    matrix: np.ndarray
    all_classes: int
    worst: list[Guess] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)


def make_report(
    sentence: str, facts: list[str], log_history: Sequence[dict], split: ImageSplit, logits: np.ndarray
) -> RunReport:
    """Make the report of a training.

    Args:
        sentence, facts: see [`RunReport`].
        log_history: that of `Trainer`'s state.
        split: the evaluated images, with their classes and labels.
        logits: floating `[images, classes]`, what the model says of them.
    """
    labels, names = split.labels, split.classes
    guesses = logits.argmax(1)
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    confidences = shifted.max(1) / shifted.sum(1)
    matrix = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(matrix, (labels, guesses), 1)
    wrong = np.flatnonzero(guesses != labels)
    wrong = wrong[np.argsort(-confidences[wrong], kind="stable")]

    def shown(place: int) -> Guess:
        value = split.rows[int(place)][split.column]
        image = open_image(value, "RGB", split.where(place), split.folder)
        label, guess = names[labels[place]], names[guesses[place]]
        return Guess(thumbnail(image), label, guess, float(confidences[place]), file_of(value))

    pairs = []
    for label, guess in confused_pairs(matrix):
        places = [place for place in wrong if labels[place] == label and guesses[place] == guess][:PER_PAIR]
        count, images = int(matrix[label, guess]), int(matrix[label].sum())
        pairs.append(Pair(names[label], names[guess], count, images, [shown(place) for place in places]))
    chosen = most_confused(matrix)
    return RunReport(
        sentence=sentence,
        facts=facts,
        course=course_of(log_history),
        classes=[names[place] for place in chosen],
        matrix=matrix[np.ix_(chosen, chosen)],
        all_classes=len(names),
        worst=[shown(place) for place in wrong[:WORST]],
        pairs=pairs,
    )


def file_of(value) -> str:
    """Return the last folder and the file of what a cell of a dataset holds; empty for bytes alone."""
    path = value.get("path") if isinstance(value, dict) else value
    return "/".join(Path(path).parts[-2:]) if isinstance(path, str) else ""


def course_of(log_history: Sequence[dict]) -> list[Evaluation]:
    """Return a training's losses and accuracies, those of the same step together."""
    found: dict[int, dict] = {}
    for line in log_history:
        if "loss" in line or "eval_top1" in line:
            values = {"epoch": line["epoch"], "loss": line.get("loss"), "top1": line.get("eval_top1")}
            found.setdefault(line["step"], {}).update({name: v for name, v in values.items() if v is not None})
    return [Evaluation(**values) for _, values in sorted(found.items())]


def confused_pairs(matrix: np.ndarray) -> list[tuple[int, int]]:
    """Return the classes (label, guess) of the largest counts beside the diagonal, the largest first."""
    errors = matrix.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:PAIRS]
    return [(int(place // len(errors)), int(place % len(errors))) for place in order if errors.flat[place]]


def most_confused(matrix: np.ndarray) -> list[int]:
    """Return the classes of a matrix to show, in their order: all, or of many those with most errors."""
    if len(matrix) <= MATRIX_CLASSES:
        return list(range(len(matrix)))
    errors = matrix.sum(0) + matrix.sum(1) - 2 * matrix.diagonal()
    return sorted(np.argsort(-errors, kind="stable")[:MATRIX_CLASSES].tolist())


def thumbnail(image: Image.Image) -> Image.Image:
    """Return `image` with a longest side of `THUMBNAIL` pixels; the pixels of a tiny one stay squares."""
    scale = THUMBNAIL / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize(size, Image.Resampling.NEAREST if scale >= 3 else Image.Resampling.BICUBIC)
