"""What OABN does to a small RepVGG: train with plain batch norm and with OABN, then quantize both without retraining.

    python recipes/study.py --dataset_name <CIFAR-10 on the Hub or as a parquet folder> --image_column_name img

Writes the figures to `--output_json` and the tables made from them beside it, as Markdown. Trained models are kept in
`--output_dir` and not trained again. Two times 8 epochs take about an hour and a half on 2 CPU cores.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from repvgg_hf.training.arguments import parse_arguments
from repvgg_hf.training.report import write_json

NETWORK = "--stem_hidden_size 32 --hidden_sizes 48 96 192 256 --depths 2 4 4 1 --strides 2 2 2 2 --image_size 32"
TRAINING = (
    "--augmentation crop_flip --per_device_train_batch_size 128 --learning_rate 0.1 --bf16 True --disable_tqdm True"
)
QUANTIZATION = "--bits 8 6 4 3 --methods uniform cluster --granularities per_tensor per_channel"
NORMS = {"BN": "--oabn False", "OABN": "--oabn True"}


@dataclass
class StudyArguments:
    """Where the data is, and where results go."""

    dataset_name: str = field(metadata={"help": "CIFAR-10: a Hub dataset or a local folder of parquet files."})
    dataset_title: str = field(default="CIFAR-10", metadata={"help": "What to call it in the tables."})
    image_column_name: str = field(default="img", metadata={"help": "Column with the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column with the labels."})
    num_train_epochs: int = field(default=8, metadata={"help": "Epochs of each training."})
    dataloader_num_workers: int = field(default=1, metadata={"help": "Processes that load images."})
    seed: int = field(default=0, metadata={"help": "Seed of both trainings."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many evaluation images."})
    output_dir: str = field(default="outputs/study", metadata={"help": "Where models go."})
    output_json: str = field(default="model_cards/oabn_study.json", metadata={"help": "Where the figures go."})


def run_recipe(name: str, options: str, args: StudyArguments, **more) -> None:
    """Run another recipe with `options`, the study's data and `more` options."""
    data = {
        "dataset_name": args.dataset_name,
        "seed": args.seed,
        "dataloader_num_workers": args.dataloader_num_workers,
    }
    data |= {"image_column_name": args.image_column_name, "label_column_name": args.label_column_name}
    data |= {"max_eval_samples": args.max_eval_samples}
    command = [sys.executable, str(Path(__file__).with_name(name)), *options.split()]
    for option, value in (data | more).items():
        if value is not None:
            command += [f"--{option}", str(value)]
    subprocess.run(command, check=True)


def study_norm(norm: str, args: StudyArguments) -> dict:
    """Train and quantize with one kind of batch normalization."""
    folder = Path(args.output_dir) / norm.lower()
    if not (folder / "train_results.json").exists():
        limits = {"num_train_epochs": args.num_train_epochs, "max_train_samples": args.max_train_samples}
        limits["use_cpu"] = not torch.accelerator.is_available()  # Trainer wants to be told before it uses bf16 there
        run_recipe("train.py", f"{NETWORK} {TRAINING} {NORMS[norm]}", args, output_dir=folder, **limits)
    quantized = folder / "ptq"
    run_recipe("ptq.py", QUANTIZATION, args, model_name_or_path=folder, output_dir=quantized)
    ptq = json.loads((quantized / "ptq_results.json").read_text())
    train = json.loads((folder / "train_results.json").read_text())
    return {
        "parameters": train["parameters"],
        "trained_top1": train["eval_top1"],
        "kernels": ptq["float_kernels"],
        "results": ptq["results"],
    }


def markdown(record: dict) -> str:
    """The study's tables."""
    norms = record["norms"]
    lines = [
        f"RepVGG of {record['parameters'] / 1e6:.1f} M parameters in train form, {record['dataset']}, "
        f"{record['epochs']} epochs, seed {record['seed']}, weights quantized without retraining; top-1 in percent.",
        "",
        "| weights | bits per weight | " + " | ".join(norms) + " |",
        "|---|---|" + "---|" * len(norms),
    ]
    for rows in zip(*(norm["results"] for norm in norms.values())):
        accuracies = " | ".join(f"{row['top1']:.2f}" for row in rows)
        lines.append(f"| {rows[0]['model']} | {rows[0]['bits_per_weight']:.2f} | {accuracies} |")
    lines += ["", "| fused kernel | " + " | ".join(f"kurtosis, {n} | max/std, {n}" for n in norms) + " |"]
    lines.append("|---|" + "---|---|" * len(norms))
    for kernels in zip(*(norm["kernels"] for norm in norms.values())):
        if len(kernels[0]["shape"]) == 4:
            figures = " | ".join(f"{kernel['kurtosis']:.1f} | {kernel['max_over_std']:.1f}" for kernel in kernels)
            lines.append(f"| {kernels[0]['name'].removeprefix('repvgg.')} | {figures} |")
    return "\n".join(lines) + "\n"


def summary(record: dict) -> str:
    """A short table for the README: the granularities side by side left out, the kernels' range of kurtosis put in."""
    norms = record["norms"]
    lines = ["| " + record["dataset"] + ", top-1 | " + " | ".join(norms) + " |", "|---|" + "---|" * len(norms)]
    for rows in zip(*(norm["results"] for norm in norms.values())):
        if rows[0]["model"] == "float" or rows[0]["model"].endswith(("-w8", "-w4", "-w3")):
            accuracies = " | ".join(f"{row['top1']:.1f}" for row in rows)
            lines.append(f"| {rows[0]['model']} | {accuracies} |")
    ranges = []
    for norm in norms.values():
        kurtosis = [kernel["kurtosis"] for kernel in norm["kernels"] if len(kernel["shape"]) == 4]
        ranges.append(f"{min(kurtosis):.0f} to {max(kurtosis):.0f}")
    lines.append("| kurtosis of the fused kernels | " + " | ".join(ranges) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> dict:
    (args,), _ = parse_arguments((StudyArguments,), arguments)
    norms = {norm: study_norm(norm, args) for norm in NORMS}
    parameters = [norm.pop("parameters") for norm in norms.values()]
    record = {
        "recipe": "recipes/study.py",
        "options": {"network": NETWORK, "training": TRAINING, "quantization": QUANTIZATION, "norms": NORMS},
        "dataset": args.dataset_title,
        "epochs": args.num_train_epochs,
        "seed": args.seed,
        "parameters": parameters[0],
        "norms": norms,
    }
    write_json(args.output_json, record)
    table = markdown(record)
    Path(args.output_json).with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    return record


if __name__ == "__main__":
    main()
