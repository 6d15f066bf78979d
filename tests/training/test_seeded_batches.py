"""Random batches that are the same whatever was drawn before."""

import torch
from torch.utils.data import DataLoader, Dataset

from repvgg_hf.training.seeded_batches import SeededBatches


class Noise(Dataset):
    def __len__(self):
        return 8

    def __getitems__(self, indices):
        return [torch.rand(3) for _ in indices]


def batches(seed: int, workers: int = 0) -> list[torch.Tensor]:
    loader = DataLoader(SeededBatches(Noise(), seed), 4, collate_fn=torch.stack, num_workers=workers)
    return list(loader)


def test_a_batch_depends_on_seed_and_indices_alone():
    first = batches(0)
    torch.rand(5)
    for workers in (0, 2):
        assert all(map(torch.equal, batches(0, workers), first))
    assert not first[0].equal(first[1]) and not batches(1)[0].equal(first[0])
    images = SeededBatches(Noise(), 0)
    assert len(images) == 8
    assert not torch.stack(images.__getitems__([1, 0, 2, 3])).equal(first[0])


def test_the_process_draws_as_if_nothing_had_been():
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    SeededBatches(Noise(), 0).__getitems__([0])
    assert torch.rand(4).equal(expected)
