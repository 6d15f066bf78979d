"""Cluster-quantised layers, their configuration, and the quantiser that loads them with `from_pretrained`.

W[o, ...] = scale[o] * codebook[group(o)][code[o, ...]]
"""

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .packing import pack_codes, packed_size, unpack_codes
from .reparameterization import require_in_memory

logger = logging.get_logger(__name__)

FORMAT_VERSION = 1
CODEBOOK_DTYPES = {"float16": torch.float16, "float32": torch.float32, "int8": torch.int8}
_CHOICES = {
    "method": ("cluster", "uniform"),
    "granularity": ("per_tensor", "per_channel", "per_group"),
    "codebook_dtype": tuple(CODEBOOK_DTYPES),
    "range_method": ("minmax", "mse"),
    "decode": ("at_load", "on_the_fly"),
}


class ClusterConfig(QuantizationConfigMixin):
    """How a model's weights are quantised; stored as `quantization_config` in `config.json`.

    Args:
        bits: bits of a weight's code, 1 to 8.
        method: `"cluster"` (k-means codebooks) or `"uniform"` (evenly spaced ones, the usual integer quantisation).
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
        symmetric: for `"uniform"` (default `True`) a grid with an exact zero and as many steps to both sides, else one
            from minimum to maximum; for `"cluster"` (default `False`) a codebook that is its own mirror image.
        preserve_zero: for `"cluster"`: one entry of every codebook is exactly zero, so that pruned weights stay zero.
        range_method: for `"uniform"`: a grid over the whole range (`"minmax"`) or with the least squared error
            (`"mse"`).
        decode: `"at_load"` decodes each weight once and keeps the codes beside it; `"on_the_fly"` keeps only the codes
            and decodes in every forward pass.
        activation_bits: reserved by the format; must be `None`.
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
                f"{FORMAT_VERSION}: upgrade with `pip install -U repvgg-hf`, or quantise the float model again."
            )
        if unknown:
            raise TypeError(
                f"Unknown quantization option {', '.join(map(repr, unknown))}: ClusterConfig takes "
                "bits, method, granularity, group_size, channel_scale, codebook_dtype, bits_overrides, "
                "modules_to_not_convert, symmetric, preserve_zero, range_method and decode."
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
            if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
                raise ValueError(f"{name} must be an integer from 1 to 8, got {bits!r}.")
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
        if self.activation_bits is not None:
            raise ValueError(f"activation_bits must be None (weights only), got {self.activation_bits!r}.")

    def bits_of(self, name: str) -> int:
        """The bits of the layer called `name`."""
        matches = {
            key.removeprefix("repvgg."): bits for key, bits in self.bits_overrides.items() if _is_within(name, key)
        }
        return matches[max(matches, key=len)] if matches else self.bits

    def converts(self, name: str) -> bool:
        """Whether the layer called `name` is quantised."""
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


class ClusterLayer(nn.Module):
    """A weight stored as packed codes, codebook and scale. Base of [`ClusterConv2d`] and [`ClusterLinear`].

    Args:
        layer: the float layer whose place it takes; only its shapes, bias, dtype and device are read.
        bits: of a code.
        groups: number of codebooks, divides the output channels.
        channel_scale: whether there is a scale a channel.
        codebook_dtype: `torch.float16`, `torch.float32` or `torch.int8`.
        on_the_fly: decode in every forward pass instead of keeping a dense `weight` beside the codes.
    """

    def __init__(self, layer: nn.Module, bits: int, groups: int, channel_scale: bool, codebook_dtype, on_the_fly=False):
        super().__init__()
        self.weight_shape = tuple(layer.weight.shape)
        self.weight_numel = layer.weight.numel()
        self.bits, self.groups, self.on_the_fly = bits, groups, on_the_fly
        device = layer.weight.device
        out_channels = self.weight_shape[0]
        codes = torch.zeros(packed_size(self.weight_numel, bits), dtype=torch.uint8, device=device)
        self.register_buffer("weight_codes", codes)
        self.register_buffer("weight_codebook", torch.zeros(groups, 2**bits, dtype=codebook_dtype, device=device))
        scale = torch.zeros(out_channels, dtype=torch.float32, device=device) if channel_scale else None
        self.register_buffer("weight_scale", scale)
        self.weight = None  # set by `refresh`
        self.bias = layer.bias
        self.compute_dtype = layer.weight.dtype

    def set_codes(self, codes: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor | None = None):
        """Store uint8 `codes` of the weight's shape, `codebook` `[groups, 2**bits]` and `scale` `[out]` or `None`."""
        self.weight_codes.copy_(pack_codes(codes, self.bits))
        self.weight_codebook.copy_(codebook)
        if self.weight_scale is not None:
            self.weight_scale.copy_(scale)
        self.refresh()

    def codes(self) -> torch.Tensor:
        """The codes, uint8, of the weight's shape."""
        return unpack_codes(self.weight_codes, self.bits, self.weight_numel).view(self.weight_shape)

    def decoded(self) -> torch.Tensor:
        """The weight, computed in float32 and returned in the layer's dtype; a kernel has its channels last."""
        codes = self.codes()
        if codes.dim() == 4:  # rearranged as codes, a quarter of the bytes
            codes = codes.permute(0, 2, 3, 1).contiguous()
        codebook = self.weight_codebook.float()
        if self.groups == 1:
            weight = codebook[0].index_select(0, codes.view(-1).int())
        else:
            weight = codebook.gather(1, codes.view(self.groups, -1).long())
        weight = weight.view(codes.shape)
        if self.weight_scale is not None:
            weight *= self.weight_scale.view(-1, *[1] * (weight.dim() - 1))
        weight = weight.to(self.compute_dtype)
        return weight.permute(0, 3, 1, 2) if weight.dim() == 4 else weight

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    def refresh(self):
        """Decode the dense weight again from the codes; call it after changing them."""
        del self.weight
        if self.on_the_fly or self.weight_codes.is_meta:
            self.weight = None  # and no buffer, as accelerate can't offload one that is None
        else:
            self.register_buffer("weight", self.decoded(), persistent=False)

    def dense_weight(self) -> torch.Tensor:
        return self.decoded() if self.weight is None else self.weight

    def _apply(self, fn, recurse=True):
        stored = self.weight_codebook, self.weight_scale
        super()._apply(fn, recurse)
        # `.half()` and `.to(bfloat16)` are for what is computed, not for what is stored: saving again stays lossless
        for name, before in zip(("weight_codebook", "weight_scale"), stored):
            after = getattr(self, name)
            if after is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=stored[0].device)).dtype
        if dtype != self.compute_dtype:
            self.compute_dtype = dtype
            self.refresh()  # from the codes: a wider dtype has all its digits again
        return self

    def check(self, name: str):
        """Raise `ValueError` naming the tensor if a loaded codebook or scale can't be right."""
        fix = "the checkpoint is damaged: download it again or quantise the float model again."
        codebook = self.weight_codebook.float()
        if not codebook.isfinite().all():
            raise ValueError(f"{name}.weight_codebook has NaN or infinite entries; {fix}")
        if (codebook.diff(dim=1) < 0).any():
            raise ValueError(f"{name}.weight_codebook is not ascending; {fix}")
        if self.weight_scale is not None and not self.weight_scale.isfinite().all():
            raise ValueError(f"{name}.weight_scale has NaN or infinite entries; {fix}")

    def extra_repr(self) -> str:
        scale = ", channel_scale" if self.weight_scale is not None else ""
        dtype = str(self.weight_codebook.dtype).removeprefix("torch.")
        return f"weight={list(self.weight_shape)}, bits={self.bits}, codebooks={self.groups} x {dtype}{scale}"


class ClusterConv2d(ClusterLayer):
    """An `nn.Conv2d` with a cluster-quantised weight."""

    def __init__(self, layer: nn.Conv2d, *args, **kwargs):
        super().__init__(layer, *args, **kwargs)
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self.conv_groups = layer.groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.dense_weight()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.conv_groups)


class ClusterLinear(ClusterLayer):
    """An `nn.Linear` with a cluster-quantised weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dense_weight(), self.bias)


LAYER_CLASSES = {nn.Conv2d: ClusterConv2d, nn.Linear: ClusterLinear}


def quantizable_layers(model: nn.Module, config: ClusterConfig | None = None) -> Iterator[tuple[str, nn.Module]]:
    """The float convolutions and linear layers of a fused `model`, with their names; those that `config` converts."""
    for name, module in model.named_modules():
        if type(module) in LAYER_CLASSES and (config is None or config.converts(name)):
            yield name, module


def replace_with_cluster_layers(model: nn.Module, config: ClusterConfig) -> dict[str, ClusterLayer]:
    """Put an empty cluster layer in the place of every layer that `config` converts; returns them by name."""
    layers = {
        name: LAYER_CLASSES[type(layer)](
            layer,
            bits=config.bits_of(name),
            groups=config.groups_of(name, layer.weight.shape[0]),
            channel_scale=config.channel_scale,
            codebook_dtype=CODEBOOK_DTYPES[config.codebook_dtype],
            on_the_fly=config.decode == "on_the_fly",
        )
        for name, layer in quantizable_layers(model, config)
    }
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


@torch.no_grad()
def decode_layers(model: nn.Module, on_the_fly: bool | None = None) -> None:
    """Check every loaded cluster layer and decode its weight; `on_the_fly`, if given, overrides when that happens.

    An offloaded layer is left alone: it decodes when it runs, with its codes on the device.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, ClusterLayer) and not layer.weight_codes.is_meta:
            layer.check(name)
            layer.on_the_fly = layer.on_the_fly if on_the_fly is None else on_the_fly
            layer.refresh()


@torch.no_grad()
def dequantize_layers(model: nn.Module) -> None:
    """Replace every cluster layer in `model` by the float layer with the decoded weight."""
    require_in_memory(model)
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, ClusterLayer)]:
        weight = layer.decoded()
        if isinstance(layer, ClusterConv2d):
            out_channels, in_channels, *kernel_size = layer.weight_shape
            dense = nn.Conv2d(
                in_channels * layer.conv_groups, out_channels, kernel_size, layer.stride, layer.padding,
                layer.dilation, layer.conv_groups, bias=layer.bias is not None, device="meta",
            )  # fmt: skip
        else:
            dense = nn.Linear(layer.weight_shape[1], layer.weight_shape[0], bias=layer.bias is not None, device="meta")
        dense.weight, dense.bias = nn.Parameter(weight), layer.bias
        model.set_submodule(name, dense)


def tensors_checksum(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """CRC-32 over the names and bytes of some tensors, whatever their order and the files they are in."""
    lines = []
    for name, tensor in tensors:
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        lines.append(f"{name} {zlib.crc32(data):08x}")
    return f"crc32:{zlib.crc32(chr(10).join(sorted(lines)).encode()):08x}"


def read_tensors(files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in some safetensors files, by name."""
    for file in files:
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (the reader itself is no iterable)
                yield name, reader.get_tensor(name)


def check_checkpoint(model: nn.Module, files: list[str], checksum: str | None) -> None:
    """Compare the tensors in safetensors `files` with those that `model`'s cluster layers expect, before loading.

    Raises `ValueError` naming the tensor and the file for a wrong shape or dtype, a missing tensor, or contents that
    don't fit the checksum.
    """
    layers = {
        name.removeprefix("repvgg."): layer for name, layer in model.named_modules() if isinstance(layer, ClusterLayer)
    }
    expected = {f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in layer.state_dict().items()}
    where = ", ".join(map(str, files))
    tensors = dict(read_tensors(files))
    strays = []  # float weights, or scales that quantization_config doesn't tell of
    for name, tensor in tensors.items():
        layer, _, key = name.removeprefix("repvgg.").rpartition(".")
        if layer in layers and f"{layer}.{key}" not in expected:
            strays.append(name)
        wanted = expected.pop(f"{layer}.{key}", tensor)
        # a bias is converted to the model's dtype, as in a float model
        if tensor.shape != wanted.shape or (tensor.dtype != wanted.dtype and key != "bias"):
            raise ValueError(
                f"{name} in {where} is {tensor.dtype} {list(tensor.shape)}, but quantization_config asks for "
                f"{wanted.dtype} {list(wanted.shape)}: config.json and the weights are not of the same model, or one "
                "of them was edited. Download both again, or quantise the float model again."
            )
    if expected:
        raise ValueError(
            f"{next(iter(expected))} ({len(expected)} tensors in all) is not in {where}: these are not the quantised "
            "weights that config.json describes. Remove quantization_config from it to load a float checkpoint, or "
            "quantise again."
        )
    if strays:
        raise ValueError(
            f"{strays[0]} in {where} is none of the tensors that quantization_config asks for: config.json and the "
            "weights are not of the same model, or one of them was edited. Download both again, or quantise the float "
            "model again."
        )
    if checksum is not None and tensors_checksum(tensors.items()) != checksum:
        raise ValueError(
            f"The tensors in {where} don't fit the checksum in config.json: a file is damaged or of another model. "
            "Download or save both again; if you changed the weights on purpose, remove checksum from "
            "quantization_config."
        )


class ClusterQuantizer(HfQuantizer):
    """Loads cluster-quantised checkpoints, and quantises float ones on the fly, inside `from_pretrained`.

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
                "config.json has a quantization_config but deploy=False: quantised checkpoints hold fused kernels. "
                "Set deploy to true in config.json if its keys end in weight_codes, or remove quantization_config."
            )
        model.replace_with_cluster_layers(self.quantization_config)
        if checkpoint_files and all(Path(file).suffix == ".safetensors" for file in checkpoint_files):
            check_checkpoint(model, checkpoint_files, self.quantization_config.checksum)

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            model.is_quantized = False  # not yet, although it was announced before the weights were loaded
            model.quantize(self.quantization_config).to(self.final_dtype)
            model.config.dtype = self.final_dtype
            return
        model.decode_weights()

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
