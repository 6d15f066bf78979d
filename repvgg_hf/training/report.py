"""Results on disk and on the screen."""

import json
import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from repvgg_hf.runtime.quantization_cluster import QuantizationOptions

FIELDS = ("method", "bits", "granularity", "group_size", "channel_scale", "activation_bits")


def write_json(path: str | Path, record: dict) -> None:
    """Write `record` to `path`, through a temporary file, so that a reader never sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several runs may share the file
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def quantization_fields(config: QuantizationOptions | None) -> dict:
    """The fields of a row of results that say how its model is quantized; `None` is a float model."""
    if config is None:
        return {"method": "float", "bits": 32} | dict.fromkeys(FIELDS[2:])
    return {name: getattr(config, name) for name in FIELDS}


def print_table(title: str, rows: list[dict]) -> None:
    """Show `rows`, which have the same keys; floats with up to four significant places after the point."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(_format(value) for value in row.values()))
    # a terminal that tells no width (a log file) must not fold the columns
    console = Console()
    Console(width=max(console.width, 120)).print(table)


def _format(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) >= 0.01 or value == 0 else f"{value:.1e}"
    return f"{value:,}" if isinstance(value, int) else str(value)
