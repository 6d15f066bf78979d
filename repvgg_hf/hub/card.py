"""The model card, made from measured figures alone.

python -m repvgg_hf.hub model_cards/repvgg-*.json      # makes each card again, as .md beside its .json
"""

import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from ..runtime.configuration_repvgg import RepVGGConfig
from ..runtime.quantization_cluster import ClusterConfig
from .about import About, Example
from .complexity import measure_complexity
from .drawing import figure_paths
from .engines import engines_section
from .integers import integers_section
from .names import check_license, check_ref, check_repo_id
from .results import ModelResult, Results, build, check, read_json
from .snippets import usage_section
from .summary import family_of, family_table, headline
from .tables import (
    cell,
    code_block,
    details,
    file_size,
    folded,
    granularity_in_words,
    kernels_table,
    latency_table,
    methods_table,
    models_table,
    quantity,
    table,
)

CITATION = """@article{niu2024outlier,
  title   = {Outlier-Aware Training for Low-Bit Quantization of Structural Re-Parameterized Networks},
  author  = {Niu, Muqun and Ren, Yuan and Li, Boyu and Ding, Chenchen},
  journal = {arXiv preprint arXiv:2402.07200},
  year    = {2024}
}
@inproceedings{ding2021repvgg,
  title     = {RepVGG: Making VGG-style ConvNets Great Again},
  author    = {Ding, Xiaohan and Zhang, Xiangyu and Ma, Ningning and Han, Jungong and Ding, Guiguang and Sun, Jian},
  booktitle = {CVPR},
  year      = {2021}
}"""

CLASSES_SHOWN = 12  # of more, all are folded away


@dataclass(kw_only=True)
class ModelCard:
    """All that one card is made of; `str(card)` is the README.md.

    Args:
        repo_id (`str`): `"namespace/name"` of the repository.
        config (`dict`): the published model's `config.json`.
        image_size (`int`): side in pixels of the square images that the processor hands to the model.
        results ([`Results`], *optional*): what was measured, if anything was.
        published (`str`, *optional*): name of the published model in `results.models`.
        revision (`str`, *optional*): branch or tag that holds the model, if not `main`.
        plots (`dict[str, str]`, *optional*): captions by path in the repository, of the figures drawn from `results`
            and of others.
        license (`str`): license of the weights, as the Hub spells it.
        files (`dict[str, int]`, *optional*): bytes of the files for engines, by path in the repository.
        links (`dict[str, str]`, *optional*): addresses of the other models in `results.models`, by name.
        about ([`About`], *optional*): what the author says of the model.
        example ([`Example`], *optional*): a picture and what the model says of it.

    Raises `ValueError` naming the field for a bad value.
    """

    repo_id: str
    config: dict
    image_size: int
    license: str
    results: Results | None = None
    published: str | None = None
    revision: str | None = None
    plots: dict | None = None
    files: dict | None = None
    links: dict | None = None
    about: About | None = None
    example: Example | None = None

    def __post_init__(self):
        check(self, "card")
        check_repo_id(self.repo_id)
        check_ref(self.revision, "card.revision")
        check_license(self.license)
        if self.results is not None and not self.results.select(self.published):
            names = ", ".join(dict.fromkeys(result.model for result in self.results.models))
            raise ValueError(f"card.published is {self.published!r}, but results.models has only {names}: name one.")

    @classmethod
    def from_json(cls, path: str | Path) -> "ModelCard":
        """Read a card from a file that `to_json` wrote. Raises `ValueError` naming the field for a bad one."""
        return build(cls, read_json(path), "card")

    def to_json(self, path: str | Path) -> None:
        """Write all that the card is made of into a file that `from_json` reads."""
        write_text(Path(path), json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    def __str__(self) -> str:
        sections = [self.introduction(), self.family(), self.example_section(), self.usage(), self.model_section()]
        sections += [self.results_section(), integers_section(self.quantization), self.engines_section()]
        sections += [self.making_section(), self.limits()]
        sections += [f"## Citation\n\n{code_block(CITATION, 'bibtex')}"]
        body = "\n\n".join(section for section in sections if section)
        return f"---\n{self.metadata().to_yaml()}\n---\n\n{body}\n"

    @property
    def name(self) -> str:
        """The repository's name, with the revision if the card is of one."""
        return self.repo_id.rpartition("/")[2] + (f" ({self.revision})" if self.revision else "")

    @cached_property
    def model_config(self) -> RepVGGConfig:
        """The published model's configuration."""
        return RepVGGConfig.from_dict({key: value for key, value in self.config.items() if key != "auto_map"})

    @cached_property
    def quantization(self) -> ClusterConfig | None:
        """How the published model is quantized; `None` for float weights."""
        stored = self.config.get("quantization_config")
        return None if stored is None else ClusterConfig.from_dict(dict(stored))

    @property
    def computes_integers(self) -> bool:
        """Whether the published model is one that engines run as integers."""
        return bool(integers_section(self.quantization))

    @property
    def weights(self) -> str:
        """The published weights in words."""
        quantization = self.quantization
        if quantization is None:
            return "float weights"
        codebooks = f"{quantization.quantization_method.title} {granularity_in_words(quantization.granularity, False)}"
        scale = " and a scale for each output channel" if quantization.channel_scale else ""
        weights = f"{quantization.bits}-bit weights ({codebooks}{scale})"
        activations = quantization.activation_bits
        return weights if activations is None else f"{weights} and {activations}-bit activations"

    def introduction(self) -> str:
        """Return the title, what the model is, and its accuracy and size."""
        config = self.model_config
        form = (
            "fused into one convolution per layer"
            if config.deploy
            else "in train form, with the branches of every layer"
        )
        training = "It was trained with plain batch normalization."
        if config.oabn:
            training = (
                "It was trained with outlier-aware batch normalization (OABN), which bounds what the 1x1 and identity "
                "branches add to the fused kernel, so that few bits are enough."
            )
        return "\n\n".join(
            [
                *self.title(),
                f"RepVGG image classifier with {config.num_labels} classes and {self.weights}, {form}. {training}",
                *self.accuracy(),
            ]
        )

    def title(self) -> list[str]:
        """Return the title, and the line that sums up what was measured, if anything was."""
        return [f"# {cell(self.name)}"] + ([headline(self.results, self.published)] if self.results else [])

    def accuracy(self) -> list[str]:
        """Return the line that tells the published model's accuracy and size; none if nothing was measured."""
        if not self.results:
            return []
        rows, dataset = self.results.select(self.published), self.results.dataset
        top1 = sum(row.top1 for row in rows) / len(rows)
        return [
            f"**Top-1 {top1:.2f} %** on {cell(dataset.name)}, {cell(dataset.split)} ({rows[0].images:,} images), "
            f"**{file_size(rows[0].bytes)}** of weights."
        ]

    def family(self) -> str:
        """Return the table of models that differ in bits, and accuracy against bytes; empty if there is one alone."""
        if self.results is None:
            return ""
        parts = [family_table(self.results, self.published, self.links or {}), self.plot("accuracy")]
        return "\n\n".join(filter(None, parts))

    def plot(self, kind: str) -> str:
        """Return the figure of this kind with its caption; empty if the card has none."""
        path = figure_paths(self.results, self.repo_id).get(kind)
        return shown_plot(path, self.plots[path]) if path in (self.plots or {}) else ""

    def example_section(self) -> str:
        """Return the picture and what the model says of it; empty without one."""
        if self.example is None:
            return ""
        guesses = zip(self.example.labels, self.example.probabilities)
        said = ", ".join(f"{cell(label)} {100 * probability:.1f} %" for label, probability in guesses)
        return f"![{cell(self.example.labels[0])}]({quote(self.example.path)})\n\n*The model says: {said}*"

    def usage(self) -> str:
        """Return the section that shows how to load the model."""
        return usage_section(self.repo_id, self.revision)

    def model_section(self) -> str:
        """Return the section with the model's complexity, in train form and fused."""
        forms = [measure_complexity(self.model_config, self.image_size, deploy) for deploy in (False, True)]
        rows = [
            ["parameters", *(f"{form.parameters:,}" for form in forms)],
            ["multiply-accumulates", *(quantity(form.macs) for form in forms)],
            ["activations", *(quantity(form.activations) for form in forms)],
            ["image size", *[f"{self.image_size} x {self.image_size}"] * 2],
        ]
        return f"## Model\n\n{table(['', 'train form', 'fused'], rows)}{self.classes()}"

    def classes(self) -> str:
        """Return the names of the classes, with an empty line before; empty if they have none."""
        names = [cell(str(name)) for _, name in sorted(self.model_config.id2label.items())]
        if all(name == f"LABEL\\_{index}" for index, name in enumerate(names)):
            return ""
        listed = ", ".join(names)
        if len(names) > CLASSES_SHOWN:
            return "\n\n" + details(f"The {len(names):,} classes", listed)
        return f"\n\nClasses: {listed}."

    def results_section(self) -> str:
        """Return the section with all that was measured; empty if nothing was."""
        if self.results is None:
            return ""
        results = self.results
        dataset = f"{cell(results.dataset.name)}, {cell(results.dataset.split)}"
        parts = [f"## Results\n\nOn {dataset}; accuracy in percent. The published weights are in bold."]
        parts.append(details("All measured models", models_table(results.models, self.published)))
        if methods := methods_table(results.models):
            parts.append(details("Methods side by side, top-1", methods))
        drawn = figure_paths(results, self.repo_id).values()
        parts += [shown_plot(path, text) for path, text in (self.plots or {}).items() if path not in drawn]
        parts += [kernels_table(results.kernels_before, results.kernels_after), self.plot("kernels")]
        parts.append(latency_table(results.latency))
        return "\n\n".join(part for part in parts if part)

    @property
    def classifies(self) -> bool:
        """Whether the model is an image classifier."""
        return True

    def engines_section(self) -> str:
        """Return the section about the files for engines; empty if there are none and nothing was measured."""
        rows = self.results.engines if self.results is not None else []
        measured = [row for row in rows if row.model == self.published]
        return engines_section(self.repo_id, self.revision, self.files, measured, self.classifies)

    def making_section(self) -> str:
        """Return the section with the description and the commands; empty if there are none."""
        parts, about = [], self.about or About()
        if self.results is not None and self.results.description:
            parts.append(cell(self.results.description))
        told = {"Started from": about.base_model, "Training data": about.training_data}
        told["License of the training data"] = about.training_data_license
        parts += [f"{title}: {cell(text)}" for title, text in told.items() if text]
        if self.results is not None and self.results.commands:
            commands = code_block("\n".join(map(folded, self.results.commands)), "bash")
            parts.append(details("Commands", commands))
        return "\n\n".join(["## How it was made", *parts]) if parts else ""

    def limits(self) -> str:
        """Return the section that says what the model is not good for and what was not measured."""
        lines = [*self.intended_use(), "## Limits", ""]
        if self.quantization is not None:
            lines.append(
                "- The weights are decoded to floating point when the model first runs: few bits make the download "
                "and the file small, not the arithmetic fast."
                + (" (That is so in PyTorch; engines compute with integers.)" if self.computes_integers else "")
            )
        if not self.model_config.deploy:
            lines.append("- With its branches the model is slower and larger than fused: call `reparameterize()`.")
        if self.results is None:
            lines.append("- No accuracy was measured.")
        else:
            lines.append(
                f"- Accuracy was measured on {cell(self.results.dataset.name)} alone. Other images, and harm to "
                "particular groups of people, were not examined."
            )
            if len(self.results.select(self.published)) == 1:
                lines.append("- One training run was measured: the spread between seeds is not known.")
        return "\n".join(lines)

    def intended_use(self) -> list[str]:
        """Return the lines of the section about what the model is for; none if its author did not say."""
        text = self.about.intended_use if self.about is not None else ""
        return ["## Intended use", "", cell(text), ""] if text else []

    def metadata(self) -> ModelCardData:
        """Return the YAML block: tags, license, and `model-index` with an entry for each bit-width."""
        tags = ["image-classification", "repvgg", "re-parameterization", "vision"]
        if self.quantization is not None:
            tags += ["quantization", f"{self.quantization.bits}-bit"]
        dataset = self.results and self.results.dataset
        return ModelCardData(
            license=self.license,
            library_name="transformers",
            pipeline_tag="image-classification",
            tags=tags,
            base_model=self.about.base_model if self.about is not None else None,
            datasets=[dataset.hub_id] if dataset and dataset.hub_id else None,
            metrics=["accuracy"] if self.results else None,
            model_name=self.name if self.results else None,
            eval_results=self.eval_results() if self.results else None,
        )

    def eval_results(self) -> list[EvalResult]:
        """Return the accuracies of the published model, of those that differ from it in bits alone, and of the float.

        They are told apart by the metric's name, config and arguments, as the Hub drops entries that differ in nothing
        else.
        """
        dataset = self.results.dataset
        names = dict.fromkeys([self.published, *family_of(self.results, self.published)])
        entries = []
        for name in names:
            rows = self.results.select(name)
            for key, title in (("top1", "Top-1"), ("top5", "Top-5")):
                value = mean_of(rows, key)
                if value is not None and int(key[3:]) < self.model_config.num_labels:  # or it says nothing
                    entries.append(
                        EvalResult(
                            task_type="image-classification",
                            task_name="Image classification",
                            dataset_type=dataset.hub_id or dataset.name,
                            dataset_name=dataset.name,
                            dataset_split=dataset.split,
                            dataset_revision=dataset.revision,
                            metric_type="accuracy",
                            metric_name=f"{title} accuracy in percent ({name})",
                            metric_config=name,
                            metric_args={"bits": rows[0].bits, "method": rows[0].method, "top": int(key[3:])},
                            metric_value=value,
                        )
                    )
        return entries

    def eval_results_yaml(self) -> str | None:
        """Return a file for `.eval_results/`, with the published model's top-1; `None` if the dataset has no Hub id."""
        if self.results is None or self.results.dataset.hub_id is None:
            return None
        rows, dataset = self.results.select(self.published), self.results.dataset
        entry = EvalResultEntry(
            dataset_id=dataset.hub_id,
            dataset_revision=dataset.revision,
            task_id=dataset.task_id,
            value=mean_of(rows, "top1"),
            notes=f"top-1 accuracy in percent, {dataset.split} split, {rows[0].images} images, {self.weights}",
        )
        return yaml_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)


def shown_plot(path: str, caption: str) -> str:
    """Return the Markdown of an image with its caption."""
    return f"![{cell(caption)}]({quote(path)})\n\n*{cell(caption)}*"


def mean_of(rows: list[ModelResult], key: str) -> float | None:
    """Return the mean over seeds, rounded to the digits that the card shows; `None` if a seed lacks the figure."""
    values = [getattr(row, key) for row in rows]
    return None if None in values else round(sum(values) / len(values), 2)


def write_text(path: Path, text: str) -> None:
    """Write `text` through a temporary file, with the same line ends on every system."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(text.encode("utf-8"))
    os.replace(temporary, path)
