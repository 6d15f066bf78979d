"""Quantize a float checkpoint without training, for every combination of bits, methods and granularities asked for.

    repvgg-hf quantize photos/ --model_name_or_path outputs/photos      # the pictures that it was trained on
    python recipes/quantize.py --model_name_or_path outputs/train --bits 8 4 3 --method uniform cluster
    python recipes/quantize.py --model_name_or_path outputs/train --bits 4 3 2 --ablation True
    python recipes/quantize.py --model_name_or_path outputs/train --peers coremltools nncf
    python recipes/quantize.py --model_name_or_path outputs/train --bits 2 --granularity per_channel --tuning_steps 300

Each quantized model is saved in `--output_dir` and evaluated; one of them is recommended: the smallest whose accuracy
drops by no more than `--tolerance` against float, or than chance explains. The figures go to `quantize_results.json`,
and accuracy against bits and bytes to `accuracy_bits` and `accuracy_bytes`, `.png` and `.svg`.
"""

import dataclasses
import itertools
import shlex
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification

import repvgg_hf
from repvgg_hf import ClusterConfig
from repvgg_hf.analysis import bits_per_weight, bits_with_one_codebook, checkpoint_bytes
from repvgg_hf.analysis.plots import import_matplotlib, plot_accuracy
from repvgg_hf.compression.ptq.config import OF_STEP, CalibrationConfig, check_use_of_ranges
from repvgg_hf.recipes.peers import PeerMethod, peer_methods
from repvgg_hf.runtime.logs import quiet
from repvgg_hf.runtime.quantization_cluster import QuantizationOptions
from repvgg_hf.runtime.quantization_methods import METHODS
from repvgg_hf.training.arguments import parse_given
from repvgg_hf.training.batches import calibration_images, collate
from repvgg_hf.training.evaluation import EvaluationArguments, evaluate_model, load_evaluation_split
from repvgg_hf.training.models import build_processor, dequantize_field, load_float
from repvgg_hf.training.report import quantization_fields, write_json
from repvgg_hf.training.splits import FOLDER, DataArguments, check_picture_folder, load_splits
from repvgg_hf.training.sweep_report import (
    accuracy_fields,
    choose,
    sweep_table,
    training_helps,
    tuning_helps,
    waste,
    why,
)

# what calibration adds, in this order, and what each is when it is off
STEPS_OFF = {
    "equalization": None, "sensitivity": "none", "error_compensation": False, "bias_correction": False,
    "tuning_steps": 0,
}  # fmt: skip


@dataclass
class QuantizeArguments:
    """Options that say what to quantize, and what to make of it."""

    # options that `--help-all` shows, and `--help` does not
    RARE = ("dequantize", "ablation", "peers", "plot_lowest")

    model_name_or_path: str = field(metadata={"help": "A float checkpoint, with branches or fused: folder or Hub id."})
    dequantize: bool = dequantize_field()
    output_dir: str = field(default="outputs/quantize", metadata={"help": "Folder for models and figures."})
    calibration_images: int = field(
        default=512,
        metadata={
            "help": "Training images, without labels, to calibrate on: so many, or all if they are fewer; 0 for none."
        },
    )
    tolerance: float = field(
        default=1.0,
        metadata={
            "help": "Recommend the smallest model whose top-1 drops by at most so many percentage points against "
            "float, or by no more than chance explains: McNemar's test at 0.05 on the same images, up to 3 points."
        },
    )
    ablation: bool = field(
        default=False,
        metadata={
            "help": "Add equalization, sensitivity, error compensation, bias correction and tuning one after the other."
        },
    )
    peers: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Libraries to compare with: coremltools, nncf, onnxruntime. Those of their methods that need "
            "calibration images run with --calibration_images only, those that quantize activations with "
            "--activation_bits only."
        },
    )
    plot: bool = field(default=True, metadata={"help": "Draw accuracy against bits and bytes; needs matplotlib."})
    plot_lowest: float | None = field(
        default=None, metadata={"help": "Lowest top-1 accuracy on the plots' axis, in percent."}
    )

    def __post_init__(self):
        if not 0 <= self.tolerance <= 100:
            raise ValueError(f"--tolerance must be from 0 to 100 percentage points, got {self.tolerance}.")


@dataclass(repr=False)
class SweepOptions(QuantizationOptions):
    """Options of a [`ClusterConfig`], of which the first three take several values: a model for each combination."""

    bits: list[int] = field(
        default_factory=lambda: [8, 4, 3, 2], metadata={"help": "Bits of a weight's code, 1 to 8; one or several."}
    )
    method: list[str] = field(
        default_factory=lambda: ["cluster"],
        metadata={"help": "How codebooks are chosen: cluster (k-means), uniform (evenly spaced), or both."},
    )
    granularity: list[str] = field(
        default_factory=lambda: ["per_tensor"],
        metadata={"help": "Which weights share a codebook: per_tensor, per_channel or per_group; one or several."},
    )

    def __post_init__(self):
        for method, granularity, bits in itertools.product(self.method, self.granularity, self.bits):
            self.config(method, granularity, bits)  # a bad option is refused before any work is done

    def config(self, method: str, granularity: str, bits: int) -> ClusterConfig:
        """The configuration of one combination, without the options that belong to another one of them."""
        options = {option.name: getattr(self, option.name) for option in dataclasses.fields(QuantizationOptions)}
        options |= {"method": method, "granularity": granularity, "bits": bits}
        if granularity != "per_group" and "per_group" in self.granularity:
            options["group_size"] = None
        for other in set(self.method) & METHODS.keys() - {method}:
            options |= dict.fromkeys(METHODS[other].options)
        return ClusterConfig(**options)


@dataclass
class SweepCalibration(CalibrationConfig):
    """Options of a [`CalibrationConfig`], with several targets: a model for each of them."""

    target_bits_per_weight: list[float] = field(
        default_factory=list,
        metadata={"help": "Further models, whose layers' bits are chosen to store so many bits per weight each."},
    )

    def __post_init__(self):
        for target in (None, *self.target_bits_per_weight):
            self.config(target_bits_per_weight=target)

    def config(self, **changes) -> CalibrationConfig:
        """The configuration with these `changes`, for one model."""
        options = {option.name: getattr(self, option.name) for option in dataclasses.fields(CalibrationConfig)}
        return CalibrationConfig(**(options | {"target_bits_per_weight": None} | changes))

    def stages(self, args: QuantizeArguments) -> dict[str, CalibrationConfig]:
        """How the weights are found at each stage of the comparison, by its name."""
        if args.calibration_images == 0:
            return {"quantized": self.config()}
        if not args.ablation:
            return {"tuned" if self.tuning_steps else "calibrated": self.config()}
        steps = {"quantized": self.config(**off(STEPS_OFF))}
        for number, (name, value) in enumerate(STEPS_OFF.items()):
            if getattr(self, name) != value:
                steps[name] = self.config(**off(list(STEPS_OFF)[number + 1 :]))
        return steps


def off(steps: Iterable[str]) -> dict:
    """The options of a [`CalibrationConfig`] without these `steps`, and without what these alone use."""
    idle = {name: getattr(CalibrationConfig, name) for name, (step, _) in OF_STEP.items() if step in steps}
    return idle | {step: STEPS_OFF[step] for step in steps}


@dataclass
class Trial:
    """One quantized model to be made.

    Attributes:
        name: of its folder.
        label: of its line in the figures.
        bits: of a weight's code; a target if they differ between layers.
        stage: how its weights are found: quantized (without images), calibrated, tuned, the last step added, or mixed.
        config, calibration: the arguments of `quantize()`; `calibration` is `None` where no images are used.
    """

    name: str
    label: str
    bits: float
    stage: str
    config: ClusterConfig
    calibration: CalibrationConfig | None


def plan(args: QuantizeArguments, sweep: SweepOptions, calibration: SweepCalibration) -> list[Trial]:
    """All combinations; a bad argument raises `ValueError` before any work is done."""
    check_use_of_ranges(calibration, sweep.activation_bits is not None)
    trials = []
    for method, granularity in itertools.product(sweep.method, sweep.granularity):
        for stage, settings in calibration.stages(args).items():
            for bits in sweep.bits:
                trials.append(make_trial(bits, stage, sweep.config(method, granularity, bits), settings))
        for target in calibration.target_bits_per_weight:
            settings = calibration.config(target_bits_per_weight=target)
            trials.append(make_trial(target, "mixed", sweep.config(method, granularity, sweep.bits[0]), settings))
    names = [trial.name for trial in trials]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{twice[0]} would be made twice: give each value of --bits, --method and the like once.")
    return trials


def make_trial(size: float, stage: str, config: ClusterConfig, calibration: CalibrationConfig | None) -> Trial:
    """The trial, called after the configuration and stage, such as `cluster-per_channel-w4-bias_correction`."""
    scale = "-scale" if config.channel_scale else ""
    activations = "" if config.activation_bits is None else f"a{config.activation_bits}"
    added = "" if stage == "quantized" else stage
    name = [f"{config.method}-{config.granularity}{scale}", f"w{size}", activations, added]
    what = f"+ {stage.replace('_', ' ')}" if stage in STEPS_OFF else added
    label = [config.method, config.granularity.removeprefix("per_") + scale.replace("-", "+"), activations, what]
    if not (added or activations):
        calibration = None  # the first stage has no use for images
    return Trial("-".join(filter(None, name)), ", ".join(filter(None, label)), size, stage, config, calibration)


def calibration_batches(args: QuantizeArguments, data_args: DataArguments, processor, batch_size: int, seed: int):
    """Training images `[batch, 3, size, size]` as in evaluation, without labels; none without calibration."""
    if args.calibration_images == 0:
        return []
    try:
        train_split = load_splits(data_args, seed=seed)["train"]
    except ValueError as error:
        raise ValueError(f"{error} Without images to calibrate on: --calibration_images 0.") from error
    images = calibration_images(train_split, args.calibration_images, data_args, processor, seed)
    return [batch["pixel_values"] for batch in DataLoader(images, batch_size, collate_fn=collate)]


def evaluate(model, dataset, args: EvaluationArguments, of_float: list[bool] | None = None) -> tuple[dict, list[bool]]:
    """Return (the figures of a row of results, for each image whether the first guess is right).

    `of_float` is the latter of the float model, which the drop is measured against; of itself by default.
    """
    figures, logits = evaluate_model(model, dataset, args)
    right = (logits.argmax(axis=1) == dataset.labels.numpy()).tolist()
    return figures | accuracy_fields(right, right if of_float is None else of_float), right


def measure(trial: Trial, output_dir: Path, processor, batches, against_float) -> dict:
    """Quantize, save and evaluate one model; returns its row of the results."""
    model = AutoModelForImageClassification.from_pretrained(output_dir / "float")
    start = time.perf_counter()
    calibration = {} if trial.calibration is None else {"calibration": batches, "calibration_config": trial.calibration}
    with quiet("repvgg_hf.compression.layers"):  # the table says which codebooks are too large
        model.quantize(trial.config, **calibration)
    seconds = time.perf_counter() - start
    folder = output_dir / trial.name
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    size = {"bytes": checkpoint_bytes(folder), "bits_per_weight": bits_per_weight(model)}
    size["bits_per_weight_with_one_codebook"] = bits_with_one_codebook(model)
    return trial_row(trial, against_float(model), size, seconds)


def trial_row(trial: Trial, figures: dict, size: dict, seconds: float) -> dict:
    """The row of the results of one of our models."""
    fields = quantization_fields(trial.config) | {"bits": trial.bits, "stage": trial.stage}
    settings = None if trial.calibration is None else dataclasses.asdict(trial.calibration)
    row = {"model": trial.name, "label": trial.label, **fields, **figures, **size, "seconds": seconds}
    return row | {"calibration_config": settings}


def measure_peer(peer: PeerMethod, bits: int, output_dir: Path, batches, against_float) -> dict:
    """The row of another library's method. Bytes are those of weights in its format and float biases."""
    model = AutoModelForImageClassification.from_pretrained(output_dir / "float")
    start = time.perf_counter()
    quantized, stored = peer.quantize(model, bits, batches)
    seconds = time.perf_counter() - start
    figures = against_float(quantized)
    layers = [layer for layer in model.modules() if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))]
    biases = sum(4 * layer.bias.numel() for layer in layers if layer.bias is not None)
    size = {"bytes": stored + biases, "bits_per_weight": 8 * stored / sum(layer.weight.numel() for layer in layers)}
    fields = {"bits": bits, "activation_bits": peer.activation_bits}
    fields["stage"] = "calibrated" if peer.calibrated else "quantized"
    return {
        "model": f"{peer.label}, w{bits}", "label": peer.label, **fields, **figures, **size, "seconds": seconds
    }  # fmt: skip


def check_options(args: QuantizeArguments, data_args: DataArguments, given: set[str]) -> None:
    """Raise `ValueError` for a folder that is not there, or an option that does nothing beside the others.

    Raises `ImportError` if plots are asked for without matplotlib.
    """
    check_picture_folder(data_args, given)
    needing = {"activation_bits", *(option.name for option in dataclasses.fields(CalibrationConfig))}
    needing |= {"ablation"} if args.ablation else set()
    idle = sorted(given & needing)
    if idle and args.calibration_images == 0:
        raise ValueError(f"--{idle[0]} needs images to calibrate on: leave it out, or add --calibration_images 512.")
    try:
        if args.plot:
            import_matplotlib()  # or it would be missed at the end
    except ImportError as error:
        if "plot" in given:
            raise
        print(f"{error} There will be none.")
        args.plot = False


def draw(record: dict, args: QuantizeArguments) -> None:
    """Draw accuracy against bits and bytes, with a ring around the recommended model."""
    rows = record["results"] + record["peers"]
    rows = [row | {"mark": "recommended"} if row["model"] == record["recommended"] else row for row in rows]
    for x in ("bits", "bytes") if args.plot else ():
        plot_accuracy(rows, Path(args.output_dir) / f"accuracy_{x}", x=x, lowest=args.plot_lowest)


def report(record: dict, args: QuantizeArguments, data_args: DataArguments, given: set[str]) -> None:
    """Print the table of a sweep, what is recommended and why, and the next command."""
    images, (float_row, *rows) = record["images"], record["results"]
    chosen, small = choose(rows, images, args.tolerance)
    print(f"\n{args.model_name_or_path} on {images:,} images (stored: bits per weight; drop: points against float)\n")
    print(sweep_table(record["results"] + record["peers"], float_row, images, chosen), end="\n\n")
    data = [
        (f"--{name}", getattr(data_args, name))
        for name in ("dataset_name", "train_dir", "validation_dir", "image_column_name", "label_column_name")
        if name in given and not (name == FOLDER[2] and FOLDER[0] in given)
    ]
    folder = [data_args.dataset_name] if FOLDER[0] in given else []
    command = [*folder, "--model_name_or_path", args.model_name_or_path, *itertools.chain(*data)]
    sentences = [why(chosen, small, images, args.tolerance, float_row), *map(waste, rows)]
    if record["calibration_images"]:
        asked = ["--calibration_images", str(args.calibration_images)] if "calibration_images" in given else []
        sentences.append(tuning_helps(rows, chosen, small, images, [*command, *asked]))
    sentences.append(training_helps(rows, chosen, small, images, command))
    if record["calibration_images"] == 0 and sentences[-1] is not None:
        sentences.append("Calibration comes first: without --calibration_images 0 it needs no training and no labels.")
    if args.plot:
        sentences.append(f"Accuracy against size is drawn in {Path(args.output_dir, 'accuracy_bytes.png')}.")
    for sentence in filter(None, sentences):
        print(sentence)
    pictures = folder or ["PICTURE"]
    print(f"Next: repvgg-hf predict {shlex.join([*pictures, '--model', str(Path(args.output_dir, chosen['model']))])}")


def main(arguments: list[str] | None = None) -> dict:
    (args, sweep, calibration, data_args, evaluation_args), arguments, given = parse_given(
        (QuantizeArguments, SweepOptions, SweepCalibration, DataArguments, EvaluationArguments), arguments, FOLDER
    )
    check_options(args, data_args, given)
    trials = plan(args, sweep, calibration)
    peers = [peer for name in args.peers for peer in peer_methods(name)]
    name, output_dir = args.model_name_or_path, Path(args.output_dir)

    model = load_float(name, args.dequantize)
    processor = build_processor(name, data_args)
    dataset = load_evaluation_split(data_args, processor, model.config, evaluation_args.seed)
    batch_size, seed = calibration.calibration_batch_size, evaluation_args.seed
    batches = calibration_batches(args, data_args, processor, batch_size, seed)
    figures, of_float = evaluate(model.reparameterize(), dataset, evaluation_args)

    def against_float(model) -> dict:
        return evaluate(model, dataset, evaluation_args, of_float)[0]

    kernels = repvgg_hf.kernel_report(model)
    model.save_pretrained(output_dir / "float")
    processor.save_pretrained(output_dir / "float")
    size = {"bytes": checkpoint_bytes(output_dir / "float"), "bits_per_weight": 32.0}
    float_row = {"model": "float", "label": "float", **quantization_fields(None), "stage": "float"}
    float_row |= figures | size | {"seconds": None, "calibration_config": None}
    record = {
        "command": ["recipes/quantize.py", *arguments],
        "seed": evaluation_args.seed,
        "images": len(dataset),
        "calibration_images": sum(map(len, batches)),
        "results": [float_row],
        "peers": [],
        "float_kernels": kernels,
    }
    used = f"calibrated on {record['calibration_images']:,} training images" if batches else "without calibration"
    print(
        f"{len(trials)} {'models' if len(trials) > 1 else 'model'}, {used}, evaluated on {len(dataset):,} images:",
        flush=True,
    )
    for trial in trials:
        row = measure(trial, output_dir, processor, batches, against_float)
        print(f"  {trial.name}  top-1 {row['top1']:.1f} %, quantized in {row['seconds']:.1f} s", flush=True)
        record["results"].append(row)
        write_json(output_dir / "quantize_results.json", record)
    for peer, bits in itertools.product(peers, sweep.bits):
        fits = bits in peer.bits and peer.activation_bits == sweep.activation_bits
        if fits and (batches or not peer.calibrated):
            record["peers"].append(measure_peer(peer, bits, output_dir, batches, against_float))

    record["recommended"] = choose(record["results"][1:], len(dataset), args.tolerance)[0]["model"]
    write_json(output_dir / "quantize_results.json", record)
    draw(record, args)
    report(record, args, data_args, given)
    return record


if __name__ == "__main__":
    main()
