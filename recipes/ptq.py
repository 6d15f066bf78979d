"""Quantise a float checkpoint without training, for every combination of bits, methods and granularities asked for.

    python recipes/ptq.py --model_name_or_path outputs/train --bits 8 4 3 --methods uniform cluster

Each quantised model is saved in `--output_dir` and evaluated; the figures go to `ptq_results.json` there.
"""

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForImageClassification

import repvgg_hf
from arguments import parse_arguments
from data import DataArguments
from evaluation import EvaluationArguments, evaluate_model, load_evaluation_split
from modeling import build_processor
from repvgg_hf.analysis import bits_per_weight, checkpoint_bytes
from results import print_table, write_json


@dataclass
class QuantizationArguments:
    """What to quantise, and how. Lists are combined with each other."""

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
    preserve_zero: bool = field(default=False, metadata={"help": "Cluster: one entry of each codebook is zero."})
    range_method: str = field(default="mse", metadata={"help": "Uniform: mse or minmax."})

    def configs(self) -> list[repvgg_hf.ClusterConfig]:
        """All combinations; a bad argument raises `ValueError` before any work is done."""
        return [
            repvgg_hf.ClusterConfig(
                bits=bits,
                method=method,
                granularity=granularity,
                group_size=self.group_size if granularity == "per_group" else None,
                channel_scale=self.channel_scale,
                codebook_dtype=self.codebook_dtype,
                symmetric=self.symmetric,
                preserve_zero=self.preserve_zero,
                range_method=self.range_method,
            )
            for method, granularity, bits in itertools.product(self.methods, self.granularities, self.bits)
        ]


def main(arguments: list[str] | None = None) -> dict:
    (quantization, data_args, evaluation_args), arguments = parse_arguments(
        (QuantizationArguments, DataArguments, EvaluationArguments), arguments
    )
    configs = quantization.configs()
    name, output_dir = quantization.model_name_or_path, Path(quantization.output_dir)

    model = AutoModelForImageClassification.from_pretrained(name)
    processor = build_processor(name, data_args)
    dataset = load_evaluation_split(data_args, processor, model.config, evaluation_args.seed)
    figures, _ = evaluate_model(model.reparameterize(), dataset, evaluation_args)
    kernels = repvgg_hf.kernel_report(model)
    model.save_pretrained(output_dir / "float")
    rows = [{"model": "float", **figures, "bytes": checkpoint_bytes(output_dir / "float"), "bits_per_weight": 32.0}]

    for config in configs:
        model = AutoModelForImageClassification.from_pretrained(output_dir / "float").quantize(config)
        scale = "+scale" if config.channel_scale else ""
        folder = output_dir / f"{config.method}-{config.granularity}{scale}-w{config.bits}"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        figures, _ = evaluate_model(model, dataset, evaluation_args)
        size = {"bytes": checkpoint_bytes(folder), "bits_per_weight": bits_per_weight(model)}
        rows.append({"model": folder.name, **figures, **size})

    record = {
        "command": ["recipes/ptq.py", *arguments],
        "seed": evaluation_args.seed,
        "images": len(dataset),
        "results": rows,
        "float_kernels": kernels,
    }
    write_json(output_dir / "ptq_results.json", record)
    print_table(f"{name} on {len(dataset)} images", rows)
    return record


if __name__ == "__main__":
    main()
