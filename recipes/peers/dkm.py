"""coremltools' differentiable k-means (DKM, arXiv 2108.12659), the peer of ClusterQAT."""

import torch
from coremltools.optimize.torch.palettization import DKMPalettizer, DKMPalettizerConfig

SCALE = {"enable_per_channel_scale": True}
SCIKIT = "cpu.kmeans++"  # its own k-means++ for the start takes minutes on a CPU


def prepare_dkm(model: torch.nn.Module, bits: int, **options) -> tuple[torch.nn.Module, DKMPalettizer]:
    """Put a fused model under DKM from its first step on, in place, with a codebook per tensor.

    Returns (model, palettizer).

    `options` are further ones of `ModuleDKMPalettizerConfig`. Call the palettizer's `step` after each optimizer step,
    and `finalize` at the end, which puts the entries of the codebooks into the kernels.
    """
    settings = {"n_bits": bits, "granularity": "per_tensor", "weight_threshold": 0, "milestone": 0, **options}
    settings.setdefault("kmeans_init", SCIKIT)
    palettizer = DKMPalettizer(model, DKMPalettizerConfig.from_dict({"global_config": settings}))
    return palettizer.prepare(inplace=True), palettizer
