"""Mixed images: MixUp and CutMix of torchvision, whose labels are shares of the classes."""

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

MIXING = ("none", "mixup", "cutmix", "both")


class MixedBatches(Dataset):
    """A dataset whose batches are mixed: `labels` are floating `[batch, classes]`.

    Args:
        dataset: has a `__getitems__` that takes a list of indices and returns a batch.
        classes: the number of classes.
        kind: `"mixup"` (sums of two images), `"cutmix"` (a rectangle of another one), or `"both"`, one of them at a
            time.
        alpha: of the Beta distribution of the shares; the larger, the more images are mixed half and half.
    """

    def __init__(self, dataset: Dataset, classes: int, kind: str, alpha: float):
        self.dataset = dataset
        mixes = [v2.MixUp(num_classes=classes, alpha=alpha)] if kind in ("mixup", "both") else []
        mixes += [v2.CutMix(num_classes=classes, alpha=alpha)] if kind in ("cutmix", "both") else []
        self.mix = mixes[0] if len(mixes) == 1 else v2.RandomChoice(mixes)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the mixed batch of these indices."""
        batch = self.dataset.__getitems__(indices)
        pixel_values, labels = self.mix(batch["pixel_values"], batch["labels"])
        return {"pixel_values": pixel_values, "labels": labels}
