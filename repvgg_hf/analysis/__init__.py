"""Measuring what fusing does to the kernels, and what a model takes on disk.

`kernels.py` and `size.py` compute figures, `plots.py` draws them (with the `plot` extra). May import runtime/.
"""

from .kernels import kernel_histogram, kernel_report
from .size import bits_per_weight, checkpoint_bytes

__all__ = ["bits_per_weight", "checkpoint_bytes", "kernel_histogram", "kernel_report"]
