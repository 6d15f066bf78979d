"""Train a float RepVGG with outlier-aware batch normalization.

    python recipes/train.py photos/                              # one folder of pictures per class, or train/ and val/
    python recipes/train.py --output_dir outputs/digits          # scikit-learn's digits
    python recipes/train.py --dataset_name cifar10 --image_column_name img --image_size 32 ...
    python recipes/train.py my_arguments.json

What is not given is chosen for the pictures: their size, the batches, epochs and learning rate (for the digits it is
fixed). With `--resume_from_checkpoint` it goes on from the last checkpoint that is whole, to the same weights; it
refuses to if data, model or options are not the same. The last model and its metrics are in `--output_dir`, which must
not hold another run.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import EarlyStoppingCallback, PrinterCallback, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging

from repvgg_hf.training.arguments import parse_given
from repvgg_hf.training.batches import collate, evaluation_data, training_data
from repvgg_hf.training.checkpoints import check_finite, resume_field, resume_place
from repvgg_hf.training.data_defaults import steps_per_epoch, suggest_image_size, suggest_plan, suggest_strides
from repvgg_hf.training.data_report import describe_data, find_concerns
from repvgg_hf.training.metrics import trainer_accuracies, wilson_interval
from repvgg_hf.training.mixing import MIXING, MixedBatches
from repvgg_hf.training.models import (
    OF_A_NEW_MODEL,
    ModelArguments,
    build_model,
    build_processor,
    changes_to_checkpoint,
    check_source,
)
from repvgg_hf.training.optimizer import build_sgd
from repvgg_hf.training.progress import ProgressLines, closing_sentence, next_command
from repvgg_hf.training.report import write_json
from repvgg_hf.training.run_record import run_record
from repvgg_hf.training.seeded_batches import SeededBatches
from repvgg_hf.training.splits import DataArguments, ImageSplit, align_splits, load_splits
from repvgg_hf.training.trainer import ImageTrainer
from repvgg_hf.training.trainer_checkpoints import (
    RESULTS,
    RunCallback,
    check_folder,
    find_checkpoint,
    training_options,
)

FOLDER = ("folder", "Pictures: one folder per class, or such folders in train/ and val/.", "dataset_name")
# options that say which images are evaluated, which the next command needs too
_DATA = (
    "dataset_name", "dataset_config_name", "train_dir", "validation_dir", "validation_split_name", "train_val_split",
    "image_column_name", "label_column_name", "seed",
)  # fmt: skip


@dataclass
class TrainArguments(TrainingArguments):
    """`TrainingArguments` with defaults for the digits; those for other pictures are chosen by what they are."""

    # options that `--help-all` shows, and `--help` does not
    RARE = ("remove_unused_columns", "optim", "momentum", "mixing_alpha", "disable_tqdm", "lr_scheduler_type")

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
        default=0.1, metadata={"help": "Peak learning rate; for smaller batches, or a checkpoint, less by default."}
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
    report_to: str = field(default="none", metadata={"help": "Where to log: tensorboard, wandb or another, or none."})
    seed: int = field(
        default=0,
        metadata={"help": "Seed of all that is random: new weights, the choice of images, order, augmentation."},
    )
    resume_from_checkpoint: str | None = resume_field()

    def __post_init__(self):
        if self.mixing not in MIXING:
            raise ValueError(f"--mixing must be one of {', '.join(MIXING)}, got {self.mixing!r}.")
        if self.early_stopping_patience is not None:
            self.load_best_model_at_end = True
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "top1"
        super().__post_init__()


def check_options(model_args: ModelArguments, data_args: DataArguments, given: set[str]) -> None:
    """Raise `ValueError` for a source that can't be, and for options that would do nothing beside another one."""
    if FOLDER[0] in given and not Path(data_args.dataset_name).is_dir():
        raise ValueError(
            f"There is no folder {data_args.dataset_name}: give a folder with one folder of pictures per class, or a "
            "dataset on the Hub with --dataset_name."
        )
    check_source(model_args.model_name_or_path, model_args.dequantize)
    sizes = [name for name in OF_A_NEW_MODEL if name in given and name not in ("variant", "num_channels")]
    if "variant" in given and sizes:
        raise ValueError(f"--variant {model_args.variant} sets all sizes, --{sizes[0]} too: leave one of them out.")
    if "validation_dir" in given and "train_val_split" in given:
        raise ValueError("--train_val_split holds out training images, and --validation_dir has others: give one.")


def choose_for_images(model_args, data_args, train_args, split, given: set[str]) -> None:
    """Set the options that were not `given` to what suits the training images, unless these are the digits."""
    if data_args.dataset_name == "digits":
        return
    new = model_args.model_name_or_path is None
    if new and data_args.image_size is None:
        data_args.image_size = suggest_image_size(split)
    if "augmentation" not in given:
        data_args.augmentation = "photo"
    if new and not given & {"variant", "stem_stride", "strides"}:
        model_args.stem_stride, model_args.strides = suggest_strides(data_args.image_size, len(model_args.hidden_sizes))
    plan = suggest_plan(
        len(split),
        not new,
        train_args.per_device_train_batch_size if "per_device_train_batch_size" in given else None,
        train_args.num_train_epochs if "num_train_epochs" in given else None,
        train_args.world_size,
        train_args.gradient_accumulation_steps,
    )
    train_args.per_device_train_batch_size, train_args.num_train_epochs = plan.batch_size, plan.epochs
    if "learning_rate" not in given:
        train_args.learning_rate = plan.learning_rate
    if plan.evaluate_every > 1 and not given & {"eval_strategy", "save_strategy", "eval_steps", "save_steps"}:
        train_args.eval_strategy, train_args.save_strategy = IntervalStrategy.STEPS, SaveStrategy.STEPS
        train_args.eval_steps = train_args.save_steps = plan.evaluate_every * steps_of_epoch(len(split), train_args)


def steps_of_epoch(images: int, args: TrainingArguments) -> int:
    """Return the optimizer steps of an epoch of so many training images."""
    return steps_per_epoch(images, args.per_device_train_batch_size, args.world_size, args.gradient_accumulation_steps)


def adapt_to_machine(args: TrainArguments, given: set[str]) -> None:
    """Set what changes no weights: when to log, and what the machine has no use for."""
    if not given & {"logging_strategy", "logging_steps"}:  # a loss for each line
        args.logging_strategy, args.logging_steps = IntervalStrategy(args.eval_strategy), args.eval_steps or 500
        if args.logging_strategy == IntervalStrategy.NO:
            args.logging_strategy = IntervalStrategy.EPOCH
    if "dataloader_pin_memory" not in given:
        args.dataloader_pin_memory = args.device.type == "cuda"
    if args.disable_tqdm:
        logging.disable_progress_bar()
    # checkpoints that are written within a second are put in their order, of which it warns
    logging.get_logger("transformers.trainer_utils").setLevel(logging.ERROR)


def weights_of_classes(labels: np.ndarray, classes: int) -> torch.Tensor:
    """Return what an image of each class counts, floating `[classes]`: all of a class's the same, 1 on average."""
    counts = np.bincount(labels, minlength=classes)
    return torch.tensor(len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1)), dtype=torch.float32)


def data_options(given: set[str], *options) -> list[str]:
    """Return the command line's options that name the evaluated images, of those that were `given`."""
    values = {name: value for each in options for name, value in vars(each).items()}
    return [word for name in _DATA if name in given for word in (f"--{name}", str(values[name]))]


def announce(splits: dict[str, ImageSplit], size: tuple[int, int], args: TrainArguments) -> None:
    """Print what is trained on, for how long, and what to be warned of."""
    steps = round(args.num_train_epochs * steps_of_epoch(len(splits["train"]), args))
    steps = args.max_steps if args.max_steps > 0 else steps
    print(describe_data(splits, size, steps, args.train_batch_size), flush=True)
    for concern in find_concerns(splits, args.class_weights):
        print(f"warning: {concern}.", flush=True)


def make_trainer(model, processor, args: TrainArguments, labels: np.ndarray, train_data, validation_data, record: dict):
    """Return the trainer of a run; `labels` are those of its training images, and `record` is the run's."""
    optimizer = None  # Trainer makes it, but its SGD has no momentum
    if args.optim == "sgd":
        optimizer = build_sgd(model, args.learning_rate, args.weight_decay, args.momentum)
    mixed, classes = args.mixing != "none", model.config.num_labels
    if mixed:
        train_data = MixedBatches(train_data, classes, args.mixing, args.mixing_alpha)
    images_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    callbacks = [RunCallback(record), ProgressLines(images_per_step)]
    if args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
    trainer = ImageTrainer(
        model=model,
        args=args,
        train_dataset=SeededBatches(train_data, args.seed),
        eval_dataset=validation_data,
        data_collator=collate,
        compute_metrics=trainer_accuracies,
        processing_class=processor,
        optimizers=(optimizer, None),
        callbacks=callbacks,
        class_weights=weights_of_classes(labels, classes) if args.class_weights else None,
        soft_labels=mixed,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def write_results(trainer: ImageTrainer, metrics: dict, images: int, arguments: list[str], more: list[str]) -> None:
    """Write the figures of `images` validation images, and print what they come to and what to do next."""
    args = trainer.args
    interval = wilson_interval(metrics["eval_top1"] / 100 * images, images)
    record = {"command": ["recipes/train.py", *arguments], "seed": args.seed}
    record |= {"parameters": trainer.model.num_parameters(), **metrics, "eval_top1_interval": interval}
    write_json(Path(args.output_dir) / RESULTS, record)
    evaluations = sum("eval_top1" in line for line in trainer.state.log_history) - 1  # the last one is of the end
    print(
        closing_sentence(
            metrics["eval_top1"], images, args.output_dir, evaluations if args.load_best_model_at_end else 0
        )
    )
    print(next_command(args.output_dir, more))


def main(arguments: list[str] | None = None) -> dict:
    (data_args, model_args, train_args), arguments, given = parse_given(
        (DataArguments, ModelArguments, TrainArguments), arguments, FOLDER
    )
    check_options(model_args, data_args, given)
    changes = changes_to_checkpoint(model_args, given)
    resume = resume_place(train_args.resume_from_checkpoint)
    check_folder(Path(train_args.output_dir), resume)

    splits = load_splits(data_args, seed=train_args.seed)
    choose_for_images(model_args, data_args, train_args, splits["train"], given)
    adapt_to_machine(train_args, given)
    set_seed(train_args.seed)  # the same new weights, whatever loading the images has drawn
    model = build_model(model_args, splits["train"].classes, data_args.labels_by_position, changes)
    splits = align_splits(splits, model.config, data_args)
    # computing a loss would set it, which a run that is resumed after its last epoch does not do
    model.config.problem_type = "single_label_classification"
    processor = build_processor(model_args.model_name_or_path, data_args, model_args.num_channels)

    train_data = training_data(splits["train"], data_args, processor)
    validation_data = evaluation_data(splits["validation"], data_args, processor, cache=True)
    if train_args.should_log:
        announce(splits, validation_data.pixels.size, train_args)
    as_evaluated = {"train": evaluation_data(splits["train"], data_args, processor), "validation": validation_data}
    record = run_record(
        (model_args, data_args, training_options(train_args)),
        model,
        processor,
        {name: (as_evaluated[name], split.labels) for name, split in splits.items()},
        number_of_processes=train_args.world_size,
    )
    place = Path(train_args.output_dir) if resume is True else resume
    checkpoint = find_checkpoint(place, record) if place else None
    if place and train_args.should_log:
        print(f"Going on from {checkpoint}." if checkpoint else f"There is no checkpoint in {place}: beginning anew.")

    labels = splits["train"].labels
    trainer = make_trainer(model, processor, train_args, labels, train_data, validation_data, record)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    check_finite(model)
    trainer.save_model()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        write_results(trainer, metrics, len(validation_data), arguments, data_options(given, data_args, train_args))
    return metrics


if __name__ == "__main__":
    main()
