"""Model and optimizer that the recipes share."""

from dataclasses import dataclass, field

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

import repvgg_hf
from repvgg_hf.training.pictures import DataArguments, make_processor
from repvgg_hf import RepVGGConfig


@dataclass
class ModelArguments:
    """Which model to start from. Without `--model_name_or_path`, a new one."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A checkpoint folder or Hub id to start from."}
    )
    variant: str | None = field(default=None, metadata={"help": "A published variant, a0 to d2se, for a new model."})
    stem_hidden_size: int = field(default=32, metadata={"help": "Width of the stem (new model without --variant)."})
    hidden_sizes: list[int] = field(default_factory=lambda: [32, 64, 128], metadata={"help": "Width of each stage."})
    depths: list[int] = field(default_factory=lambda: [1, 2, 1], metadata={"help": "Layers of each stage."})
    stem_stride: int = field(default=1, metadata={"help": "Stride of the stem."})
    strides: list[int] | None = field(default=None, metadata={"help": "Stride of each stage; default 1, then 2s."})
    oabn: bool = field(default=True, metadata={"help": "Outlier-aware batch normalization."})
    oabn_threshold: float = field(default=6.0, metadata={"help": "Its bound, in standard deviations."})
    ignore_mismatched_sizes: bool = field(default=False, metadata={"help": "Replace a classifier of another size."})


def build_model(args: ModelArguments, labels: list[str]):
    """The model to train, with `labels` as its classes. Raises `ValueError` if a checkpoint has another number."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}
    if args.model_name_or_path is None:
        return repvgg_hf.RepVGGForImageClassification(new_config(args, names))
    config = RepVGGConfig.from_pretrained(args.model_name_or_path)
    if config.num_labels != len(labels) and not args.ignore_mismatched_sizes:
        raise ValueError(
            f"{args.model_name_or_path} has {config.num_labels} classes, the dataset {len(labels)}: choose another "
            "dataset or label column, or pass --ignore_mismatched_sizes to train a new classifier."
        )
    return AutoModelForImageClassification.from_pretrained(
        args.model_name_or_path, ignore_mismatched_sizes=args.ignore_mismatched_sizes, **names
    )


def new_config(args: ModelArguments, names: dict) -> RepVGGConfig:
    oabn = {"oabn": args.oabn, "oabn_threshold": args.oabn_threshold}
    if args.variant is not None:
        return RepVGGConfig.from_variant(args.variant, **oabn, **names)
    return RepVGGConfig(
        stem_hidden_size=args.stem_hidden_size,
        hidden_sizes=args.hidden_sizes,
        depths=args.depths,
        stem_stride=args.stem_stride,
        strides=args.strides or [1] + [2] * (len(args.hidden_sizes) - 1),
        **oabn,
        **names,
    )


def build_processor(model_name_or_path: str | None, data: DataArguments):
    """The checkpoint's image processor, or a new one of `--image_size`."""
    if model_name_or_path is not None and data.image_size is None:
        return AutoImageProcessor.from_pretrained(model_name_or_path)
    if data.image_size is None and data.dataset_name != "digits":
        raise ValueError("Give --image_size, the side in pixels of the images that the model shall see.")
    return make_processor(data.image_size or 8)


def build_sgd(
    model: torch.nn.Module, learning_rate: float, weight_decay: float, momentum: float = 0.9
) -> torch.optim.SGD:
    """SGD with Nesterov momentum; weight decay on kernels only, as in RepVGG's own training."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=momentum > 0)
