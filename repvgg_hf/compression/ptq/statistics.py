"""Collecting what error compensation and bias correction need to know of a layer's inputs."""

from dataclasses import dataclass

import torch

from .activation_ranges import RangeObserver
from .blocks import layer_input, patches


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
        moments = mean = float_mean = positions = 0
        for x, float_x in zip(inputs, float_inputs):
            x, float_x = layer_input(block, layer, x), layer_input(float_block, float_layer, float_x)
            if observer is not None:
                observer.update(x)
            for columns, float_columns in zip(patches(layer, x), patches(layer, float_x)):
                moments = moments + columns @ columns.mT
                mean, float_mean = mean + columns.sum(dim=2), float_mean + float_columns.sum(dim=2)
                positions += columns.shape[2]
        return cls(moments / positions, mean / positions, float_mean / positions, observer)

    def mean_error(self, weight: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
        """Return the float layer's mean output less the quantized one's, `[out]`."""
        groups, width = self.mean.shape
        wanted = weight.reshape(groups, -1, width) @ self.float_mean[:, :, None]
        return (wanted - quantized.reshape(groups, -1, width) @ self.mean[:, :, None]).reshape(-1)
