"""Predictions and figures of a model on a dataset."""

import tempfile
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import Trainer, TrainingArguments

from repvgg_hf.training.arguments import RunArguments
from repvgg_hf.training.batches import collate, evaluation_data
from repvgg_hf.training.metrics import trainer_accuracies
from repvgg_hf.training.splits import DataArguments, align_splits, load_splits


@dataclass
class EvaluationArguments(RunArguments):
    """Options of an evaluation."""

    bf16: bool = field(default=False, metadata={"help": "Evaluate in bfloat16."})


def load_evaluation_split(data_args: DataArguments, processor, config, seed: int):
    """The evaluation images for a model, with its labels. Raises `ValueError` if the classes are not the model's."""
    splits = load_splits(data_args, seed=seed, train=False)
    split = align_splits(splits, config, data_args)["validation"]
    return evaluation_data(split, data_args, processor, cache=True)


def evaluate_model(model, dataset, args: EvaluationArguments) -> tuple[dict[str, float], np.ndarray]:
    """Return ({"top1", "top5" in percent, "loss"}, logits `[images, classes]`)."""
    with tempfile.TemporaryDirectory() as folder:  # Trainer makes one, into which an evaluation writes nothing
        return _evaluate_model(model, dataset, args, folder)


def _evaluate_model(model, dataset, args: EvaluationArguments, folder: str) -> tuple[dict[str, float], np.ndarray]:
    training_args = TrainingArguments(
        output_dir=folder,
        per_device_eval_batch_size=args.per_device_eval_batch_size,
        dataloader_num_workers=args.dataloader_num_workers,
        bf16_full_eval=args.bf16,
        dataloader_pin_memory=torch.cuda.is_available(),  # elsewhere it only warns
        disable_tqdm=True,
        remove_unused_columns=False,
        report_to="none",
    )
    trainer = Trainer(model=model, args=training_args, data_collator=collate, compute_metrics=trainer_accuracies)
    output = trainer.predict(dataset, metric_key_prefix="eval")
    return {name: output.metrics[f"eval_{name}"] for name in ("top1", "top5", "loss")}, output.predictions
