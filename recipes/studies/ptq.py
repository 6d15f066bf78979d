"""What each step of post-training quantization is worth, on float checkpoints that the study `oabn` trained.

    python -m repvgg_hf.recipes.studies.ptq --models BN/0=outputs/oabn_study/bn OABN/0=outputs/oabn_study/oabn \\
        --dataset_name <CIFAR-10 on the Hub or as a parquet folder> --image_column_name img

A model's name is what it is, and the seed of its training: those that differ only there share a table of their means.
With `--peers coremltools nncf onnxruntime` these libraries' methods are in it, on the same images. Writes the figures
to `--output_json` after each one, and goes on from there when started again; beside it the tables made from them, as
Markdown. Needs no labels but for measuring: the calibration images come from the training split.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig

from repvgg_hf.analysis import bits_per_weight, kernel_report
from repvgg_hf.compression.ptq.config import CalibrationConfig
from repvgg_hf.recipes.peers import PeerMethod, peer_methods
from repvgg_hf.recipes.studies.shared import (
    mean,
    require_same,
    rows_by_network,
    split_checkpoints,
    tails_of_convolutions,
)
from repvgg_hf.training.arguments import parse_arguments
from repvgg_hf.training.batches import calibration_images, evaluation_data
from repvgg_hf.training.evaluation import EvaluationArguments, evaluate_model
from repvgg_hf.training.models import build_processor, check_source, load_float
from repvgg_hf.training.report import write_json
from repvgg_hf.training.splits import DataArguments, align_splits, load_splits

PLAIN = {"error_compensation": False, "bias_correction": False}
CHANNEL = {"granularity": "per_channel"}
UNIFORM = {"method": "uniform"}
TUNED = {"tuning_steps": 300}
# title: (options of quantize, those of CalibrationConfig or None to use no images)
METHODS = {
    "uniform, tensor": (UNIFORM, None),
    "uniform, channel": (UNIFORM | CHANNEL, None),
    "uniform, channel, calibrated": (UNIFORM | CHANNEL, {}),
    "k-means, tensor and scale": ({}, None),
    "k-means, channel": (CHANNEL, None),
    "k-means, channel, by Fisher information": (CHANNEL, PLAIN | {"sensitivity": "fisher"}),
    "k-means, channel, + error compensation": (CHANNEL, {"bias_correction": False}),
    "k-means, channel, + bias correction": (CHANNEL, {}),
    "k-means, tensor and scale, calibrated": ({}, {}),
    "k-means, tensor and scale, tuned": ({}, TUNED),
    "k-means, channel, tuned": (CHANNEL, TUNED),
}
ACTIVATIONS = {
    name: {"bits": bits, "activation_bits": activation_bits}
    for name, bits, activation_bits in (("W8A8", 8, 8), ("W4A8", 4, 8), ("W4A4", 4, 4))
}
# title: (options of quantize, those of CalibrationConfig)
EQUALIZED = {f"{name}, equalized": (options, {"equalization": 0.3}) for name, options in ACTIVATIONS.items()}
EQUALIZED["W4A8, channel, equalized, tuned"] = (CHANNEL | ACTIVATIONS["W4A8"], TUNED | {"equalization": 0.3})
WITH_ACTIVATIONS = {name: (options, {}) for name, options in ACTIVATIONS.items()} | EQUALIZED
TARGETS = (2.33, 2.5, 3.2)  # bits per weight, mixed precision


@dataclass
class PTQStudyArguments:
    """Options that say which models to quantize, at which bits."""

    models: list[str] = field(
        metadata={"help": "Float checkpoints as name/seed=folder, such as BN/0=outputs/oabn_study/bn."}
    )
    bits: list[int] = field(
        default_factory=lambda: [8, 6, 5, 4, 3, 2], metadata={"help": "Bits of a weight's code, 1 to 8; several."}
    )
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Lines of the tables: {'; '.join(METHODS)}; or none."}
    )
    others: bool = field(
        default=True, metadata={"help": "Lines with quantized activations and of mixed precision, too."}
    )
    activations: list[str] = field(
        default_factory=list,
        metadata={"help": f"Further lines with quantized activations: {'; '.join(WITH_ACTIVATIONS)}."},
    )
    tuned_targets: list[float] = field(
        default_factory=list, metadata={"help": "Bits per weight of further lines of mixed precision, tuned."}
    )
    dataset_title: str = field(default="CIFAR-10", metadata={"help": "What to call the dataset in the tables."})
    peers: list[str] = field(
        default_factory=list, metadata={"help": "Libraries to compare with: coremltools, nncf, onnxruntime."}
    )
    calibration_images: int = field(default=512, metadata={"help": "Training images, without labels, to calibrate on."})
    output_json: str = field(
        default="outputs/ptq_study/ptq.json", metadata={"help": "File for the figures; their tables go beside it."}
    )

    def __post_init__(self):
        if self.methods == ["none"]:
            self.methods = []
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"--methods must be of {'; '.join(METHODS)}, got {name!r}.")
        for name in self.activations:
            if name not in WITH_ACTIVATIONS:
                raise ValueError(f"--activations must be of {'; '.join(WITH_ACTIVATIONS)}, got {name!r}.")


@dataclass
class Line:
    """A line of the study at one number of bits.

    Attributes:
        title: of the line in the tables.
        bits: of a weight's code; `None` if they differ between layers.
        quantize: `quantize(model) -> (model, bits per weight)`.
        fields: what else its row of the record says.
    """

    title: str
    bits: int | None
    quantize: Callable
    fields: dict = field(default_factory=dict)

    def row(self) -> dict:
        """The row without figures."""
        row = {"line": self.title, "bits": self.bits, "activation_bits": None, "target_bits_per_weight": None}
        return row | self.fields


def measure(folder: str, quantize, evaluation_set, evaluation_args) -> dict:
    """Evaluate the checkpoint after `quantize(model)`, which returns the model and its bits per weight."""
    model = load_float(folder, False).eval().reparameterize()
    start = time.perf_counter()
    model, size = quantize(model)
    seconds = time.perf_counter() - start
    figures, _ = evaluate_model(model, evaluation_set, evaluation_args)
    return {**figures, "bits_per_weight": size, "seconds": seconds}


def measure_kernels(folder: str) -> dict[str, list[dict]]:
    """Return the tails of the checkpoint's kernels, those of its branches and the fused ones."""
    model = load_float(folder, False).eval()
    return {"branches": tails_of_convolutions(model), "fused": kernel_report(model)}


def ours(title: str, options: dict, calibration: dict | None, images: torch.Tensor) -> Line:
    """The line of our quantization with these `options`, and of `CalibrationConfig` with those of `calibration`."""
    data = {}
    if calibration is not None:
        data = {"calibration": images, "calibration_config": CalibrationConfig(**calibration)}

    def quantize(model):
        model.quantize(**options, **data)
        return model, bits_per_weight(model)

    fields = {name: options[name] for name in ("activation_bits",) if name in options}
    fields |= {"target_bits_per_weight": (calibration or {}).get("target_bits_per_weight")}
    return Line(title, options.get("bits"), quantize, fields | {"options": options, "calibration_config": calibration})


def theirs(library: str, peer: PeerMethod, bits: int, images: torch.Tensor) -> Line:
    """The line of another library's method."""

    def quantize(model):
        weights = sum(module.weight.numel() for module in model.modules() if hasattr(module, "weight"))
        quantized, stored = peer.quantize(model, bits, list(images.split(64)))
        return quantized, 8 * stored / weights

    title = peer.label if peer.activation_bits is None else f"{peer.label}, W{bits}A{peer.activation_bits}"
    return Line(title, bits, quantize, {"library": library, "activation_bits": peer.activation_bits})


def lines(study: PTQStudyArguments, images: torch.Tensor) -> dict[str, Line]:
    """Every line of the study, by its key in the record."""
    chosen = {"float": Line("float", 32, lambda model: (model, 32.0))}
    for title in study.methods:
        options, calibration = METHODS[title]
        chosen |= {f"{title}|{b}": ours(title, options | {"bits": b}, calibration, images) for b in study.bits}
    for title in (*(ACTIVATIONS if study.others else ()), *study.activations):
        chosen[title] = ours(title, *WITH_ACTIVATIONS[title], images)
    for target in TARGETS if study.others else ():
        title = f"mixed precision, target {target}"
        chosen[title] = ours(title, {}, {"target_bits_per_weight": target}, images)
    for target in study.tuned_targets:
        title = f"mixed precision, tuned, target {target}"
        chosen[title] = ours(title, CHANNEL, TUNED | {"target_bits_per_weight": target}, images)
    for library in study.peers:
        for peer in peer_methods(library):
            for bits in study.bits:
                if bits in peer.bits:
                    chosen[f"{peer.label}|{bits}"] = theirs(library, peer, bits, images)
    return chosen


def main(arguments: list[str] | None = None) -> dict:
    (study, data_args, evaluation_args), _ = parse_arguments(
        (PTQStudyArguments, DataArguments, EvaluationArguments), arguments
    )
    checkpoints = split_checkpoints(study.models)
    for folder, _ in checkpoints.values():
        check_source(folder, dequantize=None)
    path, seed = Path(study.output_json), evaluation_args.seed
    record = {
        "recipe": "recipes/studies/ptq.py",
        "dataset": study.dataset_title,
        "calibration_images": study.calibration_images,
        "seed": seed,
        "models": {},
    }
    processor = build_processor(next(iter(checkpoints.values()))[0], data_args)
    splits = load_splits(data_args, seed=seed)
    record["images"] = len(splits["validation"])
    if path.exists():
        before = json.loads(path.read_text())
        require_same(path, before, {name: value for name, value in record.items() if name != "models"})
        record["models"] = before["models"]
    calibration_set = calibration_images(splits["train"], study.calibration_images, data_args, processor, seed)
    images = torch.stack([example["pixel_values"] for example in calibration_set])
    for name, (folder, network) in checkpoints.items():
        results = record["models"].setdefault(name, {})
        aligned = align_splits(splits, AutoConfig.from_pretrained(folder), data_args)["validation"]
        evaluation_set = evaluation_data(aligned, data_args, processor, cache=True)
        for key, line in lines(study, images).items():
            if key not in results:
                figures = measure(folder, line.quantize, evaluation_set, evaluation_args)
                results[key] = network | line.row() | figures
                if key == "float":
                    results[key]["kernels"] = measure_kernels(folder)
                print(f"{name}, {key}: top-1 {figures['top1']:.2f}", flush=True)
                write_json(path, record)
    table = markdown(record)
    path.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    return record


def markdown(record: dict) -> str:
    """For each network a table of mean top-1: methods against bits."""
    networks = rows_by_network(record)
    seeds = sorted({row["network_seed"] for rows in networks.values() for row in rows} - {None})
    text = [
        f"Top-1 in percent on {record['images']:,} images of {record['dataset']}; calibrated on "
        f"{record['calibration_images']} training images without labels, seed {record['seed']}. "
        + "The last column has the bits that a weight takes with the fewest bits, codebooks and scales included."
        + (f" Means over float networks trained with the seeds {' and '.join(seeds)}." if seeds else "")
    ]
    for network, rows in networks.items():
        floats = [row for row in rows if row["line"] == "float"]
        plain = [row for row in rows if row["line"] != "float" and row["activation_bits"] is None]
        methods = [row for row in plain if row["target_bits_per_weight"] is None]
        others = [row for row in rows if row not in floats and row not in methods]
        text += ["", *table_of_methods(f"{network}, float {mean(floats):.2f}", methods), "", *table_of_others(others)]
    return "\n".join(text).strip() + "\n"


def table_of_methods(heading: str, rows: list[dict]) -> list[str]:
    """Ours and other libraries' methods against bits, and what the weights take with the fewest, codebooks included."""
    bits = sorted({row["bits"] for row in rows}, reverse=True)
    text = [
        f"| {heading} | " + " | ".join(f"{b} bit" for b in bits) + " | stored |",
        "|---|" + "---|" * (len(bits) + 1),
    ]
    for title in dict.fromkeys(row["line"] for row in rows):
        cells = [[row for row in rows if row["line"] == title and row["bits"] == b] for b in bits]
        figures = " | ".join(f"{mean(cell):.2f}" if cell else "" for cell in cells)
        stored = mean([cell for cell in cells if cell][-1], "bits_per_weight")
        text.append(f"| {title} | {figures} | {stored:.2f} |")
    return text


def table_of_others(rows: list[dict]) -> list[str]:
    """Activations and mixed precision."""
    if not rows:
        return []
    text = ["| | bits per weight | top-1 |", "|---|---|---|"]
    for title in dict.fromkeys(row["line"] for row in rows):
        cell = [row for row in rows if row["line"] == title]
        text.append(f"| {title} | {mean(cell, 'bits_per_weight'):.2f} | {mean(cell):.2f} |")
    return text


if __name__ == "__main__":
    main()
