"""Layers whose weight is stored as packed codes and a codebook: decoding and checking them.

W[o, ...] = scale[o] * codebook[group(o)][code[o, ...]]

A *code* is a number of 1 to 8 bits, which selects an entry of a *codebook*: a table of `2**bits` values in ascending
order. A *group* is a run of consecutive output channels that share a codebook: all of them, some, or one. The *channel
scale*, if there is one, is a factor for each output channel.

With activation bits the layer's input x is rounded to integers too, as ONNX QuantizeLinear and DequantizeLinear do:

x_q = (clamp(round(x / input_scale) + input_zero_point, 0, 2**bits - 1) - input_zero_point) * input_scale

So is the output of a layer that asks for it, by `output_scale` and `output_zero_point`: that of the last convolution,
whose output no quantized layer takes as it is. The bias of a layer that computes with integers (int8 codebook,
activation bits) is a multiple of `input_scale * weight_scale[o]`, the unit in which these are summed up.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .packing import lookup_packed, pack_codes, packed_size, unpack_codes
from .tensors import channels_last, has_memory

CODEBOOK_DTYPES = {"float16": torch.float16, "float32": torch.float32, "int8": torch.int8}


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    """Round `x` to the unsigned integers of `bits` bits and back, computed in float32, returned in the dtype of `x`.

    `scale` is a positive 0-dim float32 tensor, `zero_point` a 0-dim uint8 tensor. Halves are rounded to even. No
    gradient passes. What is rounded is the product with the scale's reciprocal, as in PyTorch's own fake quantization
    and most engines: a quotient falls to the other side of a half once in some thousands of images.
    """
    return to_integers(x, scale, zero_point, bits).mul_(scale).to(x.dtype)


def to_integers(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    """Round `x` to the unsigned integers of `bits` bits, see [`fake_quantize`], less the zero point; float32."""
    zero_point = zero_point.float()
    integers = (x.float() * scale.reciprocal()).round_().add_(zero_point).clamp_(0, 2**bits - 1)
    return integers.sub_(zero_point)


def sum_of_integers(
    linear_map: Callable[..., torch.Tensor],
    integers: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    step: torch.Tensor,
) -> torch.Tensor:
    """Apply `linear_map` to integers and scale what it gives, as engines do.

    Products of scaled numbers are rounded each, so that their sum may fall to the other side of a step of the next
    layer's input. Float32 holds sums of integers exactly up to 2**24.

    Args:
        linear_map: a convolution or matrix product, of `(input, weight, bias)`.
        integers, weight: whole numbers, in the dtype that is computed in.
        bias: `[out]`, multiples of the steps, but for rounding.
        step: what an integer more of the sum stands for, float32 `[out]`.
    """
    bias = None if bias is None else (bias / step).round()
    y = linear_map(integers, weight, bias)
    return y * step.view(-1, *[1] * (weight.dim() - 2)).to(y.dtype)


class ClusterLayer(nn.Module):
    """A layer whose weight is stored as packed codes, codebook and scale. Base of [`ClusterConv2d`], [`ClusterLinear`].

    Args:
        layer (`nn.Module`): the float layer whose place it takes; only its shapes, bias, dtype and device are read.
        bits (`int`): bits of a code, 1 to 8.
        num_codebooks (`int`): number of codebooks, divides the output channels.
        channel_scale (`bool`): whether there is a scale per output channel.
        codebook_dtype (`torch.dtype`): `torch.float16`, `torch.float32` or `torch.int8`.
        on_the_fly (`bool`, defaults to `False`): decode in every forward pass instead of keeping the dense weight
            beside the codes.
        activation_bits (`int`, *optional*): bits of the layer's input, 2 to 8, or `None` to leave it as it is. The
            range is set by [`set_input_range`] or loaded; until then the outputs are NaN.
        rounds_output (`bool`, defaults to `False`): whether the output is rounded to as many bits, too, in a range that
            [`set_output_range`] sets.
    """

    def __init__(
        self,
        layer: nn.Module,
        bits: int,
        num_codebooks: int,
        channel_scale: bool,
        codebook_dtype: torch.dtype,
        on_the_fly: bool = False,
        activation_bits: int | None = None,
        rounds_output: bool = False,
    ):
        super().__init__()
        self.weight_shape = tuple(layer.weight.shape)
        self.weight_numel = layer.weight.numel()
        self.bits, self.num_codebooks, self.on_the_fly = bits, num_codebooks, on_the_fly
        self.activation_bits = activation_bits
        device = layer.weight.device
        codes = torch.empty(packed_size(self.weight_numel, bits), dtype=torch.uint8, device=device)
        self.register_buffer("weight_codes", codes)
        self.register_buffer(
            "weight_codebook", torch.empty(num_codebooks, 2**bits, dtype=codebook_dtype, device=device)
        )
        scale = torch.empty(self.weight_shape[0], dtype=torch.float32, device=device) if channel_scale else None
        self.register_buffer("weight_scale", scale)
        if activation_bits is not None:
            self.register_buffer("input_scale", torch.full((), math.nan, dtype=torch.float32, device=device))
            self.register_buffer("input_zero_point", torch.zeros((), dtype=torch.uint8, device=device))
        self.rounds_output = rounds_output
        if rounds_output:
            self.register_buffer("output_scale", torch.full((), math.nan, dtype=torch.float32, device=device))
            self.register_buffer("output_zero_point", torch.zeros((), dtype=torch.uint8, device=device))
        self.bias = layer.bias
        self.compute_dtype = layer.weight.dtype
        self.forget_weight()

    def set_codes(self, codes: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor | None = None):
        """Store uint8 `codes` of the weight's shape, a `codebook` `[num_codebooks, 2**bits]`, and a `scale` `[out]`."""
        self.weight_codes.copy_(pack_codes(codes, self.bits))
        self.weight_codebook.copy_(codebook)
        if self.weight_scale is not None:
            self.weight_scale.copy_(scale)
        self.forget_weight()

    def set_input_range(self, scale: float, zero_point: int = 0):
        """Round the input to `scale * (q - zero_point)` with q from 0 to `2**activation_bits - 1`.

        Raises `ValueError` for a scale that is not positive and finite in float32, or a zero point outside q's range.
        """
        if self.activation_bits is None:
            raise ValueError("The layer's input is not quantized: set activation_bits in the ClusterConfig.")
        self._set_range("input", scale, zero_point)

    def set_output_range(self, scale: float, zero_point: int = 0):
        """Round the output as [`set_input_range`] does the input; raises `ValueError` likewise."""
        if not self.rounds_output:
            raise ValueError("The layer's output is not quantized: set quantize_last_map in the ClusterConfig.")
        self._set_range("output", scale, zero_point)

    def _set_range(self, end: str, scale: float, zero_point: int) -> None:
        """Set the range of one `end` of the layer, `"input"` or `"output"`."""
        highest = 2**self.activation_bits - 1
        stored = torch.tensor(scale, dtype=torch.float32).item()
        if not 0 < stored < math.inf:
            raise ValueError(f"scale must be positive and finite in float32, got {scale!r}.")
        if not 0 <= zero_point <= highest or zero_point != int(zero_point):
            raise ValueError(f"zero_point must be an integer from 0 to {highest}, got {zero_point!r}.")
        self._buffers[f"{end}_scale"].fill_(stored)
        self._buffers[f"{end}_zero_point"].fill_(int(zero_point))

    def stored(self) -> dict[str, torch.Tensor]:
        """Return the tensors that a checkpoint has of this layer; a `state_dict` takes ten times as long to make."""
        tensors = {**self._parameters, **self._buffers}
        tensors.pop("dense_weight", None)
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def codes(self) -> torch.Tensor:
        """Return the codes, uint8, of the weight's shape."""
        return unpack_codes(self.weight_codes, self.bits, self.weight_numel).view(self.weight_shape)

    def decoded(self) -> torch.Tensor:
        """Decode the weight, in float32, and return it in the layer's dtype; a kernel has its channels last."""
        return self._scaled(self._entries()).to(self.compute_dtype)

    def _entries(self) -> torch.Tensor:
        """Return the codebook's entry for each weight, float32, without the channels' scale."""
        weight = lookup_packed(self.weight_codes, self.weight_codebook.float(), self.bits, self.weight_numel)
        weight = weight.view(self.weight_shape)
        return channels_last(weight) if weight.dim() == 4 else weight

    def _scaled(self, entries: torch.Tensor) -> torch.Tensor:
        """Return the weight of these entries, which may be overwritten."""
        if self.weight_scale is None:
            return entries
        return entries.mul_(self.weight_scale.view(-1, *[1] * (entries.dim() - 1)))

    @property
    def sums_integers(self) -> bool:
        """Whether the layer computes by [`sum_of_integers`]; not in half precision, where these overflow."""
        integers = self.activation_bits is not None and self.weight_codebook.dtype == torch.int8
        return integers and self.compute_dtype in (torch.float32, torch.float64)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight in the layer's dtype: decoded at first use and kept, or every time if `on_the_fly`."""
        operand = self.operand()
        if not self.sums_integers:
            return operand
        return self._scaled(operand.to(torch.float32, copy=True)).to(self.compute_dtype)

    def operand(self) -> torch.Tensor:
        """Return what inputs are multiplied by: the weight, or its integers if the layer [`sums_integers`].

        A forward pass asks for it before it reads any other buffer: `torch.compile` takes those that a layer has when
        the first is read as all that there are.
        """
        if self.keeps_weight:
            self.decode_once()
        dense = self._buffers.get("dense_weight")
        return self._decoded_operand() if dense is None else dense

    def _decoded_operand(self) -> torch.Tensor:
        return self._entries().to(self.compute_dtype) if self.sums_integers else self.decoded()

    @torch.compiler.assume_constant_result  # a compiled model decodes while it is traced; its graph has the result
    def decode_once(self) -> None:
        """Decode the dense weight, if that is still to be done.

        Threads that do it at once get the same values twice. Under `torch.export`, or inside a transformation of
        `torch.func`, nothing is kept: there the result is no tensor that outlives the call.
        """
        if "dense_weight" in self._buffers:
            return
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor would be of no use in training
            weight = self._decoded_operand()
        if has_memory(weight):
            self.register_buffer("dense_weight", weight, persistent=False)

    def forget_weight(self):
        """Drop the dense weight, which is decoded again when it is needed; call it after changing the codes."""
        self._buffers.pop("dense_weight", None)
        self._non_persistent_buffers_set.discard("dense_weight")
        # offloaded: decoded in every forward pass, while the codes are on the device
        self.keeps_weight = not self.on_the_fly and not self.weight_codes.is_meta

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.forget_weight()

    def _apply(self, fn, recurse=True):
        floats = ("weight_codebook", "weight_scale", "input_scale", "output_scale")
        stored = {name: self._buffers[name] for name in floats if self._buffers.get(name) is not None}
        super()._apply(fn, recurse)
        # `.half()` and `.to(bfloat16)` are for what is computed, not for what is stored: saving again stays lossless
        for name, before in stored.items():
            after = self._buffers[name]
            if after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=stored["weight_codebook"].device)).dtype
        if dtype != self.compute_dtype:
            self.compute_dtype = dtype
            self.forget_weight()  # the codes give a wider dtype all its digits again
        return self

    def linear_map(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Compute the layer's convolution or matrix product."""
        raise NotImplementedError

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # named as in PyTorch
        operand = self.operand()  # first: see there
        if self.activation_bits is None:
            return self.linear_map(input, operand, self.bias)
        x = to_integers(input, self.input_scale, self.input_zero_point, self.activation_bits)
        if not self.sums_integers or torch.is_autocast_enabled(input.device.type):
            y = self.linear_map(x.mul_(self.input_scale).to(input.dtype), self.weight, self.bias)
            return self.quantized_output(y)
        step = self.input_scale * self.weight_scale
        return self.quantized_output(sum_of_integers(self.linear_map, x.to(input.dtype), operand, self.bias, step))

    def quantized_output(self, y: torch.Tensor) -> torch.Tensor:
        """Round `y` to the grid of the layer's output, if it has one."""
        if not self.rounds_output:
            return y
        return fake_quantize(y, self.output_scale, self.output_zero_point, self.activation_bits)

    def check(self, name: str):
        """Raise `ValueError` naming the tensor if a loaded codebook, scale or input range can't be right."""
        fix = "the checkpoint is damaged: download it again or quantize the float model again."
        codebook = self.weight_codebook.float()
        for tensor, values in (("weight_codebook", codebook), ("weight_scale", self.weight_scale)):
            if values is not None and not values.isfinite().all():
                raise ValueError(f"{name}.{tensor} has NaN or infinite entries; {fix}")
        if (codebook[:, 1:] < codebook[:, :-1]).any():
            raise ValueError(f"{name}.weight_codebook is not ascending; {fix}")
        ends = ["input"] * (self.activation_bits is not None) + ["output"] * self.rounds_output
        for end in ends:
            scale, zero_point = (self._buffers[f"{end}_{kind}"].item() for kind in ("scale", "zero_point"))
            if not 0 < scale < math.inf:
                raise ValueError(f"{name}.{end}_scale is {scale}, not positive and finite; {fix}")
            if zero_point >= 2**self.activation_bits:
                raise ValueError(
                    f"{name}.{end}_zero_point is {zero_point}, and {self.activation_bits} bits end at "
                    f"{2**self.activation_bits - 1}; {fix}"
                )

    def float_layer(self) -> nn.Module:
        """Return a float layer of the same shape, without memory."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        scale = ", channel_scale" if self.weight_scale is not None else ""
        dtype = str(self.weight_codebook.dtype).removeprefix("torch.")
        activation = f", activation_bits={self.activation_bits}" if self.activation_bits is not None else ""
        activation += ", rounds_output" if self.rounds_output else ""
        return (
            f"weight={list(self.weight_shape)}, bits={self.bits}, codebooks={self.num_codebooks} x {dtype}{scale}"
            f"{activation}"
        )


class ClusterConv(ClusterLayer):
    """Base of the convolutions whose weight is stored as codes and a codebook.

    They have the attributes that describe an `nn.Conv1d` or `nn.Conv2d` (`kernel_size`, `groups`, `padding_mode`, ...).
    """

    float_class: type[nn.Module]  # whose place it takes
    convolve: Callable[..., torch.Tensor]

    def __init__(self, layer: nn.Module, *args, **kwargs):
        super().__init__(layer, *args, **kwargs)
        self.in_channels, self.out_channels, self.groups = layer.in_channels, layer.out_channels, layer.groups
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.padding, self.padding_mode = layer.padding, layer.padding_mode
        self.pads = layer._reversed_padding_repeated_twice  # for each side, the last dimension first, as F.pad takes it

    def linear_map(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.pads, self.padding_mode), 0
        return self.convolve(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def float_layer(self) -> nn.Module:
        return self.float_class(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, bias=self.bias is not None, padding_mode=self.padding_mode, device="meta",
        )  # fmt: skip


class ClusterConv1d(ClusterConv):
    """An `nn.Conv1d` whose weight is stored as codes and a codebook, see [`ClusterLayer`]."""

    float_class = nn.Conv1d
    convolve = staticmethod(F.conv1d)


class ClusterConv2d(ClusterConv):
    """An `nn.Conv2d` whose weight is stored as codes and a codebook, see [`ClusterLayer`]."""

    float_class = nn.Conv2d
    convolve = staticmethod(F.conv2d)


class ClusterLinear(ClusterLayer):
    """An `nn.Linear` whose weight is stored as codes and a codebook, see [`ClusterLayer`]."""

    def __init__(self, layer: nn.Linear, *args, **kwargs):
        super().__init__(layer, *args, **kwargs)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def linear_map(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight, bias)

    def float_layer(self) -> nn.Module:
        return nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")


LAYER_CLASSES = {nn.Conv1d: ClusterConv1d, nn.Conv2d: ClusterConv2d, nn.Linear: ClusterLinear}


def cluster_layers(model: nn.Module) -> dict[str, ClusterLayer]:
    """Return the cluster layers of `model`, by name; one that has several names is there under the first."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ClusterLayer)}


@torch.no_grad()
def check_layers(model: nn.Module) -> None:
    """Check what was loaded into the cluster layers, see [`ClusterLayer.check`]; an offloaded layer is left alone."""
    layers = cluster_layers(model)
    loaded = {name: layer for name, layer in layers.items() if not layer.weight_codes.is_meta}
    # all of them at once: this runs in every load, whose time are calls
    tensors = [t for layer in loaded.values() for t in (layer.weight_codebook, layer.weight_scale) if t is not None]
    falls = [(layer.weight_codebook[:, 1:] < layer.weight_codebook[:, :-1]).cpu().view(-1) for layer in loaded.values()]
    finite = not tensors or torch.cat([t.cpu().float().view(-1) for t in tensors]).abs().max().item() < math.inf
    if not finite or (falls and torch.cat(falls).any()) or any(layer.activation_bits for layer in loaded.values()):
        for name, layer in loaded.items():
            layer.check(name)
    for layer in layers.values():
        layer.forget_weight()


def decode_layers(model: nn.Module, on_the_fly: bool | None = None) -> None:
    """Decode every cluster layer's weight now; `on_the_fly`, if given, overrides which layers keep it."""
    for layer in cluster_layers(model).values():
        if on_the_fly is not None:
            layer.on_the_fly = on_the_fly
            layer.forget_weight()
        if layer.keeps_weight:
            layer.decode_once()


__all__ = ["ClusterConv1d", "ClusterConv2d", "ClusterLayer", "ClusterLinear", "fake_quantize"]
