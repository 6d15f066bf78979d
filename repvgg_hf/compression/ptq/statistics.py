"""Collecting what error compensation and bias correction need to know of a layer's inputs."""

from dataclasses import dataclass

import torch
from torch import nn

from .activation_ranges import RangeObserver
from .blocks import layer_input
from .patches import patches


class InputSums:
    """Running sums over a layer's inputs, in the columns that [`patches`] makes; nothing else of them is kept.

    Args:
        second (`bool`): whether second moments are wanted, or the mean alone.
        observer ([`RangeObserver`], *optional*): what also sees the inputs.
    """

    def __init__(self, second: bool, observer: RangeObserver | None = None):
        self.second, self.observer = second, observer
        self.products: torch.Tensor | None = None
        self.sums: torch.Tensor | None = None
        self.positions = 0

    def update(self, layer: nn.Module, x: torch.Tensor) -> None:
        """Add what `layer` gets in one call."""
        if self.observer is not None:
            self.observer.update(x)
        for columns in patches(layer, x):
            if self.second:
                self.products = _add(self.products, columns @ columns.mT)
            self.sums = _add(self.sums, columns.sum(dim=2))
            self.positions += columns.shape[2]

    def moments(self) -> torch.Tensor:
        """Return the second moments `[G, d, d]`."""
        return self.products / self.positions

    def mean(self) -> torch.Tensor:
        """Return the mean `[G, d]`."""
        return self.sums / self.positions


def _add(total: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    return value if total is None else total.add_(value)


@dataclass
class InputStatistics:
    """The moments of a layer's inputs over the calibration data, in the columns that [`patches`] makes.

    Attributes:
        moments (`torch.Tensor`): second moments, float32 `[G, d, d]`.
        mean (`torch.Tensor`): mean of the inputs in the quantized model, `[G, d]`.
        float_mean (`torch.Tensor`): mean of the inputs in the float model, `[G, d]`.
        observer ([`RangeObserver`], *optional*): what saw their range, if that is wanted.
    """

    moments: torch.Tensor
    mean: torch.Tensor
    float_mean: torch.Tensor
    observer: RangeObserver | None

    @classmethod
    def collect(cls, block, layer, inputs, float_block, float_layer, float_inputs, observer=None):
        """Collect the moments from the inputs of a quantized `block` and of the same block in the float model."""
        sums, float_sums = InputSums(True, observer), InputSums(False)
        for x, float_x in zip(inputs, float_inputs):
            sums.update(layer, layer_input(block, layer, x))
            float_sums.update(float_layer, layer_input(float_block, float_layer, float_x))
        return cls(sums.moments(), sums.mean(), float_sums.mean(), observer)

    def mean_error(self, weight: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
        """Return the float layer's mean output less the quantized one's, `[out]`."""
        groups, width = self.mean.shape
        wanted = weight.reshape(groups, -1, width) @ self.float_mean[:, :, None]
        return (wanted - quantized.reshape(groups, -1, width) @ self.mean[:, :, None]).reshape(-1)

    def spread_ratio(self, weight: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
        """Return the standard deviation of each output channel with `weight` over that with `quantized`, `[out]`.

        Both are of the quantized model's inputs. A channel that puts out the same always has the ratio 1, and others at
        least 1/2 and at most 2.
        """
        groups, width = self.mean.shape
        covariance = self.moments - self.mean[:, :, None] * self.mean[:, None, :]

        def variance(values: torch.Tensor) -> torch.Tensor:
            rows = values.reshape(groups, -1, width)
            return ((rows @ covariance) * rows).sum(dim=2).reshape(-1)

        wanted, found = variance(weight), variance(quantized)
        ratio = (wanted / found).sqrt().clamp(0.5, 2.0)
        return torch.where((wanted > 0) & (found > 0), ratio, 1.0)
