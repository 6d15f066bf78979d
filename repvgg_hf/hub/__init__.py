"""Model cards made from results, and publishing on the Hub.

`card.py` makes the text, `folder.py` all files of a repository, `upload.py` the commit; `publishing.py` joins them. May
import runtime/ and analysis/.
"""

from .card import ModelCard
from .complexity import Complexity, measure_complexity
from .folder import write_folder
from .publishing import publish, publish_family
from .results import DatasetInfo, HistogramResult, KernelResult, LatencyResult, ModelResult, Results
from .upload import Published

__all__ = [
    "Complexity",
    "DatasetInfo",
    "HistogramResult",
    "KernelResult",
    "LatencyResult",
    "ModelCard",
    "ModelResult",
    "Published",
    "Results",
    "measure_complexity",
    "publish",
    "publish_family",
    "write_folder",
]
