"""Networks that are not written with this package's layers: fusing any of them, and checkpoints of other libraries.

May import runtime/ alone. What `fuse` does, in the order of the files: `recording.py` notes one forward pass,
`operations.py` says what each node of it computes, `regions.py` finds which of them are one convolution together,
`equivalent.py` computes that convolution and checks it, `placement.py` says where it goes, `folding.py` takes
norms behind other layers into these, and `verifying.py` sees that nothing else has changed.

Checkpoints: `timm.py` takes models of timm, RepVGG by `repvgg_names.py` and all others by `timm_wrapper.py`, and gives
RepVGG back; `original.py` takes the authors' files, which `weight_files.py` reads.
"""

from .fusing import fuse
from .original import from_original
from .report import FusedRegion, FuseReport
from .timm import convert_timm_state_dict, from_timm, to_timm_state_dict

__all__ = [
    "FuseReport",
    "FusedRegion",
    "convert_timm_state_dict",
    "from_original",
    "from_timm",
    "fuse",
    "to_timm_state_dict",
]
