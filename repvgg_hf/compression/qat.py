"""Quantisation-aware training: the model computes with the quantised equivalent kernels while its parameters train."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import TrainerCallback

from ..quantization_cluster import CODEBOOK_DTYPES, ClusterConfig
from .layers import fused_layers, quantize_layer, resolve_config
from .weights import QuantizedWeight, fit_scale, lookup, nearest, segment_means


class _StraightThrough(torch.autograd.Function):
    """The quantised value forward, the gradient unchanged backward, also for a kernel outside the codebook's range."""

    @staticmethod
    def forward(ctx, kernel, quantized):
        return quantized.clone()

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, None


class ClusterFakeQuantize(nn.Module):
    """Maps a kernel `[out, ...]` to its quantised value, with a codebook that follows the kernel as it trains.

    Args:
        weight: how post-training quantisation codes the kernel; its codebook and scale are the start.
        codebook_dtype: in which the codebook will be stored. The forward pass rounds to it, so that what is trained is
            what is shipped.
        momentum: of the moving average of the codebook and the channel scale over optimiser steps.

    The float32 codebook `[groups, 2**bits]` and scale `[out]` are persistent buffers: part of every checkpoint.
    """

    def __init__(self, weight: QuantizedWeight, codebook_dtype: torch.dtype, momentum: float = 0.9):
        super().__init__()
        self.codebook_dtype, self.momentum = codebook_dtype, momentum
        self.register_buffer("codebook", weight.codebook.float())
        self.register_buffer("scale", None if weight.scale is None else weight.scale.clone())

    def stored_codebook(self) -> torch.Tensor:
        """The codebook in the dtype that it is saved in."""
        if self.codebook_dtype == torch.int8:
            return self.codebook.round().clamp(-127, 127).to(torch.int8)
        return self.codebook.to(self.codebook_dtype)

    @torch.no_grad()
    def quantized(self, kernel: torch.Tensor) -> QuantizedWeight:
        """Codes, codebook and scale for `kernel`, as they are saved."""
        stored = self.stored_codebook()
        return QuantizedWeight(nearest(kernel.float(), stored.float(), self.scale), stored, self.scale)

    def forward(self, kernel: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            codebook = self.stored_codebook().float()
            quantized = lookup(nearest(kernel.float(), codebook, self.scale), codebook, self.scale).to(kernel.dtype)
            if kernel.dim() == 4:  # the layout of the layer that it becomes: both add in the same order
                quantized = quantized.contiguous(memory_format=torch.channels_last)
        return _StraightThrough.apply(kernel, quantized)

    @torch.no_grad()
    def update(self, kernel: torch.Tensor) -> None:
        """One k-means step on `kernel`: move the entries towards the means of their weights, then the scales."""
        rows = kernel.float().flatten(1)
        codes = nearest(rows, self.codebook, self.scale)
        means = segment_means(rows, codes, self.codebook, self.scale)
        self.codebook.lerp_(means, 1 - self.momentum).copy_(self.codebook.sort(dim=1).values)
        if self.scale is not None:
            codes = nearest(rows, self.codebook, self.scale)
            self.scale.lerp_(fit_scale(rows, codes, self.codebook, self.scale), 1 - self.momentum)

    def extra_repr(self) -> str:
        scale = ", channel_scale" if self.scale is not None else ""
        return f"codebooks={list(self.codebook.shape)}{scale}, momentum={self.momentum}"


class QATConv2d(nn.Conv2d):
    """An `nn.Conv2d` that computes with its fake-quantised weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight_fake_quant(self.weight), self.bias)


class QATLinear(nn.Linear):
    """An `nn.Linear` that computes with its fake-quantised weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight_fake_quant(self.weight), self.bias)


QAT_CLASSES = {nn.Conv2d: QATConv2d, nn.Linear: QATLinear}
FLOAT_CLASSES = {qat: plain for plain, qat in QAT_CLASSES.items()}


def fake_quantizers(model: nn.Module) -> dict[str, ClusterFakeQuantize]:
    """The fake quantisers of a model, by the name of the layer whose kernel they quantise."""
    suffix = ".weight_fake_quant"
    return {
        name.removesuffix(suffix): module
        for name, module in model.named_modules()
        if isinstance(module, ClusterFakeQuantize)
    }


def remove_fake_quantizers(model: nn.Module) -> None:
    """Make the model compute with its float kernels again."""
    for name in fake_quantizers(model):
        layer = model.get_submodule(name)
        layer.__class__ = FLOAT_CLASSES.get(type(layer), type(layer))
        del layer.weight_fake_quant
        if type(layer) not in QAT_CLASSES:
            layer.weight_fake_quant = None  # a block of branches looks whether it has one


@torch.no_grad()
def prepare_qat(model, method: str | ClusterConfig = "cluster", bits: int | None = None, **options):
    """See `RepVGGPreTrainedModel.prepare_qat`."""
    if getattr(model, "is_quantized", False):
        raise ValueError("The model holds packed codes, which don't train: call model.dequantize() first.")
    if fake_quantizers(model):
        raise ValueError("The model is prepared for QAT already: train it, or call quantize() to freeze it.")
    config = resolve_config(method, bits, options)
    if config.method != "cluster":
        raise ValueError(f"prepare_qat trains method='cluster', got {config.method!r}.")
    _, layers = fused_layers(model)
    config.check_names(list(layers))
    weights = {name: quantize_layer(name, layer, config) for name, layer in layers.items() if config.converts(name)}
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        layer.weight_fake_quant = ClusterFakeQuantize(weight, CODEBOOK_DTYPES[config.codebook_dtype])
        layer.__class__ = QAT_CLASSES.get(type(layer), type(layer))
    model.qat_config = config
    return model


@torch.no_grad()
def update_codebooks(model: nn.Module) -> None:
    """Move every codebook one step towards its kernel. Call it once after each optimiser step, on every rank."""
    for name, fake_quantize in fake_quantizers(model).items():
        layer = model.get_submodule(name)
        fake_quantize.update(layer.weight if type(layer) in FLOAT_CLASSES else layer.equivalent()[0])


class QATCallback(TrainerCallback):
    """Moves the codebooks after every optimiser step of a `Trainer`."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        update_codebooks(model)
