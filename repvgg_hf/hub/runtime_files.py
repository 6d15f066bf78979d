"""Finding the code that a Hub repository carries, so that `trust_remote_code=True` loads it without this package."""

import re
from pathlib import Path

from ..runtime import configuration_repvgg

_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\S+)\s+import", re.MULTILINE)  # what Transformers looks for


def auto_map() -> dict[str, str]:
    """Return the class of the copied code that each Auto class loads, as `config.json` names them."""
    from ..runtime.modeling_repvgg import AUTO_CLASSES, RepVGGConfig

    classes = {"AutoConfig": RepVGGConfig} | AUTO_CLASSES
    return {auto: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for auto, cls in classes.items()}


def runtime_files() -> list[Path]:
    """Return the files that `modeling_repvgg.py` reaches by `from .name import ...`, itself included, sorted by name.

    Raises `ValueError` if one of them is not beside it.
    """
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
