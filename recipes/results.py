"""Writing results."""

import json
import os
from pathlib import Path


def write_json(path: str | Path, record: dict) -> None:
    """Write `record` to `path`, through a temporary file, so that a reader never sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
