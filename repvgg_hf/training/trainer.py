"""`Trainer` for images: no batch of one image, classes that count alike, a moving average, no secrets on disk."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from repvgg_hf.training.batches import leaves_one_image
from repvgg_hf.training.optimizer import MovingAverage
from repvgg_hf.training.report import MASK, is_secret

logger = logging.get_logger(__name__)

AVERAGE = "average.pt"  # in a checkpoint: the moving average of the weights
LOSS = "loss_{}.pt"  # in a checkpoint: the losses of a process since the last line of the log


class AverageUpdates(TrainerCallback):
    """Moves an average towards the model after each step, faster in the first ones, when the weights are far away.

    Args:
        average: the moving average.
    """

    def __init__(self, average: MovingAverage):
        self.average, self.decay = average, average.decay

    def on_step_end(self, args, state, control, model=None, **kwargs):
        # as in timm and TensorFlow; it depends on the step alone, so that an interrupted training goes on with the same
        self.average.decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        self.average.update_parameters(model)


class ImageTrainer(Trainer):
    """A `Trainer` that drops the last batch of an epoch if it is a single image, see [`leaves_one_image`].

    Tokens are masked in the `training_args.bin` that it saves with each checkpoint. With a moving average of the
    weights that one is evaluated, and is the model when the training has ended; checkpoints have both. From a
    checkpoint after which the training ended it takes no further step, and a mean loss is that of all its steps.

    Args:
        class_weights: what an image of each class counts in the loss of training, floating `[classes]`.
        soft_labels: whether the training labels are shares of the classes, floating `[batch, classes]`.
        ema_decay: share of the moving average that each step keeps; 0 for none.
        args, kwargs: those of `Trainer`.
    """

    def __init__(
        self,
        *args,
        class_weights: torch.Tensor | None = None,
        soft_labels: bool = False,
        ema_decay: float = 0.0,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.average = MovingAverage(self.model, ema_decay) if ema_decay else None
        if self.average is not None:
            self.add_callback(AverageUpdates(self.average))
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
        images, batch_size = len(self.train_dataset), self._train_batch_size
        asked = self.args.dataloader_drop_last
        with self._drop_last(asked or leaves_one_image(images, batch_size, self.args.world_size)):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """Return the loader of an evaluation: of all images, also where training drops the last of an epoch."""
        with self._drop_last(False):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        """Return the loader of a prediction: of all images."""
        with self._drop_last(False):
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _drop_last(self, value: bool) -> Iterator[None]:
        """Make a loader drop its last batch or not: Trainer has one option for those of training and evaluation."""
        asked = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = value
        try:
            yield
        finally:
            self.args.dataloader_drop_last = asked

    def train(self, *args, **kwargs):
        """Train, and give the model the average of its weights at the end."""
        output = super().train(*args, **kwargs)
        if self.average is not None:
            self.average.copy_to(self.model)
            self.average = None
        return output

    def _init_training_state(self, *args, **kwargs):
        begun = super()._init_training_state(*args, **kwargs)
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and best.is_dir():
            if self.state.best_model_checkpoint is None:  # of which Trainer has warned
                logger.warning(f"The folder of the run has moved: the best checkpoint is {best}.")
            self.state.best_model_checkpoint = str(best)
        return begun

    def _run_epoch(self, *, epoch, epochs_trained, resume_from_checkpoint, **kwargs):
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # Trainer looks at neither before the first step
            return
        if resume_from_checkpoint is not None and epoch == epochs_trained:
            self._load_loss(Path(resume_from_checkpoint) / LOSS.format(self.args.process_index))
        super()._run_epoch(
            epoch=epoch,
            epochs_trained=epochs_trained,
            resume_from_checkpoint=resume_from_checkpoint,
            **kwargs,
        )

    def evaluation_loop(self, *args, **kwargs):
        """Evaluate the average of the weights."""
        if self.average is None:
            return super().evaluation_loop(*args, **kwargs)
        with self.average.in_place(self.model):
            return super().evaluation_loop(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_average(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_average(self.state.best_model_checkpoint)

    def _load_average(self, checkpoint: str) -> None:
        if self.average is not None:
            self.average.load_state_dict(torch.load(Path(checkpoint) / AVERAGE, map_location="cpu", weights_only=True))

    def _load_loss(self, path: Path) -> None:
        if path.exists():  # older checkpoints have none
            saved = torch.load(path, map_location="cpu", weights_only=True)
            self._tr_loss = saved["loss"].to(self.args.device)
            self._globalstep_last_logged = saved["step"]

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        loss = {"loss": self._tr_loss, "step": self._globalstep_last_logged}
        torch.save(loss, Path(output_dir) / LOSS.format(self.args.process_index))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        arguments, self.args = self.args, copy.copy(self.args)
        try:
            for name, value in vars(self.args).items():
                if is_secret(name) and isinstance(value, str):
                    setattr(self.args, name, MASK)
            super()._save(output_dir, state_dict)
            if self.average is not None and self.args.should_save:
                torch.save(self.average.state_dict(), Path(output_dir or self.args.output_dir) / AVERAGE)
        finally:
            self.args = arguments
