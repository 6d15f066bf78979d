"""Train with OABN, fuse, train with quantized weights (ClusterQAT), pack, save, reload: the whole story.

    accelerate launch recipes/qat.py                                       # digits, from scratch, 4 bits
    accelerate launch recipes/qat.py --model_name_or_path outputs/train    # from a float checkpoint
    accelerate launch --config_file recipes/configs/gpu8.yaml recipes/qat.py --bits 2 --granularity per_channel \\
        --calibration_images 1024 --distillation_weight 1 --model_name_or_path ...      # all that helps at 2 bits

`--output_dir` holds the float model (`float/`), the fused one (`fused/`), the quantized one (`quantized/`), the figures
(`qat_results.json`) and a checkpoint an epoch; `--resume_from_checkpoint` goes on from the last of these.
"""

import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification

import repvgg_hf
from repvgg_hf.training.arguments import parse_arguments
from repvgg_hf.training.pictures import (
    DataArguments,
    collate,
    label_names,
    load_splits,
    training_data,
    with_pixel_values,
)
from repvgg_hf.training.metrics import accuracies
from repvgg_hf.training.models import ModelArguments, build_model, build_processor
from repvgg_hf.analysis import bits_per_weight, checkpoint_bytes
from repvgg_hf.compression.qat.annealing import set_bits
from repvgg_hf.compression.qat.distillation import Distillation
from repvgg_hf.compression.qat.config import QATOptions
from repvgg_hf.training.report import print_table, write_json
from repvgg_hf.training.loop import PhaseArguments, loss_on_labels, predict, train_phase

RELOADED_BATCHES = 4  # enough to compare logits, and small enough to hand to another process

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
    """How to train and quantize."""

    output_dir: str = field(default="outputs/qat", metadata={"help": "Where models, checkpoints and figures go."})
    num_float_epochs: int = field(default=24, metadata={"help": "Epochs of float training, without a checkpoint."})
    float_learning_rate: float = field(default=0.1, metadata={"help": "Its peak learning rate."})
    num_train_epochs: int = field(default=5, metadata={"help": "Epochs of quantization-aware training."})
    learning_rate: float = field(default=0.01, metadata={"help": "Its peak learning rate."})
    method: str = field(default="cluster", metadata={"help": "cluster, or uniform (LSQ)."})
    bits: int = field(default=4, metadata={"help": "Bits of a weight, 1 to 8."})
    activation_bits: int | None = field(default=None, metadata={"help": "Bits of the layers' inputs, 2 to 8."})
    granularity: str = field(default="per_tensor", metadata={"help": "per_tensor, per_channel or per_group."})
    group_size: int | None = field(default=None, metadata={"help": "Output channels a codebook, with per_group."})
    channel_scale: bool | None = field(default=None, metadata={"help": "A scale for each output channel."})
    codebook_dtype: str = field(default="float16", metadata={"help": "float16, float32 or int8."})
    codebook_update: str = field(default="kmeans", metadata={"help": "gradient, kmeans or both."})
    momentum: float = field(default=0.9, metadata={"help": "Of k-means updates, a step."})
    update_every: int = field(default=10, metadata={"help": "Steps between k-means updates."})
    batch_norm_every: int = field(default=0, metadata={"help": "Steps between estimates of batch norm statistics."})
    activation_update: str = field(default="gradient", metadata={"help": "gradient or moving_average."})
    freeze_threshold: float | None = field(default=None, metadata={"help": "Freeze weights that oscillate so often."})
    blend_ratio: float = field(
        default=0.0, metadata={"help": "Share of the training in which it goes over from float weights; for 1 bit 0.5."}
    )
    fused: bool = field(default=False, metadata={"help": "Train the fused kernels instead of the branches."})
    calibration_images: int = field(default=0, metadata={"help": "Start from calibration on so many images."})
    start: str = field(default="kernel", metadata={"help": "With these: kernel or decoded."})
    distillation_weight: float = field(default=0.0, metadata={"help": "Share of the float model's logits in the loss."})
    distillation_temperature: float = field(default=2.0, metadata={"help": "Of these."})
    distillation_features: float = field(default=0.0, metadata={"help": "Weight of its feature maps in the loss."})
    anneal_bits: list[int] = field(default_factory=list, metadata={"help": "Bits to train with before, such as 8 4."})
    num_anneal_epochs: int = field(default=1, metadata={"help": "Epochs with each of them."})
    report_to: str = field(default="none", metadata={"help": "A tracker of Accelerate, such as tensorboard, or none."})

    def __post_init__(self):
        if not 0 <= self.blend_ratio <= 1:
            raise ValueError(f"--blend_ratio must be from 0 to 1, got {self.blend_ratio}.")

    def quantization_config(self) -> repvgg_hf.ClusterConfig:
        return repvgg_hf.ClusterConfig(
            method=self.method,
            bits=self.bits,
            activation_bits=self.activation_bits,
            granularity=self.granularity,
            group_size=self.group_size,
            channel_scale=self.channel_scale,
            codebook_dtype=self.codebook_dtype,
        )

    def qat_options(self) -> QATOptions:
        return QATOptions(
            **{option.name: getattr(self, option.name) for option in fields(QATOptions) if hasattr(self, option.name)}
        )

    def stages(self) -> list[tuple[str, int, int]]:
        """(phase, bits, epochs) of quantization-aware training."""
        return [(f"qat{bits}", bits, self.num_anneal_epochs) for bits in self.anneal_bits] + [
            ("qat", self.bits, self.num_train_epochs)
        ]


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


def main(arguments: list[str] | None = None) -> dict:
    (model_args, data_args, args), arguments = parse_arguments((ModelArguments, DataArguments, QATArguments), arguments)
    # a bad option shall not cost the float training
    quantization_config, qat_options = args.quantization_config(), asdict(args.qat_options())
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,  # one scheduler step an optimizer step, whatever the number of processes
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=output_dir,
    )
    if args.report_to != "none":
        accelerator.init_trackers("qat", {"bits": args.bits, "granularity": args.granularity})
    set_seed(args.seed)

    splits = load_splits(data_args, seed=args.seed)
    processor = build_processor(model_args.model_name_or_path, data_args)
    train_data = training_data(splits["train"], data_args, processor)
    validation_set = with_pixel_values(splits["validation"], data_args, processor, train=False)
    validation = DataLoader(validation_set, args.per_device_eval_batch_size, collate_fn=collate)
    some_batches = [batch["pixel_values"] for batch, _ in zip(validation, range(RELOADED_BATCHES))]
    validation = accelerator.prepare(validation)
    labels = np.array(splits["validation"][data_args.label_column_name])

    # 1. a float model with branches
    finished = output_dir / "float"
    if not (args.resume_from_checkpoint and (finished / "config.json").exists()):
        model = build_model(model_args, label_names(splits["train"], data_args))
        if model_args.model_name_or_path is None:
            rate, epochs = args.float_learning_rate, args.num_float_epochs
            model = train_phase(accelerator, model, train_data, "float", epochs, rate, output_dir, args)
        save(accelerator, model, finished, processor)
    # loaded in any case: a resumed run shall go on from the same memory layout, on which the last bits of sums depend
    model = AutoModelForImageClassification.from_pretrained(finished)
    float_logits = predict(accelerator, model, validation)

    # 2. the same, fused: what is quantized, and what a float deployment would ship
    fused = AutoModelForImageClassification.from_pretrained(finished).reparameterize()
    save(accelerator, fused, output_dir / "fused", processor)
    fused_logits = predict(accelerator, fused, validation)

    # 3. train on with quantized weights, still with branches
    distillation = Distillation(
        fused, args.distillation_weight, args.distillation_temperature, args.distillation_features
    )
    if args.fused:
        model.reparameterize()
    if args.calibration_images:
        images = (
            splits["train"].shuffle(seed=args.seed).select(range(min(len(splits["train"]), args.calibration_images)))
        )
        qat_options["calibration"] = with_pixel_values(images, data_args, processor, train=False)
    batches = -(-len(train_data[0]) // (args.per_device_train_batch_size * accelerator.num_processes))
    steps = args.num_train_epochs * -(-batches // args.gradient_accumulation_steps)
    qat_options["blend_steps"] = round(args.blend_ratio * steps)
    stages = args.stages()
    for phase, bits, epochs in stages:
        if phase == stages[0][0]:
            quantization_config.bits = bits
            model.prepare_qat(quantization_config, **qat_options)
        else:
            set_bits(model, bits)
        model = train_phase(
            accelerator, model, train_data, phase, epochs, args.learning_rate, output_dir, args, loss_of(distillation)
        )
    qat_logits = predict(accelerator, model, validation)

    # 4. freeze, pack, save
    model.quantize()
    save(accelerator, model, output_dir / "quantized", processor)
    quantized_logits = predict(accelerator, model, validation)

    rows = []

    def add(name: str, logits, folder: str, weight_bits: float, reference=None):
        images = len(logits)
        difference = None if reference is None else float(np.abs(logits - reference[:images]).max())
        hits = accuracies(logits, labels[:images])
        figures = {"accuracy": hits["top1"], "top5": hits["top5"], "images": images}
        figures |= {"bytes": checkpoint_bytes(output_dir / folder)}
        rows.append({"model": name, **figures, "bits_per_weight": weight_bits, "largest_logit_difference": difference})

    if accelerator.is_main_process:
        # 5. load it like a user
        reloaded_logits = reload_logits(output_dir / "quantized", some_batches)
        packed_bits = bits_per_weight(model)
        add("float, with branches", float_logits, "float", 32.0)
        add("float, fused", fused_logits, "fused", 32.0, float_logits)
        add(f"{args.bits} bit, in training", qat_logits, "quantized", packed_bits)
        add(f"{args.bits} bit, packed", quantized_logits, "quantized", packed_bits, qat_logits)
        add(f"{args.bits} bit, reloaded", reloaded_logits, "quantized", packed_bits, quantized_logits)
        record = {"command": ["recipes/qat.py", *arguments], "seed": args.seed}
        record |= {"quantization_config": model.config.quantization_config.to_dict(), "results": rows}
        write_json(output_dir / "qat_results.json", record)
        print_table("Held-out images; difference to the line above", rows)
    accelerator.end_training()
    return {"results": rows}


def loss_of(distillation: Distillation):
    """The loss of a batch, from labels and teacher as `distillation` weighs them."""
    if not distillation.weight and not distillation.needs_features:
        return loss_on_labels

    def loss(model, batch):
        outputs = model(**batch, output_hidden_states=distillation.needs_features)
        return distillation(outputs, batch["pixel_values"])

    return loss


def save(accelerator: Accelerator, model, folder: Path, processor) -> None:
    if accelerator.is_main_process:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
