"""The card of a quantized model of another architecture, which loads with the installed package alone."""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData

from ..runtime.configuration_repvgg import RepVGGConfig
from .card import ModelCard
from .results import read_json
from .tables import cell, code_block

# by the end of the class's name, as in transformers
TASKS = {
    "ForImageClassification": "image-classification",
    "ForObjectDetection": "object-detection",
    "ForSemanticSegmentation": "image-segmentation",
    "ForUniversalSegmentation": "image-segmentation",
    "ForDepthEstimation": "depth-estimation",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(kw_only=True)
class NetworkCard(ModelCard):
    """The card of a quantized model that is not a RepVGG, with the same fields; `image_size` is not used.

    No code travels with such a checkpoint, as its class is of Transformers: the card says that loading needs this
    package, and how. `about.base_model` is the Hub id of the float model.
    """

    image_size: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.quantization is None:
            raise ValueError(
                f"card.config of {self.architecture} has no quantization_config: publish a float model with its own "
                "push_to_hub()."
            )

    @property
    def architecture(self) -> str:
        """The name of the model's class in Transformers."""
        return (self.config.get("architectures") or [self.config.get("model_type", "AutoModel")])[0]

    @property
    def classifies(self) -> bool:
        """Whether the model is an image classifier, by the name of its class."""
        return self.architecture.endswith("ForImageClassification")

    def introduction(self) -> str:
        """Return the title, what the model is, and its accuracy and size."""
        base = self.about.base_model if self.about is not None else None
        source = f" of `{base}`" if base else ""
        text = f"`{self.architecture}`{source} with {self.weights}."
        fused = self.quantization.fused_structure
        if fused:
            text += f" {len(fused)} modules of its branches were fused into plain convolutions before."
        return "\n\n".join([*self.title(), text, *self.accuracy()])

    def usage(self) -> str:
        """Return the section that shows how to load the model, and what happens without the package."""
        revision = f', revision="{self.revision}"' if self.revision else ""
        code = (
            "import repvgg_hf  # pip install repvgg-hf\n"
            f"from transformers import {self.architecture}\n\n"
            f'model = {self.architecture}.from_pretrained("{self.repo_id}"{revision})'
        )
        return (
            f"## Use\n\n{code_block(code, 'python')}\n\n"
            "The weights are packed codes, which Transformers can't read by itself: without `import repvgg_hf` first, "
            "loading ends with an error that names a tensor of size 0."
        )

    def model_section(self) -> str:
        """Return nothing: what the model is, its own documentation tells."""
        return ""

    def limits(self) -> str:
        """Return the section that says what was not measured."""
        measured = "- No accuracy was measured."
        if self.results is not None:
            measured = f"- Accuracy was measured on {cell(self.results.dataset.name)} alone."
        decoded = (
            "- The weights are decoded to floating point when the model first runs: few bits make the download and the "
            "file small, not the arithmetic fast."
        )
        if self.computes_integers:
            decoded += " (That is so in PyTorch; engines compute with integers.)"
        return "\n".join([*self.intended_use(), "## Limits", "", decoded, measured])

    def metadata(self) -> ModelCardData:
        """Return the YAML block."""
        task = next((task for end, task in TASKS.items() if self.architecture.endswith(end)), None)
        dataset = self.results and self.results.dataset
        return ModelCardData(
            license=self.license,
            library_name="transformers",
            pipeline_tag=task,
            tags=["repvgg_hf", "quantization", f"{self.quantization.bits}-bit", "vision"],
            base_model=self.about.base_model if self.about is not None else None,
            datasets=[dataset.hub_id] if dataset and dataset.hub_id else None,
            metrics=["accuracy"] if self.results else None,
            model_name=self.name if self.results else None,
            eval_results=self.eval_results() if self.results else None,
        )


def float_source(model) -> str | None:
    """Return the Hub id of the checkpoint that `model` was loaded from; `None` for a folder or a new model."""
    name = getattr(model.config, "_name_or_path", None) or ""
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def read_card(path: str | Path) -> ModelCard:
    """Read a card of any model from a file that `to_json` wrote. Raises `ValueError` naming the field for a bad one."""
    config = read_json(path).get("config")
    other = isinstance(config, dict) and config.get("model_type") != RepVGGConfig.model_type
    return (NetworkCard if other else ModelCard).from_json(path)
