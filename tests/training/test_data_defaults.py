"""What a training takes from the pictures: their size, batches, epochs; what it says of them."""

from dataclasses import replace

import numpy as np
import pytest

from repvgg_hf.training.data_defaults import (
    epochs_between_evaluations,
    steps_per_epoch,
    suggest_image_size,
    suggest_plan,
    suggest_strides,
)
from repvgg_hf.training.data_report import describe_data, find_concerns
from repvgg_hf.training.splits import DataArguments, load_splits


def split(image_folder, *arguments, **options):
    return load_splits(DataArguments(train_dir=str(image_folder(*arguments, **options))))["train"]


@pytest.mark.parametrize(
    ("size", "expected"), [((120, 160), 128), ((70, 60), 64), ((900, 700), 224), ((28, 31), 28), ((32, 40), 32)]
)
def test_the_size_is_the_median_short_side(image_folder, size, expected):
    assert suggest_image_size(split(image_folder, size=size, images=3)) == expected


def test_a_damaged_picture_has_no_say_in_the_size(image_folder):
    folder = image_folder(size=(64, 64), images=3)
    images = load_splits(DataArguments(train_dir=str(folder)))["train"]
    (folder / "ant" / "0.png").write_bytes(b"damaged")
    assert suggest_image_size(images) == 64


@pytest.mark.parametrize("size", [32, 64, 96, 128, 160, 224])
def test_the_last_maps_are_neither_tiny_nor_large(size):
    stem, strides = suggest_strides(size, 3)
    assert 5 <= size / (stem * np.prod(strides)) <= 14
    assert len(suggest_strides(size, 5)[1]) == 5


@pytest.mark.parametrize("images", [5, 33, 180, 2000, 60000])
def test_few_pictures_are_seen_often_enough(images):
    plan = suggest_plan(images, False, None, None, processes=1, accumulated=1)
    steps = plan.epochs * steps_per_epoch(images, plan.batch_size, 1, 1)
    assert steps >= 1200 and plan.epochs >= 20
    assert steps < 1300 or plan.epochs <= 60  # no more than it takes
    assert 1 <= plan.epochs / epochs_between_evaluations(int(steps), int(steps / plan.epochs)) <= 25
    assert plan.learning_rate == pytest.approx(0.1 * plan.batch_size / 64)


def test_what_is_given_stays():
    plan = suggest_plan(180, False, 16, 3, processes=1, accumulated=1)
    assert (plan.batch_size, plan.epochs) == (16, 3)
    tuned = suggest_plan(180, True, None, None, processes=1, accumulated=1)
    assert tuned.epochs == 67 and tuned.learning_rate == pytest.approx(0.005)
    again = suggest_plan(180, True, None, None, processes=1, accumulated=1, new_classifier=True)
    assert again.epochs == 67 and again.learning_rate == pytest.approx(0.01)


def test_the_line_about_the_data(image_folder):
    splits = load_splits(DataArguments(train_dir=str(image_folder(images=10)), train_val_split=0.5))
    counts = np.bincount(splits["train"].labels)
    line = describe_data(splits, (64, 96), 1800, 32)
    assert line.startswith("10 training and 10 validation images of 2 classes (ant, bee), ")
    assert f"{counts.min()} " in line and line.endswith("64 x 96 pixels; 1,800 steps of 32 images.")


def test_classes_that_are_warned_of(image_folder):
    image_folder(("ant", "bee"), images=100, name="train")
    image_folder(("cow",), images=2, name="train")
    image_folder(("ant",), images=2, name="val")
    folder = image_folder(("bee",), images=1, name="val").parent
    splits = load_splits(DataArguments(train_dir=str(folder / "train"), validation_dir=str(folder / "val")))
    names = [*splits["train"].classes, "wasp"]  # as a dataset may name one that no image shows
    splits = {name: replace(images, classes=names) for name, images in splits.items()}
    concerns = find_concerns(splits, weighted=False)
    assert [text for text in concerns if "no training image shows wasp" in text]
    assert [text for text in concerns if "fewer than 10 training images show cow" in text]
    assert [text for text in concerns if "no validation image shows cow, wasp" in text]
    assert [text for text in concerns if "--class_weights True" in text] and len(concerns) == 4
    assert len(find_concerns(splits, weighted=True)) == 3
