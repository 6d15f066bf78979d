"""Data sources of the recipes, and what they say to bad input."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def data():
    spec = importlib.util.spec_from_file_location("recipes_data", RECIPES / "data.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def make_images(count: int, size=(12, 12)):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture
def parquet_folder(tmp_path):
    splits = {
        name: Dataset.from_dict({"img": make_images(count), "label": ["cat", "dog"] * (count // 2)})
        for name, count in (("train", 8), ("test", 4))
    }
    folder = tmp_path / "parquet"
    folder.mkdir()
    for name, split in splits.items():
        split.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return folder


def test_digits_are_complete_and_disjoint(data):
    from sklearn.datasets import load_digits

    splits = data.load_splits(data.DataArguments())
    assert len(splits["train"]) == 1437 and len(splits["validation"]) == 360
    digits = load_digits()
    pixels = np.asarray(splits["validation"][7]["image"])  # every fifth one
    assert np.array_equal(pixels[..., 0], (digits.images[35] * 255 / 16).round())
    assert splits["validation"][7]["label"] == digits.target[35]


def test_parquet_folder_with_its_own_column_names(data, parquet_folder):
    args = data.DataArguments(dataset_name=str(parquet_folder), image_column_name="img", image_size=8)
    splits = data.load_splits(args)
    assert len(splits["train"]) == 8 and len(splits["validation"]) == 4
    assert data.label_names(splits["train"], args) == ["cat", "dog"]
    example = data.with_pixel_values(splits["train"], args, data.make_processor(8), train=True)[0]
    assert example["pixel_values"].shape == (3, 8, 8) and example["labels"] == 0


def test_image_folder(data, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index, image in enumerate(make_images(5, size=(10, 17))):  # not square
            image.save(tmp_path / name / f"{index}.png")
    args = data.DataArguments(train_dir=str(tmp_path), image_size=8)
    splits = data.load_splits(args)
    assert len(splits["train"]) == 8 and len(splits["validation"]) == 2
    batch = data.with_pixel_values(splits["validation"], args, data.make_processor(8), train=False)[:2]
    assert [tuple(image.shape) for image in batch["pixel_values"]] == [(3, 8, 8)] * 2


def test_evaluation_transform_equals_the_saved_processor(data):
    image = make_images(1, size=(21, 33))[0]
    processor = data.make_processor(16)
    args = data.DataArguments()
    dataset = Dataset.from_dict({"image": [image], "label": [0]})
    pixel_values = data.with_pixel_values(dataset, args, processor, train=False)[0]["pixel_values"]
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    assert np.abs((pixel_values - expected).numpy()).max() < 1e-2  # both are uint8 images before normalization


@pytest.mark.parametrize("augmentation", ["none", "crop", "crop_flip", "resized_crop_flip"])
@pytest.mark.parametrize("size", [(1, 1), (5, 40), (64, 9)])
def test_tiny_and_oblong_images_give_the_size_asked_for(data, augmentation, size):
    args = data.DataArguments(augmentation=augmentation)
    dataset = Dataset.from_dict({"image": make_images(2, size), "label": [0, 1]})
    examples = data.with_pixel_values(dataset, args, data.make_processor(8), train=True)[:2]
    batch = data.collate([dict(zip(examples, values)) for values in zip(*examples.values())])
    assert batch["pixel_values"].shape == (2, 3, 8, 8) and batch["labels"].tolist() == [0, 1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_column_name": "picture"}, "--image_column_name is 'picture'.*image, label"),
        ({"label_column_name": "class"}, "--label_column_name is 'class'.*image, label"),
        ({"max_train_samples": 0}, "train split is empty.*--max_train_samples"),
        ({"max_eval_samples": 0}, "validation split is empty.*--max_eval_samples"),
    ],
)
def test_bad_input_names_the_option(data, options, message):
    with pytest.raises(ValueError, match=message):
        data.load_splits(data.DataArguments(**options))


def test_unknown_augmentation(data):
    with pytest.raises(ValueError, match="--augmentation must be one of none, crop.*'flip'"):
        data.DataArguments(augmentation="flip")


def test_missing_training_split(data, parquet_folder):
    (parquet_folder / "train-00000-of-00001.parquet").unlink()
    args = data.DataArguments(dataset_name=str(parquet_folder), image_column_name="img")
    with pytest.raises(ValueError, match="no 'train' split, only test"):
        data.load_splits(args)
    assert list(data.load_splits(args, train=False)) == ["validation"]


def test_sizes_are_cut_with_the_seed(data):
    args = data.DataArguments(max_train_samples=10)
    first, again, other = (data.load_splits(args, seed=seed)["train"]["label"] for seed in (1, 1, 2))
    assert len(first) == 10 and list(first) == list(again) and list(first) != list(other)


def test_splits_are_a_dataset_dict(data):
    assert isinstance(data.load_digits_dataset(), DatasetDict)
