"""Train with OABN, fuse, train with quantized weights (ClusterQAT), pack, save, reload: the whole story.

    accelerate launch recipes/qat.py                                       # digits, from scratch, 4 bits
    accelerate launch recipes/qat.py --model_name_or_path outputs/train    # from a float checkpoint
    repvgg-hf qat photos/ --model_name_or_path outputs/photos --bits 2     # of the pictures in a folder
    accelerate launch --config_file recipes/configs/gpu8.yaml recipes/qat.py --bits 2 --granularity per_channel \\
        --distillation_weight 0.5 --blend_ratio 0.5 --model_name_or_path ...      # all that helps with few bits

`--output_dir` holds the float model (`float/`), the fused one (`fused/`), the quantized one (`quantized/`), the figures
(`qat_results.json`) and a checkpoint of the last epoch of each phase, from which `--resume_from_checkpoint` goes on:
wherever it was killed, to the same weights. It refuses to if data, model or options are not the same.
"""

import copy
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification

from repvgg_hf import ClusterConfig, RepVGGConfig
from repvgg_hf.analysis import bits_per_weight, checkpoint_bytes
from repvgg_hf.compression.ptq.config import ACTIVATION_RANGES, CalibrationConfig, check_use_of_ranges
from repvgg_hf.compression.qat.config import QATConfig, check_qat_options
from repvgg_hf.compression.qat.distillation import Distillation
from repvgg_hf.runtime.quantization_cluster import QuantizationOptions
from repvgg_hf.training.arguments import parse_given
from repvgg_hf.training.batches import batches_per_epoch, calibration_images, collate, evaluation_data, training_data
from repvgg_hf.training.checkpoints import RunFolder, resume_place
from repvgg_hf.training.data_defaults import suggest_plan
from repvgg_hf.training.loop import PhaseArguments, loss_on_labels, optimizer_steps, predict, train_phase
from repvgg_hf.training.metrics import accuracies
from repvgg_hf.training.models import ModelArguments, build_model, build_processor, check_source
from repvgg_hf.training.report import print_table, quantization_fields, write_json
from repvgg_hf.training.run_record import run_record
from repvgg_hf.training.splits import FOLDER, DataArguments, ImageSplit, align_splits, check_picture_folder, load_splits

RELOADED_BATCHES = 4  # enough to compare logits, and small enough to hand to another process

TABLE = ("model", "top1", "top5", "images", "bytes", "bits_per_weight", "largest_logit_difference")

# what a user's own process does, with nothing in memory from this one
RELOAD = """
import sys, torch, repvgg_hf
from transformers import AutoModelForImageClassification
folder, pixel_values, logits = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(folder)
with torch.inference_mode():
    batches = torch.load(pixel_values)
    torch.save(torch.cat([model(batch).logits for batch in batches]), logits)
"""


@dataclass
class QATArguments(PhaseArguments):
    """Options of the training; those of the quantization are [`QuantizationOptions`] and [`QATConfig`]."""

    output_dir: str = field(default="outputs/qat", metadata={"help": "Folder for models, checkpoints and figures."})
    num_float_epochs: int = field(
        default=24, metadata={"help": "Epochs of float training, if no --model_name_or_path is given."}
    )
    float_learning_rate: float = field(default=0.1, metadata={"help": "Peak learning rate of float training."})
    num_train_epochs: int = field(
        default=5, metadata={"help": "Epochs of quantization-aware training; of a folder by default 400 steps or more."}
    )
    learning_rate: float = field(default=0.01, metadata={"help": "Peak learning rate of quantization-aware training."})
    blend_ratio: float = field(
        default=0.0,
        metadata={
            "help": "Share of quantization-aware training in which it goes over from float weights to quantized ones: "
            "--blend_steps without counting steps. For 1 bit 0.5."
        },
    )
    fused: bool = field(default=False, metadata={"help": "Train the fused kernels instead of the branches."})
    target_bits_per_weight: float | None = field(
        default=None,
        metadata={
            "help": "Share out bits: choose each layer's so that the model stores this many on average, such as 2.1."
        },
    )
    calibration_images: int = field(
        default=0,
        metadata={
            "help": "Training images, without labels, to calibrate on: for ranges with --activation_bits, for what "
            "bits cost with --target_bits_per_weight."
        },
    )
    activation_range: str = field(
        default="mse",
        metadata={"help": f"Range of a layer's input with --activation_bits: {', '.join(ACTIVATION_RANGES)}."},
    )
    distillation_weight: float = field(
        default=0.0, metadata={"help": "Share of the loss that is taken from the float model's logits, 0 to 1."}
    )
    distillation_temperature: float = field(
        default=2.0, metadata={"help": "Temperature of the class probabilities in distillation."}
    )
    distillation_features: float = field(
        default=0.0, metadata={"help": "Weight of the float model's feature maps in the loss; 0 for none."}
    )
    report_to: str = field(default="none", metadata={"help": "A tracker of Accelerate, such as tensorboard, or none."})

    def __post_init__(self):
        if not 0 <= self.blend_ratio <= 1:
            raise ValueError(f"--blend_ratio must be from 0 to 1, got {self.blend_ratio}.")

    def calibration_config(self) -> CalibrationConfig:
        """How calibration images are used; raises `ValueError` for an option that is out of range."""
        return CalibrationConfig(
            activation_range=self.activation_range, target_bits_per_weight=self.target_bits_per_weight
        )


def check_options(
    args: QATArguments, quantization: QuantizationOptions, qat_config: QATConfig, source: str | None, given: set[str]
) -> None:
    """Raise `ValueError` for options that don't fit each other: a bad one shall not cost the float training.

    `source` is the float checkpoint to start from, if any, and `given` are the options that the command names.
    """
    check_use_of_ranges(args.calibration_config(), quantization.activation_bits is not None)
    check_qat_options(quantization, qat_config)
    idle = sorted(given & {"num_float_epochs", "float_learning_rate"})
    if source is not None and idle:
        raise ValueError(
            f"--{idle[0]} is of float training, and --model_name_or_path {source} is trained: leave one out."
        )
    if "distillation_temperature" in given and not args.distillation_weight:
        raise ValueError(
            "--distillation_temperature does nothing without --distillation_weight: give that, such as 0.5, or leave "
            "the temperature out."
        )
    if args.blend_ratio and qat_config.blend_steps:
        raise ValueError(
            f"--blend_ratio {args.blend_ratio} and --blend_steps {qat_config.blend_steps} say the same: give one."
        )
    needs_images = quantization.activation_bits is not None or args.target_bits_per_weight is not None
    if needs_images != (args.calibration_images > 0):
        raise ValueError(
            "--activation_bits needs images to find the inputs' ranges on, --target_bits_per_weight to find what bits "
            f"cost, and training uses them for nothing else: got --activation_bits {quantization.activation_bits}, "
            f"--target_bits_per_weight {args.target_bits_per_weight} and --calibration_images "
            f"{args.calibration_images}, give images, such as --calibration_images 512, and one of the others, or none."
        )
    if args.target_bits_per_weight is not None and quantization.bits_overrides:
        raise ValueError(
            "--target_bits_per_weight chooses the bits of every layer, and --bits_overrides those of some: leave one "
            "out."
        )


def suit_pictures(data_args: DataArguments, args: QATArguments, images: int, processes: int, given: set[str]) -> None:
    """Set what was not `given` to what suits so many pictures: few of them need many epochs."""
    if "augmentation" not in given:
        data_args.augmentation = "photo"
    batch_size = args.per_device_train_batch_size if "per_device_train_batch_size" in given else None
    epochs = args.num_train_epochs if "num_train_epochs" in given else None
    plan = suggest_plan(images, True, batch_size, epochs, processes, args.gradient_accumulation_steps)
    args.per_device_train_batch_size, args.num_train_epochs = plan.batch_size, plan.epochs


def total_steps(images: int, processes: int, args: QATArguments) -> int:
    """The optimizer steps of quantization-aware training on so many images."""
    batches = batches_per_epoch(images, args.per_device_train_batch_size, processes)
    return args.num_train_epochs * optimizer_steps(batches, args)


def reload_logits(folder: Path, batches: list[torch.Tensor]) -> np.ndarray:
    """Logits of the model in `folder`, computed by a fresh process."""
    pixel_values, logits = folder.with_name("reload_inputs.pt"), folder.with_name("reload_logits.pt")
    torch.save(batches, pixel_values)
    try:
        subprocess.run([sys.executable, "-c", RELOAD, str(folder), str(pixel_values), str(logits)], check=True)
        return torch.load(logits).numpy()
    finally:
        pixel_values.unlink()
        logits.unlink(missing_ok=True)


class Data:
    """What the run looks at: the splits, as the image processor makes them, for each phase.

    Args:
        splits: `train` and `validation`, with labels as the model counts them.
        data_args: how the images are read and augmented.
        args: the batch sizes.
        processor: the model's image processor.

    Attributes:
        train: the training images, augmented, and their `collate_fn`.
        as_evaluated: for each split (dataset of pixels as in evaluation, labels).
        validation: a loader of the held-out images.
        some_batches: the pixels of its first batches.
    """

    def __init__(self, splits: dict[str, ImageSplit], data_args: DataArguments, args: QATArguments, processor):
        self.splits, self.data_args, self.processor = splits, data_args, processor
        self.train = (training_data(splits["train"], data_args, processor), collate)
        held_out = evaluation_data(splits["validation"], data_args, processor, cache=True)
        train_split = evaluation_data(splits["train"], data_args, processor)
        self.labels = splits["validation"].labels
        self.as_evaluated = {"training": (train_split, splits["train"].labels), "validation": (held_out, self.labels)}
        self.validation = DataLoader(held_out, args.per_device_eval_batch_size, collate_fn=collate)
        self.some_batches = [batch["pixel_values"] for batch, _ in zip(self.validation, range(RELOADED_BATCHES))]

    def calibration(self, args: QATArguments) -> dict:
        """The arguments of `prepare_qat` for input ranges and bits; none without `--calibration_images`."""
        if not args.calibration_images:
            return {}
        split, count = self.splits["train"], args.calibration_images
        images = calibration_images(split, count, self.data_args, self.processor, args.seed)
        return {"calibration": images, "calibration_config": args.calibration_config()}


def start_accelerator(args: QATArguments, quantization: QuantizationOptions) -> Accelerator:
    """The accelerator of the run, with its tracker."""
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,  # one scheduler step per optimizer step, whatever the number of processes
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
    )
    if args.report_to != "none":
        accelerator.init_trackers("qat", {"bits": quantization.bits, "granularity": quantization.granularity})
    return accelerator


def main(arguments: list[str] | None = None) -> dict:
    options, arguments, given = parse_given(
        (ModelArguments, DataArguments, QATArguments, QuantizationOptions, QATConfig), arguments, FOLDER
    )
    model_args, data_args, args, quantization, qat_config = options
    check_options(args, quantization, qat_config, model_args.model_name_or_path, given)
    check_picture_folder(data_args, given)
    check_source(model_args.model_name_or_path, model_args.dequantize)
    resume = resume_place(args.resume_from_checkpoint)
    accelerator = start_accelerator(args, quantization)

    splits = load_splits(data_args, seed=args.seed)
    if FOLDER[0] in given:
        suit_pictures(data_args, args, len(splits["train"]), accelerator.num_processes, given)
    set_seed(args.seed)  # each part of the run begins with a seed: what was done before it leaves no trace
    model = build_model(model_args, splits["train"].classes, data_args.labels_by_position)
    # computing a loss would set it, which a run that is resumed after its last epoch does not do
    model.config.problem_type = "single_label_classification"
    processor = build_processor(model_args.model_name_or_path, data_args, model_args.num_channels)
    data = Data(align_splits(splits, model.config, data_args), data_args, args, processor)
    world = {"number_of_processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision}
    record = run_record(options, model, processor, data.as_evaluated, **world)
    run = RunFolder(accelerator, args.output_dir, record, resume, processor)
    data.validation = accelerator.prepare(data.validation)

    logits = {}
    if model_args.model_name_or_path is None and "float" not in run.finished:
        rate, epochs = args.float_learning_rate, args.num_float_epochs
        model = train_phase(accelerator, model, data.train, "float", epochs, rate, run, args)
    run.save_model("float", model)
    logits["float"] = predict(accelerator, load(run, "float"), data.validation)
    run.save_model("fused", load(run, "float").reparameterize())
    logits["fused"] = predict(accelerator, load(run, "fused"), data.validation)

    if args.blend_ratio:
        steps = total_steps(len(data.train[0]), accelerator.num_processes, args)
        qat_config = replace(qat_config, blend_steps=round(args.blend_ratio * steps))
    model = train_quantized(run, data, args, ClusterConfig(**asdict(quantization)), qat_config)
    logits["trained"] = predict(accelerator, model, data.validation)
    run.save_model("quantized", model.quantize())
    logits["packed"] = predict(accelerator, model, data.validation)

    rows = []
    if accelerator.is_main_process:
        logits["reloaded"] = reload_logits(run.folder / "quantized", data.some_batches)  # like a user
        bits = args.target_bits_per_weight or quantization.bits
        rows = result_rows(run.folder, quantization, bits, bits_per_weight(model), logits, data.labels)
        settings = {"seed": args.seed, **saved_quantization(run), "qat_config": asdict(qat_config)}
        write_json(
            run.folder / "qat_results.json", {"command": ["recipes/qat.py", *arguments], **settings, "results": rows}
        )
        title = "Held-out images; difference to the line above"
        print_table(title, [{column: row[column] for column in TABLE} for row in rows])
    accelerator.end_training()
    return {"results": rows}


def saved_quantization(run: RunFolder) -> dict:
    """The `quantization_config` of the packed model's files.

    The model in memory has no checksum in a run that goes on after they were written.
    """
    config = json.loads((run.folder / "quantized" / "config.json").read_text(encoding="utf-8"))
    return {"quantization_config": config["quantization_config"]}


def load(run: RunFolder, name: str):
    """The finished model `name` of a run.

    It is loaded in any case, also when it is in memory: a resumed run shall go on from the same memory layout, on which
    the last bits of sums depend.
    """
    return AutoModelForImageClassification.from_pretrained(run.folder / name)


def train_quantized(run: RunFolder, data: Data, args: QATArguments, config: ClusterConfig, qat_config: QATConfig):
    """Train the float model of `run` on with quantized weights, still with branches unless `--fused`; returns it."""
    distillation = Distillation(
        load(run, "fused"), args.distillation_weight, args.distillation_temperature, args.distillation_features
    )
    model = load(run, "float").to(run.accelerator.device)
    if args.fused:
        model.reparameterize()
    calibration = data.calibration(args)
    if args.target_bits_per_weight is not None:
        config.bits_overrides = shared_out_bits(run.accelerator, model, config, calibration)
        left = replace(calibration.pop("calibration_config"), target_bits_per_weight=None)
        calibration = calibration | {"calibration_config": left} if config.activation_bits is not None else {}
    set_seed(args.seed)
    model.prepare_qat(config, qat_config=qat_config, **calibration)
    epochs, rate, loss = args.num_train_epochs, args.learning_rate, loss_of(distillation)
    return train_phase(run.accelerator, model, data.train, "qat", epochs, rate, run, args, loss)


def shared_out_bits(accelerator: Accelerator, model, config: ClusterConfig, calibration: dict) -> dict[str, int]:
    """Each layer's bits as the first process chooses them: what they cost may differ in the last digits elsewhere."""
    chosen = None
    if accelerator.is_main_process:
        chosen = copy.deepcopy(model).prepare_qat(config, **calibration).qat_settings[0].bits_overrides
    return broadcast_object_list([chosen])[0]


def result_rows(
    folder: Path,
    quantization: QuantizationOptions,
    bits: float,
    weight_bits: float,
    logits: dict[str, np.ndarray],
    labels: np.ndarray,
) -> list[dict]:
    """The figures of each stage, of which each is compared with the one before.

    Args:
        folder: the run's, with the models.
        quantization: how the last three stages are quantized.
        bits: of a weight's code; a target if they differ between layers.
        weight_bits: bits per weight of the quantized model.
        logits: `[images, classes]` of each stage, by its name; of the reloaded model they may be of fewer images.
        labels: of all images.
    """

    def size(name: str, bits: float) -> dict:
        return {"bytes": checkpoint_bytes(folder / name), "bits_per_weight": bits}

    title, packed = f"{bits} bit", size("quantized", weight_bits)
    first = "as it began" if RepVGGConfig.from_pretrained(folder / "float").deploy else "with branches"
    rows = []
    for name, config, stage, sizes, reference in (
        (f"float, {first}", None, "float", size("float", 32.0), None),
        ("float, fused", None, "fused", size("fused", 32.0), "float"),
        (f"{title}, in training", quantization, "trained", packed, None),
        (f"{title}, packed", quantization, "packed", packed, "trained"),
        (f"{title}, reloaded", quantization, "reloaded", packed, "packed"),
    ):
        images = len(logits[stage])
        figures = {"images": images, **accuracies(logits[stage], labels[:images]), **sizes}
        figures["largest_logit_difference"] = largest_difference(logits[stage], logits.get(reference))
        fields_ = quantization_fields(config) | ({} if config is None else {"bits": bits})
        rows.append({"model": name, **fields_, "stage": stage, **figures})
    return rows


def loss_of(distillation: Distillation):
    """The function that gives the loss of a batch, from labels and teacher as `distillation` weighs them."""
    if not distillation.weight and not distillation.needs_features:
        return loss_on_labels

    def loss(model, batch):
        outputs = model(**batch, output_hidden_states=distillation.needs_features)
        return distillation(outputs, batch["pixel_values"])

    return loss


def largest_difference(logits: np.ndarray, reference: np.ndarray | None) -> float | None:
    """The largest difference of logits `[images, classes]` from those of a reference, which may be of more images."""
    return None if reference is None else float(np.abs(logits - reference[: len(logits)]).max())


if __name__ == "__main__":
    main()
