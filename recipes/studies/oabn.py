"""What OABN does to a small RepVGG: train with plain batch norm and with OABN, then quantize both without retraining.

    python -m repvgg_hf.recipes.studies.oabn --dataset_name <CIFAR-10 on the Hub or as a parquet folder>

Writes the figures to `--output_json` and the tables made from them beside it, as Markdown. Trained models are kept in
`--output_dir` and not trained again. Two times 8 epochs take about an hour and a half on 2 CPU cores.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from repvgg_hf.recipes.studies.shared import StudyArguments, require_same, run_recipe
from repvgg_hf.training.arguments import parse_arguments
from repvgg_hf.training.report import write_json

NETWORK = "--stem_hidden_size 32 --hidden_sizes 48 96 192 256 --depths 2 4 4 1 --strides 2 2 2 2 --image_size 32"
TRAINING = (
    "--augmentation crop_flip --per_device_train_batch_size 128 --learning_rate 0.1 --bf16 True --disable_tqdm True"
)
QUANTIZATION = "--method uniform cluster --granularity per_tensor per_channel --calibration_images 0"
NORMS = {"BN": "--oabn False", "OABN": "--oabn True"}


@dataclass(kw_only=True)
class OABNStudyArguments(StudyArguments):
    """Options that say where the data is, and where results go."""

    num_train_epochs: int = field(default=8, metadata={"help": "Epochs of each training."})
    bits: list[int] = field(default_factory=lambda: [8, 6, 4, 3], metadata={"help": "Bits of a weight's code."})
    dataloader_num_workers: int = field(default=1, metadata={"help": "Processes that load images."})
    output_dir: str = field(default="outputs/oabn_study", metadata={"help": "Folder for models."})
    output_json: str = field(
        default="outputs/oabn_study/oabn.json", metadata={"help": "File for the figures; their tables go beside it."}
    )


def quantization(args: OABNStudyArguments) -> str:
    """The options of the recipe that quantizes."""
    return f"--bits {' '.join(map(str, args.bits))} {QUANTIZATION}"


def study_norm(norm: str, args: OABNStudyArguments) -> dict:
    """Train and quantize with one kind of batch normalization."""
    shared = args.data_options() | {"dataloader_num_workers": args.dataloader_num_workers}
    folder = Path(args.output_dir) / norm.lower()
    if not (folder / "train_results.json").exists():
        limits = {"num_train_epochs": args.num_train_epochs, "max_train_samples": args.max_train_samples}
        limits["use_cpu"] = not torch.accelerator.is_available()  # Trainer wants to be told before it uses bf16 there
        more = shared | limits | {"output_dir": folder, "resume_from_checkpoint": True}  # if it was interrupted
        run_recipe("train", f"{NETWORK} {TRAINING} {NORMS[norm]}", more)
    train = json.loads((folder / "train_results.json").read_text())
    require_same(folder / "train_results.json", train, {"seed": args.seed, "epoch": args.num_train_epochs})
    quantized = folder / "quantize"
    run_recipe("quantize", quantization(args), shared | {"model_name_or_path": folder, "output_dir": quantized})
    ptq = json.loads((quantized / "quantize_results.json").read_text())
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


def main(arguments: list[str] | None = None) -> dict:
    (args,), _ = parse_arguments((OABNStudyArguments,), arguments)
    norms = {norm: study_norm(norm, args) for norm in NORMS}
    parameters = [norm.pop("parameters") for norm in norms.values()]
    record = {
        "recipe": "recipes/studies/oabn.py",
        "options": {"network": NETWORK, "training": TRAINING, "quantization": quantization(args), "norms": NORMS},
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
