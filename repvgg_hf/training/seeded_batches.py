"""Batches whose random augmentation depends on nothing that was done before."""

import hashlib
from collections.abc import Sequence

import torch
from torch.utils.data import Dataset


class SeededBatches(Dataset):
    """A dataset of whole batches, each of which is made with a random state of its own.

    That depends on the seed and on the batch's indices, which shuffling changes in each epoch. A loader reads ahead,
    so that in the middle of an epoch the random state of the process belongs to a later batch than the one that
    training is at: a checkpoint of that moment would go on with other images.

    Args:
        dataset: has a `__getitems__` that takes a list of indices and returns a batch.
        seed: of the run.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]):
        """Return the batch of these indices."""
        digest = hashlib.sha256(repr((self.seed, [int(index) for index in indices])).encode()).digest()
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(int.from_bytes(digest[:7], "big"))  # of the CPU alone
        try:
            return self.dataset.__getitems__(indices)
        finally:
            torch.set_rng_state(before)
