"""Networks that are not written with this package's layers: checkpoints of other libraries, made into its models.

May import runtime/ alone.
"""

from .timm import convert_timm_state_dict, from_timm

__all__ = ["convert_timm_state_dict", "from_timm"]
