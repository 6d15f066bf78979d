"""What fusing does to the kernels, and what a model takes on disk."""

from .kernels import kernel_histogram, kernel_report
from .size import bits_per_weight, checkpoint_bytes

__all__ = ["bits_per_weight", "checkpoint_bytes", "kernel_histogram", "kernel_report"]
