"""The models of a Space: what each is, its ONNX file, and which of the measurements is its."""

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..runtime.cluster_layers import cluster_layers
from .results import FLOAT, Results

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # it is part of an address


@dataclass
class SpaceModel:
    """One stop of a Space's slider.

    Attributes:
        name (`str`): its name in the address and among the files.
        source: the classifier, or the checkpoint folder that it is in.
        config (`dict`): the classifier's configuration, as JSON.
    """

    name: str
    source: object
    config: dict

    @property
    def quantization(self) -> dict:
        """The configuration of the quantization, empty for a float model."""
        return self.config.get("quantization_config") or {}

    @cached_property
    def bits(self) -> float:
        """Bits of a weight's code, their mean if layers differ; 32 for float."""
        if not self.quantization.get("bits_overrides"):
            return self.quantization.get("bits", 32)
        layers = cluster_layers(self.load()).values()
        mean = sum(layer.bits * layer.weight_numel for layer in layers) / sum(layer.weight_numel for layer in layers)
        return round(mean, 1)

    @property
    def labels(self) -> list[str]:
        """The names of the classes."""
        names = {int(index): name for index, name in (self.config.get("id2label") or {}).items()}
        return [names[index] for index in sorted(names)]

    def load(self):
        """Return the classifier, read from its folder if it is in one."""
        if isinstance(self.source, Path):
            from transformers import AutoModelForImageClassification

            self.source = AutoModelForImageClassification.from_pretrained(self.source).eval()
        return self.source

    @property
    def computes_integers(self) -> bool:
        """Whether the layers' inputs are quantized too, so that engines compute with integers."""
        return self.quantization.get("activation_bits") is not None

    def write(self, path: Path) -> None:
        """Write the model's ONNX file: the one that its folder has already, or a new one, with packed weights."""
        with tempfile.TemporaryDirectory() as temporary:
            shutil.copyfile(self.exported() or self.export(Path(temporary)), path)

    def exported(self) -> Path | None:
        """Return the ONNX file that the folder has, of the kind that `export` makes, if it has one."""
        if not isinstance(self.source, Path):
            return None
        name = "model.onnx"
        if self.computes_integers:
            name = "model_quantized.onnx" if self.bits == 8 else f"model_q{self.bits}.onnx"
        path = self.source / "onnx" / name
        return path if path.is_file() else None

    def export(self, folder: Path) -> Path:
        """Export the model into `folder` and return the file."""
        from ..interop.onnx import export_onnx

        return export_onnx(self.load(), folder, weights="packed" if self.computes_integers else "float")


def describe_models(models: dict) -> list[SpaceModel]:
    """Return the models, given as classifiers or checkpoint folders by name, from the most bits to the fewest.

    Raises `ValueError` naming the model for one that can't be shown beside the others.
    """
    if not models:
        raise ValueError("models is empty: give at least one, such as {'w4': model}.")
    described = []
    for name, source in models.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"The model's name {name!r} becomes part of an address: give letters and digits, as 'w4'.")
        described.append(SpaceModel(name, *_source_and_config(name, source)))
    first, seen = described[0], {}
    for model in described:
        if model.labels != first.labels:
            raise ValueError(
                f"models[{model.name!r}] has other classes than {first.name!r} ({len(model.labels)} and "
                f"{len(first.labels)}): a Space compares models of the same classes."
            )
        if (other := seen.setdefault(model.bits, model)) is not model:
            raise ValueError(
                f"{other.name!r} and {model.name!r} both have {model.bits} bits, and the slider has one stop for each "
                "bit-width: leave one out."
            )
    if not first.labels:
        raise ValueError(f"models[{first.name!r}] has no names of classes: set id2label in its configuration.")
    return sorted(described, key=lambda model: -model.bits)


def _source_and_config(name: str, source) -> tuple[object, dict]:
    """Return the classifier, or the path of its folder, and its configuration as JSON."""
    if not isinstance(source, (str, Path)):
        if not hasattr(getattr(source, "config", None), "id2label"):
            raise ValueError(
                f"models[{name!r}] must be an image classifier of Transformers or its checkpoint folder, got "
                f"{type(source).__name__}."
            )
        config = json.loads(source.config.to_json_string(use_diff=False)) | {"architectures": [type(source).__name__]}
    else:
        source = Path(source)
        try:
            config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"models[{name!r}] must be a classifier or a checkpoint folder, and {source} has no readable "
                f"config.json ({error}): give a folder that save_pretrained wrote."
            ) from error
    architecture = (config.get("architectures") or ["no model"])[0]
    if not architecture.endswith("ForImageClassification"):
        raise ValueError(f"models[{name!r}] is {architecture}: give one whose class ends in ForImageClassification.")
    if config.get("qat_config"):
        raise ValueError(f"models[{name!r}] is being trained with quantized weights: call quantize() before.")
    return source, config


def find_measured(model: SpaceModel, results: Results | None, measured: dict[str, str]) -> str | None:
    """Return the name in `results.models` of a model's measurement: the one in `measured`, or the only one that fits.

    Raises `ValueError` for a name that is not there.
    """
    names = {row.model for row in results.models} if results is not None else set()
    if model.name in measured:
        if measured[model.name] not in names:
            known = ", ".join(sorted(names)) or "none"
            raise ValueError(f"measured[{model.name!r}] is {measured[model.name]!r}, and results.models has {known}.")
        return measured[model.name]
    if model.name in names:
        return model.name
    kind = (model.quantization.get("method", FLOAT), model.bits, model.quantization.get("activation_bits"))
    rows = results.models if results is not None else []
    fitting = {row.model for row in rows if (row.method, row.bits, row.activation_bits) == kind}
    return fitting.pop() if len(fitting) == 1 else None
