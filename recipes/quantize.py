"""Quantize a float checkpoint without training, for every combination of bits, methods and granularities asked for.

    python recipes/ptq.py --model_name_or_path outputs/train --bits 8 4 3 --methods uniform cluster
    python recipes/ptq.py --model_name_or_path outputs/train --bits 4 3 2 --calibration_samples 512 --ablation True
    python recipes/ptq.py --model_name_or_path outputs/train --calibration_samples 512 --peers coremltools nncf

Each quantized model is saved in `--output_dir` and evaluated; the figures go to `ptq_results.json` there, and accuracy
against bits and bytes to `accuracy_bits` and `accuracy_bytes`, `.png` and `.svg`.
"""

import dataclasses
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification

import repvgg_hf
from repvgg_hf.training.arguments import parse_arguments
from repvgg_hf.training.pictures import DataArguments, collate, load_splits, with_pixel_values
from repvgg_hf.training.evaluation import EvaluationArguments, evaluate_model, load_evaluation_split
from repvgg_hf.training.models import build_processor
from repvgg_hf.recipes.peers import PeerMethod, peer_methods
from repvgg_hf.analysis import bits_per_weight, checkpoint_bytes
from repvgg_hf.analysis.plots import import_matplotlib, plot_accuracy
from repvgg_hf.compression.ptq.calibrate import DEFAULT_TUNING_STEPS, CalibrationOptions
from repvgg_hf.training.report import print_table, write_json

TABLE = ("model", "top1", "top5", "loss", "bytes", "bits_per_weight", "seconds")
SHARED = ("channel_scale", "codebook_dtype", "symmetric", "range_method", "activation_bits")
# what calibration adds, in this order, and what each is when it is off
PLAIN = {"sensitivity": "none", "error_compensation": False, "bias_correction": False, "tuning_steps": 0}


@dataclass
class QuantizationArguments:
    """What to quantize, and how. Lists are combined with each other."""

    model_name_or_path: str = field(metadata={"help": "A float checkpoint, with branches or fused."})
    output_dir: str = field(default="outputs/ptq", metadata={"help": "Where models and figures go."})
    bits: list[int] = field(default_factory=lambda: [4], metadata={"help": "Bits of a weight, 1 to 8."})
    methods: list[str] = field(default_factory=lambda: ["cluster"], metadata={"help": "cluster, uniform."})
    granularities: list[str] = field(
        default_factory=lambda: ["per_tensor"], metadata={"help": "per_tensor, per_channel, per_group."}
    )
    group_size: int | None = field(default=None, metadata={"help": "Output channels a codebook, with per_group."})
    channel_scale: bool | None = field(default=None, metadata={"help": "A scale for each output channel."})
    codebook_dtype: str = field(default="float16", metadata={"help": "float16, float32 or int8."})
    symmetric: bool | None = field(
        default=None, metadata={"help": "Mirror-image codebooks: default of uniform, which else goes from low to high."}
    )
    range_method: str = field(default="mse", metadata={"help": "Uniform: mse or minmax."})
    activation_bits: int | None = field(
        default=None, metadata={"help": "Bits of every layer's input; needs --calibration_samples."}
    )
    peers: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Libraries to compare with: coremltools, nncf. Those of their methods that need calibration images "
            "run with --calibration_samples only, those that quantize activations with --activation_bits only."
        },
    )
    plot: bool = field(default=True, metadata={"help": "Draw the figures; needs matplotlib."})
    plot_lowest: float | None = field(default=None, metadata={"help": "Where the figures' accuracy begins, percent."})


@dataclass
class CalibrationArguments:
    """Calibration on images of the training split, without labels. An option left out takes `quantize()`'s default."""

    calibration_samples: int = field(default=0, metadata={"help": "How many images; 0 quantizes without data."})
    calibration_batch_size: int = field(default=64, metadata={"help": "Images in a batch."})
    sensitivity: str | None = field(default=None, metadata={"help": "none, second_moment or fisher."})
    error_compensation: bool | None = field(default=None, metadata={"help": "GPTQ with the codebook."})
    bias_correction: bool | None = field(default=None, metadata={"help": "Keep every layer's mean output."})
    tuning_steps: int | None = field(default=None, metadata={"help": "Steps of training on the float model's outputs."})
    activation_range: str | None = field(default=None, metadata={"help": "minmax, percentile, mse or entropy."})
    target_bits_per_weight: list[float] = field(
        default_factory=list, metadata={"help": "Further models, whose layers' bits are chosen to store so many."}
    )
    ablation: bool = field(
        default=False, metadata={"help": "Add sensitivity, error compensation, bias correction and tuning in turn."}
    )

    def options(self) -> dict:
        """The whole options of `quantize()`. Raises `ValueError` for a bad one, before any work is done."""
        names = [name for name in (*PLAIN, "activation_range") if getattr(self, name) is not None]
        options = dataclasses.asdict(CalibrationOptions(**{name: getattr(self, name) for name in names}))
        return {name: options[name] for name in (*PLAIN, "activation_range")}

    def steps(self) -> dict[str, dict | None]:
        """Options of `quantize()` for each step of the comparison, by name; `None` without calibration."""
        options = self.options()
        if self.calibration_samples == 0:
            return {"": None}
        if not self.ablation:
            return {"calibrated": options}
        if options["tuning_steps"] is None:
            options["tuning_steps"] = DEFAULT_TUNING_STEPS
        steps = {"": options | PLAIN}
        for name in PLAIN:
            if options[name] != PLAIN[name]:
                steps[name] = steps[list(steps)[-1]] | {name: options[name]}
        return steps


@dataclass
class Trial:
    """One quantized model to be made: its folder, its line in the figures, and the arguments of `quantize()`.

    `bits` is `None` if they differ between layers; `options` is `None` without calibration.
    """

    name: str
    label: str
    bits: int | None
    config: repvgg_hf.ClusterConfig
    options: dict | None


def plan(quantization: QuantizationArguments, calibration: CalibrationArguments) -> list[Trial]:
    """All combinations; a bad argument raises `ValueError` before any work is done."""
    needs_images = {name: getattr(calibration, name) for name in ("ablation", "target_bits_per_weight")}
    needs_images |= {"activation_bits": quantization.activation_bits is not None}
    for name, given in needs_images.items():
        if given and calibration.calibration_samples == 0:
            raise ValueError(f"--{name} needs images to calibrate on: add --calibration_samples 512.")
    shared = {name: getattr(quantization, name) for name in SHARED}
    trials = []
    for method, granularity in itertools.product(quantization.methods, quantization.granularities):
        group_size = quantization.group_size if granularity == "per_group" else None
        shared |= {"method": method, "granularity": granularity, "group_size": group_size}
        for step, options in calibration.steps().items():
            for bits in quantization.bits:
                trials.append(make_trial(bits, step, repvgg_hf.ClusterConfig(bits=bits, **shared), options))
        for target in calibration.target_bits_per_weight:
            options = calibration.options() | {"target_bits_per_weight": target}
            CalibrationOptions(**options)  # checks the target
            trials.append(make_trial(target, "mixed", repvgg_hf.ClusterConfig(**shared), options))
    return trials


def make_trial(size: float, step: str, config: repvgg_hf.ClusterConfig, options: dict | None) -> Trial:
    """Named after the configuration and what was done besides, such as `cluster-per_channel-w4-tuning_steps`."""
    scale = "+scale" if config.channel_scale else ""
    activations = "" if config.activation_bits is None else f"a{config.activation_bits}"
    name = [f"{config.method}-{config.granularity}{scale}", f"w{size}", activations, step]
    what = f"+ {step.replace('_', ' ')}" if step in PLAIN else step
    label = [config.method, config.granularity.removeprefix("per_") + scale, activations, what]
    if not (step or activations):
        options = None  # the first step of an ablation has no use for images
    bits = None if step == "mixed" else config.bits
    return Trial("-".join(filter(None, name)), ", ".join(filter(None, label)), bits, config, options)


def calibration_batches(data_args: DataArguments, processor, calibration: CalibrationArguments, seed: int):
    """Training images `[batch, 3, size, size]` as in evaluation, without labels; none without calibration."""
    if calibration.calibration_samples == 0:
        return []
    limited = dataclasses.replace(data_args, max_train_samples=calibration.calibration_samples)
    images = with_pixel_values(load_splits(limited, seed=seed)["train"], limited, processor, train=False)
    loader = DataLoader(images, calibration.calibration_batch_size, collate_fn=collate)
    return [batch["pixel_values"] for batch in loader]


def measure(trial: Trial, output_dir: Path, processor, batches, dataset, evaluation_args) -> dict:
    """Quantize, save and evaluate one model; its row of the results."""
    model = AutoModelForImageClassification.from_pretrained(output_dir / "float")
    start = time.perf_counter()
    options = {} if trial.options is None else {"calibration": batches} | trial.options
    model.quantize(trial.config, **options)
    seconds = time.perf_counter() - start
    folder = output_dir / trial.name
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    figures, _ = evaluate_model(model, dataset, evaluation_args)
    size = {"bytes": checkpoint_bytes(folder), "bits_per_weight": bits_per_weight(model)}
    return row(trial.name, trial.label, trial.bits, figures, size, seconds, trial.options)


def measure_peer(peer: PeerMethod, bits: int, output_dir: Path, batches, dataset, evaluation_args) -> dict:
    """The same for another library's method. Bytes are those of weights in its format and float biases."""
    model = AutoModelForImageClassification.from_pretrained(output_dir / "float")
    start = time.perf_counter()
    quantized, stored = peer.quantize(model, bits, batches)
    seconds = time.perf_counter() - start
    figures, _ = evaluate_model(quantized, dataset, evaluation_args)
    layers = [layer for layer in model.modules() if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))]
    biases = sum(4 * layer.bias.numel() for layer in layers if layer.bias is not None)
    size = {"bytes": stored + biases, "bits_per_weight": 8 * stored / sum(layer.weight.numel() for layer in layers)}
    return row(f"{peer.label}, w{bits}", peer.label, bits, figures, size, seconds, None)


def row(model: str, label: str, bits: int | None, figures: dict, size: dict, seconds: float | None, options) -> dict:
    return {"model": model, "label": label, "bits": bits, **figures, **size, "seconds": seconds, "options": options}


def main(arguments: list[str] | None = None) -> dict:
    (quantization, calibration, data_args, evaluation_args), arguments = parse_arguments(
        (QuantizationArguments, CalibrationArguments, DataArguments, EvaluationArguments), arguments
    )
    trials = plan(quantization, calibration)
    peers = [peer for name in quantization.peers for peer in peer_methods(name)]
    if quantization.plot:
        import_matplotlib()  # or it would be missed at the end
    name, output_dir = quantization.model_name_or_path, Path(quantization.output_dir)

    model = AutoModelForImageClassification.from_pretrained(name)
    processor = build_processor(name, data_args)
    dataset = load_evaluation_split(data_args, processor, model.config, evaluation_args.seed)
    batches = calibration_batches(data_args, processor, calibration, evaluation_args.seed)
    figures, _ = evaluate_model(model.reparameterize(), dataset, evaluation_args)
    kernels = repvgg_hf.kernel_report(model)
    model.save_pretrained(output_dir / "float")
    size = {"bytes": checkpoint_bytes(output_dir / "float"), "bits_per_weight": 32.0}
    record = {
        "command": ["recipes/ptq.py", *arguments],
        "seed": evaluation_args.seed,
        "images": len(dataset),
        "calibration_samples": sum(map(len, batches)),
        "results": [row("float", "float", 32, figures, size, None, None)],
        "peers": [],
        "float_kernels": kernels,
    }
    for trial in trials:
        record["results"].append(measure(trial, output_dir, processor, batches, dataset, evaluation_args))
        write_json(output_dir / "ptq_results.json", record)
    for peer, bits in itertools.product(peers, quantization.bits):
        fits = bits in peer.bits and peer.activation_bits == quantization.activation_bits
        if fits and (batches or not peer.calibrated):
            record["peers"].append(measure_peer(peer, bits, output_dir, batches, dataset, evaluation_args))
            write_json(output_dir / "ptq_results.json", record)

    rows = record["results"] + record["peers"]
    print_table(f"{name} on {len(dataset)} images", [{column: line[column] for column in TABLE} for line in rows])
    if quantization.plot:
        for x in ("bits", "bytes"):
            plot_accuracy(rows, output_dir / f"accuracy_{x}", x=x, lowest=quantization.plot_lowest)
    return record


if __name__ == "__main__":
    main()
