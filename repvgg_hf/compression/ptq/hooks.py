"""Seeing what goes into the layers of any network while it runs, and stopping it when all that is wanted was seen."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from .model_inputs import ModelInputs


class _AllSeen(Exception):
    """The exception that ends a forward pass after the last layer whose inputs are wanted."""


@contextlib.contextmanager
def every_layer_runs() -> Iterator[None]:
    """A context in which PyTorch's transformer layers run their layers, instead of one kernel that takes the weights.

    Nothing would be seen of that: no hook is called, and no fake quantizer.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def watching(layers: dict[str, nn.Module], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """A context in which `see(name, x)` is called with the input of every call of one of the `layers`, before it."""

    def watch(name):
        def hook(module, args, kwargs):
            see(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    handles = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run_layers(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: Iterable[ModelInputs],
    see: Callable[[str, torch.Tensor], None],
    calls: int | None = None,
) -> None:
    """Run `model` on the `batches`, and call `see(name, x)` with what each of the `layers` gets, in every call of it.

    With `calls`, a pass ends after that many calls of these layers: what comes later in the network is not computed.
    """
    seen = 0

    def count(name, x):
        nonlocal seen
        see(name, x)
        seen += 1
        if seen == calls:
            raise _AllSeen

    with every_layer_runs(), watching(layers, count):
        for batch in batches:
            seen = 0
            with contextlib.suppress(_AllSeen):
                batch.run(model)


def round_input(layer: nn.Module, rounding: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Make `layer` compute with its input rounded, as a `ClusterLayer` will."""

    def rounded(module, args, kwargs):
        args = args or tuple(kwargs.values())
        return (rounding(args[0]),), {}

    layer.register_forward_pre_hook(rounded, with_kwargs=True)


def round_output(layer: nn.Module, rounding: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Make `layer` round its output likewise."""
    layer.register_forward_hook(lambda module, args, output: rounding(output))
