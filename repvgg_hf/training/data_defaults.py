"""What a training takes from the pictures themselves where the user says nothing: size, batches, epochs, rate."""

import statistics
from dataclasses import dataclass

import numpy as np

from repvgg_hf.training.batches import batches_per_epoch
from repvgg_hf.training.images import image_sides
from repvgg_hf.training.splits import ImageSplit

LOOKED_AT = 64  # pictures whose sides are read
LARGEST_SIDE, STEP = 224, 32  # pixels
NEW_STEPS, TUNED_STEPS = 1200, 400  # optimizer steps of a new model, and of a checkpoint that is trained on
NEW_EPOCHS, TUNED_EPOCHS = 20, 5  # epochs that a large set is trained on at least
# peak learning rates for batches of 64 images: of a new model, a checkpoint, and one that gets a new classifier
NEW_RATE, TUNED_RATE, NEW_CLASSIFIER_RATE = 0.1, 0.01, 0.02
EVALUATIONS = 25  # in a training of many short epochs


@dataclass(frozen=True)
class TrainingPlan:
    """How long, and in which steps, a set of pictures is trained on.

    Attributes:
        batch_size: images of a batch on each device.
        learning_rate: at its peak.
        epochs: passes over the pictures.
    """

    batch_size: int
    learning_rate: float
    epochs: float


def suggest_image_size(split: ImageSplit) -> int:
    """Return the median short side of a split's pictures as a multiple of 32, at most 224; below 32 as it is."""
    places = sorted({round(place) for place in np.linspace(0, len(split) - 1, LOOKED_AT)})
    found = [image_sides(value, split.folder) for value in split.rows[places][split.column]]
    short = [min(sides) for sides in found if sides is not None]
    side = statistics.median(short) if short else LARGEST_SIDE
    if side < STEP:
        return max(1, round(side))
    return min(LARGEST_SIDE, STEP * round(side / STEP))


def suggest_pretrained_size(split: ImageSplit, side: int) -> int:
    """Return the size of a split's pictures for a network that was trained with images of `side` pixels.

    It is the pictures' own, see [`suggest_image_size`], but at most `side`, and at least about half of it: in smaller
    ones the network's last maps have hardly a pixel, and nothing looks as it did in its training.
    """
    return min(side, max(suggest_image_size(split), STEP * -(-side // (2 * STEP))))


def suggest_strides(image_size: int, stages: int) -> tuple[int, list[int]]:
    """Return (stride of the stem, those of the stages) of a new model, whose last maps have a side of 5 to 14.

    The first maps cost most: a picture of 128 pixels is four times as wide there as one of 32.
    """
    first = 2 if image_size > 2.5 * STEP else 1
    return (2 if image_size > 1.25 * STEP else 1), [first] + [2] * (stages - 1)


def suggest_plan(
    images: int,
    from_checkpoint: bool,
    batch_size: int | None,
    epochs: float | None,
    processes: int,
    accumulated: int,
    new_classifier: bool = False,
) -> TrainingPlan:
    """Return the plan for so many training images: 20 epochs, or as many as make 1,200 steps of them.

    Args:
        images: of the training split.
        from_checkpoint: whether the model is trained already, which takes fewer steps and smaller ones.
        batch_size, epochs: what the user wants, or `None`.
        processes: that share each step.
        accumulated: batches of each process per step.
        new_classifier: whether the trained model gets one, which has further to go.
    """
    batch_size = batch_size or (32 if images < 3000 else 64 if images < 30000 else 128)
    steps = steps_per_epoch(images, batch_size, processes, accumulated)
    if epochs is None:
        wanted, least = (TUNED_STEPS, TUNED_EPOCHS) if from_checkpoint else (NEW_STEPS, NEW_EPOCHS)
        epochs = max(least, -(-wanted // steps))
    rate = (NEW_CLASSIFIER_RATE if new_classifier else TUNED_RATE) if from_checkpoint else NEW_RATE
    return TrainingPlan(batch_size, rate * batch_size / 64, epochs)


def epochs_between_evaluations(steps: int, steps_of_epoch: int) -> int:
    """Return after how many epochs to evaluate, in a training of so many steps, to do so about 25 times at most."""
    return max(1, -(-(steps // steps_of_epoch) // EVALUATIONS))


def steps_per_epoch(images: int, batch_size: int, processes: int, accumulated: int) -> int:
    """Return the optimizer steps of one pass over the images."""
    return max(1, -(-batches_per_epoch(images, batch_size, processes) // accumulated))
