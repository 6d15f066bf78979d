"""The fields of a configuration that a checkpoint's checksum covers: those that change what the model computes."""

import json
from dataclasses import MISSING, fields
from pathlib import Path

import torch
from transformers import PreTrainedConfig

# of quantization_config: neither when weights are decoded nor the checksum itself changes what a model computes
_NOT_COVERED = ("decode", "checksum")
# of a nested configuration, which may tell how its model was quantized before it became a part
_NOT_COVERED_INSIDE = ("quantization_config", "weights_checksum", "qat_config")


def settings_of(config: PreTrainedConfig, dtype: torch.dtype | None) -> dict:
    """Return what the checksum covers of a model's configuration, as JSON values.

    These are the fields that the class of `config` declares and `quantization_config`, without those that have their
    defaults, so that fields of later versions change no checksum; the number of classes; and `dtype`, the one that the
    model is loaded with. Names of the classes are not among them. A configuration inside is told likewise.
    """
    found = {"num_labels": config.num_labels, "dtype": None if dtype is None else str(dtype).removeprefix("torch.")}
    found |= _declared(config)
    defaults = {entry.name: entry.default for entry in fields(config)} | {"num_labels": MISSING, "dtype": None}
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        stored = quantization if isinstance(quantization, dict) else quantization.to_dict()
        found |= {f"quantization_config.{name}": value for name, value in stored.items() if name not in _NOT_COVERED}
    return _without_defaults(found, defaults)


def _declared(config: PreTrainedConfig) -> dict:
    """Return the fields that the class of `config` declares, and what a class that declares none has been given."""
    general = {entry.name for entry in fields(PreTrainedConfig)} | {"weights_checksum"}
    names = [entry.name for entry in fields(config) if entry.name not in general]
    if not names:  # a class of older code sets its fields in __init__
        names = [name for name in vars(config) if name not in general and not name.startswith("_")]
        names = [name for name in names if name not in ("quantization_config", "name_or_path", "transformers_version")]
    return {name: _nested(getattr(config, name)) for name in names}


def _nested(value):
    """Return `value`; a configuration as its settings."""
    if not isinstance(value, PreTrainedConfig):
        return value
    found = {name: inner for name, inner in _declared(value).items() if name not in _NOT_COVERED_INSIDE}
    defaults = {entry.name: entry.default for entry in fields(value)}
    return {"model_type": value.model_type} | _without_defaults(found, defaults)


def _without_defaults(found: dict, defaults: dict) -> dict:
    # as JSON has them: a list for a tuple, a name for a dtype
    plain = json.loads(json.dumps(found, default=str))
    return {
        name: value for name, value in plain.items() if value not in (None, [], {}, _plain(defaults.get(name, MISSING)))
    }


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def settings_to_store(config: PreTrainedConfig, dtype: torch.dtype | None) -> dict:
    """Return the [`settings_of`] a model of that `dtype` as they will be read from the `config.json` saved next.

    What some classes make of their fields is not what they were made from.
    """
    return _settings_in(json.loads(config.to_json_string()) | {"dtype": str(dtype).removeprefix("torch.")}, config)


def stored_settings(files: list[str], config: PreTrainedConfig) -> dict:
    """Return the [`settings_of`] the `config.json` that lies beside weight `files`, which is of the class of `config`.

    Arguments of `from_pretrained` may have changed fields of `config`; it is taken if there is no such file.
    """
    path = Path(files[0]).with_name("config.json")
    if not path.is_file():
        return settings_of(config, config.dtype)
    return _settings_in(json.loads(path.read_text(encoding="utf-8")), config)


def _settings_in(stored: dict, like: PreTrainedConfig) -> dict:
    """Return the [`settings_of`] what a `config.json` has, which is of the class of `like`."""
    kind = type(like)
    if kind.__module__.startswith("transformers."):  # some of these have rules of their own for what is in a file
        config = kind.from_dict(stored)
        return settings_of(config, config.dtype)
    # from_dict() and the names of a thousand classes would take longer than the rest of the check
    names = stored.pop("id2label", None)
    stored.pop("label2id", None)
    config = kind(**stored)
    return settings_of(config, config.dtype) | ({} if names is None else {"num_labels": len(names)})


__all__ = ["settings_of", "settings_to_store", "stored_settings"]
