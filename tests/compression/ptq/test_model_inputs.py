"""Calibration batches of models that take more, or something else, than one batch of images."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchFeature, ResNetConfig, ResNetForImageClassification

from repvgg_hf.compression.ptq.data import CalibrationData


class Two(nn.Module):
    def forward(self, image, mask, scale=None, labels=None):
        return image * mask


class Detector(nn.Module):
    main_input_name = "pixel_values"

    def forward(self, pixel_values, pixel_mask=None, labels=None, **kwargs):
        return pixel_values


@pytest.fixture
def image(generator):
    return torch.randn(10, 3, 8, 8, generator=generator)


@pytest.fixture
def mask():
    return torch.arange(10 * 64).view(10, 1, 8, 8) % 2


def together(data, *names):
    """What all batches have of the inputs `names`."""
    return [torch.cat([batch.tensors()[name] for batch in data.batches]) for name in names]


def test_every_form_of_two_inputs(image, mask):
    labels = torch.arange(10)
    loader = DataLoader(TensorDataset(image, mask, labels), batch_size=4)
    named = [{"mask": b, "image": a, "label": c, "index": 7} for a, b, c in loader]
    positional = {
        "loader": loader,
        "examples": TensorDataset(image, mask, labels),
        "nested": [((a, b), c) for a, b, c in loader],
    }
    by_name = {
        "mappings": named,
        "whole": {"image": image, "mask": mask, "labels": labels},
        "features": BatchFeature({"image": image, "mask": mask, "label_ids": labels}),
        "labels beside": [({"image": a, "mask": b}, c) for a, b, c in loader],
        "generator": (entry for entry in named),
    }
    for forms, names in ((positional, ("input 0", "input 1")), (by_name, ("image", "mask"))):
        for form, data in forms.items():
            read = CalibrationData(data, 4, model=Two())
            assert list(map(len, read.batches)) == [4, 4, 2], form
            for found, wanted in zip(together(read, *names), (image, mask)):
                assert torch.equal(found, wanted) and found.dtype == wanted.dtype, form
            assert torch.equal(torch.cat([batch.labels["labels"] for batch in read.batches]), labels), form
            assert torch.equal(torch.cat([batch.run(Two()) for batch in read.batches]), image * mask), form


def test_pairs_are_an_input_and_labels_where_the_model_takes_one(image):
    model = nn.Sequential(nn.Conv2d(3, 2, 3))
    named = [{"pixel_values": image, "labels": torch.arange(10)}]  # its only input has any name
    for data in (TensorDataset(image, torch.arange(10)), DataLoader(TensorDataset(image, torch.arange(10))), named):
        batch = CalibrationData(data, 4, model=model).batches[0]
        assert len(batch.args) == 1 and list(batch.labels) == ["labels"]


def test_of_a_mapping_those_that_the_model_takes(image):
    batch = {
        "pixel_values": image.half(),
        "pixel_mask": torch.ones(10, 8, 8, dtype=torch.long),
        "labels": [{"boxes": torch.rand(2, 4)} for _ in range(10)],
        "image_id": torch.arange(10),
        "target_sizes": None,
    }
    (read,) = CalibrationData([batch], model=Detector()).batches
    assert list(read.kwargs) == ["pixel_values", "pixel_mask"] and list(read.labels) == ["labels"]
    assert read.kwargs["pixel_values"].dtype == torch.float32
    assert read.kwargs["pixel_mask"].dtype == torch.int64
    part = read.take(slice(3, 5))
    assert len(part) == 2 and torch.equal(part.kwargs["pixel_values"], image.half().float()[3:5])
    assert torch.equal(part.labels["labels"][0]["boxes"], batch["labels"][3]["boxes"])


def test_batches_of_several_sizes_and_settings(image):
    batches = [
        {"pixel_values": image},
        {"pixel_values": image[:, :, :5], "pixel_mask": image[:, 0], "labels": [1] * 10},
    ]
    read = CalibrationData(batches, model=Detector())
    assert [list(images.shape[2:]) for images in read.images] == [[8, 8], [5, 8]]

    class AnyArguments(nn.Module):
        def forward(self, **inputs):
            return inputs["x"]

    (batch,) = CalibrationData([{"x": image, "interpolate": True}], model=AnyArguments()).batches
    assert batch.kwargs["interpolate"] is True and torch.equal(batch.run(AnyArguments()), image)


def test_images_are_told_from_batches_by_their_dimensions(image):
    model = ResNetForImageClassification(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1]))
    for data in (image, list(image), [{"pixel_values": one} for one in image], TensorDataset(image)):
        assert list(map(len, CalibrationData(data, 4, model=model).batches)) == [4, 4, 2]
    assert list(map(len, CalibrationData([image, image], 4, model=model).batches)) == [10, 10]


def test_sequences(generator):
    tokens = torch.randint(9, (6, 5), generator=generator)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
    for data in (tokens, [tokens[:2], tokens[2:4], tokens[4:]], TensorDataset(tokens)):
        read = CalibrationData(data, 2, model=model)
        assert list(map(len, read.batches)) == [2, 2, 2] and read.images[0].dtype == torch.int64
    assert [list(batch.main().shape) for batch in CalibrationData(tokens, 4, model=model).first(5)] == [[4, 5], [1, 5]]


@pytest.mark.parametrize(
    "data, model, message",
    [
        (
            [torch.ones(2, 3)],
            Two(),
            r"has input 0 torch.float32 \[2, 3\], and Two.forward also needs mask: give a tuple",
        ),
        ([{"mask": torch.ones(2)}], Two(), "has mask torch.float32 .*, and Two.forward also needs image"),
        ([{"pixels": torch.ones(2)}], Two(), r"what Two.forward takes \(image, mask, scale, labels\), got keys pixels"),
        ([{"image": [1.0], "mask": torch.ones(2)}], Two(), "Input 'image' of the calibration data is a list, .*'pt'"),
        ([(torch.ones(2), "a")], Two(), "Input 1 of the calibration data is a str"),
        (["a"], Two(), "what Two.forward takes .*, got str"),
        (
            [torch.ones(2, 3, 4, 4, dtype=torch.uint8)],
            Detector(),
            "batch 0 is torch.uint8 .*pixels that are not normal",
        ),
        ([(torch.ones(2), torch.tensor([1, float("inf")]))], Two(), r"batch 0 has NaN or infinite values \(input 1\)"),
        (
            [{"pixel_values": torch.ones(3, 4, 4)}, {"pixel_values": torch.ones(3, 4, 5)}],
            Detector(),
            "images have several sizes",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_named(data, model, message):
    with pytest.raises(ValueError, match=message):
        CalibrationData(data, model=model)


def test_examples_of_several_lengths():
    class Examples(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return torch.arange(3 + index)

    with pytest.raises(ValueError, match=r"have 'input 0' of several sizes, \[\(3,\), \(4,\)\]: pad all to one"):
        CalibrationData(Examples(), model=nn.Sequential(nn.Embedding(9, 4)))
