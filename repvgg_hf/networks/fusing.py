"""Fusing what is one convolution in any network: batch norms, parallel branches, chains without activation."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..runtime.fused_structure import check_fused_structure, describe_convolution, replace_modules, restore_modules
from ..runtime.modeling_reparameterized import ReparameterizedPreTrainedModel
from ..runtime.reparameterization import ReparamConv2d
from .checks import check_can_be_fused, check_example
from .equivalent import convolution_of, error_of, kernel_of
from .folding import fold_norms
from .oabn import settle_outlier_bounds
from .operations import Convolution, uses_batch_statistics
from .placement import Edit, Found, Placement
from .recording import arguments_of, record
from .regions import Graph, Region
from .report import FusedRegion, FuseReport
from .trainable_blocks import BlockMaker
from .verifying import explains_jumps, find_difference, largest_rounding, output_error


@torch.inference_mode(False)  # its weights may be trained
@torch.no_grad()
def fuse(model: nn.Module, example: Any, *, tolerance: float = 1e-9, keep_branches: bool = False) -> FuseReport:
    """Fuse every part of a `model` that is one convolution, in place: for inference, in eval mode.

    One forward pass is recorded. Wherever convolutions, per-channel affine operations (batch norm in eval mode,
    scales, shifts) and sums have one source and one result, and one convolution costs no more, that convolution takes
    their place: this folds batch norms, and fuses the branches of RepVGG, MobileOne, RepViT, FastViT, ACB, DBB and the
    like, whoever's code it is. Batch norms right behind linear, transposed, one- and three-dimensional layers are
    folded into these, and those right before a linear layer.

    Args:
        model (`nn.Module`): in eval mode, in memory, not quantized. A RepVGG of this package is fused by its own
            `reparameterize()`.
        example (`torch.Tensor`, `tuple` or `dict`): one input, of a size and on the device that the model takes:
            a tensor, positional inputs, or keyword inputs.
        tolerance (`float`, defaults to 1e-9): how much a fused convolution may differ from what it takes the place
            of, relative to its largest output, both in float64. What differs by more is left, and the report says so.

        keep_branches (`bool`, defaults to `False`): make sums of branches that each end in batch norm, with kernels
            padded to keep the size, a [`ReparamConv2d`] of the same parameters instead of one convolution. It trains
            on, and with [`prepare_qat`] as its fused kernel; `quantize` fuses it.

    Returns:
        [`FuseReport`]: what was fused and what was left, and why.

    `model.fused_structure` then describes the change, see `runtime/fused_structure.py`; `quantize` stores it with the
    model. A fused float model of Transformers has it not in its configuration: `from_pretrained` makes the network with
    its norms, so keep the checkpoint from before, and fuse after loading. Raises `ValueError` or
    `TypeError` that says what to do about a model that can't be fused, and leaves it unchanged.

    Example:
    ```python
    >>> import timm, torch, repvgg_hf

    >>> model = timm.create_model("mobileone_s0").eval()
    >>> report = repvgg_hf.fuse(model, torch.randn(1, 3, 224, 224))
    >>> print(report)
    ```"""
    check_can_be_fused(model, tolerance)
    check_example(example)
    before = count_layers(model)
    if isinstance(model, ReparameterizedPreTrainedModel):
        regions, error = _fuse_own(model, example)
        return FuseReport(regions, before, count_layers(model), error)
    # with named errors, before anything changes; and what a network computes once and keeps, such as RT-DETR's anchors,
    # is kept from now on, in all recordings
    first = record(model, example).output
    settle_outlier_bounds(model)
    recording = record(model, example)
    recording.repeats = output_error(first, recording.output) <= largest_rounding(recording)
    graph = Graph(recording)
    maker = BlockMaker(model, recording) if keep_branches else None
    expected, recording.output = recording.output, None
    refused: dict[frozenset[int], str] = {}
    while True:
        found, left = _find(model, graph, tolerance, refused)
        error, broken = _put(model, example, graph, expected, found)
        if not broken:
            break
        refused |= broken  # smaller regions in them may do
    if maker is not None:
        _put_blocks(model, maker, found)
    entries = [entry for one in found for entry in one.entries]
    model.fused_structure = [*getattr(model, "fused_structure", []), *entries]
    regions = [one.region for one in found] + left + _batch_statistics(graph)
    return FuseReport(regions, before, count_layers(model), error)


def count_layers(model: nn.Module) -> int:
    """Return the number of modules with parameters or buffers of their own."""
    return sum(
        any(tensor is not None for tensor in (*module._parameters.values(), *module._buffers.values()))
        for module in model.modules()
    )


def _fuse_own(model: ReparameterizedPreTrainedModel, example: Any) -> tuple[list[FusedRegion], float]:
    """Fuse a model of this package by its own method, and report as of any other."""
    args, kwargs = arguments_of(example)
    regions = [
        FusedRegion(name, tuple(f"{name}.branches.{branch}" for branch in block.branches), "closed form", _error(block))
        for name, block in model.named_modules()
        if isinstance(block, ReparamConv2d)
    ]
    expected = record(model, example).output  # named errors if the example is wrong
    model.reparameterize()
    return regions, output_error(expected, model(*args, **kwargs))


def _error(block: ReparamConv2d) -> float:
    """Return the difference between a block's branches and its fused kernel in float64, relative to the output."""
    block = copy.deepcopy(block).to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, block.in_channels, 4, 4, dtype=torch.float64, generator=generator)
    expected = block.sum_of_branches(x)
    return ((block.convolve(x, *block.equivalent()) - expected).abs().max() / expected.abs().max()).item()


def _put_blocks(model: nn.Module, maker: BlockMaker, found: list[Found]) -> None:
    """Put blocks of branches in the place of fused convolutions, where they are known."""
    names = {module: name for name, module in model.named_modules()}
    for one in found:
        block = maker.make(one.region.parts, one.convolution)
        if block is not None:
            model.set_submodule(names[one.convolution], block.train(one.convolution.training))
            one.region = dataclasses.replace(one.region, keeps_branches=True)


def _find(
    model: nn.Module, graph: Graph, tolerance: float, refused: dict[frozenset[int], str]
) -> tuple[list[Found], list[FusedRegion]]:
    """Choose the largest regions that can be fused, do not overlap and are right; returns them, and others with why.

    `refused` has the nodes of regions that are to be left, with the reason.
    """
    placement = Placement(model, graph)
    found: list[tuple[int, Found]] = []
    left: dict[int, tuple[frozenset[int], FusedRegion]] = {}
    used: set[int] = set()
    for region in graph.candidates():
        nodes = region.form.nodes
        if nodes & used:
            continue
        reason = refused.get(nodes) or placement.reason_to_leave(region)
        edits = placement.find(region) if reason is None else reason
        result = edits if isinstance(edits, str) else _compute(graph, region, edits, placement, tolerance)
        if isinstance(result, Found):
            used |= nodes
            found.append((region.result, result))
        elif not any(nodes < others for others, _ in left.values()):
            method, error, why = result if isinstance(result, tuple) else (None, None, result)
            report = FusedRegion(_region_name(graph, region), _parts(graph, region), method, error, why)
            left.setdefault(region.result, (nodes, report))
    for nodes, fold in fold_norms(graph, placement, tolerance, refused):
        if isinstance(fold, Found) and not nodes & used:
            used |= nodes
            found.append((max(nodes), fold))
        else:
            why = f"{fold.region.name} takes in another norm: fuse once more" if isinstance(fold, Found) else None
            report = fold if why is None else dataclasses.replace(fold.region, method=None, error=None, left=why)
            left.setdefault(max(nodes), (nodes - used, report))
    for number, norm in _lone_norms(graph, used.union(*(nodes for nodes, _ in left.values()))):
        left[number] = (frozenset((number,)), norm)
    found.sort(key=lambda entry: entry[0])
    return [entry for _, entry in found], [entry for nodes, entry in left.values() if not nodes <= used]


def _lone_norms(graph: Graph, seen: set[int]) -> Iterator[tuple[int, FusedRegion]]:
    """Yield the numbers and reports of batch norms that are in no region, `seen`: they follow no layer directly."""
    for number, node in enumerate(graph.recording.nodes):
        lone = node.name == "batch_norm" and node.modules and number in graph.live and number not in seen
        if lone and not uses_batch_statistics(node):
            source = graph.recording.nodes[node.inputs[0]].name if node.inputs else ""
            why = f"it follows {f'{source}()' if source else 'an input'}, no layer that could take it in"
            yield number, FusedRegion(node.modules[-1], (node.modules[-1],), left=why)


def _compute(
    graph: Graph, region: Region, edits: dict[str, Edit], placement: Placement, tolerance: float
) -> Found | tuple[str, float, str]:
    """Compute and check a region's convolution; returns method, error and reason if it is not exact enough."""
    kernel, method = kernel_of(graph, region)
    error = error_of(graph, region, kernel)
    if not error <= tolerance:
        return method, error, f"one convolution differs from it by {error:.1e} in float64, more than {tolerance:.0e}"
    convolution = convolution_of(kernel, region.form, _first_weight(graph, region))
    name = next(name for name, edit in edits.items() if edit.kind == "conv2d")
    entries = []
    for place, edit in edits.items():
        entry = {"name": place, "kind": edit.kind} | ({"then": list(edit.then)} if edit.then else {})
        entries.append(describe_convolution(place, convolution, edit.then) if place == name else entry)
        others = [other for other in placement.names[id(placement.modules[place])] if other != place]
        entries += [{"name": other, "kind": "alias", "of": place} for other in others]
    return Found(
        region.form.nodes,
        region.form.source,
        FusedRegion(name, _parts(graph, region), method, error),
        entries,
        convolution,
    )


def _first_weight(graph: Graph, region: Region) -> torch.Tensor:
    operations = (graph.operations[number] for number in sorted(region.form.nodes))
    return next(op.weight for op in operations if isinstance(op, Convolution) and not op.pools)


def _parts(graph: Graph, region: Region) -> tuple[str, ...]:
    """Name what computes a region: a module for all that it does itself, in the order of the calls."""
    parts = {}
    for number in sorted(region.form.nodes):
        node = graph.recording.nodes[number]
        name = node.modules[-1] if node.modules else ""
        own = node.name if node.name in ("conv2d", "batch_norm", "avg_pool2d") else node.name.strip("_")
        is_module = own in ("conv2d", "batch_norm", "avg_pool2d") and name
        parts[name if is_module else f"{name}.{own}()".lstrip(".")] = None
    return tuple(parts)


def _region_name(graph: Graph, region: Region) -> str:
    modules = graph.recording.nodes[region.result].modules
    return (modules[-1] if modules else "") or "the model"


def _batch_statistics(graph: Graph) -> list[FusedRegion]:
    """Report the batch norms that compute the statistics of each batch, which nothing can be fused with."""
    why = "it computes mean and variance of each batch (track_running_stats=False), and is no fixed scale and shift"
    names = [
        node.modules[-1]
        for node in graph.recording.nodes
        if node.name == "batch_norm" and node.modules and uses_batch_statistics(node)
    ]
    return [FusedRegion(name, (name,), left=why) for name in dict.fromkeys(names)]


def _put(
    model: nn.Module, example: Any, graph: Graph, expected: Any, found: list[Found]
) -> tuple[float, dict[frozenset[int], str]]:
    """Replace the modules, and see that the model computes the same around them.

    Returns by how much the outputs for the example differ, and the nodes of regions without which the model does not
    run or computes something else, with what that is; if there are any, the model is as it was.
    """
    check_fused_structure([entry for one in found for entry in one.entries])
    undo: list[tuple[str, nn.Module]] = []
    try:
        undo += _replace(model, found)
        outcome = _outcome(model, example, graph, expected, found)
        if not isinstance(outcome, str):
            return outcome, {}
        _restore(model, undo)
        good: list[Found] = []
        broken, error = {}, 0.0
        for one in found:  # which of them is it?
            before = len(undo)
            undo += _replace(model, [one])
            outcome = _outcome(model, example, graph, expected, [*good, one])
            if isinstance(outcome, str):
                broken[one.nodes] = outcome
                _restore(model, undo, before)
            else:
                error = outcome
                good.append(one)
    except BaseException:
        _restore(model, undo)
        raise
    if broken:
        _restore(model, undo)
    return error, broken


def _replace(model: nn.Module, found: list[Found]) -> list[tuple[str, nn.Module]]:
    entries = [entry for one in found for entry in one.entries]
    return replace_modules(model, entries, {one.region.name: one.convolution for one in found})


def _restore(model: nn.Module, undo: list[tuple[str, nn.Module]], start: int = 0) -> None:
    """Undo replacements from number `start` on, and drop them from the list."""
    restore_modules(model, undo[start:])
    del undo[start:]


def _outcome(model: nn.Module, example: Any, graph: Graph, expected: Any, found: list[Found]) -> float | str:
    """Return how much the outputs for the example differ from those `expected`, or what is wrong with the model."""
    try:
        after = record(model, example)
    except ValueError as failure:  # code around the replaced modules that reads more of them than their results
        cause = failure.__cause__ or failure
        return f"with one convolution in its place the model fails, {type(cause).__name__}: {cause}"
    difference = find_difference(graph, after, {max(one.nodes): (one.source, one.convolution) for one in found})
    if difference is not None:
        return f"with one convolution in its place the model is another: {difference}"
    error = output_error(expected, after.output)
    limit = largest_rounding(graph.recording)
    if error > limit and not explains_jumps(graph.recording):
        return f"with one convolution in its place the model's outputs differ by {error:.1e} of the largest"
    return error
