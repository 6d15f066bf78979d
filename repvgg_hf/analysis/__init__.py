"""What fusing does to the kernels."""

from .kernels import kernel_report

__all__ = ["kernel_report"]
