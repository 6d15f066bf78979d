"""Which layers of a network wait for which, found in one recorded forward pass.

Layers that don't wait for each other, as those of parallel branches or the projections of an attention, are calibrated
in the same pass over the data: the result is as if they were taken one by one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .hooks import every_layer_runs
from .model_inputs import ModelInputs
from .outputs import require_finite_outputs


class _FollowData(TorchDispatchMode):
    """Keeps, for the memory of each tensor, the set of layers whose outputs it was computed from.

    Sets are integers, with a bit for each layer. Views share their memory, and what is written to a part counts for
    the whole: a layer may so seem to wait for one that it does not need, which costs a pass and changes nothing.
    """

    def __init__(self):
        super().__init__()
        self.sources: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        mask = 0
        for tensor in _tensors((args, kwargs or {})):
            mask |= self.of(tensor)
        for tensor in _tensors(result):
            self.sources[_memory(tensor)] = mask
        if func._schema.is_mutable:  # operations in place, also those that return nothing
            for argument, value in zip(func._schema.arguments, args):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in _tensors(value):
                        self.sources[_memory(tensor)] = mask
        return result

    def of(self, tensor: torch.Tensor) -> int:
        return self.sources.get(_memory(tensor), 0)

    def mark(self, outputs, mask: int) -> None:
        for tensor in _tensors(outputs):
            self.sources[_memory(tensor)] = self.of(tensor) | mask


def _tensors(tree) -> Iterable[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass
class LayerRun:
    """How a layer runs in a forward pass.

    Attributes:
        calls (`int`): how often.
        waits_for (`set[str]`): the layers that its inputs are computed from, in any call.
        shares_with (`str`): the first layer that gets the very same input in the same geometry; itself if none does.
    """

    calls: int
    waits_for: set[str]
    shares_with: str


@torch.no_grad()
def record_run(model: nn.Module, layers: dict[str, nn.Module], inputs: ModelInputs) -> dict[str, LayerRun]:
    """Run `model` once, and return how each of the `layers` that it runs does, in the order of their first calls.

    Raises `ValueError` if the model can't run on these `inputs`, or puts out values that are not finite.
    """
    data = _FollowData()
    names = list(layers)
    calls: dict[str, int] = {}
    masks: dict[str, int] = {}
    seen: dict[str, list[tuple]] = {}  # what each layer got, kept alive so that it is no other tensor's memory

    def before(name):
        def hook(module, args, kwargs):
            x = args[0] if args else next(iter(kwargs.values()))
            calls[name] = calls.get(name, 0) + 1
            masks[name] = masks.get(name, 0) | data.of(x)
            seen.setdefault(name, []).append((x, x._version, geometry(module)))

        return hook

    def after(index):
        return lambda module, args, output: data.mark(output, 1 << index)

    handles = [layer.register_forward_pre_hook(before(name), with_kwargs=True) for name, layer in layers.items()]
    handles += [layer.register_forward_hook(after(index)) for index, layer in enumerate(layers.values())]
    try:
        with every_layer_runs(), data:
            outputs = inputs.run(model)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{type(model).__name__} can't run on the calibration data ({inputs.described()}): {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    require_finite_outputs(model, outputs)
    runs = {}
    for name in calls:
        waits_for = {other for index, other in enumerate(names) if masks[name] >> index & 1}
        runs[name] = LayerRun(calls[name], waits_for, _twin(name, runs, seen))
    return runs


def geometry(layer: nn.Module) -> tuple:
    """Return all that a layer's columns depend on besides its input."""
    if isinstance(layer, nn.Linear):
        return ("linear",)
    return (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)


def _twin(name: str, earlier: dict[str, LayerRun], seen: dict[str, list[tuple]]) -> str:
    """Return the first of the `earlier` layers that got what the layer called `name` got, or `name` itself."""
    if len(seen[name]) == 1:
        x, version, own = seen[name][0]
        for other in earlier:
            if len(seen[other]) == 1 and (y := seen[other][0])[0] is x and y[1:] == (version, own):
                return other
    return name


def levels(runs: dict[str, LayerRun]) -> list[list[str]]:
    """Sort layers into levels, so that each waits for layers of earlier levels only, in as few levels as can be.

    Of layers that wait for each other, as in a loop, the one that runs first comes first.
    """
    level: dict[str, int] = {}
    for name, run in runs.items():
        level[name] = 1 + max((level[other] for other in run.waits_for if other in level), default=-1)
    return [[name for name in runs if level[name] == number] for number in range(1 + max(level.values(), default=-1))]
