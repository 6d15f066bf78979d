"""`Trainer` for images: its last batch of an epoch is never a single one, and it saves no secrets."""

import copy

from torch.utils.data import DataLoader
from transformers import Trainer

from repvgg_hf.training.batches import leaves_one_image
from repvgg_hf.training.report import MASK, is_secret


class ImageTrainer(Trainer):
    """A `Trainer` that drops the last batch of an epoch if it is a single image, see [`leaves_one_image`].

    Tokens are masked in the `training_args.bin` that it saves with each checkpoint.
    """

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of training batches, on whose length the number of steps depends."""
        asked = self.args.dataloader_drop_last  # evaluation follows it too, and must see every image
        images, batch_size = len(self.train_dataset), self._train_batch_size
        self.args.dataloader_drop_last = asked or leaves_one_image(images, batch_size, self.args.world_size)
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = asked

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        arguments, self.args = self.args, copy.copy(self.args)
        try:
            for name, value in vars(self.args).items():
                if is_secret(name) and isinstance(value, str):
                    setattr(self.args, name, MASK)
            super()._save(output_dir, state_dict)
        finally:
            self.args = arguments
