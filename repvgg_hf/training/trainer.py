"""`Trainer` for images: its last batch of an epoch is never a single one."""

from torch.utils.data import DataLoader
from transformers import Trainer

from repvgg_hf.training.batches import leaves_one_image


class ImageTrainer(Trainer):
    """A `Trainer` that drops the last batch of an epoch if it is a single image, see [`leaves_one_image`]."""

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of training batches, on whose length the number of steps depends."""
        asked = self.args.dataloader_drop_last  # evaluation follows it too, and must see every image
        images, batch_size = len(self.train_dataset), self._train_batch_size
        self.args.dataloader_drop_last = asked or leaves_one_image(images, batch_size, self.args.world_size)
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = asked
