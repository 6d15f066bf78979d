"""What a model takes: a batch of calibration data as arguments of its forward pass, with labels kept apart."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class ModelInputs:
    """One batch of what a model takes.

    Attributes:
        args (`tuple`): positional arguments of `forward`, at least one or one in `kwargs` a tensor `[batch, ...]`.
        kwargs (`dict[str, Any]`): keyword arguments: tensors, and settings such as `interpolate_pos_encoding=True`.
        labels (`dict[str, Any]`): labels by the names of their arguments; empty if there are none.
    """

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)

    def run(self, model: nn.Module, with_labels: bool = False):
        """Return what `model` puts out for them."""
        return model(*self.args, **self.kwargs, **(self.labels if with_labels else {}))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the inputs that are tensors, by name; a positional one's is its number."""
        named = {f"input {index}": value for index, value in enumerate(self.args)} | self.kwargs
        return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}

    def main(self) -> torch.Tensor:
        """Return the first tensor, whose first dimension is the batch."""
        return next(iter(self.tensors().values()))

    def __len__(self) -> int:
        return len(self.main())

    def take(self, part: slice) -> "ModelInputs":
        """Return some examples of the batch: that part of all that has as many entries as the batch has examples."""
        size = len(self)

        def taken(value):
            has_batch = isinstance(value, (torch.Tensor, list, tuple)) and getattr(value, "ndim", 1) > 0
            return value[part] if has_batch and len(value) == size else value

        return self._each(taken)

    def to(self, device: torch.device | str) -> "ModelInputs":
        """Return the batch on a device, with all floating point tensors in float32."""

        def moved(value):
            if isinstance(value, torch.Tensor):
                return value.to(device, torch.float32 if value.is_floating_point() else value.dtype)
            if isinstance(value, (list, tuple)):
                return type(value)(map(moved, value))
            if isinstance(value, Mapping):
                return {name: moved(entry) for name, entry in value.items()}
            return value

        return self._each(moved)

    def _each(self, function) -> "ModelInputs":
        """Apply `function` to every argument and label."""
        kwargs, labels = ({name: function(value) for name, value in d.items()} for d in (self.kwargs, self.labels))
        return ModelInputs(tuple(map(function, self.args)), kwargs, labels)

    def described(self) -> str:
        """Return names, dtypes and shapes, for messages."""
        parts = (f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in self.tensors().items())
        return ", ".join(parts)


class ForwardArguments:
    """What the `forward` of a model takes, and batches of data as its arguments.

    Attributes:
        images_alone (`bool`): whether the model takes one batch of images `[batch, channels, height, width]` and no
            more: one with a chain of blocks, or none that is known (`model=None`).
        main (`str`, *optional*): the name of the model's main input, if it says so.
    """

    def __init__(self, model: nn.Module | None):
        self.images_alone = model is None or hasattr(model, "calibration_blocks")
        self.main = "pixel_values" if self.images_alone else getattr(model, "main_input_name", None)
        self.model_name = "The model" if model is None else type(model).__name__
        parameters = [] if self.images_alone else list(inspect.signature(model.forward).parameters.values())
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self.takes_any_name = not named and any(p.kind == p.VAR_KEYWORD for p in parameters)
        self.names = ["pixel_values", "labels"] if self.images_alone else [p.name for p in named]
        self.required = [p.name for p in named if p.default is p.empty and not _is_label(p.name)]

    def bind(self, item) -> ModelInputs:
        """Return a batch or an example of calibration data as arguments.

        A tuple has as many inputs as `forward` takes without a default, at least one, and then perhaps labels; an
        input may be a tuple of all inputs, or a mapping, too. From a mapping those are taken that `forward` takes; the
        only input of a model may have any name there.
        """
        if isinstance(item, torch.Tensor):
            return self._complete(ModelInputs((item,)))
        if isinstance(item, (tuple, list)) and item:
            return self._bind_tuple(item)
        if isinstance(item, Mapping) or hasattr(item, "keys"):
            return self._bind_mapping(item)
        raise self._unknown(type(item).__name__)

    def _bind_tuple(self, item) -> ModelInputs:
        inputs, labels = item[:1], item[1:]
        if isinstance(item[0], (tuple, list)):
            bound = ModelInputs(tuple(item[0]))
        elif isinstance(item[0], torch.Tensor):
            count = max(1, len(self.required))
            inputs, labels = item[:count], item[count:]
            bound = ModelInputs(tuple(inputs))
        elif hasattr(item[0], "keys"):
            bound = self._bind_mapping(item[0])
        else:
            raise self._unknown(f"a {type(item).__name__} of {type(item[0]).__name__}")
        if labels and labels[0] is not None:
            bound.labels = {"labels": _as_labels(labels[0])}
        return self._complete(bound)

    def _bind_mapping(self, item) -> ModelInputs:
        if self.images_alone and not isinstance(item.get("pixel_values"), torch.Tensor):
            raise self._unknown(f"keys {', '.join(map(str, item.keys()))}")
        bound = ModelInputs()
        for name, value in item.items():
            if value is None:
                continue
            if _is_label(name):
                # a plain `label` is what data sets call it, and collators rename it
                bound.labels["labels" if name in ("label", "label_ids") else name] = _as_labels(value)
            elif name in self.names or self.takes_any_name:
                bound.kwargs[name] = value
        if self.images_alone:
            bound.args, bound.kwargs = (bound.kwargs["pixel_values"],), {}
            bound.labels = {name: value for name, value in bound.labels.items() if name == "labels"}
        elif not bound.tensors():
            inputs = [value for name, value in item.items() if not _is_label(name) and value is not None]
            if len(inputs) == len(self.required) == 1:
                bound.args = (inputs[0],)
                return self._complete(bound)
            raise self._unknown(f"keys {', '.join(map(str, item.keys()))}")
        return self._complete(bound)

    def _complete(self, bound: ModelInputs) -> ModelInputs:
        """Raise `ValueError` naming what `forward` needs and `bound` lacks, or what is no tensor."""
        missing = [name for name in self.required[len(bound.args) :] if name not in bound.kwargs]
        if missing:
            raise ValueError(
                f"Calibration data has {bound.described() or 'no tensor'}, and {self.model_name}.forward also needs "
                f"{', '.join(missing)}: give a tuple of all inputs in order, or a mapping with their names."
            )
        others = {name: value for name, value in enumerate(bound.args) if not isinstance(value, torch.Tensor)}
        others |= {
            name: value for name, value in bound.kwargs.items() if not isinstance(value, (torch.Tensor, bool, int, str))
        }
        for name, value in others.items():
            raise ValueError(
                f"Input {name!r} of the calibration data is a {type(value).__name__}, expected a tensor: let the "
                "processor or tokenizer return tensors (return_tensors='pt')."
            )
        return bound

    def _unknown(self, found: str) -> ValueError:
        if self.images_alone:
            return ValueError(
                f"Calibration data must give tensors or mappings with a 'pixel_values' tensor, got {found}: pass "
                "images through the image processor."
            )
        return ValueError(
            f"Calibration data must give tensors, tuples or mappings of what {self.model_name}.forward takes "
            f"({', '.join(self.names) or 'any'}), got {found}: give the inputs these names."
        )


def _is_label(name: str) -> bool:
    return "label" in str(name)


def _as_labels(value):
    """Return labels as a tensor where they are numbers; other ones, such as boxes of each image, as they are."""
    is_structure = isinstance(value, Mapping) or (
        isinstance(value, (list, tuple)) and value and not isinstance(value[0], (int, float))
    )
    return value if is_structure or isinstance(value, str) else torch.as_tensor(value)
