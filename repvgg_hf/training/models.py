"""The model that a recipe trains, and its image processor."""

from dataclasses import dataclass, field

from transformers import AutoImageProcessor, AutoModelForImageClassification

from repvgg_hf import RepVGGConfig, RepVGGForImageClassification
from repvgg_hf.training.pictures import DataArguments, make_processor


@dataclass
class ModelArguments:
    """Options that say which model to start from: `--model_name_or_path`, or else a new one."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A checkpoint folder or Hub id to start from."}
    )
    variant: str | None = field(
        default=None, metadata={"help": "For a new model: a published variant, a0 to d2se, which sets all sizes."}
    )
    stem_hidden_size: int = field(default=32, metadata={"help": "For a new model: channels of the stem."})
    hidden_sizes: list[int] = field(
        default_factory=lambda: [32, 64, 128], metadata={"help": "For a new model: channels of each stage."}
    )
    depths: list[int] = field(
        default_factory=lambda: [1, 2, 1], metadata={"help": "For a new model: layers of each stage."}
    )
    stem_stride: int = field(default=1, metadata={"help": "For a new model: stride of the stem."})
    strides: list[int] | None = field(
        default=None, metadata={"help": "For a new model: stride of each stage; by default 1 and then 2s."}
    )
    oabn: bool = field(default=True, metadata={"help": "For a new model: outlier-aware batch normalization."})
    oabn_threshold: float = field(
        default=6.0,
        metadata={"help": "For a new model: the bound of OABN, in standard deviations of the 3x3 branch's entries."},
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Train a new classifier if the checkpoint's has another number of classes."}
    )


def build_model(args: ModelArguments, labels: list[str]):
    """The model to train, with `labels` as its classes. Raises `ValueError` if a checkpoint has another number."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}
    if args.model_name_or_path is None:
        return RepVGGForImageClassification(new_config(args, names))
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
    """The configuration of a new model, with the label `names`."""
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
    """The checkpoint's image processor, or a new one of `--image_size`. Raises `ValueError` without either."""
    if model_name_or_path is not None and data.image_size is None:
        return AutoImageProcessor.from_pretrained(model_name_or_path)
    if data.image_size is None and data.dataset_name != "digits":
        raise ValueError("Give --image_size, the side in pixels of the images that the model shall see.")
    return make_processor(data.image_size or 8)
