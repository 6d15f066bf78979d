"""What quantization-aware training reaches with few bits, on float checkpoints that `recipes/study.py` trained.

    python recipes/qat_study.py --models OABN/0=outputs/study/oabn BN/0=outputs/study/bn --dataset_name <CIFAR-10>

A model's name is what it is, and the seed of its training: those that differ only there share a table of their means.
Each line is a run of `recipes/qat.py` (with branches, batch norm statistics frozen, codebooks per channel) or, only if
asked for, of `recipes/qat_dkm.py` (fused, float32, a codebook a tensor with a scale a channel). Writes the figures to
`--output_json` after each one, beside it the tables made from them, as Markdown, and goes on from there when started
again. Several may share the file, on other models and with other `--output_dir`.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from repvgg_hf.training.arguments import parse_arguments
from repvgg_hf.training.report import by_kind, mean, write_json

SWITCHES = "--distillation_weight 0.5 --blend_ratio 0.5"
# options of qat.py by line
METHODS = {
    "uniform (LSQ)": "--method uniform",
    "ClusterQAT": "",
    "ClusterQAT, all switches": SWITCHES,
}
# these and others, one at a time
SINGLE = {
    "distilled": "--distillation_weight 0.5",
    "blended": "--blend_ratio 0.5",
    "calibrated codebooks": "--calibration_images 512",
    "calibrated kernels": "--calibration_images 512 --start decoded",
    "learned codebooks": "--codebook_update gradient",
    "learned and k-means codebooks": "--codebook_update both",
    "4 bits for an epoch before": "--anneal_bits 4",
    "oscillations frozen": "--freeze_threshold 0.02",
    "batch norm re-estimated": "--batch_norm_every 100",
}
METHODS |= {f"ClusterQAT, {name}": options for name, options in SINGLE.items()}
PEER = "coremltools DKM"
METHODS[PEER] = ""
# without data there is no range to start from
ACTIVATIONS = {
    name: f"{SWITCHES} --calibration_images 512 --bits {bits} --activation_bits {activation_bits}"
    for name, bits, activation_bits in (("W4A8", 4, 8), ("W4A4", 4, 4), ("W2A8", 2, 8))
}
# two entries are a coarse start: the kernels have further to go
LEARNING_RATES = {1: 0.04}


@dataclass
class QATStudyArguments:
    """Which models to train, with which bits."""

    models: list[str] = field(
        metadata={"help": "name/seed=folder of each float checkpoint, such as OABN/0=outputs/study/oabn."}
    )
    dataset_name: str = field(metadata={"help": "CIFAR-10: a Hub dataset or a local folder of parquet files."})
    dataset_title: str = field(default="CIFAR-10", metadata={"help": "What to call it in the tables."})
    image_column_name: str = field(default="img", metadata={"help": "Column with the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column with the labels."})
    augmentation: str = field(default="crop_flip", metadata={"help": "Of training images, as in train.py."})
    bits: list[int] = field(default_factory=lambda: [4, 3, 2, 1], metadata={"help": "Bits of a weight."})
    methods: list[str] = field(
        default_factory=lambda: list(METHODS)[:3], metadata={"help": f"Of {', '.join(METHODS)}."}
    )
    activations: list[str] = field(
        default_factory=lambda: list(ACTIVATIONS), metadata={"help": f"Of {', '.join(ACTIVATIONS)}; or none."}
    )
    num_train_epochs: int = field(default=2, metadata={"help": "Epochs of each run."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images in a batch."})
    mixed_precision: str = field(default="bf16", metadata={"help": "Of Accelerate: no, bf16 or fp16."})
    seed: int = field(default=0, metadata={"help": "Of order and augmentation."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many evaluation images."})
    output_dir: str = field(default="outputs/qat_study", metadata={"help": "Where models go."})
    output_json: str = field(default="model_cards/qat_study.json", metadata={"help": "Where the figures go."})

    def __post_init__(self):
        if self.activations == ["none"]:
            self.activations = []
        for option, known in (("methods", METHODS), ("activations", ACTIVATIONS)):
            for name in getattr(self, option):
                if name not in known:
                    raise ValueError(f"--{option} must be of {', '.join(known)}, got {name!r}.")
        for model in self.models:
            if "=" not in model:
                raise ValueError(f"--models takes name/seed=folder, got {model!r}.")

    def lines(self) -> dict[str, str]:
        """The options of every line, by its name."""
        lines = {
            f"{name}|{bits}": f"{METHODS[name]} --bits {bits} --learning_rate {LEARNING_RATES.get(bits, 0.01)}"
            for bits in self.bits
            for name in self.methods
        }
        return lines | {name: ACTIVATIONS[name] for name in self.activations}


def train(line: str, options: str, folder: str, study: QATStudyArguments) -> dict:
    """Run the recipe of a line on the float checkpoint in `folder`; what came out, packed, and the float accuracy."""
    output_dir = Path(study.output_dir)
    shared = {
        name: getattr(study, name)
        for name in (
            "dataset_name", "image_column_name", "label_column_name", "augmentation", "num_train_epochs",
            "per_device_train_batch_size", "seed", "max_train_samples", "max_eval_samples", "output_dir",
        )
    }  # fmt: skip
    if line.startswith(PEER):
        recipe, mixed_precision = ["qat_dkm.py"], "no"
    else:
        recipe, mixed_precision = ["qat.py", "--granularity", "per_channel"], study.mixed_precision
    recipe[0] = str(Path(__file__).with_name(recipe[0]))
    command = [sys.executable, *recipe, *options.split(), "--model_name_or_path", folder]
    for name, value in shared.items():
        if value is not None:
            command += [f"--{name}", str(value)]
    subprocess.run(command, check=True, env=os.environ | {"ACCELERATE_MIXED_PRECISION": mixed_precision})
    results = json.loads((output_dir / "qat_results.json").read_text())["results"]
    rows = {row["model"].split(", ")[-1]: row for row in results}
    packed = rows["packed"]
    return {
        "options": options,
        "top1": packed["accuracy"],
        "top5": packed["top5"],
        "float_top1": rows["with branches"]["accuracy"],
        "bits_per_weight": packed["bits_per_weight"],
        "bytes": packed["bytes"],
        "images": packed["images"],
    }


def main(arguments: list[str] | None = None) -> dict:
    (study,), _ = parse_arguments((QATStudyArguments,), arguments)
    path = Path(study.output_json)
    settings = {
        "recipe": "recipes/qat_study.py",
        "dataset": study.dataset_title,
        "epochs": study.num_train_epochs,
        "mixed_precision": study.mixed_precision,
        "seed": study.seed,
    }
    if path.exists():
        before = {name: value for name, value in json.loads(path.read_text()).items() if name != "models"}
        if before != settings:
            raise ValueError(f"{path} has figures of other runs, {before}, now {settings}: give another --output_json.")
    for model in study.models:
        name, folder = model.split("=", 1)
        for line, options in study.lines().items():
            if line in recorded(path).get(name, {}):
                continue
            row = train(line, options, folder, study)
            print(f"{name}, {line}: top-1 {row['top1']:.2f}", flush=True)
            models = recorded(path)
            models.setdefault(name, {})[line] = row
            record = settings | {"models": dict(sorted(models.items()))}
            write_json(path, record)
            path.with_suffix(".md").write_text(markdown(record), encoding="utf-8")
    record = json.loads(path.read_text())
    print(markdown(record))
    return record


def recorded(path: Path) -> dict:
    """The figures in the file so far, by model and line."""
    return json.loads(path.read_text())["models"] if path.exists() else {}


def markdown(record: dict) -> str:
    """For each kind of model a table of mean top-1, methods against bits; "(of n)" where it is of fewer networks."""
    images = next(row["images"] for results in record["models"].values() for row in results.values())
    text = [
        f"Top-1 in percent on {images:,} images of {record['dataset']}, after {record['epochs']} epochs of "
        f"quantization-aware training; seed {record['seed']}."
    ]
    for kind, results in by_kind(record["models"]).items():
        bits = sorted({int(line.split("|")[1]) for line in results if "|" in line}, reverse=True)
        networks = [list(rows.values()) for name, rows in record["models"].items() if name.split("/")[0] == kind]
        seeds, float_top1 = len(networks), mean([rows[0] for rows in networks], "float_top1")

        def cell(line, results=results, seeds=seeds):
            rows = results.get(line)
            if rows is None:
                return ""
            return f"{mean(rows):.2f}" + (f" (of {len(rows)})" if len(rows) < seeds else "")

        title = f"{kind}, float {float_top1:.2f}" + (f", mean of {seeds} networks" if seeds > 1 else "")
        text += ["", f"| {title} | " + " | ".join(f"{b} bit" for b in bits) + " |", "|---|" + "---|" * len(bits)]
        for method in METHODS:
            cells = [cell(f"{method}|{b}") for b in bits]
            if any(cells):
                text.append(f"| {method} | " + " | ".join(cells) + " |")
        others = [name for name in ACTIVATIONS if name in results]
        if others:
            text += ["", "| weights and activations, all switches | top-1 |", "|---|---|"]
            text += [f"| {name} | {cell(name)} |" for name in others]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
