"""Train a float RepVGG with outlier-aware batch normalization.

    python recipes/train.py --output_dir outputs/digits
    python recipes/train.py --dataset_name cifar10 --image_column_name img --image_size 32 ...
    python recipes/train.py my_arguments.json

With `--resume_from_checkpoint` it goes on from the last checkpoint that is whole, to the same weights; it refuses to if
data, model or options are not the same. The last model and its metrics are in `--output_dir`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainingArguments, set_seed

from repvgg_hf.training.arguments import parse_arguments
from repvgg_hf.training.batches import collate, evaluation_data, training_data
from repvgg_hf.training.checkpoints import check_finite, resume_field, resume_place
from repvgg_hf.training.metrics import trainer_accuracies
from repvgg_hf.training.models import ModelArguments, build_model, build_processor, check_source
from repvgg_hf.training.optimizer import build_sgd
from repvgg_hf.training.report import write_json
from repvgg_hf.training.run_record import run_record
from repvgg_hf.training.seeded_batches import SeededBatches
from repvgg_hf.training.splits import DataArguments, align_splits, load_splits
from repvgg_hf.training.trainer import ImageTrainer
from repvgg_hf.training.trainer_checkpoints import RunCallback, find_checkpoint, training_options


@dataclass
class TrainArguments(TrainingArguments):
    """`TrainingArguments` with defaults for the digits."""

    output_dir: str = field(default="outputs/train", metadata={"help": "Folder for models, checkpoints and figures."})
    num_train_epochs: float = field(default=20, metadata={"help": "Epochs of training."})
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Images per batch in training, on each device."}
    )
    per_device_eval_batch_size: int = field(
        default=256, metadata={"help": "Images per batch in evaluation, on each device."}
    )
    learning_rate: float = field(default=0.1, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay of kernels; nothing else decays."})
    max_grad_norm: float = field(default=5.0, metadata={"help": "Larger gradients are scaled down to this norm."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Steps in which the learning rate rises to its peak; below 1 a share of all."}
    )
    optim: str = field(
        default="sgd", metadata={"help": "The optimizer: sgd (ours, with momentum) or one of Trainer's."}
    )
    momentum: float = field(default=0.9, metadata={"help": "Momentum of SGD, in Nesterov's form; 0 for none."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls after its peak."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint: no, steps or epoch."})
    save_total_limit: int = field(default=2, metadata={"help": "How many checkpoints to keep, the last ones."})
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Drop columns that the model does not take, which images are made of."},
    )
    report_to: str = field(default="none", metadata={"help": "Where to log: tensorboard, wandb or another, or none."})
    seed: int = field(
        default=0,
        metadata={"help": "Seed of all that is random: new weights, the choice of images, order, augmentation."},
    )
    resume_from_checkpoint: str | None = resume_field()


def main(arguments: list[str] | None = None) -> dict:
    (model_args, data_args, train_args), arguments = parse_arguments(
        (ModelArguments, DataArguments, TrainArguments), arguments
    )
    check_source(model_args.model_name_or_path, model_args.dequantize)
    resume = resume_place(train_args.resume_from_checkpoint)

    splits = load_splits(data_args, seed=train_args.seed)
    set_seed(train_args.seed)  # the same new weights, whatever loading the images has drawn
    model = build_model(model_args, splits["train"].classes, data_args.labels_by_position)
    splits = align_splits(splits, model.config, data_args)
    # computing a loss would set it, which a run that is resumed after its last epoch does not do
    model.config.problem_type = "single_label_classification"
    processor = build_processor(model_args.model_name_or_path, data_args, model_args.num_channels)

    train_data = training_data(splits["train"], data_args, processor)
    validation_data = evaluation_data(splits["validation"], data_args, processor, cache=True)
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

    optimizer = None  # Trainer makes it, but its SGD has no momentum
    if train_args.optim == "sgd":
        optimizer = build_sgd(model, train_args.learning_rate, train_args.weight_decay, train_args.momentum)
    trainer = ImageTrainer(
        model=model,
        args=train_args,
        train_dataset=SeededBatches(train_data, train_args.seed),
        eval_dataset=validation_data,
        data_collator=collate,
        compute_metrics=trainer_accuracies,
        processing_class=processor,
        optimizers=(optimizer, None),
        callbacks=[RunCallback(record)],
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    check_finite(model)
    trainer.save_model()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        record = {"command": ["recipes/train.py", *arguments], "seed": train_args.seed}
        record |= {"parameters": model.num_parameters(), **metrics}
        write_json(Path(train_args.output_dir) / "train_results.json", record)
        print(json.dumps(metrics, indent=2))
    return metrics


if __name__ == "__main__":
    main()
