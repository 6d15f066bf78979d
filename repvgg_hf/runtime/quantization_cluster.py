"""The configuration of quantized models."""

import difflib
import json
from dataclasses import dataclass, field
from typing import TypedDict

from transformers.utils.quantization_config import QuantizationConfigMixin

from .cluster_layers import CODEBOOK_DTYPES
from .fused_structure import check_fused_structure
from .options import suggest_options
from .quantization_methods import METHODS, QuantizationMethod

FORMAT_VERSION = 1
_CHOICES = {
    "method": tuple(METHODS),
    "granularity": ("per_tensor", "per_channel", "per_group"),
    "codebook_dtype": tuple(CODEBOOK_DTYPES),
    "decode": ("at_load", "on_the_fly"),
    "activation_scheme": ("affine", "int8_symmetric"),
}
LARGEST_INT8 = 127
# CPUs without VNNI instructions add the products of two uint8 inputs and int8 weights in 16 bits: up to 64 they fit,
# and 63 is as far as codebooks that are as long to both sides of zero have it (ONNX Runtime's reduce_range).
LARGEST_REDUCED = 63
REDUCED_BITS = 6  # of the codes of layers that are reduced by default: for them 127 integers are nearly as good as 255
# fields that the first files of this format don't have, and what is meant there
_BEFORE = {
    "fused_structure": None, "reduce_range": None, "activation_scheme": "affine", "quantize_last_map": None,
}  # fmt: skip
_METHOD_OPTIONS = {option: method.name for method in METHODS.values() for option in method.options}


class ClusterOptions(TypedDict, total=False):
    """The keyword arguments of `quantize` and `prepare_qat`: the fields of [`ClusterConfig`], which explains them."""

    granularity: str
    group_size: int | None
    channel_scale: bool | None
    codebook_dtype: str | None
    reduce_range: bool | None
    bits_overrides: dict[str, int] | None
    modules_to_not_convert: list[str] | None
    symmetric: bool | None
    range_method: str | None
    decode: str
    activation_bits: int | None
    activation_scheme: str | None
    quantize_last_map: bool | None


@dataclass(repr=False)
class QuantizationOptions:
    """The fields of a [`ClusterConfig`] that a user chooses; recipes take them as command-line options."""

    bits: int = field(default=4, metadata={"help": "Bits of a weight's code, 1 to 8."})
    method: str = field(
        default="cluster", metadata={"help": "How codebooks are chosen: cluster (k-means) or uniform (evenly spaced)."}
    )
    granularity: str = field(
        default="per_tensor",
        metadata={"help": "Which weights share a codebook: per_tensor, per_channel (of the output) or per_group."},
    )
    group_size: int | None = field(
        default=None, metadata={"help": "Output channels that share a codebook, with --granularity per_group."}
    )
    channel_scale: bool | None = field(
        default=None,
        metadata={"help": "Fit a scale for each output channel; by default where it costs next to nothing."},
    )
    codebook_dtype: str | None = field(
        default=None,
        metadata={
            "help": "How codebooks are stored: float16 (default), float32, or int8 for integer engines (default with "
            "--activation_bits)."
        },
    )
    reduce_range: bool | None = field(
        default=None,
        metadata={
            "help": "Int8 weights within +-63, which CPUs without VNNI compute with exactly; by default those of up to "
            "6 bits with --activation_bits."
        },
    )
    bits_overrides: dict[str, int] | str | None = field(
        default=None, metadata={"help": "Other bits for some modules, as JSON, such as '{\"classifier\": 8}'."}
    )
    modules_to_not_convert: list[str] | None = field(
        default=None, metadata={"help": "Modules that stay float, such as classifier."}
    )
    symmetric: bool | None = field(
        default=None,
        metadata={"help": "For --method uniform: a grid with as many steps below zero as above (default)."},
    )
    range_method: str | None = field(
        default=None,
        metadata={"help": "For --method uniform: the grid with the least squared error, mse (default), or minmax."},
    )
    decode: str = field(
        default="at_load",
        metadata={"help": "When a loaded model decodes its weights: at_load (once) or on_the_fly (in each forward)."},
    )
    activation_bits: int | None = field(
        default=None, metadata={"help": "Bits of every quantized layer's input, 2 to 8; none for weights only."}
    )
    activation_scheme: str | None = field(
        default=None,
        metadata={
            "help": "With --activation_bits: zero is any of the integers, affine (default), or the middle one, "
            "int8_symmetric (for TensorRT)."
        },
    )
    quantize_last_map: bool | None = field(
        default=None,
        metadata={"help": "With --activation_bits: round the last feature map of a classifier, too (default)."},
    )

    def __post_init__(self):
        if isinstance(self.bits_overrides, str):
            self.bits_overrides = _parse_overrides(self.bits_overrides)
        if not isinstance(self.bits_overrides, dict | None):
            raise ValueError(f"bits_overrides must be an object of bits by module, got {self.bits_overrides!r:.80}.")
        kept = self.modules_to_not_convert
        if not isinstance(kept, list | tuple | None) or not all(isinstance(name, str) for name in kept or []):
            raise ValueError(f"modules_to_not_convert must be a list of names of modules, got {kept!r:.80}.")
        self.bits_overrides, self.modules_to_not_convert = dict(self.bits_overrides or {}), list(kept or [])
        self._resolve_defaults()
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices and (value is not None or name != "activation_scheme"):
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
        self._resolve_method_options()
        self._validate()

    @property
    def quantization_method(self) -> QuantizationMethod:
        """The object that chooses the codebooks."""
        return METHODS[self.method]

    def _resolve_defaults(self) -> None:
        """Set what depends on whether activations are quantized: integer engines then want integers throughout."""
        if self.codebook_dtype is None:
            # options that integers can't have, and that were chosen, come first
            floats = self.activation_bits is None or self.channel_scale is False or self.symmetric is False
            self.codebook_dtype = "float16" if floats else "int8"
        if self.activation_scheme is None and self.activation_bits is not None:
            self.activation_scheme = "affine"

    def _resolve_method_options(self) -> None:
        """Give options that depend on the method their defaults, and refuse those of another one."""
        for option, owner in _METHOD_OPTIONS.items():
            if owner == self.method and getattr(self, option) is None:
                setattr(self, option, self.quantization_method.options[option])
            elif owner != self.method and getattr(self, option) is not None:
                raise ValueError(
                    f"{option}={getattr(self, option)!r} is an option of method={owner!r}, not of {self.method!r}: "
                    "leave it out, or choose that method."
                )
        if self.channel_scale is None:
            self.channel_scale = self.quantization_method.default_channel_scale(self)

    def _validate(self) -> None:
        overrides = {f"bits_overrides[{key!r}]": bits for key, bits in self.bits_overrides.items()}
        for name, bits in {"bits": self.bits, **overrides}.items():
            if type(bits) is not int or not 1 <= bits <= 8:
                raise ValueError(f"{name} must be an integer from 1 to 8, got {bits!r}.")
        if self.activation_bits is not None and (
            type(self.activation_bits) is not int or not 2 <= self.activation_bits <= 8
        ):
            raise ValueError(
                f"activation_bits must be None (weights only) or an integer from 2 to 8, got {self.activation_bits!r}."
            )
        if not isinstance(self.channel_scale, bool):
            raise ValueError(f"channel_scale must be True or False, got {self.channel_scale!r}.")
        if (self.granularity == "per_group") != (self.group_size is not None):
            raise ValueError(
                f"granularity={self.granularity!r} and group_size={self.group_size!r} don't fit: give group_size (the "
                "output channels that share a codebook) with granularity='per_group', and only with that."
            )
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size < 1):
            raise ValueError(f"group_size must be a positive integer, got {self.group_size!r}.")
        if self.codebook_dtype == "int8" and not self.channel_scale:
            raise ValueError("codebook_dtype='int8' holds integers only: set channel_scale=True to give them a scale.")
        self._validate_integers()
        self.quantization_method.validate(self)

    def _validate_integers(self) -> None:
        """Raise `ValueError` for options of integers that are no bool, or that nothing here is an integer for."""
        for name in ("reduce_range", "quantize_last_map"):
            if not isinstance(getattr(self, name), bool | None):
                raise ValueError(f"{name} must be True, False or None (the default), got {getattr(self, name)!r}.")
        if self.reduce_range and self.codebook_dtype != "int8":
            raise ValueError(
                f"reduce_range=True is for integers, and codebook_dtype is {self.codebook_dtype!r}: set it to 'int8', "
                "or leave reduce_range out."
            )
        for name in ("activation_scheme", "quantize_last_map"):
            if getattr(self, name) and self.activation_bits is None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is for quantized activations, and activation_bits is None: set "
                    f"that to 8, say, or leave {name} out."
                )

    def largest_integer(self, bits: int) -> int:
        """Return the largest magnitude of the int8 codebook entries of a layer with codes of `bits` bits.

        (The usual integer grid of 8 bits, which is not reduced, has -128, too.)
        """
        reduced = self.reduce_range
        if reduced is None:
            reduced = self.activation_bits is not None and bits <= REDUCED_BITS
        return LARGEST_REDUCED if reduced else LARGEST_INT8


@suggest_options
@dataclass(repr=False)
class ClusterConfig(QuantizationOptions, QuantizationConfigMixin):
    """The configuration of a quantized model, stored as `quantization_config` in `config.json`.

    A weight is stored as a *code* of a few bits, which selects an entry of a *codebook*: a short table of values. A
    *group* is a run of output channels that share a codebook, and a *channel scale* is one more factor for each output
    channel: `weight[o] = scale[o] * codebook[group(o)][code[o]]`.

    Args:
        bits: bits of a weight's code, 1 to 8.
        method: `"cluster"` (k-means codebooks) or `"uniform"` (evenly spaced ones, the usual integer quantization).
        granularity: which weights share a codebook: `"per_tensor"`, `"per_channel"` (of the output) or `"per_group"`
            (of `group_size` consecutive output channels).
        group_size: output channels that share a codebook, for `"per_group"` only; divides every layer's channels.
        channel_scale: fit a float32 scale for each output channel. `None` takes the default of the method and
            granularity: on for clusters per tensor, where it costs 0.01 to 0.04 bits per weight, for symmetric uniform
            grids per channel, which are one table of integers times that scale, and for an int8 codebook.
        codebook_dtype: `"float16"`, `"float32"` or `"int8"`. With `"int8"` (needs `channel_scale`) the decoded weight
            is an int8 weight with a symmetric scale per channel, as integer engines use it. `None` takes int8 with
            `activation_bits`, unless `channel_scale=False` or `symmetric=False` rules it out, and float16 without.
        reduce_range: keep the entries of int8 codebooks within +-63 instead of +-127. CPUs without VNNI instructions
            add products of activations and weights in 16 bits, which larger ones overflow: with this every CPU computes
            the same. `None`: with `activation_bits` for layers of up to 6 bits, where it costs next to nothing.
        bits_overrides: other bits for some layers, such as `{"classifier": 8, "embeddings": 8}`. A key is a module's
            name or a parent's, in which the first component (the base model's) may be left out; the longest matching
            key wins. JSON text is accepted too.
        modules_to_not_convert: modules, named likewise, that stay float.
        symmetric: for `"uniform"` only: a grid with an exact zero and as many steps to both sides (the default), or
            one from minimum to maximum.
        range_method: for `"uniform"` only: a grid with the least squared error (`"mse"`, the default) or over the whole
            range (`"minmax"`).
        decode: `"at_load"` decodes each weight once, when it is first used, and keeps the codes beside it;
            `"on_the_fly"` keeps only the codes and decodes in every forward pass.
        activation_bits: 2 to 8 also rounds the input of every converted layer, to integers with a fixed scale and
            zero point for the whole tensor, which `quantize()` finds on `calibration` data. `None`: weights only. With
            an int8 codebook biases are then rounded to multiples of the input's scale times the weight's, so that a
            layer computes with integers alone.
        activation_scheme: with `activation_bits`: `"affine"` (the default) puts the zero point where the range of the
            values wants it; `"int8_symmetric"` at `2**(activation_bits - 1)`, which is zero in signed integers, as
            TensorRT asks for, and costs a bit after a ReLU.
        quantize_last_map: with `activation_bits`: round the last feature map as well, which no quantized layer takes as
            it is, so that engines compute the last convolution in integers, too. `None`: in RepVGG classifiers without
            squeeze-excitation; no other model has it.
        format_version: of the tensors on disk; this version of the package reads and writes 1.
        fused_structure: what `repvgg_hf.fuse` has put into the model, an entry `{"name": ..., "kind": ..., ...}` for
            each module, so that loading rebuilds it before the weights come. `None` if it is as its class makes it.
        checksum: of all tensors of the checkpoint and of the configuration's fields that change what the model
            computes, written by `save_pretrained` and checked by `from_pretrained`.
        quant_method: how Transformers finds this class: `"cluster"`.

    Raises `ValueError` (or `TypeError` for an unknown key) that names the argument and what it accepts.

    Example:
    ```python
    >>> from repvgg_hf import ClusterConfig

    >>> config = ClusterConfig(bits=3, bits_overrides={"classifier": 8})
    >>> config.bits_of("classifier"), config.bits_of("repvgg.encoder.stages.0.layers.0.conv")
    (8, 3)
    ```"""

    format_version: int = field(default=FORMAT_VERSION, kw_only=True)
    fused_structure: list[dict] | None = field(default=None, kw_only=True)
    checksum: str | None = field(default=None, kw_only=True)
    quant_method: str = field(default="cluster", kw_only=True)

    def __post_init__(self):
        if self.quant_method != "cluster":
            raise ValueError(f"quant_method must be 'cluster', got {self.quant_method!r}.")
        _check_format(self.format_version)
        if self.fused_structure is not None:
            check_fused_structure(self.fused_structure)
        super().__post_init__()

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """Make a configuration from a dictionary.

        A later `format_version` is refused before its fields are, so that the error tells the true reason.
        """
        _check_format(config_dict.get("format_version", FORMAT_VERSION))
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict:
        """Return the fields as JSON values, those that came later only if they are not what there was before."""
        values = super().to_dict()
        for name, before in _BEFORE.items():
            if values[name] in (None, before):
                del values[name]
        return values

    def get_loading_attributes(self) -> dict:
        """Return what a configuration given to `from_pretrained` changes of a quantized checkpoint's, by attribute.

        It is not the field `decode` itself, which is saved again as it was.
        """
        return {"decode_here": self.decode}

    def bits_of(self, name: str) -> int:
        """Return the bits of the layer called `name`."""
        depths = {key: _match(name, key) for key in self.bits_overrides}
        key = max(depths, key=depths.get, default=None)
        return self.bits_overrides[key] if key is not None and depths[key] else self.bits

    def converts(self, name: str) -> bool:
        """Tell whether the layer called `name` is quantized."""
        return not any(_match(name, key) for key in self.modules_to_not_convert)

    def groups_of(self, name: str, out_channels: int) -> int:
        """Return the number of codebooks of the layer called `name`, which has `out_channels` output channels.

        Raises `ValueError` if `group_size` does not divide these.
        """
        shared = self.granularity == "per_channel" and self.quantization_method.shares_codebook(self)
        if self.granularity == "per_tensor" or shared:
            return 1
        size = 1 if self.granularity == "per_channel" else self.group_size
        if out_channels % size:
            raise ValueError(
                f"group_size={size} does not divide the {out_channels} output channels of {name!r}: choose a divisor, "
                "or name the layer in modules_to_not_convert."
            )
        return out_channels // size

    def check_names(self, names: list[str]):
        """Raise `ValueError` if a key of `bits_overrides` or `modules_to_not_convert` matches none of `names`."""
        for option in ("bits_overrides", "modules_to_not_convert"):
            for key in getattr(self, option):
                if not any(_match(name, key) for name in names):
                    raise ValueError(
                        f"{option} names {key!r}, which is no convolution or linear layer of this model, nor the "
                        f"parent of one{_similar_names(names, key)}"
                    )


def _match(name: str, key: str) -> int:
    """Count the components of the layer `name` that `key` covers, if it names the layer or a parent; else return 0.

    The first component, which is the base model's in a model with a head, may be missing from the key, and a key that
    has it covers a layer of a base model.
    """
    layer, parts = name.split("."), key.split(".")
    for skipped, left_out in ((0, 0), (1, 0), (0, 1)):
        wanted = parts[left_out:]
        if wanted and layer[skipped : skipped + len(wanted)] == wanted:
            return skipped + len(wanted)
    return 0


def _similar_names(names: list[str], key: str) -> str:
    """Return what `key` may have been meant to be of the layers called `names` and their parents, for a message."""
    parts = [name.split(".") for name in names]
    whole = [".".join(part[:end]) for part in parts for end in range(1, len(part) + 1)]
    without_base = [".".join(part[1:end]) for part in parts for end in range(2, len(part) + 1)]
    similar = difflib.get_close_matches(key, dict.fromkeys([*whole, *without_base]), n=1)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    hint = f": did you mean {similar[0]!r}?" if similar else "."
    return f"{hint} Its layers: {', '.join(names[:20])}{more}."


def _parse_overrides(text: str) -> dict[str, int]:
    try:
        overrides = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"bits_overrides is no JSON ({error}): give text such as '{{\"classifier\": 8}}'.") from error
    if not isinstance(overrides, dict):
        raise ValueError(f"bits_overrides must be an object of bits by module, got {text!r}.")
    return overrides


def _check_format(version) -> None:
    if version != FORMAT_VERSION:
        raise ValueError(
            f"quantization_config has format_version {version!r}, this version of repvgg_hf reads {FORMAT_VERSION}: "
            "upgrade with `pip install -U repvgg-hf`, or quantize the float model again."
        )


__all__ = ["ClusterConfig", "ClusterOptions", "QuantizationOptions"]
