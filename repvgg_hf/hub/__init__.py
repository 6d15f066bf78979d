"""Model cards made from results, and publishing on the Hub.

`card.py` makes the text, `folder.py` all files of a repository, `upload.py` the commit; `publishing.py` joins them.
`space.py` makes a page that runs models in the browser. May import runtime/, interop/ and analysis/.
"""

from .about import About, Example
from .card import ModelCard
from .complexity import Complexity, measure_complexity
from .folder import write_folder
from .publishing import publish, publish_family
from .results import DatasetInfo, EngineResult, HistogramResult, KernelResult, LatencyResult, ModelResult, Results
from .space import publish_space, write_space
from .upload import Published

__all__ = [
    "About",
    "Complexity",
    "DatasetInfo",
    "EngineResult",
    "Example",
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
    "publish_space",
    "write_folder",
    "write_space",
]
