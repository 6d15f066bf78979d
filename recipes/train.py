"""Train a float RepVGG with outlier-aware batch normalization.

    python recipes/train.py --output_dir outputs/digits
    python recipes/train.py --dataset_name cifar10 --image_column_name img --image_size 32 ...
    python recipes/train.py my_arguments.json

Stops and resumes like any `Trainer` run (`--resume_from_checkpoint`); the last model and its metrics are in
`--output_dir`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import Trainer, TrainingArguments, set_seed

from repvgg_hf.training.arguments import parse_arguments
from repvgg_hf.training.metrics import trainer_accuracies
from repvgg_hf.training.models import ModelArguments, build_model, build_processor
from repvgg_hf.training.optimizer import build_sgd
from repvgg_hf.training.pictures import DataArguments, collate, label_names, load_splits, with_pixel_values
from repvgg_hf.training.report import write_json


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


def main(arguments: list[str] | None = None) -> dict:
    (model_args, data_args, train_args), arguments = parse_arguments(
        (ModelArguments, DataArguments, TrainArguments), arguments
    )
    set_seed(train_args.seed)

    splits = load_splits(data_args, seed=train_args.seed)
    model = build_model(model_args, label_names(splits["train"], data_args))
    processor = build_processor(model_args.model_name_or_path, data_args)

    optimizer = None  # Trainer makes it, but its SGD has no momentum
    if train_args.optim == "sgd":
        optimizer = build_sgd(model, train_args.learning_rate, train_args.weight_decay, train_args.momentum)
    trainer = Trainer(
        model=model,
        args=train_args,
        train_dataset=with_pixel_values(splits["train"], data_args, processor, train=True),
        eval_dataset=with_pixel_values(splits["validation"], data_args, processor, train=False),
        data_collator=collate,
        compute_metrics=trainer_accuracies,
        processing_class=processor,
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=train_args.resume_from_checkpoint)
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
