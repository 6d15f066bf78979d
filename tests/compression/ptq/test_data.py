"""Calibration data, from whatever gives images."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from repvgg_hf.compression.ptq.data import CalibrationData


@pytest.fixture
def images(generator):
    return torch.randn(10, 3, 16, 16, generator=generator)


class Examples(torch.utils.data.Dataset):
    """A map-style dataset as `datasets` gives them: examples are dictionaries."""

    def __init__(self, images, labels=None):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        example = {"pixel_values": self.images[index]}
        return example if self.labels is None else example | {"labels": int(self.labels[index])}


def test_every_kind_of_data_gives_the_same_batches(images):
    labels = torch.arange(10) % 4
    plain = {
        "tensor": images,
        "examples": Examples(images),
        "loader": DataLoader(Examples(images), batch_size=4),
        "batches": [{"pixel_values": batch} for batch in images.split(4)],
        "generator": (batch for batch in images.split(4)),
    }
    labeled = {
        "labeled examples": Examples(images, labels),
        "labeled loader": DataLoader(Examples(images, labels), batch_size=4),
        "tuples": DataLoader(TensorDataset(images, labels), batch_size=4),
        "single tuples": TensorDataset(images, labels),
    }
    for data in [*plain.values(), *labeled.values()]:
        read = CalibrationData(data, batch_size=4)
        assert len(read) == 10 and list(map(len, read.batches)) == [4, 4, 2]
        assert torch.equal(torch.cat(read.images), images)
        if data in labeled.values():
            assert torch.equal(torch.cat([batch.labels["labels"] for batch in read.batches]), labels)
    assert not any(batch.labels for batch in CalibrationData(Examples(images), batch_size=4).batches)


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "empty: pass a few hundred images"),
        (torch.zeros(0, 3, 8, 8), "empty"),
        (torch.zeros(2, 3, 8), r"batch 0 is torch.float32 \[2, 3, 8\], expected floating"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"batch 0 is torch.uint8 .*pixel_values"),
        (torch.full((2, 3, 8, 8), float("nan")), "batch 0 has NaN or infinite values"),
        ([torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 9)], r"batch 1 has .*\[3, 8, 9\], those before \[3, 8, 8\]"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], "several sizes.*resize all to one"),
        ([{"image": torch.zeros(3, 8, 8)}], "'pixel_values' tensor, got keys image"),
        (["a.png"], "'pixel_values' tensor, got str"),
        (7, "must be a DataLoader, a dataset or batches, got int"),
    ],
)
def test_bad_data(data, message):
    with pytest.raises(ValueError, match=message):
        CalibrationData(data)
