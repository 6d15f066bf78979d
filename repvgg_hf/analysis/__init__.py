"""Measuring what fusing does to the kernels, and what a model takes on disk.

`kernels.py` and `size.py` compute figures, `uncertainty.py` tells how sure an accuracy is, `plots.py` draws (with the
`plot` extra). May import runtime/.
"""

from .kernels import kernel_histogram, kernel_report
from .size import bits_per_weight, bits_with_one_codebook, checkpoint_bytes

__all__ = ["bits_per_weight", "bits_with_one_codebook", "checkpoint_bytes", "kernel_histogram", "kernel_report"]
