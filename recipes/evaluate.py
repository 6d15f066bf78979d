"""Evaluate a float or quantized checkpoint: top-1, top-5, loss, size on disk, bits per weight.

python recipes/evaluate.py --model_name_or_path outputs/train
python recipes/evaluate.py --model_name_or_path outputs/quantize/cluster-per_tensor-scale-w4 --output_json results.json
python recipes/evaluate.py --model_name_or_path my-model --engines onnxruntime openvino inductor --threads 1

With `--engines`, every one of them runs what recipes/export.py has written into the checkpoint's folder, on the same
images: top-1, how many images have the same first class as in PyTorch, how many have the same logits but for the order
of sums (1e-5 standard deviations), and the milliseconds of a picture.
"""

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from huggingface_hub import snapshot_download
from transformers import AutoModelForImageClassification

import repvgg_hf  # noqa: F401  registers RepVGG with the Auto classes
from repvgg_hf.analysis import bits_per_weight, checkpoint_bytes
from repvgg_hf.interop.agreement import agreement
from repvgg_hf.interop.engines import ENGINES, Engine, load_engine
from repvgg_hf.interop.formats import file_bytes
from repvgg_hf.interop.processor import processor_facts
from repvgg_hf.training.arguments import parse_arguments
from repvgg_hf.training.batches import collate
from repvgg_hf.training.evaluation import EvaluationArguments, evaluate_model, load_evaluation_split
from repvgg_hf.training.models import build_processor
from repvgg_hf.training.report import print_table, write_json
from repvgg_hf.training.splits import DataArguments

PYTORCH = "pytorch"  # what the others are compared with


@dataclass
class CheckpointArguments:
    """Options that say what to evaluate."""

    model_name_or_path: str = field(metadata={"help": "A checkpoint folder or Hub id, float or quantized."})
    output_json: str | None = field(default=None, metadata={"help": "Write the figures to this JSON file, too."})
    engines: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Engines to compare with PyTorch: {', '.join(name for name in ENGINES if name != PYTORCH)}."
        },
    )
    files: list[str] = field(
        default_factory=list,
        metadata={"help": "Files for engines to compare, too, each run by the engine of its kind."},
    )
    threads: int | None = field(default=None, metadata={"help": "Threads of the engines, which choose by default."})
    timed_images: int = field(
        default=50, metadata={"help": "Images, one in a call, whose median is an engine's milliseconds; 0 for none."}
    )

    def __post_init__(self):
        unknown = [name for name in self.engines if name not in ENGINES or name == PYTORCH]
        if unknown:
            known = ", ".join(name for name in ENGINES if name != PYTORCH)
            raise ValueError(f"--engines takes {known}, got {', '.join(unknown)}.")


def load_engines(args: CheckpointArguments, folder: str) -> list[Engine]:
    """All engines, before any work is done: of a missing file or package the error comes now."""
    threads = {"threads": args.threads}
    engines = [load_engine(folder, name, **threads) for name in args.engines]
    return engines + [load_engine(path, **threads) for path in args.files]


def evaluate_engine(engine: Engine, dataset, expected: np.ndarray, args: CheckpointArguments, batch_size: int) -> dict:
    """The row of one engine, against the logits `[images, classes]` that PyTorch gave for the same images."""
    logits, right = [], 0
    for first in range(0, len(dataset), batch_size):
        batch = collate([dataset[index] for index in range(first, min(first + batch_size, len(dataset)))])
        logits.append(engine(batch["pixel_values"]))
        right += int((logits[-1].argmax(1) == batch["labels"].numpy()).sum())
    return {
        "engine": engine.title,
        "file": engine.file,
        "bytes": None if engine.file is None else file_bytes(engine.path),
        "milliseconds": milliseconds(engine, dataset, args.timed_images),
        "top1": 100 * right / len(dataset),
        **agreement(np.concatenate(logits), expected),
    }


def milliseconds(engine: Engine, dataset, count: int) -> float | None:
    """The median time of one image, without preparing it; `None` if none are to be timed."""
    if count == 0:
        return None
    times = []
    for index in range(-2, count):  # the first ones are lazy initialization
        image = collate([dataset[max(index, 0) % len(dataset)]])["pixel_values"]
        start = time.perf_counter()
        engine(image)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[2:])


def main(arguments: list[str] | None = None) -> dict:
    (checkpoint, data_args, evaluation_args), arguments = parse_arguments(
        (CheckpointArguments, DataArguments, EvaluationArguments), arguments
    )
    name = checkpoint.model_name_or_path
    patterns = None if checkpoint.engines else "*.safetensors"
    folder = name if Path(name).is_dir() else snapshot_download(name, allow_patterns=patterns)
    engines = load_engines(checkpoint, folder)
    if engines and evaluation_args.bf16:
        raise ValueError("--bf16 rounds what engines are compared with: leave it out, or --engines and --files.")
    model = AutoModelForImageClassification.from_pretrained(name)
    processor = build_processor(name, data_args)
    dataset = load_evaluation_split(data_args, processor, model.config, evaluation_args.seed)
    figures, logits = evaluate_model(model, dataset, evaluation_args)
    record = {
        "command": ["recipes/evaluate.py", *arguments],
        "images": len(dataset),
        **figures,
        "bytes": checkpoint_bytes(folder),
        "bits_per_weight": bits_per_weight(model),
    }
    print_table(
        f"{name} on {len(dataset)} images", [{k: v for k, v in record.items() if k not in ("command", "images")}]
    )
    if engines:
        size = evaluation_args.per_device_eval_batch_size
        rows = [evaluate_engine(engine, dataset, logits, checkpoint, size) for engine in engines]
        record |= {"threads": checkpoint.threads, **processor_facts(), "engines": rows}
        print_table(f"{name}, engines against PyTorch", rows)
    if checkpoint.output_json is not None:
        write_json(checkpoint.output_json, record)
    return record


if __name__ == "__main__":
    main()
