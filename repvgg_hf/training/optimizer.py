"""The optimizer of float and quantization-aware training, and the moving average of what it trains."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def build_sgd(model: nn.Module, learning_rate: float, weight_decay: float, momentum: float = 0.9) -> torch.optim.SGD:
    """Build SGD with Nesterov momentum, and weight decay on kernels only, as in RepVGG's own training.

    Codebooks, steps and scales of fake quantizers, batch norms and biases do not decay. `momentum=0` is plain SGD.
    """
    kernels, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_kernel = parameter.dim() > 1 and "fake_quant" not in name
            (kernels if is_kernel else others).append(parameter)
    groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=momentum > 0)


class MovingAverage(nn.Module):
    """The exponential moving average of a model's state, as a copy of the model that begins at what it is now.

    Parameters and buffers of floating-point type are averaged, integers (such as counts of steps) copied. It is what
    `torch.optim.swa_utils.AveragedModel` computes, whose updates ask the device how many there were, and wait for it.

    Args:
        model: what trains.
        decay: share of the average that each update keeps, 0 to 1.
        device: where the average is kept; by default where the model is.

    Attributes:
        module: the copy.
    """

    def __init__(self, model: nn.Module, decay: float, device: torch.device | None = None):
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"The decay of a moving average must be from 0 to 1, got {decay}.")
        self.decay = decay
        self.module = copy.deepcopy(model).to(device)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards `model`; call it after each optimizer step."""
        values = [value.detach() for value in _tensors(model)]
        pairs = [(mean, value.to(mean.device)) for mean, value in zip(_tensors(self.module), values, strict=True)]
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        if floats:
            torch._foreach_lerp_(*map(list, zip(*floats)), 1 - self.decay)
        for mean, value in pairs:
            if not mean.is_floating_point():
                mean.copy_(value)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give `model` the averages as its own parameters and buffers."""
        for mean, value in zip(_tensors(self.module), _tensors(model), strict=True):
            value.copy_(mean)

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Give `model` the averages inside a `with` block, and what it had back after it."""
        before = [value.detach().clone() for value in _tensors(model)]
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for kept, value in zip(before, _tensors(model), strict=True):
                    value.copy_(kept)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
