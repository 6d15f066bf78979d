"""Measuring what a model's weights take on disk."""

from pathlib import Path

from torch import nn

from ..runtime.cluster_layers import ClusterLayer


def bits_per_weight(model) -> float:
    """Return the bits stored per entry of the model's convolution and linear weights.

    A quantized weight takes codes (a few bits for each entry), codebooks (the tables of values that they select from)
    and channel scales (a factor for each output channel); a float one takes its entries. Biases are not counted.
    """
    stored_bits, numel = 0, 0
    for module in model.modules():
        if isinstance(module, ClusterLayer):
            tensors = [module.weight_codes, module.weight_codebook, module.weight_scale]
            stored_bits += 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
            numel += module.weight_numel
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            stored_bits += 8 * module.weight.numel() * module.weight.element_size()
            numel += module.weight.numel()
    return stored_bits / numel


def bits_with_one_codebook(model) -> float:
    """Return the [`bits_per_weight`] of a quantized model if each layer had one codebook and a scale for each channel.

    Layers that are float are left out.
    """
    layers = [module for module in model.modules() if isinstance(module, ClusterLayer)]
    entries = sum(layer.weight_codebook.shape[1] * layer.weight_codebook.element_size() for layer in layers)
    stored_bytes = entries + sum(layer.weight_codes.numel() + 4 * layer.weight_shape[0] for layer in layers)
    return 8 * stored_bytes / sum(layer.weight_numel for layer in layers)


def checkpoint_bytes(folder: str | Path) -> int:
    """Return the bytes of the weight files in a checkpoint folder. Raises `ValueError` if there are none."""
    files = list(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no .safetensors file: give a folder that save_pretrained wrote.")
    return sum(file.stat().st_size for file in files)
