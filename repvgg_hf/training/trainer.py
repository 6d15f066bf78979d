"""`Trainer` for images: its last batch of an epoch is never a single one, and it saves no secrets."""

import copy

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import Trainer

from repvgg_hf.training.batches import leaves_one_image
from repvgg_hf.training.report import MASK, is_secret


class ImageTrainer(Trainer):
    """A `Trainer` that drops the last batch of an epoch if it is a single image, see [`leaves_one_image`].

    Tokens are masked in the `training_args.bin` that it saves with each checkpoint.

    Args:
        class_weights: what an image of each class counts in the loss of training, floating `[classes]`.
        soft_labels: whether the training labels are shares of the classes, floating `[batch, classes]`.
        args, kwargs: those of `Trainer`.
    """

    def __init__(self, *args, class_weights: torch.Tensor | None = None, soft_labels: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.class_weights, self.own_loss = class_weights, soft_labels or class_weights is not None
        if self.own_loss:
            self.loss_is_scaled_for_ga = False  # a mean of the batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss of a batch, in training with the classes' weights and labels that may be shares."""
        if not (self.own_loss and model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        weights = None if self.class_weights is None else self.class_weights.to(outputs.logits)
        loss = F.cross_entropy(outputs.logits, labels, weight=weights, label_smoothing=self.args.label_smoothing_factor)
        return (loss, outputs) if return_outputs else loss

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
