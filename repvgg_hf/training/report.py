"""Results on disk and on the screen."""

import json
import os
import platform
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from repvgg_hf.runtime.quantization_cluster import QuantizationOptions

MASK = "***"  # in the place of a secret
SECRET_OPTION = re.compile(r"--?[\w-]*(token|secret|password|passwd|api[_-]?key|credentials?)", re.IGNORECASE)
HUB_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{16,}")
PASSWORD = re.compile(r"(://[^/@\s:]*:)[^/@\s]+@")  # https://user:password@host
FIELDS = ("method", "bits", "granularity", "group_size", "channel_scale", "activation_bits")


def write_json(path: str | Path, record: dict) -> None:
    """Write `record` to `path`, through a temporary file, so that a reader never sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beginning = f"{path.name}.{platform.node()}-"
    temporary = path.with_name(f"{beginning}{os.getpid()}.tmp")  # several runs may share the file
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    for left in path.parent.iterdir():
        process = left.name.removeprefix(beginning).removesuffix(".tmp")
        if left.name == f"{beginning}{process}.tmp" and process.isdigit() and not _is_running(int(process)):
            left.unlink(missing_ok=True)  # of a process of this machine that was killed while it wrote


def masked(command: Iterable[str], secrets: Iterable[str] = ()) -> list[str]:
    """A command as others may see it: with `***` for tokens, passwords and keys.

    These are the values of options whose names say so (`--hub_token X`, `--token=X`), what looks like a token of the
    Hub or like a password in an address, and all of `secrets`.
    """
    shown, follows = [], False
    for argument in command:
        for secret in filter(None, secrets):
            argument = argument.replace(secret, MASK)
        option, equals, _ = argument.partition("=")
        names_secret = SECRET_OPTION.fullmatch(option) is not None
        if follows and not argument.startswith("--"):
            argument = MASK
        elif names_secret and equals:
            argument = f"{option}={MASK}"
        follows = names_secret and not equals
        shown.append(PASSWORD.sub(rf"\1{MASK}@", HUB_TOKEN.sub(MASK, argument)))
    return shown


def masked_text(command: str) -> str:
    """A command in one line as others may see it, see [`masked`]; without secrets it stays as it is written.

    Raises `ValueError` for a quote that does not end.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"The command {command!r} can't be read ({error}): close its quotes.") from error
    shown = masked(words)
    return command if shown == words else shlex.join(shown)


def is_secret(name: str) -> bool:
    """Tell whether the option called `name` is a token, password or key."""
    return SECRET_OPTION.fullmatch(f"--{name}") is not None


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


def _is_running(process: int) -> bool:
    if os.name != "posix":  # there the call below would end it
        return True
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        pass
    return True


def _format(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) >= 0.01 or value == 0 else f"{value:.1e}"
    return f"{value:,}" if isinstance(value, int) else str(value)
