"""The code that a Hub repository carries, so that `trust_remote_code=True` loads it without this package."""

import re
from pathlib import Path

from ..runtime import configuration_repvgg

AUTO_MAP = {
    "AutoConfig": "configuration_repvgg.RepVGGConfig",
    "AutoModel": "modeling_repvgg.RepVGGModel",
    "AutoModelForImageClassification": "modeling_repvgg.RepVGGForImageClassification",
    "AutoBackbone": "modeling_repvgg.RepVGGBackbone",
}
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\S+)\s+import", re.MULTILINE)  # what Transformers looks for


def runtime_files() -> list[Path]:
    """The modules that `modeling_repvgg.py` reaches by `from .name import ...`, itself included, sorted by name."""
    folder = Path(configuration_repvgg.__file__).parent
    found, waiting = set(), ["modeling_repvgg"]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        path = folder / f"{name}.py"
        if not path.is_file():
            raise ValueError(f"The runtime code imports .{name}, and {path.name} is no module beside it.")
        found.add(name)
        waiting += _RELATIVE_IMPORT.findall(path.read_text(encoding="utf-8"))
    return [folder / f"{name}.py" for name in sorted(found)]
