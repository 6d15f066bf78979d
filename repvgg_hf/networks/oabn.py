"""Outlier-aware batch normalization (OABN) in any network with parallel branches, after arXiv 2402.07200.

The weight of a branch's batch norm is *projected* before every forward pass in training: clipped so that the branch
adds at most `threshold` standard deviations of the dense branches' contribution to any entry of the fused kernel. The
network keeps its modules, keys and forward pass, so that checkpoints load in either direction. It does the projection
itself, before every training step's forward pass and whenever its `state_dict` is taken: no training loop knows of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..runtime.reparameterization import ReparamConv2d
from ..runtime.tensors import at_least_float32, has_memory, kernel_of
from .branch_sums import BranchSum, NormedBranch, SumFinder
from .checks import check_can_be_recorded, check_not_quantized
from .recording import record


class OutlierBounds:
    """What [`add_oabn`] adds to a model, as its `outlier_bounds`: a hook that keeps branches within their bounds.

    Args:
        sums: the sums of branches, by the names of their modules.
        threshold: how many standard deviations of the dense branches' contribution another one may add to an entry.
    """

    def __init__(self, sums: Sequence[BranchSum], threshold: float):
        self.sums, self.threshold = list(sums), threshold
        self.trained = False  # since the last projection for good: an optimizer step may have moved the weights
        self.moved: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # norm weights before and after, by module
        self.versions: list[int] | None = None  # of the tensors that bounds are made of, when last seen in evaluation

    def __getstate__(self) -> dict:
        return vars(self) | {"versions": None}  # a copy's tensors count anew

    @torch.no_grad()
    def project(self, model: nn.Module) -> None:
        """Clip the norm weights of every bounded branch of `model`, in place, for the statistics that it has now.

        All sums are computed side by side: on an accelerator a step is as long as the number of its small kernels.
        """
        present = self.present(model)
        if not present:
            return
        variances = iter(_contribution_variances(model, [branch for one in present for branch in one.dense]))
        # parallel dense branches are near independent: their variances add
        bounds = [self.threshold * sum(next(variances) for _ in one.dense).sqrt() for one in present]
        others = [(branch, bound) for one, bound in zip(present, bounds) for branch in one.others]
        norms = [model.get_submodule(branch.norm) for branch, _ in others]
        limits = torch._foreach_mul(_deviations(norms), [bound for _, bound in others])
        with_kernel = [number for number, (branch, _) in enumerate(others) if branch.convolution is not None]
        if with_kernel:
            largest = [_largest_entry(model, others[number][0]) for number in with_kernel]
            torch._foreach_clamp_min_(largest, 1e-12)
            torch._foreach_div_([limits[number] for number in with_kernel], largest)
        weights = [norm.weight for norm in norms]
        exact = [at_least_float32(weight) for weight in weights]
        clipped = torch._foreach_maximum(torch._foreach_minimum(exact, limits), torch._foreach_neg(limits))
        torch._foreach_copy_(weights, clipped)

    def present(self, model: nn.Module) -> list[BranchSum]:
        """Return the sums that `model` still has: others are in a part that was fused by itself, as they were then."""
        return [branches for branches in self.sums if _has(model, branches)]

    def present_versions(self, model: nn.Module) -> list[int] | None:
        """Return how often each tensor that bounds are made of was overwritten, which is known without the device.

        `None` where they are stand-ins, as `torch.func` computes with.
        """
        branches = [branch for one in self.present(model) for branch in (*one.dense, *one.others)]
        names = [name for branch in branches for name in (branch.norm, branch.convolution) if name]
        modules = map(model.get_submodule, names)
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        if not all(has_memory(tensor.data) for tensor in tensors):
            return None
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]

    def _is_outdated(self, model: nn.Module) -> bool:
        """Tell whether weights or statistics were overwritten since they were last seen; not told while compiled."""
        if torch.compiler.is_compiling():
            return False
        return self.present_versions(model) not in (None, self.versions)

    def __call__(self, model: nn.Module, args: tuple) -> None:
        """Project before a forward pass in training. Ranks agree: their statistics are made equal just before.

        And before one in evaluation if weights or statistics were overwritten since the last, by training, averaging or
        loading: it then computes what the fused model will.
        """
        if model.outlier_bounds is not self:
            return
        if not model.training:
            if self.trained or self._is_outdated(model):
                self.project_for_now(model)
            return
        if not self.trained:
            self.trained = True
        if self.moved:
            self._move_back(model)
        self.project(model)

    def before_state_dict(self, model: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Project once more before a checkpoint is taken: an optimizer step has moved the weights since."""
        if model.outlier_bounds is self:
            self.project_for_now(model)

    @torch.no_grad()
    def project_for_now(self, model: nn.Module) -> None:
        """Project between steps of training.

        Each of several ranks does so for statistics of its own, if at all, so that its weights would be others from
        then on: they are remembered, and moved back before training goes on.
        """
        self.trained = False
        self._project_or_remember(model)
        if not torch.compiler.is_compiling():
            self.versions = self.present_versions(model)

    def _project_or_remember(self, model: nn.Module) -> None:
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            self.project(model)
            return
        self._move_back(model)
        norms = {branch.norm: model.get_submodule(branch.norm) for one in self.present(model) for branch in one.others}
        before = {name: norm.weight.detach().clone() for name, norm in norms.items()}
        self.project(model)
        self.moved = {name: (before[name], norm.weight.detach().clone()) for name, norm in norms.items()}

    @torch.compiler.disable
    @torch.no_grad()
    def _move_back(self, model: nn.Module) -> None:
        """Undo the projection between steps, of the weights that nothing else has changed since."""
        for name, (before, after) in self.moved.items():
            weight = model.get_submodule(name).weight
            if (weight.device, weight.dtype) == (after.device, after.dtype) and torch.equal(weight, after):
                weight.copy_(before)
        self.moved = {}


def _has(model: nn.Module, branches: BranchSum) -> bool:
    """Tell whether the modules of a sum are still in `model`."""
    try:
        return all(hasattr(model.get_submodule(one.norm), "running_var") for one in (*branches.dense, *branches.others))
    except AttributeError:
        return False


def settle_outlier_bounds(model: nn.Module) -> bool:
    """Project what [`add_oabn`] bounds in `model` a last time, and end that; tell whether there was anything.

    It is called before weights are replaced: fused, or quantized.
    """
    bounds = getattr(model, "outlier_bounds", None)
    if bounds is None:
        return False
    bounds.project(model)
    model.outlier_bounds = None
    return True


@dataclass
class OABNReport:
    """What [`add_oabn`] did: the sums that are bounded, and why others are left, by the name of the module they are in.

    Attributes:
        bounded: for each sum the branches that are dense and those that are bounded.
        left: the reason, for sums of branches that are not bounded.
    """

    bounded: list[BranchSum] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        count = sum(len(branches.others) for branches in self.bounded)
        lines = [f"{count} branches of {len(self.bounded)} sums are bounded."]
        lines += [f"Left: {name or 'the model'}: {reason}." for name, reason in self.left.items()]
        return "\n".join(lines)


def add_oabn(model: nn.Module, example: Any, threshold: float = 6.0) -> OABNReport:
    """Bound the outliers that fusing the branches of any network would make, from now on while it trains.

    Branches are found by running `model` once, in eval mode. A bounded branch is batch normalization of a sum's source
    (the identity), or a convolution with a smaller kernel than another branch of the sum followed by batch norm. Train
    with any loop, then fuse, or save and load the weights as ever; a model that was loaded needs `add_oabn` again
    before it trains on.

    Args:
        model (`nn.Module`): with branches; on any device. A model of this package gets OABN as its configuration's
            `oabn=True` gives it.
        example: a tensor, a tuple of positional inputs or a dictionary of keyword inputs that the model runs on.
        threshold (`float`, defaults to 6): standard deviations of the dense branches' contribution to an entry of the
            fused kernel that another branch may add.

    Returns an [`OABNReport`]. Raises `ValueError` if there is nothing to bound, the model does not run on the example,
    is compiled, quantized, not in memory or has bounds already, and for a `threshold` that is not positive and finite;
    the model is then unchanged.

    Example:
    ```python
    >>> import timm, torch
    >>> import repvgg_hf

    >>> model = timm.create_model("mobileone_s0", num_classes=10)
    >>> report = repvgg_hf.add_oabn(model, torch.randn(1, 3, 64, 64))
    ```"""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold < float("inf"):
        raise ValueError(f"threshold must be a positive, finite number of standard deviations, got {threshold!r}.")
    if getattr(model, "outlier_bounds", None) is not None:
        raise ValueError("The model has outlier bounds already: call add_oabn once, on the model as it was made.")
    check_can_be_recorded(model)
    check_not_quantized(model)
    own = {name: block for name, block in model.named_modules() if isinstance(block, ReparamConv2d)}
    finder = SumFinder(model, _record_in_eval_mode(model, example))
    inside = tuple(f"{name}." for name in own)
    found = [branches for branches in finder.found if not f"{branches.name}.".startswith(inside)]
    left = {name: reason for name, reason in finder.left.items() if not f"{name}.".startswith(inside)}
    report = OABNReport([*_set_own_thresholds(model, own, threshold), *found], left)
    if not report.bounded:
        raise ValueError(f"The model has no sum of branches to bound. {_nothing(report)}")
    if found:
        model.outlier_bounds = OutlierBounds(found, threshold)
        model.outlier_bounds.versions = model.outlier_bounds.present_versions(model)
        model.register_forward_pre_hook(model.outlier_bounds)
        model.register_state_dict_pre_hook(model.outlier_bounds.before_state_dict)
    return report


def _nothing(report: OABNReport) -> str:
    if report.left:
        return str(report).partition("\n")[2]
    return (
        "A sum needs a convolution with batch norm beside a smaller one, or beside batch norm alone, of the same input."
    )


def _set_own_thresholds(model: nn.Module, blocks: dict[str, ReparamConv2d], threshold: float) -> list[BranchSum]:
    """Give this package's own blocks the threshold, which they apply themselves; returns them as sums."""
    sums = []
    for name, block in blocks.items():
        block.oabn_threshold = threshold
        branches = {
            key: NormedBranch(f"{name}.branches.{key}.norm", f"{name}.branches.{key}.conv" * hasattr(branch, "conv"))
            for key, branch in block.branches.items()
        }
        dense = block.dense_names
        others = tuple(branch for key, branch in branches.items() if key not in dense)
        sums.append(BranchSum(name, tuple(branches[key] for key in dense), others))
    config = getattr(model, "config", None)
    if blocks and hasattr(config, "oabn_threshold"):
        config.oabn, config.oabn_threshold = True, threshold
    return sums


def _record_in_eval_mode(model: nn.Module, example: Any):
    """Record the model in eval mode, in which batch norm is affine, and give every module its mode back."""
    modes = {module: module.training for module in model.modules()}
    try:
        return record(model.eval(), example)
    finally:
        for module, training in modes.items():
            module.training = training


def _deviations(norms: list[nn.Module]) -> list[torch.Tensor]:
    """Return what each norm divides by, `[out]`."""
    variances = [at_least_float32(norm.running_var) for norm in norms]
    variances = torch._foreach_add(variances, [norm.eps for norm in norms])
    return torch._foreach_sqrt(variances)


def _contribution_variances(model: nn.Module, branches: list[NormedBranch]) -> list[torch.Tensor]:
    """Return the variances of the entries of what dense branches add to their fused kernels, 0-dim each.

    They are computed from sums per channel, which read a kernel twice and allocate nothing of its size.
    """
    norms = [model.get_submodule(branch.norm) for branch in branches]
    kernels = [at_least_float32(kernel_of(model.get_submodule(branch.convolution))) for branch in branches]
    weights = [torch.ones_like(norm.running_var) if norm.weight is None else norm.weight for norm in norms]
    scales = torch._foreach_div([at_least_float32(weight) for weight in weights], _deviations(norms))
    totals = torch._foreach_mul(scales, [kernel.sum(dim=(1, 2, 3)) for kernel in kernels])
    lengths = torch._foreach_mul(scales, [torch.linalg.vector_norm(kernel, dim=(1, 2, 3)) for kernel in kernels])
    counts = [kernel.numel() for kernel in kernels]
    means = torch._foreach_div([total.sum() for total in totals], [count**0.5 for count in counts])
    squares = torch._foreach_pow(torch._foreach_norm(lengths), 2)
    variances = torch._foreach_sub(squares, torch._foreach_pow(means, 2))
    return torch._foreach_div(torch._foreach_clamp_min(variances, 0), [count - 1 for count in counts])


def _largest_entry(model: nn.Module, branch: NormedBranch) -> torch.Tensor:
    """Return the largest magnitude in a branch's kernel before its norm, for each output channel `[out]`."""
    return at_least_float32(kernel_of(model.get_submodule(branch.convolution)).abs().amax(dim=(1, 2, 3)))


__all__ = ["OABNReport", "OutlierBounds", "add_oabn", "settle_outlier_bounds"]
