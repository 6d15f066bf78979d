"""A tensor in quantized checkpoints that stops them from being loaded where this package is not imported.

Transformers does not know the quantization method then: it warns, takes the model for a float one, and would leave the
weights random, as the file has only codes. So the file of a model that no code travels with has one float weight too,
`<first quantized layer>.weight`, which is empty: as its size is not the model's, loading ends with an error. With the
package the model has no such tensor, and it is passed over.
"""

import re

import torch

from .cluster_layers import cluster_layers


def has_own_code(model) -> bool:
    """Tell whether `model` is of this package, whose code can lie beside a checkpoint, or of a copy of that.

    Blocks of timm have a `reparameterize()`, too, so that this is no sign.
    """
    return hasattr(model, "replace_with_cluster_layers")


def with_marker(model, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the `state` of a quantized `model` with the marker, if it needs one and its state is in memory."""
    if has_own_code(model) or any(tensor.is_meta for tensor in model.state_dict().values()):
        return state
    first = next(iter(cluster_layers(model)))
    return state | {f"{first}.weight": torch.empty(0, dtype=torch.uint8)}


def is_marker(name: str, shape: list[int]) -> bool:
    """Tell whether a tensor of a file, of a quantized layer by its `name`, is the marker."""
    return name.endswith(".weight") and list(shape) == [0]


def pass_over_marker(model, layers) -> None:
    """Let `model` be loaded from a file with the marker, without a report; `layers` are the names of quantized ones."""
    if not has_own_code(model):
        known = model._keys_to_ignore_on_load_unexpected or []
        # a file of a model with a head may be loaded into the base model and the reverse
        names = "|".join(re.escape(name.removeprefix(f"{model.base_model_prefix}.")) for name in layers)
        model._keys_to_ignore_on_load_unexpected = {*known, rf"(^|\.)({names})\.weight$"}


__all__ = ["has_own_code", "is_marker", "pass_over_marker", "with_marker"]
