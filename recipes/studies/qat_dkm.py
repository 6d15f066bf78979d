"""Train a fused float checkpoint with coremltools' differentiable k-means: what to compare the recipe `qat` with.

    python -m repvgg_hf.recipes.studies.qat_dkm --model_name_or_path outputs/train --bits 4 --dataset_name ...

The loop, data and options are the same, in float32: a codebook per tensor and a scale per channel, k-means++ of
scikit-learn for the start (its own takes minutes on a CPU), all else as coremltools has it. Writes `qat_results.json`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from repvgg_hf.recipes.peers import peer_methods
from repvgg_hf.training.arguments import parse_arguments
from repvgg_hf.training.batches import collate, evaluation_data, training_data
from repvgg_hf.training.loop import PhaseArguments, predict, train_phase
from repvgg_hf.training.metrics import accuracies
from repvgg_hf.training.models import ModelArguments, build_model, build_processor, check_source
from repvgg_hf.training.report import print_table, quantization_fields, write_json
from repvgg_hf.training.splits import DataArguments, align_splits, load_splits

TABLE = ("model", "top1", "top5", "images", "bytes", "bits_per_weight")


@dataclass
class DKMArguments(PhaseArguments):
    """Options of the training and of the codebooks."""

    output_dir: str = field(default="outputs/qat_dkm", metadata={"help": "Folder for the figures."})
    bits: int = field(default=4, metadata={"help": "Bits of a weight's code, 1 to 8."})
    num_train_epochs: int = field(default=2, metadata={"help": "Epochs of training."})
    learning_rate: float = field(default=0.01, metadata={"help": "Peak learning rate."})


def main(arguments: list[str] | None = None) -> dict:
    (model_args, data_args, args), arguments = parse_arguments((ModelArguments, DataArguments, DKMArguments), arguments)
    if model_args.model_name_or_path is None:
        raise ValueError("DKM starts from a trained float network: give --model_name_or_path.")
    if args.resume_from_checkpoint:
        raise ValueError("DKM's state has lists in it and can't be saved: leave --resume_from_checkpoint out.")
    peer_methods("coremltools")  # says what to install
    from repvgg_hf.recipes.peers.coremltools_methods import stored_bytes
    from repvgg_hf.recipes.peers.dkm import SCALE, prepare_dkm

    accelerator = Accelerator(step_scheduler_with_optimizer=False)
    set_seed(args.seed)
    check_source(model_args.model_name_or_path, model_args.dequantize)
    splits = load_splits(data_args, seed=args.seed)
    model = build_model(model_args, splits["train"].classes, data_args.labels_by_position)
    splits = align_splits(splits, model.config, data_args)
    processor = build_processor(model_args.model_name_or_path, data_args)
    train_data = (training_data(splits["train"], data_args, processor), collate)
    validation_set = evaluation_data(splits["validation"], data_args, processor, cache=True)
    validation = accelerator.prepare(DataLoader(validation_set, args.per_device_eval_batch_size, collate_fn=collate))
    labels = splits["validation"].labels

    float_logits = predict(accelerator, model, validation)
    weights = sum(p.numel() for p in model.reparameterize().parameters() if p.dim() > 1)
    prepared, palettizer = prepare_dkm(model, args.bits, **SCALE)
    trained = train_phase(
        accelerator, prepared, train_data, "dkm", args.num_train_epochs, args.learning_rate, None, args
    )
    final = palettizer.finalize(trained, inplace=True)

    shared = {"granularity": "per_tensor", "channel_scale": True, "method": "dkm", "bits": args.bits}
    rows = []
    for name, stage, fields, logits, size in (
        ("float, with branches", "float", {}, float_logits, 4 * weights),
        (f"{args.bits} bit, packed", "packed", shared, predict(accelerator, final, validation),
         stored_bytes(final, args.bits)),
    ):  # fmt: skip
        figures = {"images": len(logits), **accuracies(logits, labels)}
        figures |= {"bytes": size, "bits_per_weight": 8 * size / weights}
        rows.append({"model": name, **quantization_fields(None), **fields, "stage": stage, **figures})
    record = {"command": ["recipes/studies/qat_dkm.py", *arguments], "seed": args.seed, "results": rows}
    if accelerator.is_main_process:
        write_json(Path(args.output_dir) / "qat_results.json", record)
        print_table("Held-out images", [{column: row[column] for column in TABLE} for row in rows])
    return {"results": rows}


if __name__ == "__main__":
    main()
