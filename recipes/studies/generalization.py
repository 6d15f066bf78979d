"""Where do outliers arise, and where does OABN help? Small networks of other re-parameterizable blocks on CIFAR-10.

    python -m repvgg_hf.recipes.studies.generalization --dataset_name <CIFAR-10 on the Hub or as a parquet folder>

Each network is trained with plain batch norm and, where it has branches to bound, with OABN, then fused, and quantized
without retraining. A training's figures are in a JSON file of its own in `--output_dir`, and not measured again; the
joined ones are written to `--output_json`, and a table beside them.
"""

import copy
import json
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

import repvgg_hf
from repvgg_hf.recipes.studies.branch_networks import BLOCKS, build_network
from repvgg_hf.recipes.studies.shared import require_same, tails_of_convolutions
from repvgg_hf.training.arguments import parse_arguments
from repvgg_hf.training.batches import collate, evaluation_data, training_data
from repvgg_hf.training.loop import PhaseArguments, train_phase
from repvgg_hf.training.processors import make_processor
from repvgg_hf.training.report import write_json
from repvgg_hf.training.splits import DataArguments, load_splits

BITS = (8, 4, 3)
METHODS = ("uniform", "cluster")


@dataclass
class GeneralizationArguments(PhaseArguments):
    """Options of the study."""

    networks: list[str] = field(
        default_factory=lambda: list(BLOCKS), metadata={"help": f"Which networks: {', '.join(BLOCKS)}."}
    )
    num_train_epochs: int = field(default=12, metadata={"help": "Epochs of each training."})
    learning_rate: float = field(default=0.1, metadata={"help": "Peak learning rate."})
    per_device_train_batch_size: int = field(
        default=128, metadata={"help": "Images per batch in training, on each device."}
    )
    oabn_threshold: float = field(default=6.0, metadata={"help": "Standard deviations that a branch may add."})
    bf16: bool = field(default=True, metadata={"help": "Train in bfloat16."})
    output_dir: str = field(default="outputs/generalization", metadata={"help": "Folder for each training's figures."})
    output_json: str = field(
        default="outputs/generalization/generalization.json", metadata={"help": "File for all; a table goes beside it."}
    )


def check_networks(names: list[str]) -> None:
    """Raise `ValueError` for a network that the study has not."""
    for name in names:
        if name not in BLOCKS:
            raise ValueError(f"--networks has {name!r}: choose among {', '.join(BLOCKS)}.")


def cross_entropy(model: nn.Module, batch: dict) -> torch.Tensor:
    return F.cross_entropy(model(batch["pixel_values"]).float(), batch["labels"], label_smoothing=0.1)


@torch.inference_mode()
def accuracy(model: nn.Module, data, batch_size: int) -> float:
    """The share of images whose class has the largest logit, in percent."""
    model.eval()
    right = 0
    for batch in DataLoader(data, batch_size, collate_fn=collate):
        right += (model(batch["pixel_values"]).argmax(1) == batch["labels"]).sum().item()
    return 100 * right / len(data)


def settings_of(args: GeneralizationArguments, data_args: DataArguments) -> dict:
    """What the figures of a training depend on besides the network and the seed."""
    settings = {"epochs": args.num_train_epochs, "bf16": args.bf16, "oabn_threshold": args.oabn_threshold}
    settings |= {"learning_rate": args.learning_rate, "batch_size": args.per_device_train_batch_size}
    names = ("augmentation", "image_size", "max_train_samples", "max_eval_samples")
    return settings | {name: getattr(data_args, name) for name in names}


def study_network(name: str, norm: str, data: dict, args: GeneralizationArguments, settings: dict) -> dict:
    """Train one network with `norm`, "BN" or "OABN", and return its figures."""
    set_seed(args.seed)
    model = build_network(BLOCKS[name], data["classes"])
    example = data["validation"][0]["pixel_values"][None]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    record = {"network": name, "norm": norm, **settings, "parameters": parameters}
    if norm == "OABN":
        report = repvgg_hf.add_oabn(model, example, args.oabn_threshold)
        record["bounded_branches"] = sum(len(branches.others) for branches in report.bounded)
    accelerator = Accelerator(mixed_precision="bf16" if args.bf16 else "no")
    model = train_phase(
        accelerator, model, (data["train"], collate), f"{name} {norm}", args.num_train_epochs, args.learning_rate,
        None, args, cross_entropy,
    )  # fmt: skip
    model = model.to("cpu").eval()
    model.state_dict()  # bounds hold for the statistics at the end
    record["kernels_before"] = tails_of_convolutions(model)
    repvgg_hf.fuse(model, example)
    record["kernels_fused"] = tails_of_convolutions(model)
    record["top1"] = {"float": accuracy(model, data["validation"], args.per_device_eval_batch_size)}
    for method, bits in product(METHODS, BITS):
        quantized = repvgg_hf.quantize(copy.deepcopy(model), method, bits)
        record["top1"][f"{method} W{bits}"] = accuracy(quantized, data["validation"], args.per_device_eval_batch_size)
    return record


def has_bounds(name: str, example: torch.Tensor) -> bool:
    """Tell whether OABN finds anything to bound in a network."""
    try:
        return bool(repvgg_hf.add_oabn(build_network(BLOCKS[name], 2), example).bounded)
    except ValueError:
        return False


def median(values: list[float]) -> float:
    return torch.tensor(values).median().item()


def markdown(records: list[dict], seed: int) -> str:
    """The study's table."""
    columns = ["float", *(f"{method} W{bits}" for method in METHODS for bits in BITS)]
    lines = [
        f"CIFAR-10, seed {seed}; top-1 in percent on held-out images, weights quantized per tensor without "
        "retraining. Kurtosis is the median over the kernels, and the largest.",
        "",
        "| network | norm | epochs | kurtosis before fusing | fused | " + " | ".join(columns) + " |",
        "|---|---|---|---|---|" + "---|" * len(columns),
    ]
    for record in records:
        tails = [[kernel["kurtosis"] for kernel in record[key]] for key in ("kernels_before", "kernels_fused")]
        tails = " | ".join(f"{median(values):.1f}, {max(values):.0f}" for values in tails)
        accuracies = " | ".join(f"{record['top1'][column]:.2f}" for column in columns)
        lines.append(f"| {record['network']} | {record['norm']} | {record['epochs']} | {tails} | {accuracies} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> dict:
    (data_args, args), _ = parse_arguments((DataArguments, GeneralizationArguments), arguments)
    check_networks(args.networks)
    splits = load_splits(data_args, seed=args.seed)
    processor = make_processor(data_args.image_size or 32)
    data = {
        "train": training_data(splits["train"], data_args, processor),
        "validation": evaluation_data(splits["validation"], data_args, processor, cache=True),
        "classes": len(splits["train"].classes),
    }
    records, settings = [], settings_of(args, data_args)
    for name in args.networks:
        for norm in ("BN", "OABN") if has_bounds(name, data["validation"][0]["pixel_values"][None]) else ("BN",):
            path = Path(args.output_dir) / f"{name.lower()}-{norm.lower()}-{args.seed}.json"
            if not path.exists():
                write_json(path, study_network(name, norm, data, args, settings))
            records.append(json.loads(path.read_text(encoding="utf-8")))
            require_same(path, records[-1], settings)
    table = markdown(records, args.seed)
    joined = {"recipe": "recipes/studies/generalization.py", "seed": args.seed, "networks": records}
    write_json(args.output_json, joined)
    Path(args.output_json).with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    return joined


if __name__ == "__main__":
    main()
