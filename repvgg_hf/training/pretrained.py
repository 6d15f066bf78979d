"""A pretrained RepVGG as the start of a training: timm's, the authors' or one of this package, with a new classifier.

Such networks were trained with plain batch normalization. OABN bounds what their small branches add to the fused
kernel, and with that changes what they compute.
"""

import copy
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoImageProcessor

from repvgg_hf import RepVGGForImageClassification, from_original, from_timm
from repvgg_hf.networks import convert_timm_state_dict
from repvgg_hf.networks.repvgg_names import config_of, make_repvgg
from repvgg_hf.networks.timm import TIMM_NAMES
from repvgg_hf.networks.weight_files import read_weights
from repvgg_hf.runtime.image_processor_file import PROCESSOR_FILE
from repvgg_hf.training.closing_bound import find_clipping
from repvgg_hf.training.models import OF_A_NEW_MODEL, ModelArguments, check_source
from repvgg_hf.training.processors import make_processor

IMAGENET_SIDE = 224  # of images, where nothing says what a network was trained with
COMPARED = 64  # training images on which a network is compared with itself under OABN
MUCH = 0.1  # share of channels that the bound cuts off, above which the other ways are named


@dataclass
class SourceArguments(ModelArguments):
    """Options that say which model to start from: a new one, a checkpoint, or a pretrained network."""

    pretrained: str | None = field(
        default=None,
        metadata={
            "help": "Start from a RepVGG that was trained on other classes, with a new classifier: of timm "
            "(timm/repvgg_a0.rvgg_in1k), a folder, or a file of weights."
        },
    )


def check_pretrained(args: SourceArguments, given: set[str]) -> None:
    """Raise `ValueError` for options that say something else than `--pretrained` does, of those that were `given`."""
    others = ("model_name_or_path", *OF_A_NEW_MODEL, "dequantize", "ignore_mismatched_sizes")
    unfit = [name for name in others if name in given]
    if "pretrained" in given and unfit:
        raise ValueError(
            f"--{unfit[0]} says otherwise than --pretrained {args.pretrained}, which has its own sizes and gets a new "
            "classifier: leave one of them out."
        )


def load_pretrained(name: str) -> RepVGGForImageClassification:
    """Load a RepVGG with its branches and its own classifier, in eval mode.

    Args:
        name: a file of weights under timm's names or the authors'; a folder or a repository on the Hub, of timm or of
            this package; or the name of a model in timm.

    Raises `ValueError` that says what else `name` is.
    """
    if Path(name).is_file():
        model = _from_file(name)
    elif not Path(name).is_dir() and "/" not in name:
        model = from_timm(name)
    else:
        fields = _configuration(name)
        if "architecture" in fields:
            model = from_timm(f"{'local-dir' if Path(name).is_dir() else 'hf-hub'}:{name}")
        elif fields.get("model_type") == "repvgg":
            check_source(name, None)
            model = RepVGGForImageClassification.from_pretrained(name, dtype=torch.float32)  # see `load_float`
        else:
            found = fields.get("model_type", "no model")
            raise ValueError(f"--pretrained {name} is {found} by its config.json: {_FIT}.")
    if not isinstance(model, RepVGGForImageClassification):
        raise ValueError(f"--pretrained {name} is {getattr(model.config, 'architecture', 'another network')}: {_FIT}.")
    if model.config.deploy:
        raise ValueError(f"--pretrained {name} is fused, and training needs its branches: give it as it was before.")
    return model.eval()


_FIT = "give a RepVGG of timm (timm/repvgg_a0.rvgg_in1k), of its authors or of this package"


def _configuration(name: str) -> dict:
    path = Path(name, "config.json")
    if not Path(name).is_dir():
        try:
            path = Path(hf_hub_download(name, "config.json"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--pretrained {name} is no file or folder, and can't be had from the Hub ({error}): correct the name."
            ) from error
    if not path.is_file():
        raise ValueError(f"--pretrained {name} has no config.json: {_FIT}, or a file with the weights.")
    return json.loads(path.read_text(encoding="utf-8"))


def _from_file(name: str) -> torch.nn.Module:
    tensors = read_weights(name)
    if not any("conv_kxk." in key or ".reparam_conv." in key for key in tensors):
        return from_original(tensors)
    renamed = convert_timm_state_dict(tensors)
    return make_repvgg(renamed, config_of(renamed, TIMM_NAMES), TIMM_NAMES).eval()


def processor_of(model: RepVGGForImageClassification):
    """Return the image processor that came with a pretrained `model`, or else that of ImageNet."""
    file = getattr(model, "image_processor_file", None)
    if file is not None:
        with tempfile.TemporaryDirectory() as folder:
            file.write(Path(folder))
            if Path(folder, PROCESSOR_FILE).is_file():
                return AutoImageProcessor.from_pretrained(folder)
    return make_processor(IMAGENET_SIDE, 0.875, model.config.num_channels)


def with_new_classifier(pretrained, labels: list[str], **changes) -> RepVGGForImageClassification:
    """Return a model with the features of a `pretrained` one and a new classifier of the classes `labels`.

    `changes` are fields that its configuration shall have instead.
    """
    config = copy.deepcopy(pretrained.config)
    config.id2label, config.label2id = dict(enumerate(labels)), {name: place for place, name in enumerate(labels)}
    for name, value in changes.items():
        setattr(config, name, value)
    model = RepVGGForImageClassification(config)
    model.repvgg.load_state_dict(pretrained.repvgg.state_dict())
    return model


@torch.no_grad()
def describe_change(pretrained, model, pixel_values: torch.Tensor, closing: int) -> list[str]:
    """Return lines that say how OABN in `model` changes what the `pretrained` network computes.

    Args:
        pretrained, model: before, and with the new classifier and OABN; both are put into eval mode for it.
        pixel_values: images to compare on, floating `[images, channels, height, width]`.
        closing: the step at which the bound has closed in; 0 if it has from the start.
    """
    clipping = find_clipping(model)
    before = pretrained.eval().repvgg(pixel_values).pooler_output
    training = model.training
    after = model.eval().repvgg(pixel_values).pooler_output
    model.train(training)
    change = ((after - before).norm() / before.norm().clamp_min(1e-12)).item()
    line = (
        f"OABN at {model.config.oabn_threshold:g} standard deviations bounds {clipping.clipped:,} of "
        f"{clipping.channels:,} channels of the pretrained branches (the largest has {clipping.largest:.0f}), which "
        f"changes the features of {len(pixel_values)} training images by {change:.0%}"
    )
    if pretrained.config.num_labels > 1:
        agree = (pretrained.classifier(before).argmax(1) == pretrained.classifier(after).argmax(1)).sum().item()
        line += f"; the old classifier then says the same of {agree} of them"
    lines = [f"{line}."]
    if clipping.clipped > MUCH * clipping.channels:
        until = f"The bound closes in until step {closing:,}, before which validation tells little. " if closing else ""
        lines.append(
            f"{until}--oabn False leaves the branches as they are, which low bits suffer from; a larger "
            "--oabn_threshold bounds less."
        )
    return lines
