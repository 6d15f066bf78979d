"""Data sources, augmentation and the cache of images, and what they say to bad input."""

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image

from repvgg_hf.training import pictures as data


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


def test_digits_are_complete_and_disjoint():
    from sklearn.datasets import load_digits

    splits = data.load_splits(data.DataArguments())
    assert len(splits["train"]) == 1437 and len(splits["validation"]) == 360
    digits = load_digits()
    pixels = np.asarray(splits["validation"][7]["image"])  # every fifth one
    assert np.array_equal(pixels[..., 0], (digits.images[35] * 255 / 16).round())
    assert splits["validation"][7]["label"] == digits.target[35]


def test_parquet_folder_with_its_own_column_names(parquet_folder):
    args = data.DataArguments(dataset_name=str(parquet_folder), image_column_name="img", image_size=8)
    splits = data.load_splits(args)
    assert len(splits["train"]) == 8 and len(splits["validation"]) == 4
    assert data.label_names(splits["train"], args) == ["cat", "dog"]
    example = data.with_pixel_values(splits["train"], args, data.make_processor(8), train=True)[0]
    assert example["pixel_values"].shape == (3, 8, 8) and example["labels"] == 0


def test_image_folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index, image in enumerate(make_images(5, size=(10, 17))):  # not square
            image.save(tmp_path / name / f"{index}.png")
    args = data.DataArguments(train_dir=str(tmp_path), image_size=8)
    splits = data.load_splits(args)
    assert len(splits["train"]) == 8 and len(splits["validation"]) == 2
    batch = data.with_pixel_values(splits["validation"], args, data.make_processor(8), train=False)[:2]
    assert [tuple(image.shape) for image in batch["pixel_values"]] == [(3, 8, 8)] * 2


def test_evaluation_transform_equals_the_saved_processor():
    image = make_images(1, size=(21, 33))[0]
    processor = data.make_processor(16)
    args = data.DataArguments()
    dataset = Dataset.from_dict({"image": [image], "label": [0]})
    pixel_values = data.with_pixel_values(dataset, args, processor, train=False)[0]["pixel_values"]
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    assert np.abs((pixel_values - expected).numpy()).max() < 1e-2  # both are uint8 images before normalization


@pytest.mark.parametrize("augmentation", ["none", "crop", "crop_flip", "resized_crop_flip"])
@pytest.mark.parametrize("size", [(1, 1), (5, 40), (64, 9)])
def test_tiny_and_oblong_images_give_the_size_asked_for(augmentation, size):
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
def test_bad_input_names_the_option(options, message):
    with pytest.raises(ValueError, match=message):
        data.load_splits(data.DataArguments(**options))


def test_unknown_augmentation():
    with pytest.raises(ValueError, match="--augmentation must be one of none, crop.*'flip'"):
        data.DataArguments(augmentation="flip")


def test_missing_training_split(parquet_folder):
    (parquet_folder / "train-00000-of-00001.parquet").unlink()
    args = data.DataArguments(dataset_name=str(parquet_folder), image_column_name="img")
    with pytest.raises(ValueError, match="no 'train' split, only test"):
        data.load_splits(args)
    assert list(data.load_splits(args, train=False)) == ["validation"]


def test_sizes_are_cut_with_the_seed():
    args = data.DataArguments(max_train_samples=10)
    first, again, other = (data.load_splits(args, seed=seed)["train"]["label"] for seed in (1, 1, 2))
    assert len(first) == 10 and list(first) == list(again) and list(first) != list(other)


def test_splits_are_a_dataset_dict():
    assert isinstance(data.load_digits_dataset(), DatasetDict)


def test_cached_images_are_those_of_the_transform():
    args = data.DataArguments(augmentation="none")
    processor = data.make_processor(8)
    digits = data.load_digits_dataset()["train"].select(range(20))
    cached, transform = data.CachedImages(digits, args, processor), data.BatchTransform(args, processor)
    batch = transform(cached.__getitems__([3, 5, 19]))
    plain = data.with_pixel_values(digits, args, processor, train=False)
    expected = data.collate([plain[index] for index in (3, 5, 19)])
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], atol=1e-5, rtol=1e-5)
    assert torch.equal(batch["labels"], expected["labels"]) and len(cached) == 20


@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_windows_of_the_padded_image(flip):
    torch.manual_seed(0)
    args = data.DataArguments(augmentation="crop_flip" if flip else "crop")
    transform = data.BatchTransform(args, data.make_processor(16))
    images = torch.randint(1, 255, (32, 3, 16, 16), dtype=torch.uint8)
    crops, found, flipped = transform.random_crop(images), set(), 0
    padded = torch.nn.functional.pad(images, [2] * 4)
    for crop, image in zip(crops, padded):
        windows = {(y, x): image[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)}
        straight = [corner for corner, window in windows.items() if torch.equal(window, crop)]
        mirrored = [corner for corner, window in windows.items() if torch.equal(window.flip(2), crop)]
        assert straight or (flip and mirrored)
        found |= set(straight or mirrored)
        flipped += not straight
    assert len(found) > 10 and (8 < flipped < 24) == flip


def test_training_data_falls_back_to_decoding():
    digits = data.load_digits_dataset()["train"]
    processor = data.make_processor(8)
    for options in ({"cache_gigabytes": 0}, {"augmentation": "resized_crop_flip"}):
        dataset, collate = data.training_data(digits, data.DataArguments(**options), processor)
        assert collate is data.collate and len(dataset) == len(digits)


def test_calibration_images_are_chosen_with_the_seed():
    digits = data.load_digits_dataset()["train"].select(range(50))
    args, processor = data.DataArguments(augmentation="crop"), data.make_processor(8)
    first, again, other = (data.calibration_images(digits, 12, args, processor, seed)[:] for seed in (1, 1, 2))
    assert torch.equal(torch.stack(first["pixel_values"]), torch.stack(again["pixel_values"]))  # no augmentation
    assert len(first["labels"]) == 12 and first["labels"] != other["labels"]
    assert len(data.calibration_images(digits, 99, args, processor, 0)) == 50
