"""Train a float RepVGG with outlier-aware batch normalization.

    python recipes/train.py photos/                              # one folder of pictures per class, or train/ and val/
    python recipes/train.py --output_dir outputs/digits          # scikit-learn's digits
    python recipes/train.py --dataset_name cifar10 --image_column_name img --image_size 32 ...
    python recipes/train.py photos/ --pretrained timm/repvgg_a0.rvgg_in1k
    python recipes/train.py my_arguments.json

What is not given is chosen for the pictures: their size, the batches, epochs and learning rate (for the digits it is
fixed). With `--resume_from_checkpoint` it goes on from the last checkpoint that is whole, to the same weights; it
refuses to if data, model or options are not the same. The last model, its metrics and a report with curves and wrong
pictures are in `--output_dir`, which must not hold another run.
"""

import math
from pathlib import Path

import numpy as np
import torch
from transformers import PrinterCallback, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging

from repvgg_hf.analysis.uncertainty import wilson_interval
from repvgg_hf.training.arguments import parse_given
from repvgg_hf.training.batches import collate, evaluation_data, training_data
from repvgg_hf.training.checkpoints import check_finite, resume_place
from repvgg_hf.training.closing_bound import ClosingBound, closing_steps, find_clipping
from repvgg_hf.training.data_defaults import (
    epochs_between_evaluations,
    steps_per_epoch,
    suggest_image_size,
    suggest_plan,
    suggest_pretrained_size,
    suggest_strides,
)
from repvgg_hf.training.data_report import describe_data, find_concerns
from repvgg_hf.training.early_stopping import EarlyStopping
from repvgg_hf.training.metrics import trainer_accuracies
from repvgg_hf.training.mixing import MixedBatches
from repvgg_hf.training.models import (
    OF_A_NEW_MODEL,
    build_model,
    build_processor,
    changes_to_checkpoint,
    check_source,
)
from repvgg_hf.training.optimizer import build_sgd
from repvgg_hf.training.pixels import pixels_of
from repvgg_hf.training.pretrained import (
    COMPARED,
    SourceArguments,
    check_pretrained,
    describe_change,
    load_pretrained,
    processor_of,
    with_new_classifier,
)
from repvgg_hf.training.processors import with_size
from repvgg_hf.training.progress import ProgressLines, closing_sentence, next_command
from repvgg_hf.training.report import write_json
from repvgg_hf.training.report_files import write_report
from repvgg_hf.training.run_record import run_record
from repvgg_hf.training.seeded_batches import SeededBatches
from repvgg_hf.training.splits import FOLDER, DataArguments, ImageSplit, align_splits, check_picture_folder, load_splits
from repvgg_hf.training.train_arguments import TrainArguments
from repvgg_hf.training.trainer import ImageTrainer
from repvgg_hf.training.trainer_checkpoints import (
    RESULTS,
    RunCallback,
    check_folder,
    find_checkpoint,
    training_options,
)

# options that say which images are evaluated, which the next command needs too
_DATA = (
    "dataset_name", "dataset_config_name", "train_dir", "validation_dir", "validation_split_name", "train_val_split",
    "image_column_name", "label_column_name", "seed",
)  # fmt: skip


def check_options(model_args: SourceArguments, data_args: DataArguments, given: set[str]) -> None:
    """Raise `ValueError` for a source that can't be, and for options that would do nothing beside another one."""
    check_picture_folder(data_args, given)
    check_pretrained(model_args, given)
    check_source(model_args.model_name_or_path, model_args.dequantize)
    sizes = [name for name in OF_A_NEW_MODEL if name in given and name not in ("variant", "num_channels")]
    if "variant" in given and sizes:
        raise ValueError(f"--variant {model_args.variant} sets all sizes, --{sizes[0]} too: leave one of them out.")
    for kind in ("save", "eval"):
        if f"{kind}_steps" in given and f"{kind}_strategy" not in given:
            raise ValueError(f"--{kind}_steps does nothing without --{kind}_strategy steps: add that, or leave it out.")
    if "validation_dir" in given and "train_val_split" in given:
        raise ValueError("--train_val_split holds out training images, and --validation_dir has others: give one.")


def choose_for_images(model_args, data_args, train_args, split, given: set[str], processor=None) -> None:
    """Set the options that were not `given` to what suits the training images, unless these are the digits.

    `processor` is that of a pretrained network, if there is one.
    """
    if processor is not None and data_args.image_size is None:
        data_args.image_size = suggest_pretrained_size(split, pixels_of(processor).size[0])
    if data_args.dataset_name == "digits":
        return
    new = model_args.model_name_or_path is None and processor is None
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
        new_classifier=processor is not None,
    )
    train_args.per_device_train_batch_size, train_args.num_train_epochs = plan.batch_size, plan.epochs
    if "learning_rate" not in given:
        train_args.learning_rate = plan.learning_rate
    of_epoch = steps_of_epoch(len(split), train_args)
    epochs = epochs_between_evaluations(planned_steps(len(split), train_args), of_epoch)
    if epochs > 1 and not given & {"eval_strategy", "save_strategy", "eval_steps", "save_steps"}:
        train_args.eval_strategy, train_args.save_strategy = IntervalStrategy.STEPS, SaveStrategy.STEPS
        train_args.eval_steps = train_args.save_steps = epochs * of_epoch


def steps_of_epoch(images: int, args: TrainingArguments) -> int:
    """Return the optimizer steps of an epoch of so many training images.

    Raises `ValueError` where `--dataloader_drop_last` leaves none.
    """
    together = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last:
        if images < together:
            raise ValueError(
                f"--dataloader_drop_last drops all {images} training images, which fill no batch of {together}: leave "
                "it out, or make --per_device_train_batch_size smaller."
            )
        images -= images % together
    return steps_per_epoch(images, args.per_device_train_batch_size, args.world_size, args.gradient_accumulation_steps)


def adapt_to_machine(args: TrainArguments, given: set[str]) -> None:
    """Set what changes no weights: when to log, and what the machine has no use for."""
    if not given & {"logging_strategy", "logging_steps"}:  # a loss for each line
        args.logging_strategy, args.logging_steps = IntervalStrategy(args.eval_strategy), args.eval_steps or 500
        if args.logging_strategy == IntervalStrategy.NO:
            args.logging_strategy = IntervalStrategy.EPOCH
    if "dataloader_pin_memory" not in given:
        args.dataloader_pin_memory = args.device.type == "cuda"
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


def planned_steps(images: int, args: TrainingArguments) -> int:
    """Return the optimizer steps of the whole training on so many images."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_of_epoch(images, args))


def announce(splits: dict[str, ImageSplit], size: tuple[int, int], args: TrainArguments) -> None:
    """Print what is trained on, for how long, and what to be warned of."""
    steps = planned_steps(len(splits["train"]), args)
    print(describe_data(splits, size, steps, args.train_batch_size), flush=True)
    for concern in find_concerns(splits, args.class_weights):
        print(f"warning: {concern}.", flush=True)


def begin_with(pretrained, processor, classes: list[str], model_args, data_args, given: set[str]):
    """Return (model, image processor): new ones of the options, or those of a checkpoint or a `pretrained` network."""
    if pretrained is None:
        changes = changes_to_checkpoint(model_args, given)
        model = build_model(model_args, classes, data_args.labels_by_position, changes)
        return model, build_processor(model_args.model_name_or_path, data_args, model_args.num_channels)
    changes = {"oabn": model_args.oabn, "oabn_threshold": model_args.oabn_threshold}
    model = with_new_classifier(pretrained, classes, **changes)
    return model, with_size(processor, data_args.image_size, data_args.crop_ratio or 1.0)


def make_trainer(
    model, processor, args: TrainArguments, labels: np.ndarray, train_data, validation_data, record: dict, start=None
):
    """Return the trainer of a run.

    `labels` are those of its training images, `record` is the run's, and OABN's bound closes in from `start`.
    """
    optimizer = None  # Trainer makes it, but its SGD has no momentum
    if args.optim == "sgd":
        optimizer = build_sgd(model, args.learning_rate, args.weight_decay, args.momentum)
    mixed, classes = args.mixing != "none", model.config.num_labels
    if mixed:
        train_data = MixedBatches(train_data, classes, args.mixing, args.mixing_alpha)
    images_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    callbacks = [RunCallback(record), ProgressLines(images_per_step)]
    if start is not None:
        callbacks.append(ClosingBound(model, start))
    if args.early_stopping_patience is not None:
        steps = planned_steps(len(labels), args)
        callbacks.append(EarlyStopping(args.early_stopping_patience, closing_steps(steps) if start is not None else 0))
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
        ema_decay=args.ema_decay,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def write_results(trainer: ImageTrainer, output, split: ImageSplit, arguments: list[str], more: list[str]) -> None:
    """Write the figures and the report of the last evaluation, and print what they come to and what to do next."""
    args, metrics, images = trainer.args, output.metrics, len(split)
    interval = wilson_interval(metrics["eval_top1"] / 100 * images, images)
    record = {"command": ["recipes/train.py", *arguments], "seed": args.seed}
    record |= {"parameters": trainer.model.num_parameters(), **metrics, "eval_top1_interval": interval}
    write_json(Path(args.output_dir) / RESULTS, record)
    evaluations = sum("eval_top1" in line for line in trainer.state.log_history) if args.load_best_model_at_end else 0
    print(closing_sentence(metrics["eval_top1"], images, args.output_dir, evaluations))
    if args.report:
        print(write_report(trainer, split, output.predictions, metrics["eval_top1"]))
    print(next_command(args.output_dir, more))


def main(arguments: list[str] | None = None) -> dict:
    (data_args, model_args, train_args), arguments, given = parse_given(
        (DataArguments, SourceArguments, TrainArguments), arguments, FOLDER
    )
    check_options(model_args, data_args, given)
    changes_to_checkpoint(model_args, given)  # its errors, before any work
    resume = resume_place(train_args.resume_from_checkpoint)
    check_folder(Path(train_args.output_dir), resume)

    splits = load_splits(data_args, seed=train_args.seed)
    if train_args.disable_tqdm:
        logging.disable_progress_bar()
    pretrained = load_pretrained(model_args.pretrained) if model_args.pretrained else None
    processor = processor_of(pretrained) if pretrained is not None else None
    choose_for_images(model_args, data_args, train_args, splits["train"], given, processor)
    adapt_to_machine(train_args, given)
    set_seed(train_args.seed)  # the same new weights, whatever loading the images has drawn
    model, processor = begin_with(pretrained, processor, splits["train"].classes, model_args, data_args, given)
    splits = align_splits(splits, model.config, data_args)
    # computing a loss would set it, which a run that is resumed after its last epoch does not do
    model.config.problem_type = "single_label_classification"

    train_data = training_data(splits["train"], data_args, processor)
    validation_data = evaluation_data(splits["validation"], data_args, processor, cache=True)
    if train_args.should_log:
        announce(splits, validation_data.pixels.size, train_args)
    as_evaluated = {"train": evaluation_data(splits["train"], data_args, processor), "validation": validation_data}
    start = find_clipping(model).largest if pretrained is not None else 0.0
    start = start if start > model.config.oabn_threshold else None
    if pretrained is not None and model.config.oabn and train_args.should_log:
        places = np.linspace(0, len(splits["train"]) - 1, COMPARED).round().astype(int)
        pixel_values = as_evaluated["train"].__getitems__(np.unique(places).tolist())["pixel_values"]
        closing = closing_steps(planned_steps(len(splits["train"]), train_args)) if start is not None else 0
        print(*describe_change(pretrained, model, pixel_values, closing), sep="\n", flush=True)
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
    trainer = make_trainer(model, processor, train_args, labels, train_data, validation_data, record, start)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except KeyboardInterrupt:
        print("\nStopped. With --resume_from_checkpoint the same command goes on from the last checkpoint.")
        raise
    check_finite(model)
    trainer.save_model()
    output = trainer.predict(validation_data, metric_key_prefix="eval")
    output.metrics["epoch"] = trainer.state.epoch
    if trainer.is_world_process_zero():
        write_results(trainer, output, splits["validation"], arguments, data_options(given, data_args, train_args))
    return output.metrics


if __name__ == "__main__":
    main()
