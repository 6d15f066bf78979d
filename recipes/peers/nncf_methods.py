"""NNCF 3.4: weight compression below 8 bits with convolutions as matrices, and its post-training quantization.

`nncf.compress_weights` keeps every convolution at 8 bits whatever the mode, GPTQ raises "Convolution metatypes are not
supported", and for a PyTorch model it refuses GPTQ and all codebook modes and fails at 2 and 3 bits ("cannot access
local variable 'decompressor'"). So the network is written with matrix multiplications on patches instead of
convolutions, converted to OpenVINO, compressed there, and the decoded weights are put back into the convolutions.

Also tried, and left out: scale estimation, NF4 and CB4 lose to plain 4 bit integers on these weights; AWQ finds no
pattern that it knows; the adaptive codebook is for 4 bits only. `nncf.quantize` has 8 bit weights, and 4 bit ones for
the NPU alone; other widths are "incompatible with HW capabilities". Grouped convolutions are not supported here.
"""

import copy
import copyreg
import os
import types
from functools import partial

import nncf
import openvino
import torch
import torch.nn.functional as F
from nncf import CompressWeightsMode as Mode
from nncf.quantization.advanced_parameters import (
    AdvancedCompressionParameters,
    AdvancedQuantizationParameters,
    GroupSizeFallbackMode,
    QuantizationParameters,
)
from torch import nn

from repvgg_hf.recipes.peers import Logits, PeerMethod

# NNCF 3.4 copies its graph of the model, which has attributes of torch.Tensor in it that torch 2.14 can't copy
copyreg.pickle(types.GetSetDescriptorType, lambda found: (getattr, (found.__objclass__, found.__name__)))

INTEGERS = {8: Mode.INT8_ASYM, 4: Mode.INT4_ASYM, 3: Mode.INT3_SYM, 2: Mode.INT2_SYM}  # there is no asymmetric 3 or 2
# a scale for 16 to 64 inputs, whichever divides a layer's: what NNCF recommends below 8 bits
GROUPS = AdvancedCompressionParameters(
    group_size_fallback_mode=GroupSizeFallbackMode.ADJUST, min_adjusted_group_size=16
)
os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "900")  # `nncf.quantize` compiles a PyTorch extension once


class PatchLinear(nn.Module):
    """A convolution as a linear layer on patches, with its inputs in the order `[height, width, channels]`."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        if convolution.groups != 1 or set(convolution.dilation) != {1}:
            raise ValueError("Comparing with NNCF needs convolutions without groups or dilation: take another model.")
        self.kernel_size, self.stride = convolution.kernel_size, convolution.stride
        self.padding = convolution.padding
        weight = convolution.weight.detach().permute(0, 2, 3, 1).flatten(1)
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=convolution.bias is not None)
        self.linear.weight, self.linear.bias = nn.Parameter(weight.clone()), convolution.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (high, wide), (step_h, step_w), (pad_h, pad_w) = self.kernel_size, self.stride, self.padding
        x = F.pad(x, (pad_w, pad_w, pad_h, pad_h)).permute(0, 2, 3, 1)  # [batch, height, width, channels]
        out_h, out_w = (x.shape[1] - high) // step_h + 1, (x.shape[2] - wide) // step_w + 1
        shifted = [
            x[:, i : i + step_h * (out_h - 1) + 1 : step_h, j : j + step_w * (out_w - 1) + 1 : step_w]
            for i in range(high)
            for j in range(wide)
        ]
        patches = torch.cat(shifted, dim=3).reshape(x.shape[0], out_h * out_w, -1)
        return self.linear(patches).reshape(x.shape[0], out_h, out_w, -1).permute(0, 3, 1, 2)


@torch.no_grad()
def as_openvino(model: nn.Module, images: torch.Tensor) -> openvino.Model:
    """`model` as an OpenVINO model in which every convolution is a matrix multiplication."""
    model = copy.deepcopy(model).eval()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d):
            model.set_submodule(name, PatchLinear(layer))
    return openvino.convert_model(Logits(model), example_input=images)


@torch.no_grad()
def with_weights_of(model: nn.Module, compressed: openvino.Model) -> tuple[nn.Module, int]:
    """A copy of `model` with the decoded weights of [`as_openvino`]'s model; the bytes of these weights' constants."""
    model, total = copy.deepcopy(model), 0
    for node in compressed.get_ops():
        if node.get_type_name() != "MatMul":
            continue
        name = node.get_friendly_name().split("/")[0].removeprefix("__module.model.").removesuffix(".linear")
        weight = node.input(1).get_source_output()
        decoder = openvino.compile_model(openvino.Model([weight], []), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        decoded = torch.from_numpy(decoder([])[0].copy())
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Conv2d):
            out_channels, in_channels, high, wide = layer.weight.shape
            decoded = decoded.reshape(out_channels, high, wide, in_channels).permute(0, 3, 1, 2)
        layer.weight.copy_(decoded.reshape(layer.weight.shape))
        total += sum(constant.get_byte_size() for constant in _constants(weight.get_node()))
    return model, total


def _constants(node) -> list:
    """What a decoded weight is computed from: codes, scales, zero points, a codebook."""
    if node.get_type_name() == "Constant":
        return [node] if len(node.get_output_shape(0)) else []  # a number without dimensions is part of the operation
    return [constant for i in node.inputs() for constant in _constants(i.get_source_output().get_node())]


def compress(model: nn.Module, bits: int, batches: list[torch.Tensor], mode: Mode | None = None, **options):
    """`nncf.compress_weights` with `mode`, or plain integers of `bits`, all layers alike."""
    if bits < 8:
        options |= {"all_layers": True, "group_size": options.get("group_size", -1), "subset_size": len(batches)}
        options["dataset"] = nncf.Dataset([batch.numpy() for batch in batches])
    compressed = nncf.compress_weights(as_openvino(model, batches[0][:2]), mode=mode or INTEGERS[bits], **options)
    return with_weights_of(model, compressed)


def quantize(model: nn.Module, bits: int, batches: list[torch.Tensor], activation_bits: int):
    """`nncf.quantize`: weights and activations, with its bias correction; weights of 4 bits by the rules of the NPU."""
    parameters = AdvancedQuantizationParameters(
        weights_quantization_params=QuantizationParameters(num_bits=bits),
        activations_quantization_params=QuantizationParameters(num_bits=activation_bits),
    )
    device = nncf.TargetDevice.ANY if bits == 8 else nncf.TargetDevice.NPU
    quantized = nncf.quantize(
        copy.deepcopy(model),
        nncf.Dataset(batches),
        subset_size=len(batches),
        target_device=device,
        advanced_parameters=parameters,
    )
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    codes = sum(-(-layer.weight.numel() * bits // 8) for layer in layers)
    return quantized, codes + sum(4 * len(layer.weight) for layer in layers)  # and a float32 scale per channel


METHODS = [
    PeerMethod("nncf int, channel", (2, 3, 4, 8), compress),
    PeerMethod("nncf GPTQ, channel", (2, 3, 4), partial(compress, gptq=True), calibrated=True),
    PeerMethod(
        "nncf GPTQ, groups",
        (2, 3, 4),
        partial(compress, gptq=True, group_size=64, advanced_parameters=GROUPS),
        calibrated=True,
    ),
    PeerMethod("nncf adaptive codebook", (4,), partial(compress, mode=Mode.ADAPTIVE_CODEBOOK), calibrated=True),
    PeerMethod("nncf quantize", (4, 8), partial(quantize, activation_bits=8), calibrated=True, activation_bits=8),
]
