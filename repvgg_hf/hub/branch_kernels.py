"""Kernels before and after the branches are added: their tails, and how their entries are distributed.

A *branch* is one of the linear maps that a block sums while it trains; fusing adds their kernels. The *dense* branch is
the one as large as the fused kernel.
"""

import torch
from torch import nn

from ..analysis.kernels import kernel_histogram, tail_figures
from ..runtime.reparameterization import ReparamConv2d


@torch.no_grad()
def dense_kernels(model) -> dict[str, torch.Tensor]:
    """Return the kernel `[out, in / groups, k, k]` of each block's dense branch with its batch norm, by block.

    Fusing starts from these; the other branches are what may bring outliers. Raises `ValueError` for a fused model,
    which has no branches any more.
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
    """Return what [`~repvgg_hf.analysis.kernel_report`] does, for each block's dense branch instead of its sum."""
    return [{"name": name, **tail_figures(kernel)} for name, kernel in dense_kernels(model).items()]


def branch_histograms(model, before: bool = True) -> list[dict]:
    """Count the entries of a float model's kernels after fusing, and with `before` also of its dense branches.

    Returns the fields of one [`HistogramResult`] each.
    """
    norm = "OABN" if model.config.oabn else "BN"
    kernels = {f"{norm}, before fusing (3x3 branch)": dense_kernels(model).values()} if before else {}
    fused = list(model.fused_convolutions().values())  # none of a model that is fused already
    if not fused:  # every larger convolution is a fused block: those of squeeze-excitation are 1x1
        fused = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)]
    kernels[f"{norm}, fused"] = [layer.weight for layer in fused]
    return [{"name": name, **kernel_histogram(tensors, name)} for name, tensors in kernels.items()]
