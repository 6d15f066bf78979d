"""Convert a checkpoint of timm, of the authors of RepVGG or MobileOne, or of Transformers, into one that both load.

    python recipes/convert.py --source timm --model_name_or_path mobileone_s0 --output_dir outputs/mobileone
    python recipes/convert.py --source timm --model_name_or_path repvgg_a0 --checkpoint_file a0.pth --output_dir out
    python recipes/convert.py --source original --checkpoint_file RepVGG-A0-train.pth --fuse True --output_dir out
    python recipes/convert.py --source transformers --model_name_or_path outputs/train --to timm --output_dir out

The folder has the weights, the configuration with the names of the classes, and the image processor. It appears when
all of it is complete.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForImageClassification, PreTrainedModel

from repvgg_hf import RepVGGForImageClassification, from_original, from_timm
from repvgg_hf.networks.repvgg_names import label_fields
from repvgg_hf.networks.timm_folder import save_for_timm
from repvgg_hf.networks.timm_images import imagenet_names, timm_image_settings
from repvgg_hf.runtime.image_processor_file import PROCESSOR_FILE, ImageProcessorFile
from repvgg_hf.runtime.saving import clean, replace_files
from repvgg_hf.training.arguments import parse_arguments

SOURCES, TARGETS = ("timm", "original", "transformers"), ("transformers", "timm")


@dataclass
class ConvertArguments:
    """Options that say what to convert, and into what."""

    source: str = field(
        metadata={
            "help": "Where the checkpoint is from: timm, original (a file of the authors' code of RepVGG or MobileOne) "
            "or transformers."
        }
    )
    output_dir: str = field(metadata={"help": "New folder for the converted checkpoint."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "What to convert: timm's name of a model, such as repvgg_a0 or mobileone_s0.apple_in1k; the "
            "published network that an original file must be, such as RepVGG-B1g4; or a folder or Hub id of "
            "Transformers."
        },
    )
    checkpoint_file: str | None = field(
        default=None,
        metadata={"help": "A file with the weights, .safetensors, .pth or .pt; by default timm's published ones."},
    )
    entry: str | None = field(
        default=None,
        metadata={"help": "Entry of an original file that has the weights; an average over the training by default."},
    )
    strides: list[int] | None = field(
        default=None,
        metadata={"help": "Strides of an original RepVGG's stem and of each stage; 2 each by default."},
    )
    model_args: str | None = field(
        default=None,
        metadata={"help": 'Further arguments of timm.create_model, as JSON such as {"act_layer": "silu"}.'},
    )
    to: str = field(
        default="transformers",
        metadata={"help": "What to write: transformers (from_pretrained loads it) or timm (create_model does)."},
    )
    fuse: bool = field(
        default=False, metadata={"help": "Fuse the branches; of timm's models those that timm makes fused, too."}
    )
    label_names: str | None = field(
        default=None,
        metadata={
            "help": "Names of the classes: imagenet-1k, a text file with one name on each line, or a .json file with a "
            "list."
        },
    )
    image_processor: str | None = field(
        default=None,
        metadata={"help": "A folder whose preprocessor_config.json goes along, for models that come without one."},
    )

    def __post_init__(self):
        for name, known in (("source", SOURCES), ("to", TARGETS)):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        if self.source == "original" and self.checkpoint_file is None:
            raise ValueError("--source original converts a file: give --checkpoint_file.")
        if self.source != "original" and self.model_name_or_path is None:
            raise ValueError(f"--source {self.source} needs --model_name_or_path.")
        if self.source == "transformers" and self.checkpoint_file is not None:
            raise ValueError("--source transformers takes a folder or Hub id alone: leave --checkpoint_file out.")
        for name, source in (("entry", "original"), ("strides", "original"), ("model_args", "timm")):
            if getattr(self, name) is not None and self.source != source:
                raise ValueError(f"--{name} is an option of --source {source}.")
        if self.to == "timm" and self.fuse:
            raise ValueError(
                "--to timm takes no --fuse: timm makes models with branches from a name. Fuse with "
                "timm.utils.reparameterize_model where the model is used."
            )


def load(args: ConvertArguments) -> PreTrainedModel:
    """Return the model that is to be converted, as one of Transformers."""
    if args.source == "timm":
        model_args = None if args.model_args is None else read_model_args(args.model_args)
        return from_timm(args.model_name_or_path, args.checkpoint_file, model_args=model_args)
    if args.source == "original":
        return from_original(args.checkpoint_file, args.model_name_or_path, entry=args.entry, strides=args.strides)
    model = AutoModelForImageClassification.from_pretrained(args.model_name_or_path)
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{args.model_name_or_path} is quantized: dequantize() it and save that first.")
    return model.eval()


def read_model_args(text: str) -> dict:
    """Read the arguments of `timm.create_model`; raises `ValueError` if they are no JSON object."""
    try:
        arguments = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--model_args must be a JSON object, got {text!r}: {error}.") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"--model_args must be a JSON object, got {text!r}.")
    return arguments


def read_label_names(source: str) -> list[str]:
    """Read the names of the classes; raises `ValueError` for a file without, or with one twice."""
    if source == "imagenet-1k":
        return imagenet_names()
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"--label_names must be imagenet-1k or a file, and there is no {source}.")
    text = path.read_text(encoding="utf-8")
    names = json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.splitlines() if line.strip()]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
        raise ValueError(f"--label_names {source} must hold a list of names.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"--label_names {source} has {twice!r} {names.count(twice)} times: give each class its own.")
    return names


def set_label_names(model: PreTrainedModel, names: list[str]) -> None:
    """Name the classes; raises `ValueError` for another number of them."""
    if len(names) != model.config.num_labels:
        raise ValueError(f"--label_names has {len(names)} names, and the model {model.config.num_labels} classes.")
    for name, value in label_fields(dict(enumerate(names))).items():
        setattr(model.config, name, value)


def fused(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with its branches fused, in a form that can be loaded again."""
    if isinstance(model, RepVGGForImageClassification):
        return model.reparameterize()
    from timm.utils.model import reparameterize_model

    arguments = model.config.model_args or {}
    if "inference_mode" in arguments:
        return model
    made = from_timm(reparameterize_model(model.timm_model), model_args=arguments)
    if not made.config.model_args.get("inference_mode"):
        raise ValueError(
            f"A fused {model.config.architecture} can't be loaded again, as timm makes it with branches alone: convert "
            "it without --fuse, and call repvgg_hf.fuse on the loaded model. A quantized one stores how it was fused."
        )
    model.config.model_args = made.config.model_args
    made.config = model.config
    return made


def read_processor(folder: str) -> ImageProcessorFile:
    """Read the configuration of the image processor in a folder; raises `ValueError` if there is none."""
    path = Path(folder, PROCESSOR_FILE)
    if not path.is_file():
        raise ValueError(f"--image_processor {folder} has no {PROCESSOR_FILE}: give a folder that has one.")
    return ImageProcessorFile(path.read_text(encoding="utf-8"))


def set_processor(model: PreTrainedModel, processor: ImageProcessorFile) -> None:
    """Let an image processor go along with the model; raises `ValueError` for one that a timm model can't have.

    Of a wrapped timm model it is in `config.json`, in timm's terms, and Transformers looks nowhere else.
    """
    model.image_processor_file = processor
    if isinstance(model, RepVGGForImageClassification):
        return
    settings = timm_image_settings(json.loads(processor.text or "{}"))
    if settings is None:
        raise ValueError(
            "--image_processor must resize, crop the center, rescale and normalize, as BitImageProcessor does: timm "
            "prepares images for this model in no other way."
        )
    model.config.pretrained_cfg = settings | {"architecture": model.config.architecture}


@contextlib.contextmanager
def new_folder(name: str) -> Iterator[Path]:
    """Give a folder to fill, which becomes the new folder called `name` when the `with` block ends without an error.

    Raises `ValueError` if there is something in that place.
    """
    target = Path(name)
    if target.is_dir():
        clean(target)  # what a killed conversion has left
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--output_dir {target} is there and not empty: give a new folder.")
    existed = target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        with replace_files(target) as folder:
            yield folder
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):  # something else was put there meanwhile
                target.rmdir()
        raise


def main(arguments: list[str] | None = None) -> None:
    (args,), _ = parse_arguments((ConvertArguments,), arguments)
    names = None if args.label_names is None else read_label_names(args.label_names)
    processor = None if args.image_processor is None else read_processor(args.image_processor)
    with new_folder(args.output_dir) as folder:
        model = load(args)
        if names is not None:
            set_label_names(model, names)
        if args.fuse:
            model = fused(model)
        if processor is not None:
            set_processor(model, processor)
        if args.to == "timm":
            save_for_timm(model, folder)
        else:
            model.save_pretrained(folder)
    print(f"{type(model).__name__} of {model.num_parameters():,} parameters, {model.config.num_labels} classes:")
    print(f"written to {args.output_dir}.")


if __name__ == "__main__":
    main()
