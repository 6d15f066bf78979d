"""What Transformers calls a model's tensors in files, where that differs from the names in the model.

It keeps the names of older checkpoints in files (of ViT, RT-DETR, D-FINE, ...), and renames tensors when they are
loaded and saved. Models of this package and of other code are saved under the names that they have.
"""

from collections.abc import Iterable

import torch
from torch import nn


def is_renamed(model: nn.Module) -> bool:
    """Tell whether Transformers may rename tensors of `model`: it does so for classes of its own, also inside others.

    Its rules take longer to put together than all other checks of a small model.
    """
    return any(type(module).__module__.startswith("transformers.models.") for module in model.modules())


def names_in_model(names: Iterable[str], model: nn.Module) -> dict[str, str]:
    """Return what each of the `names` in a file is called in `model`, but for its `base_model_prefix`.

    A file of a model with a head may be loaded into the base model and the reverse, so that names of files are compared
    without that prefix.
    """
    names = sorted(names)
    if not is_renamed(model):
        return dict(zip(names, names))
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    return {name: rename_source_key(name, renamings, [])[0] for name in names}


def tensors_in_files(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the `state` of `model` as `save_pretrained` puts it into files: renamed, each shared tensor once."""
    if not is_renamed(model):
        return state
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(dict(state), model))


__all__ = ["names_in_model", "tensors_in_files"]
