"""How other code names the tensors of a RepVGG, and the configuration that their shapes describe."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers.initialization import no_init_weights

from ..runtime.configuration_repvgg import RepVGGConfig
from ..runtime.modeling_repvgg import RepVGGForImageClassification
from .weight_files import misfit, with_counters

_STEM, _LAYER = "repvgg.embeddings.layer", r"repvgg\.encoder\.stages\.(\d+)\.layers\.(\d+)"
_KERNEL = {True: "conv.weight", False: "conv.branches.3x3.conv.weight"}  # of a layer, by whether it is fused


@dataclass(frozen=True)
class Naming:
    """The names that some code gives to a RepVGG's tensors.

    Attributes:
        stem: the stem's name.
        layer: that of another layer, with `{stage}` and `{layer}` for its place.
        first_stage: number of the first stage.
        parts: a layer's parts, their name to ours.
        classifier: the classifier's name.
    """

    stem: str
    layer: str
    first_stage: int
    parts: Mapping[str, str]
    classifier: str

    @cached_property
    def _their_key(self) -> re.Pattern:
        layer = re.escape(self.layer).replace(r"\{stage\}", r"(\d+)").replace(r"\{layer\}", r"(\d+)")
        return re.compile(rf"(?:{re.escape(self.stem)}|{layer})\.({'|'.join(map(re.escape, self.parts))})\.(\w+)")

    @cached_property
    def _our_key(self) -> re.Pattern:
        parts = "|".join(map(re.escape, self.parts.values()))
        return re.compile(rf"(?:{re.escape(_STEM)}|{_LAYER})\.({parts})\.(\w+)")

    def ours(self, key: str) -> str | None:
        """Return our name of a tensor that they call `key`; `None` if no RepVGG has it."""
        if key in (f"{self.classifier}.weight", f"{self.classifier}.bias"):
            return key.replace(self.classifier, "classifier")
        match = self._their_key.fullmatch(key)
        if match is None:
            return None
        stage, layer, part, name = match.groups()
        if stage is not None and int(stage) < self.first_stage:
            return None
        place = _STEM if stage is None else f"repvgg.encoder.stages.{int(stage) - self.first_stage}.layers.{layer}"
        return f"{place}.{self.parts[part]}.{name}"

    def theirs(self, key: str) -> str | None:
        """Return their name of a tensor that we call `key`; `None` if they have none."""
        if key in ("classifier.weight", "classifier.bias"):
            return key.replace("classifier", self.classifier)
        match = self._our_key.fullmatch(key)
        if match is None:
            return None
        stage, layer, part, name = match.groups()
        place = self.stem
        if stage is not None:
            place = self.layer.format(stage=int(stage) + self.first_stage, layer=layer)
        theirs = next(their for their, our in self.parts.items() if our == part)
        return f"{place}.{theirs}.{name}"

    def shown(self, key: str) -> str:
        """Return the name to show in an error: theirs, or `key` itself where they have none."""
        return self.theirs(key) or key

    def rename(self, state_dict: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Return the tensors under our names, and the names that no RepVGG has."""
        names = {key: self.ours(key) for key in state_dict}
        renamed = {name: state_dict[key] for key, name in names.items() if name is not None}
        return renamed, [key for key, name in names.items() if name is None]


def config_of(state_dict: Mapping[str, torch.Tensor], naming: Naming, **fields) -> RepVGGConfig:
    """Return the configuration that the shapes of tensors under our names describe.

    Args:
        state_dict (`dict[str, torch.Tensor]`): the tensors.
        naming ([`Naming`]): their names, for errors.
        fields: what no shape shows. Strides are 2 by default.

    Raises `ValueError` naming the tensor for a shape that no RepVGG has, or one without which nothing is known.
    """
    deploy = not any(".branches." in key for key in state_dict)
    stem = _kernel(state_dict, naming, f"{_STEM}.{_KERNEL[deploy]}")
    depths: dict[int, int] = {}
    for key in state_dict:
        if match := re.match(_LAYER, key):
            stage, layer = map(int, match.groups())
            depths[stage] = max(depths.get(stage, 0), layer + 1)
    sizes, groups, before = [], 1, stem.shape[0]
    for stage in range(max(depths, default=0) + 1):
        for layer in range(depths.get(stage, 1)):
            kernel = _kernel(state_dict, naming, f"repvgg.encoder.stages.{stage}.layers.{layer}.{_KERNEL[deploy]}")
            groups, before = max(groups, before // kernel.shape[1]), kernel.shape[0]
        sizes.append(before)
    squeeze, classifier = (state_dict.get(key) for key in (f"{_STEM}.attention.fc1.weight", "classifier.weight"))
    for key, tensor, kind in (
        (f"{_STEM}.attention.fc1.weight", squeeze, f"[inner channels, {stem.shape[0]}, 1, 1]"),
        ("classifier.weight", classifier, f"[classes, {sizes[-1]}]"),
    ):
        if tensor is not None and (tensor.dim() != kind.count(",") + 1 or 0 in tensor.shape):
            raise ValueError(f"{naming.shown(key)} is {list(tensor.shape)}: expected {kind}.")
    return RepVGGConfig(
        num_channels=stem.shape[1],
        stem_hidden_size=stem.shape[0],
        hidden_sizes=sizes,
        depths=[depths[stage] for stage in sorted(depths)],
        groups=groups,
        use_squeeze_excitation=squeeze is not None,
        squeeze_ratio=16 if squeeze is None else max(1, stem.shape[0] // squeeze.shape[0]),
        oabn=False,
        deploy=deploy,
        **({"num_labels": 0 if classifier is None else classifier.shape[0], "strides": [2] * len(sizes)} | fields),
    )


def _kernel(state_dict: Mapping[str, torch.Tensor], naming: Naming, key: str) -> torch.Tensor:
    """Return a layer's kernel `[out, in / groups, 3, 3]`; raises `ValueError` if it is missing or another shape."""
    kernel = state_dict.get(key)
    if kernel is None:
        raise ValueError(
            f"{naming.shown(key)} is missing: each layer of a RepVGG has one, and all layers have branches or all are "
            "fused. The file is incomplete, or of another network."
        )
    if kernel.dim() != 4 or kernel.shape[2:] != (3, 3) or 0 in kernel.shape:
        raise ValueError(f"{naming.shown(key)} is {list(kernel.shape)}: expected [out, in / groups, 3, 3].")
    return kernel


def make_repvgg(
    state_dict: dict[str, torch.Tensor], config: RepVGGConfig, naming: Naming
) -> RepVGGForImageClassification:
    """Return a model with copies of these tensors, which have our names.

    Raises `ValueError` naming, in their names, tensors that are missing, unknown or of another shape.
    """
    with no_init_weights():  # every weight is loaded
        model = RepVGGForImageClassification(config)
    expected = model.state_dict()
    state_dict = with_counters(state_dict, expected)
    problems = misfit(expected, state_dict, naming.shown)
    if problems:
        raise ValueError(
            f"The tensors don't make a RepVGG of depths {list(config.depths)} and widths "
            f"{[config.stem_hidden_size, *config.hidden_sizes]}: {problems}. Convert the network that they are of, or "
            "a complete file."
        )
    model.load_state_dict(state_dict)
    return model


def label_fields(names: Mapping[int, str] | None) -> dict:
    """Return the fields of a configuration that hold these names of the classes; none if they are not known."""
    if names is None:
        return {}
    return {"id2label": dict(names), "label2id": {name: index for index, name in names.items()}}
