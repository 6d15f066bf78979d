"""Finding the ranges of layers' inputs and outputs alone, for quantization-aware training, which learns the weights."""

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...runtime.layer_swaps import LastMap
from ...runtime.quantization_cluster import ClusterConfig
from .activation_ranges import RangeObserver
from .config import CalibrationConfig
from .data import CalibrationData
from .hooks import run_layers

Range = tuple[float, int]  # scale and zero point


def chosen_range(observer: RangeObserver, config: ClusterConfig, options: CalibrationConfig) -> Range:
    """Return the (scale, zero point) for what an `observer` saw, as the configurations ask for it."""
    symmetric = config.activation_scheme == "int8_symmetric"
    return observer.quantization(config.activation_bits, options.activation_range, symmetric)


def observe_last_map(observer: RangeObserver, layer: nn.Module, last_map: LastMap) -> RemovableHandle:
    """Let `observer` see all that `layer` puts out as the `last_map` from now on; returns the hook, to remove it.

    What a ReLU cuts off needs no range: with the zero point at the lowest integer rounding cuts it off, too.
    """

    def see(module, args, output):
        observer.update(output.relu() if last_map.rectified else output)

    return layer.register_forward_hook(see)


@torch.no_grad()
def observe_ranges(
    model: nn.Module,
    names: list[str],
    data: CalibrationData,
    config: ClusterConfig,
    options: CalibrationConfig,
    last_map: LastMap | None = None,
) -> tuple[dict[str, Range], dict[str, Range]]:
    """Find the (scale, zero point) of what a fused float model's layers take, from one pass over the data.

    `names` are those of the layers, `config` says to what inputs are rounded, and `last_map`, if any, is what the
    output of is rounded, too. Returns the ranges of the inputs and of outputs by name. Raises `ValueError` naming the
    layer whose inputs are NaN or infinite, or that no example reaches.
    """
    observers = {name: RangeObserver() for name in names}

    def observe(name, x):
        try:
            observers[name].update(x)
        except ValueError as error:
            raise ValueError(f"The input of {name!r}: {error}") from error

    last = RangeObserver()
    hook = None if last_map is None else observe_last_map(last, model.get_submodule(last_map.layer), last_map)
    run_layers(model, {name: model.get_submodule(name) for name in names}, data.batches, observe)
    for name, observer in observers.items():
        if observer.min > observer.max:
            raise ValueError(f"{name!r} gets no input when the model runs: name it in modules_to_not_convert.")
    inputs = {name: chosen_range(observer, config, options) for name, observer in observers.items()}
    if hook is None:
        return inputs, {}
    hook.remove()
    return inputs, {last_map.layer: chosen_range(last, config, options)}
