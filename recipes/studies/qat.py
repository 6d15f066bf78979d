"""What quantization-aware training reaches with few bits, on float checkpoints that the study `oabn` trained.

    python -m repvgg_hf.recipes.studies.qat --models OABN/0=outputs/oabn_study/oabn BN/0=outputs/oabn_study/bn \\
        --dataset_name <CIFAR-10 on the Hub or as a parquet folder>

A model's name is what it is, and the seed of its training: those that differ only there share a table of their means.
Each line is a run of the recipe `qat` (with branches, batch norm statistics frozen, codebooks per channel) or, only if
asked for, of the study `qat_dkm` (fused, float32, a codebook per tensor with a scale per channel). Writes the figures
to `--output_json` after each one, beside it the tables made from them, as Markdown, and goes on from there when started
again. Several processes may share the file, on other models and with other `--output_dir`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from repvgg_hf.recipes.studies.shared import (
    StudyArguments,
    mean,
    require_same,
    rows_by_network,
    run_recipe,
    split_checkpoints,
)
from repvgg_hf.training.arguments import parse_arguments
from repvgg_hf.training.report import write_json

SWITCHES = "--distillation_weight 0.5 --blend_ratio 0.5"
PEER = "coremltools DKM"
# title: options of qat.py; of the peer none but those of all lines
METHODS = {
    "uniform (LSQ)": "--method uniform",
    "ClusterQAT": "",
    "ClusterQAT, all switches": SWITCHES,
    "ClusterQAT, distilled": "--distillation_weight 0.5",
    "ClusterQAT, blended": "--blend_ratio 0.5",
    PEER: "",
}
# without data there is no range to start from
ACTIVATIONS = {
    name: f"{SWITCHES} --calibration_images 512 --bits {bits} --activation_bits {activation_bits}"
    for name, bits, activation_bits in (("W4A8", 4, 8), ("W4A4", 4, 4), ("W2A8", 2, 8))
}
# two entries are a coarse start: the kernels have further to go
LEARNING_RATES = {1: 0.04}


@dataclass(kw_only=True)
class QATStudyArguments(StudyArguments):
    """Options that say which models to train, with which bits."""

    models: list[str] = field(
        metadata={"help": "Float checkpoints as name/seed=folder, such as OABN/0=outputs/oabn_study/oabn."}
    )
    augmentation: str = field(default="crop_flip", metadata={"help": "Augmentation of training images."})
    bits: list[int] = field(
        default_factory=lambda: [4, 3, 2, 1], metadata={"help": "Bits of a weight's code, 1 to 8; several."}
    )
    methods: list[str] = field(
        default_factory=lambda: list(METHODS)[:3], metadata={"help": f"Lines of the tables: {'; '.join(METHODS)}."}
    )
    activations: list[str] = field(
        default_factory=lambda: list(ACTIVATIONS),
        metadata={"help": f"Lines with quantized activations: {', '.join(ACTIVATIONS)}; or none."},
    )
    num_train_epochs: int = field(default=2, metadata={"help": "Epochs of each training."})
    per_device_train_batch_size: int = field(
        default=128, metadata={"help": "Images per batch in training, on each device."}
    )
    mixed_precision: str = field(default="bf16", metadata={"help": "Mixed precision of Accelerate: no, bf16 or fp16."})
    output_dir: str = field(default="outputs/qat_study", metadata={"help": "Folder for models."})
    output_json: str = field(
        default="outputs/qat_study/qat.json", metadata={"help": "File for the figures; their tables go beside it."}
    )

    def __post_init__(self):
        if self.activations == ["none"]:
            self.activations = []
        for option, known in (("methods", METHODS), ("activations", ACTIVATIONS)):
            for name in getattr(self, option):
                if name not in known:
                    raise ValueError(f"--{option} must be of {'; '.join(known)}, got {name!r}.")

    def lines(self) -> dict[str, tuple[str, str]]:
        """(title, options) of every line, by its key in the record."""
        lines = {
            f"{name}|{bits}": (name, f"{METHODS[name]} --bits {bits} --learning_rate {LEARNING_RATES.get(bits, 0.01)}")
            for bits in self.bits
            for name in self.methods
        }
        return lines | {name: (name, ACTIVATIONS[name]) for name in self.activations}


def train(title: str, options: str, folder: str, study: QATStudyArguments) -> dict:
    """Run the recipe of a line on the float checkpoint in `folder`; returns what came out, and the float accuracy."""
    names = (
        "augmentation", "num_train_epochs", "per_device_train_batch_size", "max_train_samples", "output_dir",
    )  # fmt: skip
    more = study.data_options() | {name: getattr(study, name) for name in names} | {"model_name_or_path": folder}
    if title == PEER:
        run_recipe("studies.qat_dkm", options, more, ACCELERATE_MIXED_PRECISION="no")
    else:
        options_of_all = f"--granularity per_channel {options}"
        run_recipe("qat", options_of_all, more, ACCELERATE_MIXED_PRECISION=study.mixed_precision)
    results = json.loads((Path(study.output_dir) / "qat_results.json").read_text())["results"]
    stages = {row["stage"]: row for row in results}
    packed = stages["packed"]
    names = ("bits", "activation_bits", "top1", "top5", "bits_per_weight", "bytes", "images")
    row = {"line": title, "options": options, "float_top1": stages["float"]["top1"]}
    return row | {name: packed[name] for name in names}


def main(arguments: list[str] | None = None) -> dict:
    (study,), _ = parse_arguments((QATStudyArguments,), arguments)
    checkpoints = split_checkpoints(study.models)
    path = Path(study.output_json)
    settings = {
        "recipe": "recipes/studies/qat.py",
        "dataset": study.dataset_title,
        "epochs": study.num_train_epochs,
        "mixed_precision": study.mixed_precision,
        "seed": study.seed,
    }
    if path.exists():
        require_same(path, json.loads(path.read_text()), settings)
    for name, (folder, network) in checkpoints.items():
        for key, (title, options) in study.lines().items():
            if key in recorded(path).get(name, {}):
                continue
            row = network | train(title, options, folder, study)
            print(f"{name}, {key}: top-1 {row['top1']:.2f}", flush=True)
            models = recorded(path)
            models.setdefault(name, {})[key] = row
            record = settings | {"models": dict(sorted(models.items()))}
            write_json(path, record)
            path.with_suffix(".md").write_text(markdown(record), encoding="utf-8")
    record = json.loads(path.read_text())
    print(markdown(record))
    return record


def recorded(path: Path) -> dict:
    """The rows in the file so far, by model and line."""
    return json.loads(path.read_text())["models"] if path.exists() else {}


def markdown(record: dict) -> str:
    """For each network a table of mean top-1, methods against bits; "(of n)" where it is of fewer seeds."""
    networks = rows_by_network(record)
    images = next(iter(networks.values()))[0]["images"]
    text = [
        f"Top-1 in percent on {images:,} images of {record['dataset']}, after {record['epochs']} epochs of "
        f"quantization-aware training; seed {record['seed']}."
    ]
    for network, rows in networks.items():
        floats = list({row["network_seed"]: row for row in rows}.values())  # one for each seed
        heading = f"{network}, float {mean(floats, 'float_top1'):.2f}"
        if len(floats) > 1:
            heading += f", mean of {len(floats)} networks"
        text += ["", *table_of_methods(heading, [row for row in rows if row["activation_bits"] is None], len(floats))]
        others = [row for row in rows if row["activation_bits"] is not None]
        if others:
            text += ["", "| weights and activations, all switches | top-1 |", "|---|---|"]
        for title in in_order(others, ACTIVATIONS):
            text.append(f"| {title} | {cell([row for row in others if row['line'] == title], len(floats))} |")
    return "\n".join(text) + "\n"


def table_of_methods(heading: str, rows: list[dict], seeds: int) -> list[str]:
    """Methods against bits, means over so many seeds."""
    bits = sorted({row["bits"] for row in rows}, reverse=True)
    text = [f"| {heading} | " + " | ".join(f"{b} bit" for b in bits) + " |", "|---|" + "---|" * len(bits)]
    for title in in_order(rows, METHODS):
        cells = [cell([row for row in rows if row["line"] == title and row["bits"] == b], seeds) for b in bits]
        text.append(f"| {title} | " + " | ".join(cells) + " |")
    return text


def in_order(rows: list[dict], known) -> list[str]:
    """The titles of the rows: those that the study knows first, others as they come."""
    titles = dict.fromkeys(row["line"] for row in rows)
    return [title for title in known if title in titles] + [title for title in titles if title not in known]


def cell(rows: list[dict], seeds: int) -> str:
    """Mean top-1 of the rows, and of how many seeds it is if not of all."""
    if not rows:
        return ""
    return f"{mean(rows):.2f}" + (f" (of {len(rows)})" if len(rows) < seeds else "")


if __name__ == "__main__":
    main()
