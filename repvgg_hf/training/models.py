"""The model that a recipe trains, and its image processor."""

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from repvgg_hf import RepVGGConfig, RepVGGForImageClassification
from repvgg_hf.runtime.logs import quiet
from repvgg_hf.training.labels import are_places, match_classes
from repvgg_hf.training.processors import make_processor, with_size
from repvgg_hf.training.splits import DataArguments, model_classes


def dequantize_field():
    """The option `--dequantize`, for recipes that need a float model."""
    return field(
        default=False,
        metadata={
            "help": "Start from the float weights that a quantized checkpoint decodes to, in a fused model, as its "
            "codes don't train."
        },
    )


# options that set the sizes of a new model
OF_A_NEW_MODEL = ("variant", "stem_hidden_size", "hidden_sizes", "depths", "stem_stride", "strides", "num_channels")


@dataclass
class ModelArguments:
    """Options that say which model to start from: `--model_name_or_path`, or else a new one."""

    # options that `--help-all` shows, and `--help` does not
    RARE = (
        "stem_hidden_size", "hidden_sizes", "depths", "stem_stride", "strides", "num_channels", "oabn_threshold",
        "dequantize",
    )  # fmt: skip

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
    num_channels: int = field(
        default=3, metadata={"help": "For a new model: channels of its images, 3, or 1 for gray ones."}
    )
    oabn: bool = field(
        default=True,
        metadata={"help": "Outlier-aware batch normalization; of a checkpoint by default what it was trained with."},
    )
    oabn_threshold: float = field(
        default=6.0, metadata={"help": "The bound of OABN, in standard deviations of the 3x3 branch's entries."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Train a new classifier if the checkpoint's has other classes."}
    )
    dequantize: bool = dequantize_field()


def check_source(name: str | None, dequantize: bool | None) -> None:
    """Raise `ValueError` if a recipe that needs float weights can't start from the checkpoint called `name`.

    It reads the configuration only: a recipe calls it before any work. No name is a new model; `dequantize` is `None`
    for a recipe that has no such option.
    """
    if name is not None and not RepVGGConfig.get_config_dict(name)[0]:  # of which Transformers makes its defaults
        raise ValueError(
            f"{name} has no config.json: give a folder that a recipe or save_pretrained() wrote, or the id of a model "
            "on the Hub."
        )
    config = None if name is None else RepVGGConfig.from_pretrained(name)
    quantized = getattr(config, "quantization_config", None)
    if dequantize and not quantized:
        found = "a new model is float" if name is None else f"{name} is a float checkpoint"
        raise ValueError(f"--dequantize True is for a quantized checkpoint, and {found}: leave the option out.")
    if quantized and not dequantize:
        start = "pass --dequantize True to start from the float weights that they decode to, or "
        raise ValueError(
            f"{name} is quantized to {quantized['bits']} bits, and codes neither train nor are quantized again: "
            f"{'' if dequantize is None else start}give the float checkpoint that it was made of."
        )
    if config is not None and config.qat_config is not None:
        raise ValueError(
            f"{name} is a checkpoint of quantization-aware training, which this recipe does not go on with: give the "
            "float checkpoint that it began from, or go on with the run that saved it (--resume_from_checkpoint)."
        )


def changes_to_checkpoint(args: ModelArguments, given: set[str]) -> dict:
    """Return the fields that the options called `given` change in a checkpoint's configuration.

    OABN can be switched there. Raises `ValueError` for options of a new model, whose sizes a checkpoint has of its own.
    """
    name = args.model_name_or_path
    unfit = [option for option in OF_A_NEW_MODEL if option in given]
    if name is None:
        return {}
    if unfit:
        raise ValueError(
            f"--{unfit[0]} is an option of a new model, and --model_name_or_path {name} has its own: leave one of them "
            "out."
        )
    changes = {option: getattr(args, option) for option in ("oabn", "oabn_threshold") if option in given}
    if changes and RepVGGConfig.from_pretrained(name).deploy:
        raise ValueError(
            f"--{next(iter(changes))} bounds branches, and those of {name} are fused: leave it out, or give the "
            "checkpoint that has them."
        )
    return changes


def load_float(name: str, dequantize: bool | None, **arguments):
    """Load the classifier called `name` in float32; `arguments` are those of `from_pretrained`.

    It may be stored with fewer bits: steps of training are too small for bfloat16 weights, which would round them away.
    Raises what [`check_source`] does.
    """
    check_source(name, dequantize)
    model = AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32, **arguments)
    return model.dequantize() if dequantize else model


def build_model(args: ModelArguments, labels: list[str], by_position: bool = False, changes: dict | None = None):
    """The model to train on a dataset with the classes `labels`.

    `changes` are fields that a checkpoint's configuration shall have instead, see [`changes_to_checkpoint`].

    A checkpoint keeps its own classes, names and order, to which `align_splits` brings the dataset's labels; if they
    are only numbered it takes the dataset's names. Raises `ValueError` that lists both sides if they don't match (see
    `match_classes`); with `--ignore_mismatched_sizes` the checkpoint then gets a new classifier.
    """
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}
    check_source(args.model_name_or_path, args.dequantize)
    if args.model_name_or_path is None:
        return RepVGGForImageClassification(new_config(args, names))
    name, changes = args.model_name_or_path, changes or {}
    config = RepVGGConfig.from_pretrained(name)
    own = model_classes(config)
    try:
        match_classes(own, labels, by_position=by_position, all_needed=True)
    except ValueError as error:
        if not args.ignore_mismatched_sizes:
            raise ValueError(
                f"{name} has other classes: {error} Or pass --ignore_mismatched_sizes True to train a new classifier."
            ) from error
        with quiet("transformers.modeling_utils"):  # which lists the weights that do not fit, as was asked for
            model = load_float(name, args.dequantize, ignore_mismatched_sizes=True, **names, **changes)
        if config.num_labels == len(labels):  # loading has kept the classifier of the other classes
            model.classifier = nn.Linear(model.classifier.in_features, len(labels), dtype=model.classifier.weight.dtype)
            model._init_weights(model.classifier)
        return model
    if are_places(own) and len(own) == len(labels):
        return load_float(name, args.dequantize, **names, **changes)
    return load_float(name, args.dequantize, **changes)


def new_config(args: ModelArguments, names: dict) -> RepVGGConfig:
    """The configuration of a new model, with the label `names`."""
    oabn = {"oabn": args.oabn, "oabn_threshold": args.oabn_threshold}
    if args.variant is not None:
        return RepVGGConfig.from_variant(args.variant, num_channels=args.num_channels, **oabn, **names)
    return RepVGGConfig(
        num_channels=args.num_channels,
        stem_hidden_size=args.stem_hidden_size,
        hidden_sizes=args.hidden_sizes,
        depths=args.depths,
        stem_stride=args.stem_stride,
        strides=args.strides or [1] + [2] * (len(args.hidden_sizes) - 1),
        **oabn,
        **names,
    )


def build_processor(model_name_or_path: str | None, data: DataArguments, channels: int = 3):
    """The checkpoint's image processor, at `--image_size` and `--crop_ratio` if given, or a new one of them.

    `channels` are those of a new model. Raises `ValueError` without a size.
    """
    if model_name_or_path is None:
        if data.image_size is None and data.dataset_name != "digits":
            raise ValueError("Give --image_size, the side in pixels of the images that the model shall see.")
        return make_processor(data.image_size or 8, data.crop_ratio or 1.0, channels)
    try:
        processor = AutoImageProcessor.from_pretrained(model_name_or_path)
    except (OSError, ValueError) as error:
        if data.image_size is None:
            raise ValueError(
                f"{model_name_or_path} has no image processor that can be loaded ({error}): save the one that it was "
                "trained with there, or give --image_size to prepare images as for a new model."
            ) from error
        channels = RepVGGConfig.from_pretrained(model_name_or_path).num_channels
        return make_processor(data.image_size, data.crop_ratio or 1.0, channels)
    if data.image_size is None and data.crop_ratio is None:
        return processor
    return with_size(processor, data.image_size, data.crop_ratio)
