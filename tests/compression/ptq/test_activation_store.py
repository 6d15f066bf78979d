"""Tensors in memory and on disk."""

from pathlib import Path

import pytest
import torch

from repvgg_hf.compression.ptq.activation_store import ActivationStore

BYTES = 2 * 4 * 6 * 6 * 4  # of a tensor below


@pytest.fixture
def tensors(generator):
    images = torch.randn(6, 4, 6, 6, generator=generator).contiguous(memory_format=torch.channels_last)
    return list(images.split(2))


@pytest.mark.parametrize("fit", [0, 1, 2, 3])
def test_all_come_back_as_they_were(fit, tensors):
    store = ActivationStore(tensors, fit * BYTES)
    assert len(store) == 3 and len(store.in_memory) == fit
    for tensor, other in zip(tensors, store, strict=True):
        assert torch.equal(tensor, other) and tensor.stride() == other.stride()
    assert (store.folder is None) == (fit == 3)


def test_what_is_on_disk_is_no_larger_than_the_tensor(tensors):
    store = ActivationStore(tensors, 0)
    sizes = [path.stat().st_size for path in Path(store.folder.name).iterdir()]
    assert len(sizes) == 3 and max(sizes) < BYTES + 2000


def test_another_tensor_in_the_place_of_one(tensors):
    store = ActivationStore(tensors, 2 * BYTES)
    store[0] = torch.zeros(2 * BYTES)  # too large by itself: to disk
    store[2] = torch.ones(3)  # there is room for it now
    assert sorted(store.in_memory) == [1, 2]
    assert torch.equal(store[0], torch.zeros(2 * BYTES)) and torch.equal(store[2], torch.ones(3))


def test_the_folder_goes_away(tensors):
    store = ActivationStore(tensors, 0)
    folder = Path(store.folder.name)
    assert folder.is_dir()
    del store
    assert not folder.exists()
