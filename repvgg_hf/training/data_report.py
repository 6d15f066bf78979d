"""What a training set is, in a line, and what to be warned of before hours are spent on it."""

import numpy as np

from repvgg_hf.training.labels import shown
from repvgg_hf.training.splits import ImageSplit

FEW = 10  # training images of a class, below which it is warned of
UNBALANCED = 10  # ratio of the largest class to the smallest, above which it is warned of


def describe_data(splits: dict[str, ImageSplit], image_size: tuple[int, int], steps: int, batch_size: int) -> str:
    """Return one line about the images, their classes and balance, the size and the steps of the training."""
    train, names = splits["train"], splits["train"].classes
    counts = np.bincount(train.labels, minlength=len(names))
    low, high = counts.argmin(), counts.argmax()
    balance = f"{counts[low]} to {counts[high]} of each ({names[low]} to {names[high]})"
    balance = f"{counts[low]} of each" if counts[low] == counts[high] else balance
    listed = f" ({shown(names)})" if len(names) <= 5 else ""
    return (
        f"{len(train):,} training and {len(splits['validation']):,} validation images of {len(names)} classes{listed}, "
        f"{balance} to train on; {image_size[0]} x {image_size[1]} pixels; {steps:,} steps of {batch_size} images."
    )


def find_concerns(splits: dict[str, ImageSplit], weighted: bool) -> list[str]:
    """Return warnings of classes with few or no images, and of classes that most others outnumber.

    `weighted` tells whether the classes' weights make up for their numbers.
    """
    names = splits["train"].classes
    counts, held_out = (np.bincount(splits[name].labels, minlength=len(names)) for name in ("train", "validation"))
    absent, few, unseen = (
        [names[place] for place in np.flatnonzero(places)]
        for places in (counts == 0, (counts > 0) & (counts < FEW), held_out == 0)
    )
    concerns = []
    if absent:
        concerns.append(f"no training image shows {shown(absent)}, which the model can't learn so")
    if few:
        concerns.append(f"fewer than {FEW} training images show {shown(few)}: take more")
    if unseen:
        concerns.append(f"no validation image shows {shown(unseen)}, of which the accuracy will tell nothing")
    if not weighted and counts.max() > UNBALANCED * max(1, counts[counts > 0].min()):
        concerns.append("the largest class has over ten times the images of the smallest: try --class_weights True")
    return concerns
