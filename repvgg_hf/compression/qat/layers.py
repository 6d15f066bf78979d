"""Layers that compute with fake-quantized weights, and with fake-quantized inputs, biases and outputs if wanted."""

import torch
import torch.nn.functional as F
from torch import nn

from ...runtime.cluster_layers import sum_of_integers, to_integers
from ...runtime.reparameterization import ConvBranch, ReparamConv2d
from ...runtime.tensors import require_module
from ..codebooks.bias import SMALLEST_STEP, round_to_steps
from .fake_quantize import FakeQuantize
from .inputs import InputFakeQuantize


class QATLayer(nn.Module):
    """What the classes below add to a float layer, whose class is changed in place.

    Attributes:
        weight_fake_quant: maps the kernel to its quantized value.
        input_fake_quant: does so with the input; `None` leaves it as it is.
        output_fake_quant: does so with the output; `None` leaves it as it is.
    """

    weight_fake_quant: FakeQuantize
    input_fake_quant: InputFakeQuantize | None
    output_fake_quant: InputFakeQuantize | None

    def quantized_output(self, y: torch.Tensor) -> torch.Tensor:
        """`y` on the grid of the layer's output, or as it is."""
        return y if self.output_fake_quant is None else self.output_fake_quant(y)

    @property
    def trains_integers(self) -> bool:
        """Whether input and weight are integers with scales, so that the bias is a multiple of their product."""
        return self.input_fake_quant is not None and self.weight_fake_quant.codebook_dtype == torch.int8

    def bias_step(self) -> torch.Tensor:
        """What an integer more of the products stands for, float32 `[out]`."""
        _, scale = self.weight_fake_quant.stored()
        return (self.input_fake_quant.positive_scale() * scale).clamp_min(SMALLEST_STEP)

    def kernel(self) -> torch.Tensor:
        """The float kernel that is quantized, `[out, ...]`."""
        return self.weight

    def parts(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The float kernel and bias."""
        return self.weight, self.bias

    def linear_map(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Compute the layer's convolution or matrix product."""
        raise NotImplementedError

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # named as in PyTorch
        kernel, bias = self.parts()
        weight = self.weight_fake_quant(kernel)
        whole = weight.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(input.device.type)
        as_frozen = self.trains_integers and not self.training and whole
        if as_frozen and not torch.is_grad_enabled():
            return self.quantized_output(self._sum(input, weight, bias))
        x = input if self.input_fake_quant is None else self.input_fake_quant(input)
        y = self.linear_map(x, weight, self.quantized_bias(bias))
        if as_frozen:  # with the gradient that training has
            y = y + (self._sum(input, weight, bias) - y.detach())
        return self.quantized_output(y)

    def quantized_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The `bias` in multiples of the steps that integers add up in, or as it is if the weights are none.

        Its gradient is that of the rounded one.
        """
        if bias is None or not self.trains_integers:
            return bias
        with torch.no_grad():
            rounded = round_to_steps(bias, self.bias_step())
        return rounded.to(bias.dtype) + (bias - bias.detach())

    @torch.no_grad()
    def _sum(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Compute in evaluation what the frozen layer will, to the bit."""
        inputs, (_, scale) = self.input_fake_quant, self.weight_fake_quant.stored()
        integers = to_integers(x, inputs.positive_scale(), inputs.zero_point, inputs.bits).to(x.dtype)
        entries = (weight / scale.view(-1, *[1] * (weight.dim() - 1))).round()
        return sum_of_integers(self.linear_map, integers, entries, bias, self.bias_step())


class QATConv1d(QATLayer, nn.Conv1d):
    """An `nn.Conv1d` that computes with its fake-quantized weight, with any padding."""

    def linear_map(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._conv_forward(x, weight, bias)


class QATConv2d(QATLayer, nn.Conv2d):
    """An `nn.Conv2d` that computes with its fake-quantized weight, with any padding."""

    def linear_map(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._conv_forward(x, weight, bias)


class QATLinear(QATLayer, nn.Linear):
    """An `nn.Linear` that computes with its fake-quantized weight."""

    def linear_map(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight, bias)


class QATReparamConv2d(QATLayer, ReparamConv2d):
    """A `ReparamConv2d` that runs one convolution, with its fake-quantized equivalent kernel.

    The batch norms' statistics, which the equivalent kernel and bias depend on, stay as they are.
    """

    def kernel(self) -> torch.Tensor:
        return self.equivalent()[0]

    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.equivalent()

    def linear_map(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.convolve(x, weight, bias)


QAT_CLASSES = {
    nn.Conv1d: QATConv1d,
    nn.Conv2d: QATConv2d,
    nn.Linear: QATLinear,
    ReparamConv2d: QATReparamConv2d,
}
FLOAT_CLASSES = {qat_class: float_class for float_class, qat_class in QAT_CLASSES.items()}


def qat_layers(model: nn.Module) -> dict[str, QATLayer]:
    """The layers of `model` that compute with fake-quantized weights, by name."""
    require_module(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, QATLayer)}


def kernel_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of the kernel that a float layer quantizes."""
    if not isinstance(layer, ReparamConv2d):
        return tuple(layer.weight.shape)
    return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)


def make_qat_layer(
    layer: nn.Module,
    weight: FakeQuantize,
    inputs: InputFakeQuantize | None,
    outputs: InputFakeQuantize | None = None,
) -> None:
    """Make `layer` compute with its weight, and with its input and output if these are given, fake-quantized."""
    device = next(layer.parameters()).device
    _fuse_channels_last(layer, True)
    layer.__class__ = QAT_CLASSES[type(layer)]
    layer.weight_fake_quant = weight.to(device).train(layer.training)
    layer.input_fake_quant = None if inputs is None else inputs.to(device).train(layer.training)
    layer.output_fake_quant = None if outputs is None else outputs.to(device).train(layer.training)


def make_float_layer(layer: QATLayer) -> None:
    """Make `layer` compute with its float kernel again."""
    _fuse_channels_last(layer, False)
    layer.__class__ = FLOAT_CLASSES[type(layer)]
    del layer.weight_fake_quant, layer.input_fake_quant, layer.output_fake_quant


def _fuse_channels_last(layer: nn.Module, choice: bool) -> None:
    """Choose whether branches of `layer` fuse with the channels last: the rows that are quantized are then a view."""
    for branch in layer.modules():
        if isinstance(branch, ConvBranch):
            branch.fuses_channels_last = choice
