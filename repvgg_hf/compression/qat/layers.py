"""Layers that compute with fake-quantized weights, and inputs if wanted."""

import torch
import torch.nn.functional as F
from torch import nn

from ...runtime.reparameterization import ReparamConv2d
from .fake_quantize import FakeQuantize


class QATLayer(nn.Module):
    """What the classes below add to a float layer, whose class is changed in place.

    `weight_fake_quant` maps the kernel to its quantized value; `input_fake_quant`, if there is one, does so with the
    input.
    """

    def quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        quantize = self._modules.get("input_fake_quant")
        return x if quantize is None else quantize(x)

    def kernel(self) -> torch.Tensor:
        """The float kernel that is quantized, `[out, ...]`."""
        return self.weight


class QATConv2d(QATLayer, nn.Conv2d):
    """An `nn.Conv2d` that computes with its fake-quantized weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(self.quantized_input(x), self.weight_fake_quant(self.weight), self.bias)


class QATLinear(QATLayer, nn.Linear):
    """An `nn.Linear` that computes with its fake-quantized weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.quantized_input(x), self.weight_fake_quant(self.weight), self.bias)


class QATReparamConv2d(QATLayer, ReparamConv2d):
    """A `ReparamConv2d` that computes with its fake-quantized equivalent kernel, batch norm statistics frozen.

    Every `batch_norm_every` steps a training step runs the branches too, for their statistics.
    """

    batch_norm_every = 0
    estimates_statistics: bool | None = False  # in the step to come; None after loading

    def choose_statistics(self) -> None:
        """Decide whether the step to come estimates statistics."""
        steps = self.weight_fake_quant.count()
        self.estimates_statistics = self.batch_norm_every > 0 and (steps + 1) % self.batch_norm_every == 0

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.estimates_statistics = None

    def kernel(self) -> torch.Tensor:
        return self.equivalent()[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.quantized_input(x)
        if self.estimates_statistics is None:
            self.choose_statistics()
        if self.estimates_statistics and self.training:
            with torch.no_grad():
                self._sum_of_branches(x)
        return super().forward(x)


QAT_CLASSES = {nn.Conv2d: QATConv2d, nn.Linear: QATLinear, ReparamConv2d: QATReparamConv2d}
FLOAT_CLASSES = {qat: plain for plain, qat in QAT_CLASSES.items()}


def qat_layers(model: nn.Module) -> dict[str, QATLayer]:
    """The layers of `model` that compute with fake-quantized weights, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QATLayer)}


def kernel_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of the kernel that a float layer quantizes."""
    if not isinstance(layer, ReparamConv2d):
        return tuple(layer.weight.shape)
    return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)


def add_fake_quantizers(
    layer: nn.Module, weight: FakeQuantize, inputs: nn.Module | None, batch_norm_every: int = 0
) -> None:
    """Make `layer` compute with fake-quantized weight, and input if `inputs` is given."""
    device = next(layer.parameters()).device
    for module in layer.modules():
        if isinstance(module, nn.Conv2d):  # as the rows that are quantized, so that no step has to rearrange them
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    layer.__class__ = QAT_CLASSES[type(layer)]
    layer.weight_fake_quant = weight.to(device).train(layer.training)
    if inputs is not None:
        layer.input_fake_quant = inputs.to(device).train(layer.training)
    if isinstance(layer, QATReparamConv2d):
        layer.batch_norm_every = batch_norm_every
        layer.estimates_statistics = None


def restore_float_layers(model: nn.Module) -> None:
    """Make the model compute with its float kernels again."""
    for layer in qat_layers(model).values():
        layer.__class__ = FLOAT_CLASSES[type(layer)]
        del layer.weight_fake_quant
        layer._modules.pop("input_fake_quant", None)
        if isinstance(layer, ReparamConv2d):
            layer.weight_fake_quant = None  # it looks whether it has one
