"""Predictions and figures of a model on a dataset."""

from dataclasses import dataclass, field

import numpy as np
from transformers import Trainer, TrainingArguments

from repvgg_hf.training.arguments import RunArguments
from repvgg_hf.training.metrics import trainer_accuracies
from repvgg_hf.training.pictures import DataArguments, collate, label_names, load_splits, with_pixel_values


@dataclass
class EvaluationArguments(RunArguments):
    """Options of an evaluation."""

    bf16: bool = field(default=False, metadata={"help": "Evaluate in bfloat16."})


def load_evaluation_split(data_args: DataArguments, processor, config, seed: int):
    """The evaluation images for a model. Raises `ValueError` if the dataset's classes are not the model's."""
    split = load_splits(data_args, seed=seed, train=False)["validation"]
    names = label_names(split, data_args)
    if len(names) != config.num_labels:
        raise ValueError(
            f"The model has {config.num_labels} classes, the dataset {len(names)}: evaluate on the dataset that the "
            "model was trained on, or choose another --label_column_name."
        )
    return with_pixel_values(split, data_args, processor, train=False)


def evaluate_model(model, dataset, args: EvaluationArguments) -> tuple[dict[str, float], np.ndarray]:
    """Return ({"top1", "top5" in percent, "loss"}, logits `[images, classes]`)."""
    training_args = TrainingArguments(
        output_dir="outputs/evaluate",  # nothing is written there
        per_device_eval_batch_size=args.per_device_eval_batch_size,
        dataloader_num_workers=args.dataloader_num_workers,
        bf16_full_eval=args.bf16,
        remove_unused_columns=False,
        report_to="none",
    )
    trainer = Trainer(model=model, args=training_args, data_collator=collate, compute_metrics=trainer_accuracies)
    output = trainer.predict(dataset, metric_key_prefix="eval")
    return {name: output.metrics[f"eval_{name}"] for name in ("top1", "top5", "loss")}, output.predictions
