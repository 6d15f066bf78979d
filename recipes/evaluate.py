"""Evaluate a float or quantized checkpoint: top-1, top-5, loss, size on disk, bits per weight.

python recipes/evaluate.py --model_name_or_path outputs/train
python recipes/evaluate.py --model_name_or_path outputs/quantize/cluster-per_channel-w4 --output_json results.json
"""

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoModelForImageClassification

import repvgg_hf  # noqa: F401  registers RepVGG with the Auto classes
from repvgg_hf.analysis import bits_per_weight, checkpoint_bytes
from repvgg_hf.training.arguments import parse_arguments
from repvgg_hf.training.evaluation import EvaluationArguments, evaluate_model, load_evaluation_split
from repvgg_hf.training.models import build_processor
from repvgg_hf.training.report import print_table, write_json
from repvgg_hf.training.splits import DataArguments


@dataclass
class CheckpointArguments:
    """Options that say what to evaluate."""

    model_name_or_path: str = field(metadata={"help": "A checkpoint folder or Hub id, float or quantized."})
    output_json: str | None = field(default=None, metadata={"help": "Write the figures to this JSON file, too."})


def main(arguments: list[str] | None = None) -> dict:
    (checkpoint, data_args, evaluation_args), arguments = parse_arguments(
        (CheckpointArguments, DataArguments, EvaluationArguments), arguments
    )
    name = checkpoint.model_name_or_path
    model = AutoModelForImageClassification.from_pretrained(name)
    processor = build_processor(name, data_args)
    dataset = load_evaluation_split(data_args, processor, model.config, evaluation_args.seed)
    figures, _ = evaluate_model(model, dataset, evaluation_args)
    folder = name if Path(name).is_dir() else snapshot_download(name, allow_patterns="*.safetensors")
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
    if checkpoint.output_json is not None:
        write_json(checkpoint.output_json, record)
    return record


if __name__ == "__main__":
    main()
