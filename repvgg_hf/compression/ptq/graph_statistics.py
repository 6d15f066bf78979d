"""What goes into the layers of any network, gathered by hooks in as few passes over the data as the order allows."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers.utils import logging

from .activation_ranges import RangeObserver
from .config import CalibrationConfig
from .data import CalibrationData
from .graph import LayerRun, levels
from .hooks import run_layers
from .statistics import InputStatistics, InputSums


def statistics_in_order(
    model: nn.Module,
    quantized: nn.Module,
    runs: dict[str, LayerRun],
    data: CalibrationData,
    options: CalibrationConfig,
    observe: bool,
) -> Iterator[tuple[str, InputStatistics]]:
    """Yield the statistics of each layer in `runs`, by name.

    Whoever takes them makes the layer of the `quantized` copy compute with the result before taking the next: with
    `options.order="sequential"` later statistics are of the inputs that the layers quantized so far make. With
    `"one_pass"` they are all of the float `model`.

    Args:
        model (`nn.Module`): the float network.
        quantized (`nn.Module`): a copy of it.
        runs (`dict[str, LayerRun]`): how it runs its layers, as [`record_run`] found.
        data ([`CalibrationData`]): what both run on.
        options ([`CalibrationConfig`]): `activation_memory` bounds the moments that are gathered at once, unless a
            single layer's are larger.
        observe (`bool`): whether the range of the inputs is wanted, too.
    """
    sequential = options.order == "sequential"
    steps = levels(runs) if sequential else [list(runs)]
    limit = options.activation_memory * 2**30
    passes = [part for step in steps for part in _parts(model, step, runs, limit)]
    float_sums = _gather(model, list(runs), runs, data, second=False) if sequential else {}
    for names in logging.tqdm(passes, desc="Calibration"):
        sums = _gather(quantized if sequential else model, names, runs, data, second=True, observe=observe)
        for twin in list(sums):
            found = sums.pop(twin)
            float_mean = float_sums.pop(twin).mean() if sequential else found.mean()
            statistics = InputStatistics(found.moments(), found.mean(), float_mean, found.observer)
            for name in names:
                if runs[name].shares_with == twin:
                    yield name, statistics


def _gather(
    model: nn.Module,
    names: list[str],
    runs: dict[str, LayerRun],
    data: CalibrationData,
    second: bool,
    observe: bool = False,
) -> dict[str, InputSums]:
    """Return the sums over what goes into the layers `names` of `model`; of those that share an input, of the first."""
    layers = {name: model.get_submodule(name) for name in names if runs[name].shares_with == name}
    sums = {name: InputSums(second, RangeObserver() if observe else None) for name in layers}

    def see(name: str, x: torch.Tensor) -> None:
        try:
            sums[name].update(layers[name], x)
        except ValueError as error:
            raise ValueError(f"The input of {name!r}: {error}") from error

    once = all(runs[name].calls == 1 for name in layers)  # else the number may depend on the data
    run_layers(model, layers, data.batches, see, calls=len(layers) if once else None)
    return sums


def _parts(model: nn.Module, names: list[str], runs: dict[str, LayerRun], limit: float) -> Iterator[list[str]]:
    """Split layers into parts whose second moments take at most `limit` bytes together, or are those of one input."""
    part: list[str] = []
    size = 0.0
    for twin in (name for name in names if runs[name].shares_with == name):
        added = _moments_bytes(model.get_submodule(twin))
        if part and size + added > limit:
            yield part
            part, size = [], 0.0
        part += [name for name in names if runs[name].shares_with == twin]
        size += added
    if part:
        yield part


def _moments_bytes(layer: nn.Module) -> int:
    """Count the bytes of a layer's second moments, float32 `[G, d, d]`."""
    return 4 * getattr(layer, "groups", 1) * layer.weight[0].numel() ** 2
