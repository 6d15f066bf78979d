"""What each step of post-training quantisation is worth, on float checkpoints that `recipes/study.py` trained.

    python recipes/ptq_study.py --models BN=outputs/study/bn OABN=outputs/study/oabn --dataset_name <CIFAR-10>

Writes the figures to `--output_json` after each one, and goes on from there when started again; beside it the tables
made from them, as Markdown. Needs no labels but for measuring: the calibration images come from the training split.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification

from arguments import parse_arguments
from data import DataArguments, load_splits, with_pixel_values
from evaluation import EvaluationArguments, evaluate_model
from modeling import build_processor
from repvgg_hf.analysis import bits_per_weight
from results import write_json

PLAIN = {"sensitivity": "none", "error_compensation": False, "bias_correction": False, "tuning_steps": 0}
CHANNEL = {"granularity": "per_channel"}
# name: (options of quantize, whether they need calibration images)
METHODS = {
    "uniform, tensor": ({"method": "uniform"}, False),
    "uniform, channel": ({"method": "uniform"} | CHANNEL, False),
    "uniform, channel, all steps": ({"method": "uniform"} | CHANNEL, True),
    "k-means, channel": (CHANNEL, False),
    "+ sensitivity": (CHANNEL | PLAIN | {"sensitivity": "second_moment"}, True),
    "+ error compensation": (CHANNEL | {"bias_correction": False, "tuning_steps": 0}, True),
    "+ bias correction": (CHANNEL | {"tuning_steps": 0}, True),
    "+ tuning = all steps": (CHANNEL, True),
    "all steps, tensor and scale": ({}, True),
}
ACTIVATIONS = {"W4A8": {"bits": 4, "activation_bits": 8}, "W4A4": {"bits": 4, "activation_bits": 4}}
TARGETS = (2.5, 3.2)  # bits a weight, mixed precision


@dataclass
class PTQStudyArguments:
    """Which models to quantise, at which bits."""

    models: list[str] = field(metadata={"help": "name=folder of each float checkpoint, such as BN=outputs/study/bn."})
    bits: list[int] = field(default_factory=lambda: [8, 6, 5, 4, 3, 2], metadata={"help": "Bits of a weight."})
    dataset_title: str = field(default="CIFAR-10", metadata={"help": "What to call the data in the tables."})
    calibration_samples: int = field(default=512, metadata={"help": "Training images to calibrate on."})
    output_json: str = field(default="model_cards/ptq_study.json", metadata={"help": "Where the figures go."})


class CachedImages(torch.utils.data.Dataset):
    """A dataset's examples, decoded once: every model is measured on all of them."""

    def __init__(self, dataset):
        examples = dataset[:]
        self.pixel_values, self.labels = torch.stack(list(examples["pixel_values"])), examples["labels"]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


def settings(bits: list[int]) -> dict[str, tuple[dict, bool]]:
    """Every line of the study: `(options of quantize, whether they need images)` by name."""
    lines = {
        f"{name}|{b}": (options | {"bits": b}, images) for name, (options, images) in METHODS.items() for b in bits
    }
    lines |= {f"{name}|{name}": (options, True) for name, options in ACTIVATIONS.items()}
    return lines | {f"mixed|{target}": ({"target_bits_per_weight": target}, True) for target in TARGETS}


def measure(folder: str, options: dict, images: torch.Tensor | None, evaluation_set, evaluation_args) -> dict:
    """Quantise the checkpoint and evaluate it. Without options, the float model."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    start = time.perf_counter()
    if options:
        model.quantize(**options, **({} if images is None else {"calibration": images}))
    seconds = time.perf_counter() - start
    size = bits_per_weight(model) if options else 32.0
    figures, _ = evaluate_model(model, evaluation_set, evaluation_args)
    return {"options": options, **figures, "bits_per_weight": size, "seconds": seconds}


def main(arguments: list[str] | None = None) -> dict:
    (study, data_args, evaluation_args), _ = parse_arguments(
        (PTQStudyArguments, DataArguments, EvaluationArguments), arguments
    )
    folders = dict(model.split("=", 1) for model in study.models)
    path = Path(study.output_json)
    record = {
        "recipe": "recipes/ptq_study.py",
        "dataset": study.dataset_title,
        "calibration_samples": study.calibration_samples,
        "seed": evaluation_args.seed,
        "models": {},
    }
    if path.exists():
        record["models"] = json.loads(path.read_text())["models"]
    processor = build_processor(next(iter(folders.values())), data_args)
    data_args.max_train_samples = study.calibration_samples
    splits = load_splits(data_args, seed=evaluation_args.seed)
    evaluation_set, calibration_set = (
        CachedImages(with_pixel_values(splits[name], data_args, processor, train=False))
        for name in ("validation", "train")
    )
    record["images"] = len(evaluation_set)
    for name, folder in folders.items():
        results = record["models"].setdefault(name, {})
        for line, (options, needs_images) in ({"float": ({}, False)} | settings(study.bits)).items():
            if line not in results:
                images = calibration_set.pixel_values if needs_images else None
                results[line] = measure(folder, options, images, evaluation_set, evaluation_args)
                print(f"{name}, {line}: top-1 {results[line]['top1']:.2f}")
                write_json(path, record)
    table = markdown(record)
    path.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    return record


def markdown(record: dict) -> str:
    """A table of top-1 for each model: methods against bits."""
    lines = [
        f"Top-1 in percent on {record['images']:,} images of {record['dataset']}; calibrated on "
        f"{record['calibration_samples']} training images without labels, seed {record['seed']}.",
    ]
    for name, results in record["models"].items():
        bits = sorted({int(line.split("|")[1]) for line in results if line.split("|")[0] in METHODS}, reverse=True)
        lines += [
            "",
            f"| {name}, float {results['float']['top1']:.2f} | " + " | ".join(f"{b} bit" for b in bits) + " |",
        ]
        lines.append("|---|" + "---|" * len(bits))
        for method in METHODS:
            cells = [results.get(f"{method}|{b}") for b in bits]
            if any(cells):
                figures = " | ".join("" if cell is None else f"{cell['top1']:.2f}" for cell in cells)
                lines.append(f"| {method} | {figures} |")
        others = {line: row for line, row in results.items() if "|" in line and line.split("|")[0] not in METHODS}
        if others:
            lines += ["", "| | bits per weight | top-1 |", "|---|---|---|"]
        for line, row in others.items():
            method, what = line.split("|")
            title = what if method == what else f"mixed precision, target {what}"
            lines.append(f"| {title} | {row['bits_per_weight']:.2f} | {row['top1']:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
