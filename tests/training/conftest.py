"""Fixtures of the tests of training: small pictures, as files and as splits."""

import numpy as np
import pytest
from PIL import Image

from repvgg_hf.training.splits import DataArguments, ImageSplit, load_splits


@pytest.fixture(scope="session")
def make_images():
    """`make_images(count, (height, width))`: random RGB images."""

    def make(count: int, size=(12, 12)) -> list[Image.Image]:
        generator = np.random.default_rng(0)
        return [Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)) for _ in range(count)]

    return make


@pytest.fixture
def image_folder(tmp_path, make_images):
    """`image_folder(classes, images, (height, width))`: a folder with a folder of images for each class."""

    def make(classes=("ant", "bee"), images=5, size=(12, 12), name="pictures"):
        for label in classes:
            (tmp_path / name / label).mkdir(parents=True)
            for index, image in enumerate(make_images(images, size)):
                image.save(tmp_path / name / label / f"{index}.png")
        return tmp_path / name

    return make


@pytest.fixture
def split_of(image_folder):
    """`split_of(count, (height, width))`: a split of random images."""

    def make(count: int, size=(12, 12)) -> ImageSplit:
        folder = image_folder(images=-(-count // 2), size=size)
        split = load_splits(DataArguments(validation_dir=str(folder)), train=False)["validation"]
        return split.select(range(count))

    return make


@pytest.fixture(scope="session")
def digits() -> ImageSplit:
    """The training digits."""
    return load_splits(DataArguments())["train"]
