"""What each step of post-training quantization is worth, on float checkpoints that `recipes/study.py` trained.

    python recipes/ptq_study.py --models BN/0=outputs/study/bn OABN/0=outputs/study/oabn --dataset_name <CIFAR-10>

A model's name is what it is, and the seed of its training: those that differ only there share a table of their means.
With `--peers coremltools nncf` these libraries' methods are in it, on the same images. Writes the figures to
`--output_json` after each one, and goes on from there when started again; beside it the tables made from them, as
Markdown. Needs no labels but for measuring: the calibration images come from the training split.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification

from repvgg_hf.training.arguments import parse_arguments
from repvgg_hf.training.pictures import DataArguments, load_splits, with_pixel_values
from repvgg_hf.training.evaluation import EvaluationArguments, evaluate_model
from repvgg_hf.training.models import build_processor
from repvgg_hf.recipes.peers import PeerMethod, peer_methods
from repvgg_hf.analysis import bits_per_weight
from repvgg_hf.training.report import by_kind, mean, write_json

PLAIN = {"error_compensation": False, "bias_correction": False, "tuning_steps": 0}
CHANNEL = {"granularity": "per_channel"}
TUNED = {"tuning_steps": 200}
# name: (options of quantize, whether they need calibration images)
METHODS = {
    "uniform, tensor": ({"method": "uniform"}, False),
    "uniform, channel": ({"method": "uniform"} | CHANNEL, False),
    "uniform, channel, all steps": ({"method": "uniform"} | CHANNEL | TUNED, True),
    "k-means, tensor and scale": ({}, False),
    "k-means, channel": (CHANNEL, False),
    "k-means, channel, by second moments": (CHANNEL | PLAIN | {"sensitivity": "second_moment"}, True),
    "k-means, channel, by Fisher information": (CHANNEL | PLAIN | {"sensitivity": "fisher"}, True),
    "k-means, channel, + error compensation": (CHANNEL | {"bias_correction": False, "tuning_steps": 0}, True),
    "k-means, channel, + bias correction": (CHANNEL | {"tuning_steps": 0}, True),
    "k-means, channel, + tuning = all steps": (CHANNEL | TUNED, True),
    "k-means, tensor and scale, all steps": (TUNED, True),
}
ACTIVATIONS = {"W4A8": {"bits": 4, "activation_bits": 8}, "W4A4": {"bits": 4, "activation_bits": 4}}
TARGETS = (2.5, 3.2)  # bits a weight, mixed precision


@dataclass
class PTQStudyArguments:
    """Which models to quantize, at which bits."""

    models: list[str] = field(
        metadata={"help": "name/seed=folder of each float checkpoint, such as BN/0=outputs/study/bn."}
    )
    bits: list[int] = field(default_factory=lambda: [8, 6, 5, 4, 3, 2], metadata={"help": "Bits of a weight."})
    dataset_title: str = field(default="CIFAR-10", metadata={"help": "What to call the data in the tables."})
    peers: list[str] = field(default_factory=list, metadata={"help": "Libraries to compare with: coremltools, nncf."})
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
    lines |= {f"{name}|{name}": (options | TUNED, True) for name, options in ACTIVATIONS.items()}
    return lines | {f"mixed|{target}": ({"target_bits_per_weight": target} | TUNED, True) for target in TARGETS}


def measure(folder: str, quantize, evaluation_set, evaluation_args) -> dict:
    """Evaluate the checkpoint after `quantize(model)`, which returns the model and its bits a weight."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval().reparameterize()
    start = time.perf_counter()
    model, size = quantize(model)
    seconds = time.perf_counter() - start
    figures, _ = evaluate_model(model, evaluation_set, evaluation_args)
    return {**figures, "bits_per_weight": size, "seconds": seconds}


def with_options(options: dict):
    """Our quantization with these `options`."""

    def quantize(model):
        model.quantize(**options)
        return model, bits_per_weight(model)

    return quantize


def with_peer(peer: PeerMethod, bits: int, images: torch.Tensor):
    """Another library's."""

    def quantize(model):
        weights = sum(module.weight.numel() for module in model.modules() if hasattr(module, "weight"))
        quantized, stored = peer.quantize(model, bits, list(images.split(64)))
        return quantized, 8 * stored / weights

    return quantize


def lines(study: PTQStudyArguments, images: torch.Tensor) -> dict[str, tuple]:
    """(what quantizes, what to note) of every line of the study, by its name."""
    chosen = {"float": (lambda model: (model, 32.0), {})}
    for name, (options, calibrated) in settings(study.bits).items():
        calibration = {"calibration": images} if calibrated else {}
        chosen[name] = with_options(options | calibration), {"options": options}
    for library in study.peers:
        for peer in peer_methods(library):
            for bits in study.bits:
                if bits in peer.bits and peer.activation_bits is None:
                    chosen[f"{peer.label}|{bits}"] = with_peer(peer, bits, images), {"library": library}
    return chosen


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
        for line, (quantize, notes) in lines(study, calibration_set.pixel_values).items():
            if line not in results:
                results[line] = notes | measure(folder, quantize, evaluation_set, evaluation_args)
                print(f"{name}, {line}: top-1 {results[line]['top1']:.2f}", flush=True)
                write_json(path, record)
    table = markdown(record)
    path.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    return record


def markdown(record: dict) -> str:
    """For each kind of model a table of mean top-1: methods against bits."""
    seeds = sorted({name.partition("/")[2] for name in record["models"]} - {""})
    text = [
        f"Top-1 in percent on {record['images']:,} images of {record['dataset']}; calibrated on "
        f"{record['calibration_samples']} training images without labels, seed {record['seed']}. "
        + "The last column has the bits that a weight takes with the fewest bits, codebooks and scales included."
        + (f" Means over float networks trained with the seeds {' and '.join(seeds)}." if seeds else "")
    ]
    for kind, results in by_kind(record["models"]).items():
        text += ["", *table_of_methods(kind, results), "", *table_of_others(results)]
    return "\n".join(text).strip() + "\n"


def table_of_methods(kind: str, results: dict[str, list[dict]]) -> list[str]:
    """Ours and other libraries' methods against bits, and what the weights take with the fewest, codebooks included."""
    libraries = [line.split("|")[0] for line, rows in results.items() if "library" in rows[0]]
    methods = [*METHODS, *dict.fromkeys(libraries)]
    bits = sorted({int(line.split("|")[1]) for line in results if line.split("|")[0] in methods}, reverse=True)
    text = [f"| {kind}, float {mean(results['float']):.2f} | " + " | ".join(f"{b} bit" for b in bits) + " | stored |"]
    text.append("|---|" + "---|" * (len(bits) + 1))
    for method in methods:
        cells = [results.get(f"{method}|{b}") for b in bits]
        if any(cells):
            figures = " | ".join("" if cell is None else f"{mean(cell):.2f}" for cell in cells)
            stored = mean([cell for cell in cells if cell][-1], "bits_per_weight")
            text.append(f"| {method} | {figures} | {stored:.2f} |")
    return text


def table_of_others(results: dict[str, list[dict]]) -> list[str]:
    """Activations and mixed precision."""
    kinds = (*ACTIVATIONS, "mixed")
    others = {line: rows for line, rows in results.items() if line.split("|")[0] in kinds}
    if not others:
        return []
    text = ["| | bits per weight | top-1 |", "|---|---|---|"]
    for line, rows in others.items():
        method, what = line.split("|")
        title = what if method == what else f"mixed precision, target {what}"
        text.append(f"| {title} | {mean(rows, 'bits_per_weight'):.2f} | {mean(rows):.2f} |")
    return text


if __name__ == "__main__":
    main()
