"""Checkpoints of other libraries in, other formats out."""

from .timm import convert_timm_state_dict, from_timm

__all__ = ["convert_timm_state_dict", "from_timm"]
