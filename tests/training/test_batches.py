"""Batches of pixels: read or cached, augmented in the geometry of evaluation."""

import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import adjust_brightness
from transformers import BitImageProcessor

from repvgg_hf.training import batches
from repvgg_hf.training.batches import (
    Augmentation,
    CachedImages,
    DecodedImages,
    batches_per_epoch,
    calibration_images,
    collate,
    evaluation_data,
    leaves_one_image,
    training_data,
)
from repvgg_hf.training.pixels import pixels_of
from repvgg_hf.training.processors import make_processor
from repvgg_hf.training.splits import DataArguments, load_splits


@pytest.mark.parametrize("cache", [0, 1])
@pytest.mark.parametrize("augmentation", ["none", "crop", "crop_flip", "resized_crop_flip", "photo"])
@pytest.mark.parametrize("size", [(1, 1), (5, 40), (64, 9)])
def test_tiny_and_oblong_images_give_the_size_asked_for(split_of, augmentation, size, cache):
    args = DataArguments(augmentation=augmentation, cache_gigabytes=cache)
    data = training_data(split_of(3, size), args, make_processor(8, 0.8))
    (batch,) = DataLoader(data, 3, collate_fn=collate)
    assert batch["pixel_values"].shape == (3, 3, 8, 8) and batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].tolist() == [0, 0, 1]


@pytest.mark.parametrize("kind", [DecodedImages, CachedImages])
def test_evaluation_gives_the_processors_pixels(split_of, kind):
    split, processor = split_of(7, (21, 33)), make_processor(16, 0.875)
    data = kind(split, pixels_of(processor))
    batch = data.__getitems__([4, 0, 6])
    from repvgg_hf.training.images import open_image

    images = [open_image(split.rows[index][split.column], "RGB", "") for index in (4, 0, 6)]
    expected = processor(images, return_tensors="pt")["pixel_values"]
    assert (batch["pixel_values"] - expected).abs().max() <= 1e-5
    assert batch["labels"].tolist() == split.labels[[4, 0, 6]].tolist()
    assert torch.equal(data[4]["pixel_values"], batch["pixel_values"][0]) and data[-1]["labels"] == batch["labels"][2]
    assert len(list(data)) == 7
    with pytest.raises(IndexError, match="There is no image 7"):
        data[7]


@pytest.mark.parametrize("augmentation", ["none", "crop", "crop_flip"])
def test_cached_and_read_images_are_augmented_alike(split_of, augmentation):
    split, pixels = split_of(9, (20, 31)), pixels_of(make_processor(16, 0.8))
    batches = []
    for kind in (DecodedImages, CachedImages):
        data = kind(split, pixels, augmentation)
        torch.manual_seed(0)
        batches.append(data.__getitems__([0, 3, 8]))
    assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])


@pytest.mark.parametrize("ratio", [1.0, 0.8])
@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_windows_of_the_resized_image(flip, ratio):
    """With black around it where it ends."""
    torch.manual_seed(0)
    side = round(16 / ratio)
    augmentation = Augmentation("crop_flip" if flip else "crop", pixels_of(make_processor(16, ratio)))
    assert augmentation.stored == (side, side)
    images = torch.randint(1, 255, (32, 3, side, side), dtype=torch.uint8)
    crops, found, flipped = augmentation(images), set(), 0
    padded = torch.nn.functional.pad(images, [(20 - side) // 2] * 4)
    for crop, image in zip(crops, padded):
        windows = {(y, x): image[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)}
        straight = [corner for corner, window in windows.items() if torch.equal(window, crop)]
        mirrored = [corner for corner, window in windows.items() if torch.equal(window.flip(2), crop)]
        assert straight or (flip and mirrored)
        found |= set(straight or mirrored)
        flipped += not straight
    assert len(found) > 10 and (8 < flipped < 24) == flip


def test_an_oblong_crop_moves_in_both_directions():
    processor = BitImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 8})
    augmentation = Augmentation("crop", pixels_of(processor))
    height, width = augmentation.stored
    images = torch.arange(height * width).reshape(1, 1, height, width).repeat(64, 3, 1, 1).to(torch.uint8)
    crops = augmentation(images)
    assert crops.shape == (64, 3, 16, 8) and len(crops[:, 0, 8, 4].unique()) > 10


def test_random_parts_are_resized_as_the_processor_does(split_of):
    """With nearest neighbors no new values arise, with bilinear interpolation they do."""
    split = split_of(4, (40, 40))
    values = []
    for resample in (0, 2):
        processor = BitImageProcessor(
            size={"shortest_edge": 9}, crop_size={"height": 9, "width": 9}, resample=resample,
            do_rescale=False, do_normalize=False,
        )  # fmt: skip
        data = training_data(split, DataArguments(augmentation="resized_crop_flip"), processor)
        batch = data.__getitems__([0])["pixel_values"][0]
        image = data.pixels.source(_image(split)).float()
        there = {tuple(pixel) for pixel in image.flatten(1).T.tolist()}
        values.append(np.mean([tuple(pixel) in there for pixel in batch.flatten(1).T.tolist()]))
    assert values[0] == 1 and values[1] < 0.5


def _image(split):
    from repvgg_hf.training.images import open_image

    return open_image(split.rows[0][split.column], "RGB", "")


def test_photo_without_its_changes_is_the_image(monkeypatch):
    images = torch.randint(0, 256, (5, 3, 12, 9), dtype=torch.uint8)
    still = {"_TURN": 0.0, "_ZOOM": (1.0, 1.0), "_BEYOND": 0.0, "_ASPECT": 0.0, "_COLOR": (1.0, 1.0)}
    for name, value in still.items():
        monkeypatch.setattr(batches, name, value)
    torch.manual_seed(1)
    views = batches.recolored(batches.random_view(images))
    mirrored = [not torch.allclose(view, image.float(), atol=1e-2) for view, image in zip(views, images)]
    assert 0 < sum(mirrored) < 5
    expected = torch.stack([image.flip(2) if turned else image for image, turned in zip(images, mirrored)])
    torch.testing.assert_close(views, expected.float(), atol=1e-2, rtol=0)


def test_photo_gives_each_image_another_view():
    images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).expand(4, -1, -1, -1)
    views = Augmentation("photo", pixels_of(make_processor(16)))(images)
    assert views.dtype == torch.float32 and views.min() >= 0 and views.max() <= 255
    assert all((views[0] - view).abs().mean() > 5 for view in views[1:])


def test_brightness_is_torchvisions(monkeypatch):
    images = 255 * torch.rand(3, 3, 6, 6)
    factors = iter([torch.tensor([0.8] * 3), torch.ones(3), torch.ones(3)])
    monkeypatch.setattr(batches, "_uniform", lambda count, low, high: next(factors))
    expected = 255 * adjust_brightness(images / 255, 0.8)
    torch.testing.assert_close(batches.recolored(images), expected, rtol=1e-5, atol=1e-2)


def test_gray_images_of_one_channel(split_of):
    data = training_data(split_of(4), DataArguments(), make_processor(8, channels=1))
    assert data.__getitems__([0, 1])["pixel_values"].shape == (2, 1, 8, 8)


def test_what_does_not_fit_is_read_for_each_batch(digits):
    processor = make_processor(8)
    for options in ({"cache_gigabytes": 0}, {"augmentation": "resized_crop_flip"}, {"cache_gigabytes": 2e-4}):
        data = training_data(digits, DataArguments(**options), processor)
        assert type(data) is DecodedImages and len(data) == len(digits)
    fits = DataArguments(cache_gigabytes=3e-4)  # 1437 * 3 * 8 * 8 bytes
    assert type(training_data(digits, fits, processor)) is CachedImages
    assert type(evaluation_data(digits, fits, processor)) is DecodedImages
    assert type(evaluation_data(digits, fits, processor, cache=True)) is CachedImages


def test_a_damaged_file_is_named_before_training(image_folder):
    folder = image_folder()
    path = folder / "bee" / "3.png"
    path.write_bytes(path.read_bytes()[:100])
    split = load_splits(DataArguments(validation_dir=str(folder)), train=False)["validation"]
    with pytest.raises(
        ValueError, match=f"Image 8 of the validation split, column 'image', file {path}, can't be read"
    ):
        evaluation_data(split, DataArguments(), make_processor(8), cache=True)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stored", ["files", "bytes"])
def test_a_damaged_image_beyond_the_cache_is_named_as_the_dataset_has_it(image_folder, tmp_path, stored, workers):
    """Also among images that were held out, chosen and shuffled, of which nobody knows the order."""
    damaged = 8  # of the dataset's ten
    folder = image_folder()
    paths = sorted(folder.rglob("*.png"))
    paths[damaged].write_bytes(paths[damaged].read_bytes()[:100])
    if stored == "files":
        args, named = DataArguments(train_dir=str(folder)), f", file {paths[damaged]},"
    else:
        (tmp_path / "table").mkdir()
        columns = {"image": [{"bytes": path.read_bytes(), "path": None} for path in paths],
                   "label": [path.parent.name for path in paths]}  # fmt: skip
        Dataset.from_dict(columns).to_parquet(tmp_path / "table" / "train.parquet")
        args, named = DataArguments(dataset_name=str(tmp_path / "table")), ""
    args.train_val_split, args.augmentation = 0.3, "resized_crop_flip"
    seeds = range(20)
    held = {seed: load_splits(args, seed)["validation"] for seed in seeds}
    held_out, kept = (next(s for s in seeds if (damaged in held[s].numbers) == inside) for inside in (True, False))
    for split in (held[held_out], load_splits(args, kept)["train"]):
        data = training_data(split.sample(9, seed=1), args, make_processor(8))
        assert type(data) is DecodedImages
        message = (
            rf"Image {damaged} of the train split, column 'image'{re.escape(named)} can't be read .*replace it by an"
        )
        with pytest.raises(ValueError, match=message):
            list(DataLoader(data, 2, num_workers=workers, collate_fn=collate))


def test_calibration_images_are_chosen_with_the_seed(digits):
    args, processor = DataArguments(augmentation="crop"), make_processor(8)
    few = digits.select(range(50))
    chosen = [calibration_images(few, 12, args, processor, seed) for seed in (1, 1, 2)]
    first, again, other = (data.__getitems__(range(12)) for data in chosen)
    assert torch.equal(first["pixel_values"], again["pixel_values"])  # no augmentation
    assert first["labels"].tolist() != other["labels"].tolist()
    assert len(calibration_images(few, 99, args, processor, 0)) == 50


@pytest.mark.parametrize("images", [1, 2, 63, 64, 65, 128, 129])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_no_epoch_ends_with_a_single_image(images, batch_size):
    drop = leaves_one_image(images, batch_size)
    sizes = [len(batch) for batch in DataLoader(range(images), batch_size, drop_last=drop)]
    assert len(sizes) == batches_per_epoch(images, batch_size)
    assert batch_size == 1 or images == 1 or (min(sizes) > 1 and sum(sizes) >= images - 1)


def test_examples_make_a_batch():
    batch = collate([{"pixel_values": torch.ones(3, 2, 2), "labels": 4}] * 2)
    assert batch["pixel_values"].shape == (2, 3, 2, 2) and batch["labels"].tolist() == [4, 4]
