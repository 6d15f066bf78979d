"""Files of quantized networks that are plain `nn.Module`s, which have no `save_pretrained`."""

import copy
import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..runtime.checkpoints import check_tensors, checksum, read_tensors, tensors_checksum
from ..runtime.cluster_layers import check_layers, cluster_layers
from ..runtime.layer_swaps import (
    rebuild_structure,
    replace_with_cluster_layers,
    require_quantizable,
    warn_of_half_biases,
)
from ..runtime.quantization_cluster import ClusterConfig
from ..runtime.saving import finish, replace_files
from ..runtime.tensors import require_bare, require_in_memory

WEIGHTS, CONFIG = "model.safetensors", "quantization_config.json"


@torch.no_grad()
def save_quantized(model: nn.Module, folder: str | Path) -> None:
    """Save a network that [`quantize`] has quantized into a `folder`, as `model.safetensors` and its configuration.

    The files appear only when both are complete. A tensor that has several names is stored under the first. Raises
    `ValueError` for a model that is not quantized, has a `save_pretrained` of its own, is offloaded, or has a state
    that is no tensor.

    Example:
    ```python
    >>> import repvgg_hf
    >>> from torch import nn

    >>> def make_model():
    ...     return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))

    >>> repvgg_hf.save_quantized(repvgg_hf.quantize(make_model(), bits=4), "small-w4")
    >>> model = repvgg_hf.load_quantized(make_model(), "small-w4")
    ```"""
    _require_plain(model, "save it with model.save_pretrained(folder)")
    config = getattr(model, "quantization_config", None)
    if not isinstance(config, ClusterConfig) or not cluster_layers(model):
        raise ValueError(f"{type(model).__name__} is not quantized: call repvgg_hf.quantize(model) first.")
    require_in_memory(model)
    names = _stored_names(model)
    warn_of_half_biases(model)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _state(model).items()}
    tensors = {name: tensor for name, tensor in tensors.items() if names[name] == name}
    config.checksum = tensors_checksum(tensors.items(), _settings(config))
    target = Path(folder)
    if target.is_file():
        raise ValueError(f"{target} is a file: save_quantized needs a folder.")
    target.mkdir(parents=True, exist_ok=True)
    with replace_files(target) as new:
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(config.to_dict(), indent=2, sort_keys=True, default=str)
        (new / CONFIG).write_text(f"{text}\n", encoding="utf-8")


@torch.no_grad()
def load_quantized(model: nn.Module, folder: str | Path, decode: str | None = None) -> nn.Module:
    """Load what [`save_quantized`] has put into a `folder` into a float `model`, in place; returns it in eval mode.

    Args:
        model (`nn.Module`): a fresh float network of the architecture that was quantized, before it was fused; its
            weights don't matter.
        folder (`str` or `Path`): where the files are.
        decode (`str`, *optional*): when weights are decoded, `"at_load"` or `"on_the_fly"`, see [`ClusterConfig`]; as
            the model was saved unless given.

    Everything is checked before the model is changed: names, dtypes, shapes and a checksum over the tensors' bytes and
    the configuration. Raises `ValueError` naming the file and the tensor that is wrong, missing or too many.

    Example:
    ```python
    >>> model = repvgg_hf.load_quantized(make_model(), "small-w4")
    ```"""
    _require_plain(model, "load the folder with its from_pretrained()")
    require_quantizable(model)
    folder = Path(folder)
    finish(folder)
    config = _read_config(folder)
    here = config if decode is None else dataclasses.replace(config, decode=decode)  # saved again as it was
    loaded = _check_files(model, config, folder / WEIGHTS)
    rebuild_structure(model, config)
    replace_with_cluster_layers(model, here)
    model.load_state_dict(loaded)
    model.quantization_config, model.is_quantized = config, True
    return model.eval()


def _check_files(model: nn.Module, config: ClusterConfig, path: Path) -> dict[str, torch.Tensor]:
    """Return the state for a quantized `model`, which is not changed; raises `ValueError` if the file does not fit."""
    skeleton = _without_memory(model)
    rebuild_structure(skeleton, config)
    layers = replace_with_cluster_layers(skeleton, config)
    names = _stored_names(skeleton)
    stored = read_tensors([path])
    check_tensors(layers, {name: (name, tensor) for name, tensor in stored.items()}, str(path))
    expected = {name: tensor for name, tensor in _state(skeleton).items() if names[name] == name}
    for name in sorted(expected.keys() | stored.keys()):
        there, wanted = (_shape(tensors.get(name)) for tensors in (stored, expected))
        if there != wanted:
            raise ValueError(
                f"{name} is {there} in {path} and {wanted} in the model: give load_quantized a fresh float model of "
                "the architecture that was quantized."
            )
    if config.checksum is not None and config.checksum != checksum(stored, _settings(config)):
        raise ValueError(
            f"The tensors in {path} don't fit the checksum in {CONFIG}, or fields of that were changed: a file is "
            "damaged or of another model. Save both again; if you changed weights or fields on purpose, remove "
            "checksum."
        )
    tensors = load_file(path)
    loaded = {name: tensors[first] for name, first in names.items()}
    skeleton.load_state_dict(loaded, assign=True)
    check_layers(skeleton)
    return loaded


def _shape(tensor) -> str:
    return "missing" if tensor is None else str(list(tensor.shape))


def _read_config(folder: Path) -> ClusterConfig:
    """Return the configuration in a `folder`; raises `ValueError` if it or the weights are not there or unreadable."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: it is no folder that repvgg_hf.save_quantized has written.")
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        read_tensors([folder / WEIGHTS])
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"A file in {folder} is truncated or damaged ({error}): save the model again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{folder / CONFIG} must hold an object, got {values!r:.80}: save the model again.")
    return ClusterConfig.from_dict(values)


def _without_memory(model: nn.Module) -> nn.Module:
    """Return a copy of `model` on the meta device; a tensor that two modules share is shared in the copy, too."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():  # what a hook has computed can't be copied
        tensors += [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
    empty = (torch.empty_like(tensor, device="meta") for tensor in tensors)
    memo = {
        id(old): nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        for old, new in zip(tensors, empty)
    }
    return copy.deepcopy(model, memo)


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that `model` saves, by name; raises `ValueError` for a state that is none."""
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"{name} is {tensor!r:.40}, no tensor, and safetensors files hold nothing else: remove get_extra_state "
                "from the module, or save model.state_dict() with torch.save."
            )
    return state


def _stored_names(model: nn.Module) -> dict[str, str]:
    """Return the name under which each tensor of `model` is stored: the first of those that it has."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in _state(model).items()}


def _settings(config: ClusterConfig) -> dict:
    """Return what the checksum covers of `config`, as in a `config.json`."""
    kept = {name: value for name, value in config.to_dict().items() if name not in ("decode", "checksum")}
    return {f"quantization_config.{name}": value for name, value in kept.items() if value not in (None, [], {})}


def _require_plain(model: nn.Module, fix: str) -> None:
    require_bare(model)
    if isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is a model of Transformers: {fix}.")


__all__ = ["load_quantized", "save_quantized"]
