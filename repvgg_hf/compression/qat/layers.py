"""Layers that compute with fake-quantized weights, and with fake-quantized inputs if wanted."""

import torch
import torch.nn.functional as F
from torch import nn

from ...runtime.reparameterization import ConvBranch, ReparamConv2d
from .fake_quantize import FakeQuantize
from .inputs import InputFakeQuantize


class QATLayer(nn.Module):
    """What the classes below add to a float layer, whose class is changed in place.

    Attributes:
        weight_fake_quant: maps the kernel to its quantized value.
        input_fake_quant: does so with the input; `None` leaves it as it is.
    """

    weight_fake_quant: FakeQuantize
    input_fake_quant: InputFakeQuantize | None

    def quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        """`x` on the grid of the layer's input, or as it is."""
        return x if self.input_fake_quant is None else self.input_fake_quant(x)

    def kernel(self) -> torch.Tensor:
        """The float kernel that is quantized, `[out, ...]`."""
        return self.weight


class QATConv1d(QATLayer, nn.Conv1d):
    """An `nn.Conv1d` that computes with its fake-quantized weight, with any padding."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # named as in PyTorch
        return self._conv_forward(self.quantized_input(input), self.weight_fake_quant(self.weight), self.bias)


class QATConv2d(QATLayer, nn.Conv2d):
    """An `nn.Conv2d` that computes with its fake-quantized weight, with any padding."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(self.quantized_input(input), self.weight_fake_quant(self.weight), self.bias)


class QATLinear(QATLayer, nn.Linear):
    """An `nn.Linear` that computes with its fake-quantized weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(self.quantized_input(input), self.weight_fake_quant(self.weight), self.bias)


class QATReparamConv2d(QATLayer, ReparamConv2d):
    """A `ReparamConv2d` that runs one convolution, with its fake-quantized equivalent kernel.

    The batch norms' statistics, which the equivalent kernel and bias depend on, stay as they are.
    """

    def kernel(self) -> torch.Tensor:
        return self.equivalent()[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel, bias = self.equivalent()
        return self.convolve(self.quantized_input(x), self.weight_fake_quant(kernel), bias)


QAT_CLASSES = {
    nn.Conv1d: QATConv1d,
    nn.Conv2d: QATConv2d,
    nn.Linear: QATLinear,
    ReparamConv2d: QATReparamConv2d,
}
FLOAT_CLASSES = {qat_class: float_class for float_class, qat_class in QAT_CLASSES.items()}


def qat_layers(model: nn.Module) -> dict[str, QATLayer]:
    """The layers of `model` that compute with fake-quantized weights, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QATLayer)}


def kernel_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of the kernel that a float layer quantizes."""
    if not isinstance(layer, ReparamConv2d):
        return tuple(layer.weight.shape)
    return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)


def make_qat_layer(layer: nn.Module, weight: FakeQuantize, inputs: InputFakeQuantize | None) -> None:
    """Make `layer` compute with its weight, and with its input if `inputs` is given, fake-quantized by these."""
    device = next(layer.parameters()).device
    _fuse_channels_last(layer, True)
    layer.__class__ = QAT_CLASSES[type(layer)]
    layer.weight_fake_quant = weight.to(device).train(layer.training)
    layer.input_fake_quant = None if inputs is None else inputs.to(device).train(layer.training)


def make_float_layer(layer: QATLayer) -> None:
    """Make `layer` compute with its float kernel again."""
    _fuse_channels_last(layer, False)
    layer.__class__ = FLOAT_CLASSES[type(layer)]
    del layer.weight_fake_quant, layer.input_fake_quant


def _fuse_channels_last(layer: nn.Module, choice: bool) -> None:
    """Choose whether branches of `layer` fuse with the channels last: the rows that are quantized are then a view."""
    for branch in layer.modules():
        if isinstance(branch, ConvBranch):
            branch.fuses_channels_last = choice
