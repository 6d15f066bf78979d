"""Kernels before the branches are added, and after: their tails, and how their entries are distributed."""

import torch

from ..analysis.kernels import kernel_histogram, tail_figures
from ..runtime.reparameterization import ReparamConv2d


@torch.no_grad()
def dense_kernels(model) -> dict[str, torch.Tensor]:
    """The kernel of each block's dense branch with its batch norm, by the block's name.

    That is what fusing starts from; the other branches are what may bring outliers. Raises `ValueError` for a fused
    model, which has no branches any more.
    """
    found = {}
    for name, block in model.named_modules():
        if isinstance(block, ReparamConv2d):
            kernels = [block.branches[dense].equivalent()[0] for dense in block.dense_names]
            found[name] = torch.stack(kernels).sum(dim=0)
    if not found:
        raise ValueError("The model is fused and has no branches: give the checkpoint that was trained.")
    return found


def dense_branch_report(model) -> list[dict]:
    """As [`~repvgg_hf.analysis.kernel_report`], of each block's dense branch."""
    return [{"name": name, **tail_figures(kernel)} for name, kernel in dense_kernels(model).items()]


def branch_histograms(model, before: bool = True) -> list[dict]:
    """Entries of a float model's kernels before fusing (with `before`) and after, as fields of [`HistogramResult`]."""
    norm = "OABN" if model.config.oabn else "BN"
    kernels = {f"{norm}, before fusing (3x3 branch)": dense_kernels(model).values()} if before else {}
    fused = model.fused_convolutions()  # none of a model that is fused already
    fused = fused or {name: layer for name, layer in model.named_modules() if name.endswith(".conv")}
    kernels[f"{norm}, fused"] = [layer.weight for layer in fused.values()]
    return [{"name": name, **kernel_histogram(tensors, name)} for name, tensors in kernels.items()]
