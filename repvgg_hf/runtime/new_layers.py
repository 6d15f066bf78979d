"""Layers that a checkpoint has not, or with other sizes: a head for other classes. They are new, and untrained.

In a quantized model such a layer stays float, in one prepared for quantization-aware training (QAT) it is prepared
anew; the rest is as it was.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from .cluster_layers import cluster_layers
from .layer_swaps import convertible_layers
from .logs import get_logger

logger = get_logger(__name__)


@dataclass
class NewLayer:
    """A layer of the model that the checkpoint does not fit.

    Attributes:
        outputs: how many the model's layer has.
        stored: how many the checkpoint's has; `None` if it has no such layer.
    """

    outputs: int
    stored: int | None

    def found(self) -> str:
        """Say what the checkpoint has in its place."""
        return "no such layer" if self.stored is None else f"one with {self.stored} outputs"


def find_new_layers(model, shapes: dict[str, list[int]], config) -> dict[str, NewLayer]:
    """Find the layers that a quantized checkpoint lacks or has with another number of outputs, before it is loaded.

    Args:
        model: on the meta device, still float.
        shapes: those of the checkpoint's tensors, by the names in the model.
        config: the `ClusterConfig` that says which layers are quantized there.

    A layer of the base model that is missing is not new but damage, which `check_checkpoint` finds. Returns them by
    name.
    """
    prefix = f"{model.base_model_prefix}."
    shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    stored = {name.rpartition(".")[0] for name in shapes}
    found = {}
    for name, layer in convertible_layers(model, config).items():
        place, outputs = name.removeprefix(prefix), layer.weight.shape[0]
        bias = shapes.get(f"{place}.bias")
        if place not in stored and is_outside_base(model, name):
            found[name] = NewLayer(outputs, None)
        elif bias is not None and layer.bias is not None and len(bias) == 1 and bias[0] != outputs:
            found[name] = NewLayer(outputs, bias[0])
    return found


def is_outside_base(model, name: str) -> bool:
    """Tell whether the layer called `name` is part of a head."""
    return model.base_model is not model and not name.startswith(f"{model.base_model_prefix}.")


def without_layers(keys: Iterable[str], layers: Iterable[str]) -> set[str]:
    """Return the `keys` of tensors that are not of these `layers`."""
    parts = tuple(f"{layer}." for layer in layers)
    return {key for key in keys if not key.startswith(parts)}


def check_sizes(name, mismatched: Iterable[tuple], ignored: bool) -> None:
    """Raise `RuntimeError`, as Transformers does, for tensors `(key, stored shape, model's shape)`, unless `ignored`.

    `name` is the folder or repository that they are from.
    """
    if ignored or not mismatched:
        return
    # of a prepared or quantized layer what says most
    key, stored, shape = min(mismatched, key=lambda entry: ("_fake_quant." in entry[0], entry[0]))
    layer = key.rpartition(".")[0]
    raise RuntimeError(
        f"{key} is {list(stored)} in {name} and {list(shape)} in the model ({len(mismatched)} tensors differ in all): "
        f"{layer or key} has {stored[0] if stored else 1} outputs there, and the configuration asks for "
        f"{shape[0] if shape else 1}. Load the model with the checkpoint's own configuration (of a classifier leave "
        "out num_labels, id2label and label2id), or pass ignore_mismatched_sizes=True, which makes such layers new "
        "and untrained."
    )


def check_quantized_on_loading(model, missing: Iterable[str], mismatched: Iterable[tuple]) -> None:
    """Raise `ValueError` if a float checkpoint was quantized on loading together with layers that are untrained."""
    absent = {*missing, *(key for key, *_ in mismatched)}
    if not absent:
        return
    _refuse_untrained(name for name in cluster_layers(model) if any(key.startswith(f"{name}.") for key in absent))


def check_loaded_before_quantizing(model, config) -> None:
    """Raise `ValueError` for layers that `config` quantizes and that Transformers found no weights of to load.

    It marks what it loaded, and hides what it did not from quantizers; a part that it moved has lost the marks.
    """
    layers = convertible_layers(model, config).items()
    _refuse_untrained(
        name
        for name, layer in layers
        if not hasattr(layer, "_hf_hook")
        and not all(getattr(tensor, "_is_hf_initialized", False) for tensor in layer.parameters(recurse=False))
    )


def _refuse_untrained(names: Iterable[str]) -> None:
    new = list(names)
    if new:
        raise ValueError(
            f"{', '.join(new)} is new and untrained, as the checkpoint has no such layer or another size of it, and "
            "quantization_config would freeze it as it is: load the float model without quantization_config, train it, "
            "then call quantize()."
        )


def warn_of_new_layers(name, layers: dict[str, NewLayer], kept: str) -> None:
    """Log which layers are new, and that these stay float or are prepared anew, as `kept` says."""
    for layer, new in layers.items():
        logger.warning(
            "%s has %d outputs, and %s has %s: it is new and untrained, and %s. The other layers are the checkpoint's. "
            "Train it before use.", layer, new.outputs, name, new.found(), kept,
        )  # fmt: skip


__all__ = [
    "NewLayer",
    "check_loaded_before_quantizing",
    "check_quantized_on_loading",
    "check_sizes",
    "find_new_layers",
    "is_outside_base",
    "warn_of_new_layers",
    "without_layers",
]
