"""Storing the activations of many images, which need not all fit into memory."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch


class ActivationStore:
    """A list of tensors that keeps up to `limit` bytes of them in memory, and the others in a temporary folder.

    The folder is made when it is needed and goes away with the store. A tensor comes back as it was: same device, same
    layout in memory.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], limit: float):
        self.limit, self.size = limit, len(tensors)
        self.in_memory: dict[int, torch.Tensor] = {}
        self.devices: dict[int, torch.device] = {}  # of the others
        self.folder: tempfile.TemporaryDirectory | None = None
        for index, tensor in enumerate(tensors):
            self[index] = tensor

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(self.size))

    def __getitem__(self, index: int) -> torch.Tensor:
        if index in self.in_memory:
            return self.in_memory[index]
        return torch.load(self._path(index), map_location=self.devices[index], weights_only=True)

    def __setitem__(self, index: int, tensor: torch.Tensor) -> None:
        self.in_memory.pop(index, None)
        if tensor.nbytes + sum(other.nbytes for other in self.in_memory.values()) <= self.limit:
            self.in_memory[index] = tensor
            return
        if self.folder is None:
            self.folder = tempfile.TemporaryDirectory(prefix="repvgg_hf_")
        torch.save(tensor.clone(), self._path(index))  # of a view, not all that it is a view of
        self.devices[index] = tensor.device

    def _path(self, index: int) -> Path:
        return Path(self.folder.name) / f"{index}.pt"
