"""The configuration of cluster-quantized models, and the quantizer that loads them with `from_pretrained`."""

from pathlib import Path

import torch
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoints import check_checkpoint, tensors_checksum
from .cluster_layers import CODEBOOK_DTYPES, ClusterConv2d, ClusterLayer, ClusterLinear

FORMAT_VERSION = 1
_CHOICES = {
    "method": ("cluster", "uniform"),
    "granularity": ("per_tensor", "per_channel", "per_group"),
    "codebook_dtype": tuple(CODEBOOK_DTYPES),
    "range_method": ("minmax", "mse"),
    "decode": ("at_load", "on_the_fly"),
}


class ClusterConfig(QuantizationConfigMixin):
    """How a model's weights are quantized; stored as `quantization_config` in `config.json`.

    Args:
        bits: bits of a weight's code, 1 to 8.
        method: `"cluster"` (k-means codebooks) or `"uniform"` (evenly spaced ones, the usual integer quantization).
        granularity: which weights share a codebook: `"per_tensor"`, `"per_channel"` (of the output) or `"per_group"`
            (of `group_size` consecutive output channels).
        group_size: output channels that share a codebook, for `"per_group"` only; divides every layer's channels.
        channel_scale: fit a float32 scale for each output channel. `None` takes the default of the method and
            granularity: on for clusters per tensor, where it costs 0.01 to 0.04 bit a weight, or for an int8 codebook.
        codebook_dtype: `"float16"`, `"float32"` or `"int8"`. With `"int8"` (needs `channel_scale`) the decoded weight
            is an int8 weight with a symmetric scale a channel, as integer engines use it.
        bits_overrides: other bits for some layers, such as `{"classifier": 8, "embeddings": 8}`. A key is a module's
            name or a parent's, the base model's prefix may be left out; the longest matching key wins.
        modules_to_not_convert: modules, named likewise, that stay float.
        symmetric: for `"uniform"` (the default there) a grid with an exact zero and as many steps to both sides, else
            one from minimum to maximum. For `"cluster"` every entry has its negative.
        preserve_zero: one entry of every codebook is exactly zero, as in a symmetric uniform grid: pruned weights stay
            pruned. A symmetric codebook of `"cluster"` then holds zero twice, and takes at least 2 bits.
        range_method: for `"uniform"`: a grid over the whole range (`"minmax"`) or with the least squared error
            (`"mse"`).
        decode: `"at_load"` decodes each weight once, when it is first used, and keeps the codes beside it;
            `"on_the_fly"` keeps only the codes and decodes in every forward pass.
        activation_bits: 2 to 8 also rounds the input of every converted layer, to integers with a fixed scale and
            zero point for the whole tensor, which `quantize()` finds on `calibration` data. `None`: weights only.
        format_version: of the tensors on disk; this version of the package reads and writes 1.
        checksum: of all tensors of the checkpoint, written by `save_pretrained` and checked by `from_pretrained`.

    Raises `ValueError` (or `TypeError` for an unknown key) that names the argument and what it accepts.
    """

    def __init__(
        self,
        bits: int = 4,
        method: str = "cluster",
        granularity: str = "per_tensor",
        group_size: int | None = None,
        channel_scale: bool | None = None,
        codebook_dtype: str = "float16",
        bits_overrides: dict[str, int] | None = None,
        modules_to_not_convert: list[str] | None = None,
        symmetric: bool | None = None,
        preserve_zero: bool = False,
        range_method: str = "mse",
        decode: str = "at_load",
        activation_bits: int | None = None,
        format_version: int = FORMAT_VERSION,
        checksum: str | None = None,
        quant_method: str = "cluster",
        **unknown,
    ):
        # first: what a later format adds is unknown here
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"quantization_config has format_version {format_version!r}, this version of repvgg_hf reads "
                f"{FORMAT_VERSION}: upgrade with `pip install -U repvgg-hf`, or quantize the float model again."
            )
        if unknown:
            raise TypeError(
                f"Unknown quantization option {', '.join(map(repr, unknown))}: ClusterConfig takes "
                "bits, method, granularity, group_size, channel_scale, codebook_dtype, bits_overrides, "
                "modules_to_not_convert, symmetric, preserve_zero, range_method, decode and activation_bits."
            )
        self.quant_method = quant_method
        self.bits = bits
        self.method = method
        self.granularity = granularity
        self.group_size = group_size
        if channel_scale is None:
            channel_scale = codebook_dtype == "int8" or (method == "cluster" and granularity == "per_tensor")
        self.channel_scale = channel_scale
        self.codebook_dtype = codebook_dtype
        self.bits_overrides = dict(bits_overrides or {})
        self.modules_to_not_convert = list(modules_to_not_convert or [])
        self.symmetric = method == "uniform" if symmetric is None else symmetric
        self.preserve_zero = preserve_zero
        self.range_method = range_method
        self.decode = decode
        self.activation_bits = activation_bits
        self.format_version = format_version
        self.checksum = checksum
        self._validate()

    def _validate(self):
        if self.quant_method != "cluster":
            raise ValueError(f"quant_method must be 'cluster', got {self.quant_method!r}.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
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
        for name in ("channel_scale", "symmetric", "preserve_zero"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if (self.granularity == "per_group") != (self.group_size is not None):
            raise ValueError(
                f"granularity={self.granularity!r} and group_size={self.group_size!r} don't fit: give group_size (the "
                "output channels that share a codebook) with granularity='per_group', and only with that."
            )
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size < 1):
            raise ValueError(f"group_size must be a positive integer, got {self.group_size!r}.")
        if self.codebook_dtype == "int8" and not self.channel_scale:
            raise ValueError("codebook_dtype='int8' holds integers only: set channel_scale=True to give them a scale.")
        if self.method == "uniform" and self.channel_scale and not self.symmetric:
            raise ValueError(
                "A uniform grid with channel_scale has no offset: set symmetric=True or channel_scale=False"
            )
        if self.method == "uniform" and self.preserve_zero and not self.symmetric:
            raise ValueError("An affine uniform grid has no exact zero: set symmetric=True or preserve_zero=False.")

    def bits_of(self, name: str) -> int:
        """The bits of the layer called `name`."""
        matches = {
            key.removeprefix("repvgg."): bits for key, bits in self.bits_overrides.items() if _is_within(name, key)
        }
        return matches[max(matches, key=len)] if matches else self.bits

    def converts(self, name: str) -> bool:
        """Whether the layer called `name` is quantized."""
        return not any(_is_within(name, key) for key in self.modules_to_not_convert)

    def groups_of(self, name: str, out_channels: int) -> int:
        """How many codebooks the layer called `name` has. Raises `ValueError` if `group_size` does not divide it."""
        if self.granularity == "per_tensor":
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
        for field in ("bits_overrides", "modules_to_not_convert"):
            for key in getattr(self, field):
                if not any(_is_within(name, key) for name in names):
                    raise ValueError(
                        f"{field} names {key!r}, which is no convolution or linear layer of this model, nor the "
                        f"parent of one. Its layers: {', '.join(names)}."
                    )


def _is_within(name: str, key: str) -> bool:
    """Whether the layer `name` is `key` or inside it, whether or not they start with the base model's prefix."""
    name, key = name.removeprefix("repvgg."), key.removeprefix("repvgg.")
    return name == key or name.startswith(key + ".")


class ClusterQuantizer(HfQuantizer):
    """Loads cluster-quantized checkpoints, and quantizes float ones on the fly, inside `from_pretrained`.

    The model does the work through its own methods, so that a model whose code came with a checkpoint gets layers of
    that code, also while the package is installed.
    """

    requires_calibration = False

    def update_dtype(self, dtype):
        # fusing and clustering in half precision would cost accuracy: load in float32, cast when done
        self.final_dtype = dtype
        return dtype if self.pre_quantized else torch.float32

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        if not self.pre_quantized:
            return
        if not model.config.deploy:
            raise ValueError(
                "config.json has a quantization_config but deploy=False: quantized checkpoints hold fused kernels. "
                "Set deploy to true in config.json if its keys end in weight_codes, or remove quantization_config."
            )
        layers = model.replace_with_cluster_layers(self.quantization_config)
        if checkpoint_files and all(Path(file).suffix == ".safetensors" for file in checkpoint_files):
            check_checkpoint(layers, checkpoint_files, self.quantization_config.checksum)

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            model.is_quantized = False  # not yet, although it was announced before the weights were loaded
            model.quantize(self.quantization_config).to(self.final_dtype)
            model.config.dtype = self.final_dtype
            return
        model.check_cluster_layers()

    def _dequantize(self, model, dtype=None):
        model.replace_with_float_layers()
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # config.json holds its name
        return model if dtype is None else model.to(dtype)

    def get_state_dict_and_metadata(self, model):
        from transformers.integrations.accelerate import load_offloaded_parameter  # rarely needed, and internal

        # in config.json, which is written next: safetensors writes several metadata keys in random order, and saving
        # the same model twice shall give the same bytes
        tensors = (
            (name, load_offloaded_parameter(model, name) if tensor.is_meta else tensor)
            for name, tensor in model.state_dict().items()
        )
        self.quantization_config.checksum = tensors_checksum(tensors)
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """What stayed float (biases) trains; the codes don't. `Trainer` asks before it evaluates, too."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


# `setdefault`: a copy of this file that came with a checkpoint may meet the installed package in one process
AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("cluster", ClusterConfig)
AUTO_QUANTIZER_MAPPING.setdefault("cluster", ClusterQuantizer)

__all__ = ["ClusterConfig", "ClusterConv2d", "ClusterLayer", "ClusterLinear", "ClusterQuantizer"]
