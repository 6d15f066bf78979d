"""Outlier figures of the kernels before the branches are added."""

import torch

from ..analysis.kernels import tail_figures
from ..reparameterization import ReparamConv2d


@torch.no_grad()
def dense_branch_report(model) -> list[dict]:
    """As [`~repvgg_hf.analysis.kernel_report`], of each block's dense branch with its batch norm.

    That is what fusing starts from; the other branches are what may bring outliers. Raises `ValueError` for a fused
    model, which has no branches any more.
    """
    report = []
    for name, block in model.named_modules():
        if isinstance(block, ReparamConv2d):
            kernels = [block.branches[dense].equivalent(block.kernel_size)[0] for dense in block.dense_names]
            report.append({"name": name, **tail_figures(torch.stack(kernels).sum(dim=0))})
    if not report:
        raise ValueError("The model is fused and has no branches: give the checkpoint that was trained.")
    return report
