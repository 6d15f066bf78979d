"""Finding the ranges of layers' inputs alone, for quantization-aware training, which learns the weights."""

import torch
from torch import nn

from .activation_ranges import RangeObserver
from .config import CalibrationConfig
from .data import CalibrationData
from .hooks import run_layers


@torch.no_grad()
def observe_input_ranges(
    model: nn.Module, names: list[str], data: CalibrationData, bits: int, options: CalibrationConfig
) -> dict[str, tuple[float, int]]:
    """Find the (scale, zero point) of the inputs of a fused float model's layers, from one pass over the data.

    `names` are those of the layers, and `bits` are those of the integers that inputs are rounded to, 2 to 8. Raises
    `ValueError` naming the layer whose inputs are NaN or infinite, or that no example reaches.
    """
    observers = {name: RangeObserver() for name in names}

    def observe(name, x):
        try:
            observers[name].update(x)
        except ValueError as error:
            raise ValueError(f"The input of {name!r}: {error}") from error

    run_layers(model, {name: model.get_submodule(name) for name in names}, data.batches, observe)
    for name, observer in observers.items():
        if observer.min > observer.max:
            raise ValueError(f"{name!r} gets no input when the model runs: name it in modules_to_not_convert.")
    return {name: observer.quantization(bits, options.activation_range) for name, observer in observers.items()}
