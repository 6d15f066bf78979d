"""The options of a float training with `Trainer`."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from repvgg_hf.training.checkpoints import resume_field
from repvgg_hf.training.mixing import MIXING

METRICS = ("top1", "top5", "loss")  # of an evaluation


@dataclass
class TrainArguments(TrainingArguments):
    """`TrainingArguments` with defaults for the digits; those for other pictures are chosen by what they are."""

    # options that `--help-all` shows, and `--help` does not
    RARE = (
        "remove_unused_columns", "optim", "momentum", "mixing_alpha", "disable_tqdm", "lr_scheduler_type",
        "logging_nan_inf_filter",
    )  # fmt: skip

    output_dir: str = field(default="outputs/train", metadata={"help": "Folder for models, checkpoints and figures."})
    num_train_epochs: float = field(
        default=20, metadata={"help": "Epochs of training; of pictures by default as many as make 1,200 steps."}
    )
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Images per batch in training, on each device; 32 of few pictures by default."}
    )
    per_device_eval_batch_size: int = field(
        default=256, metadata={"help": "Images per batch in evaluation, on each device."}
    )
    learning_rate: float = field(
        default=0.1,
        metadata={"help": "Peak learning rate; by default less for smaller batches, or a trained model."},
    )
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay of kernels; nothing else decays."})
    label_smoothing_factor: float = field(
        default=0.0, metadata={"help": "Share of each label that goes to all classes alike."}
    )
    class_weights: bool = field(
        default=False, metadata={"help": "Weight the images of each class so that all classes count the same."}
    )
    mixing: str = field(default="none", metadata={"help": f"Mix training images: {', '.join(MIXING)}."})
    mixing_alpha: float = field(
        default=0.2, metadata={"help": "The Beta distribution's parameter of --mixing; more mixes more."}
    )
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "End with the moving average of the weights, which decays so much per step, "
            "less in the first ones; 0 for none."
        },
    )
    max_grad_norm: float = field(default=5.0, metadata={"help": "Larger gradients are scaled down to this norm."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Steps in which the learning rate rises to its peak; below 1 a share of all."}
    )
    optim: str = field(
        default="sgd", metadata={"help": "The optimizer: sgd (ours, with momentum) or one of Trainer's."}
    )
    momentum: float = field(default=0.9, metadata={"help": "Momentum of SGD, in Nesterov's form; 0 for none."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls after its peak."})
    eval_strategy: str = field(
        default="epoch",
        metadata={"help": "When to evaluate: no, steps or epoch; of many short epochs after several, by default."},
    )
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to save a checkpoint: no, steps or epoch; by default as evaluation."}
    )
    save_total_limit: int = field(default=2, metadata={"help": "How many checkpoints to keep, the last ones."})
    load_best_model_at_end: bool = field(
        default=False, metadata={"help": "Keep the model of the best evaluation instead of the last one."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after so many evaluations that were not the best, and keep the best; never by default."
        },
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Drop columns that the model does not take, which images are made of."},
    )
    disable_tqdm: bool = field(default=True, metadata={"help": "Show no progress bars."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Leave losses that are not finite out of the log, for which each step waits for the device."},
    )
    report_to: str = field(default="none", metadata={"help": "Where to log: tensorboard, wandb or another, or none."})
    seed: int = field(
        default=0,
        metadata={"help": "Seed of all that is random: new weights, the choice of images, order, augmentation."},
    )
    report: bool = field(
        default=True, metadata={"help": "Write report.html and report.png: curves, confusions, the worst pictures."}
    )
    resume_from_checkpoint: str | None = resume_field()

    def __post_init__(self):
        if self.mixing not in MIXING:
            raise ValueError(f"--mixing must be one of {', '.join(MIXING)}, got {self.mixing!r}.")
        if not self.mixing_alpha > 0:
            raise ValueError(f"--mixing_alpha must be positive, got {self.mixing_alpha}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay must be at least 0 and below 1, such as 0.99, got {self.ema_decay}.")
        if self.early_stopping_patience is not None:
            self.load_best_model_at_end = True
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "top1"
        metric = self.metric_for_best_model
        if metric is not None and metric.removeprefix("eval_") not in METRICS:
            raise ValueError(f"--metric_for_best_model must be one of {', '.join(METRICS)}, got {metric!r}.")
        super().__post_init__()
