"""One weight tensor -> codes, codebook, scale: k-means and uniform fitting, encoding, decoding. Knows no model.

Files here may import each other and `repvgg_hf.runtime`, nothing else of the package.
Start at `weights.py` (`quantize_weight`, `QuantizedWeight`); `codes.py` has `encode` and `decode`.
"""

from .codes import decode, encode, round_to_codebook
from .kmeans import kmeans_1d
from .weights import QuantizedWeight, quantize_weight

__all__ = ["QuantizedWeight", "decode", "encode", "kmeans_1d", "quantize_weight", "round_to_codebook"]
