"""Core ML Tools 9.0: k-means, sensitivity-weighted k-means, and GPTQ, all of `coremltools.optimize.torch`.

What does not run on these networks: GPTQ with 2, 5, 6 or 7 bits ("Received unsupported dtype: uint2"), with
normal-float values except 3 and 4 bits, and on anything but a plain sequence of modules (it gets one here). int8 tables
(`lut_dtype`) run, but are rounded after clustering and lose much with outliers; left out.
"""

import copy
import logging
from functools import partial

import torch
import torch.nn.functional as F
from coremltools.optimize.torch.layerwise_compression import LayerwiseCompressor, LayerwiseCompressorConfig
from coremltools.optimize.torch.palettization import (
    PostTrainingPalettizer,
    PostTrainingPalettizerConfig,
    SKMPalettizer,
    SKMPalettizerConfig,
)
from torch import nn

from repvgg_hf.recipes.peers import PeerMethod

logging.getLogger("coremltools").setLevel(logging.WARNING)  # it tells of every layer
CHANNEL = {"granularity": "per_grouped_channel", "group_size": 1}
SCALE = {"enable_per_channel_scale": True}
TABLES = ("lut", "palettization_scale", "quantization_scale")


def palettize(model: nn.Module, bits: int, batches, **options) -> tuple[nn.Module, int]:
    """K-means without data."""
    config = PostTrainingPalettizerConfig.from_dict({"global_config": {"n_bits": bits, **options}})
    compressed = PostTrainingPalettizer(model, config).compress()
    return compressed, stored_bytes(compressed, bits)


def palettize_sensitively(model: nn.Module, bits: int, batches: list[torch.Tensor], **options):
    """K-means weighted by the squared gradients of the loss (SqueezeLLM), one image after the other.

    Without labels, the loss is that of the class that the float model predicts, as in ours.
    """
    images = [image[None] for batch in batches for image in batch]

    def loss(model, image):
        logits = model(image).logits
        return F.cross_entropy(logits, logits.argmax(dim=1))

    sections = {"global_config": {"n_bits": bits, **options}, "calibration_nsamples": len(images)}
    compressor = SKMPalettizer(model, SKMPalettizerConfig.from_dict(sections))
    compressed = compressor.compress(dataloader=images, loss_fn=loss)
    return compressed, stored_bytes(compressed, bits)


def compensate(model: nn.Module, bits: int, batches: list[torch.Tensor], **options) -> tuple[nn.Module, int]:
    """GPTQ, layer by layer, with a range and zero point for each channel."""
    compressed = copy.deepcopy(model)
    chain = nn.Sequential(*compressed.calibration_blocks().values())  # shares its modules
    options |= {"algorithm": "gptq", "weight_dtype": f"uint{bits}"}
    sections = {"global_config": options, "calibration_nsamples": len(batches)}
    config = LayerwiseCompressorConfig.from_dict(sections)
    LayerwiseCompressor(chain, config).compress(batches, device="cpu", inplace=True)
    return compressed, stored_bytes(compressed, bits)


def stored_bytes(model: nn.Module, bits: int) -> int:
    """Codes, tables and scales in float16 as in a Core ML package, zero points of 8 bits."""
    total = 0
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            tensors = {name.rsplit("/", 1)[-1]: tensor for name, tensor in module.named_buffers(recurse=False)}
            total += -(-module.weight.numel() * bits // 8)
            total += sum(2 * tensors[name].numel() for name in TABLES if name in tensors)
            total += tensors["zero_point"].numel() if "zero_point" in tensors else 0
    return total


EVERY = (1, 2, 3, 4, 5, 6, 7, 8)
METHODS = [
    PeerMethod("coremltools k-means, tensor", EVERY, palettize),
    PeerMethod("coremltools k-means, tensor + scale", EVERY, partial(palettize, **SCALE)),
    PeerMethod("coremltools k-means, channel", EVERY, partial(palettize, **CHANNEL)),
    PeerMethod("coremltools sensitive, tensor", EVERY, palettize_sensitively, calibrated=True),
    PeerMethod("coremltools sensitive, channel", EVERY, partial(palettize_sensitively, **CHANNEL), calibrated=True),
    PeerMethod("coremltools GPTQ, channel", (3, 4, 8), partial(compensate, quantization_scheme="affine"), True),
    PeerMethod("coremltools GPTQ normal float", (3, 4), partial(compensate, enable_normal_float=True), True),
]
