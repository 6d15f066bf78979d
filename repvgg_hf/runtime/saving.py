"""Replacing a checkpoint's files so that a process that is killed meanwhile leaves the old checkpoint or the new one.

New files are written into a folder `.saving-<host>-<process>-<random>` inside the checkpoint's. A *manifest* in it, a
list of them, is written last: from then on the new checkpoint is the one that counts. Its files are renamed over the
old ones, and what is left of that after an interruption is done by the next save into the folder or load from it. A
folder without a manifest is what an interrupted save has left, and the next save removes it.
"""

import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedConfig

PREFIX = ".saving-"
_MANIFEST = ".complete.json"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_QUIET_SECONDS = 3600  # after which an unfinished folder of a process that can't be looked up is given up
_running = set()  # names of the folders that this process is filling


@contextmanager
def replace_files(target: Path) -> Iterator[Path]:
    """Give a folder to fill, whose files replace those of `target` when the `with` block ends.

    If the block raises, `target` is as before. Weights there that have no counterpart among new weights are removed.
    Raises `ValueError` if a folder in `target` has the name of a file.
    """
    clean(target)
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{platform.node()}-{os.getpid()}-", dir=target))
    _running.add(folder.name)
    try:
        yield folder
        _write_manifest(folder, target)
        _move_files(folder, target)
    except BaseException:
        if _is_complete(folder):  # too late to go back: some of the old files may be gone
            _move_files(folder, target)
        raise
    finally:
        if not _is_complete(folder):
            shutil.rmtree(folder, ignore_errors=True)
        _running.discard(folder.name)


def clean(target: Path) -> None:
    """Finish what interrupted saves into `target` have left complete, and remove what they left incomplete."""
    finish(target)
    for folder in target.glob(f"{PREFIX}*"):
        if not _is_complete(folder) and not _is_live(folder):
            shutil.rmtree(folder, ignore_errors=True)


def finish(target: Path) -> bool:
    """Move files that an interrupted save has left complete to where they belong; returns whether there were any.

    Raises `ValueError` if that can't be done.
    """
    folders = [folder for folder in sorted(target.glob(f"{PREFIX}*")) if _is_complete(folder)]
    for folder in folders:
        try:
            _move_files(folder, target)
        except OSError as error:
            raise ValueError(
                f"A save into {target} was interrupted and the rest of it, in {folder.name}, can't be moved ({error}): "
                f"make {target} writable and load it once, or save the model again into another folder."
            ) from error
    return bool(folders)


def finish_before_loading(name, arguments: dict) -> dict:
    """Finish an interrupted save of what is about to be loaded.

    Args:
        name (`str` or `Path`), arguments (`dict`): those of `from_pretrained`.

    Returns the arguments. A `config` among them that was read before is replaced by the one that belongs to the
    weights, with the same fields changed.
    """
    folder = Path(name, arguments.get("subfolder") or "") if os.path.isdir(str(name)) else None
    if folder is None or not any(folder.glob(f"{PREFIX}*")):
        return arguments
    path, given = folder / "config.json", arguments.get("config")
    if not isinstance(given, PreTrainedConfig) or not path.is_file():
        finish(folder)
        return arguments
    before = json.loads(path.read_text(encoding="utf-8"))
    finish(folder)
    after = json.loads(path.read_text(encoding="utf-8"))
    if before == after:
        return arguments
    read, chosen = type(given).from_dict(before).to_dict(), given.to_dict()
    changed = {field: getattr(given, field) for field, value in chosen.items() if read.get(field) != value}
    config = type(given).from_dict(after | {field: value for field, value in changed.items() if field != "id2label"})
    if "id2label" in changed:
        config.id2label, config.label2id = given.id2label, given.label2id
    config.name_or_path = given.name_or_path
    return arguments | {"config": config}


def _write_manifest(folder: Path, target: Path) -> None:
    """List the files of `folder`. Raises `ValueError` if a folder is in the place of one, or of weights to remove."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in [*names, *_stale_weights(names, target)]:
        if (target / name).is_dir() and not (target / name).is_symlink():
            raise ValueError(
                f"{target / name} is a folder, and saving would put a file in its place: rename it, or save into "
                "another folder."
            )
    give_ordinary_modes(folder)
    temporary = folder / f"{_MANIFEST}.tmp"
    temporary.write_text(json.dumps(names), encoding="utf-8")
    os.replace(temporary, folder / _MANIFEST)


def give_ordinary_modes(folder: Path) -> None:
    """Let all files below `folder` be read by whom the user's umask lets read a new file.

    safetensors writes files that nobody but the user can read.
    """
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        new = Path(temporary) / "new"
        new.touch()  # the umask itself can't be read without changing it for other threads
        for path in paths:
            path.chmod(new.stat().st_mode & 0o666)


def _stale_weights(names: list[str], target: Path) -> list[str]:
    """Weights in `target` that the new files `names` take the place of under other names: sharded or not."""
    if not any(_WEIGHTS.fullmatch(name) for name in names):  # the new ones lie beside: a variant, an adapter
        return []
    return [path.name for path in target.iterdir() if _WEIGHTS.fullmatch(path.name) and path.name not in names]


def _is_complete(folder: Path) -> bool:
    return (folder / _MANIFEST).is_file()


def _move_files(folder: Path, target: Path) -> None:
    """Move the files of a complete `folder` into `target`, those that are not there yet, and remove `folder`.

    Another process may be doing the same.
    """
    try:
        names = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return  # the other one was quicker
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _unless_gone(os.replace, folder / name, target / name)
    for name in _stale_weights(names, target):
        _unless_gone(os.unlink, target / name)
    _unless_gone(os.unlink, folder / _MANIFEST)  # last: without it the rest would be forgotten
    shutil.rmtree(folder, ignore_errors=True)


def _unless_gone(function, *paths: Path) -> None:
    try:
        function(*paths)
    except FileNotFoundError:
        if paths[0].exists():
            raise


def _is_live(folder: Path) -> bool:
    """Tell whether a process may still be filling an incomplete `folder`."""
    parts = re.fullmatch(re.escape(PREFIX) + r"(.*)-(\d+)-\w+", folder.name)
    if parts is None:
        return False  # no process of ours has made it
    host, process = parts.groups()
    if host == platform.node() and process == str(os.getpid()):
        return folder.name in _running
    if host == platform.node() and os.name == "posix":
        try:
            os.kill(int(process), 0)  # sends nothing
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):  # another user's
            pass
    try:
        return time.time() - max(path.stat().st_mtime for path in (folder, *folder.rglob("*"))) < _QUIET_SECONDS
    except FileNotFoundError:
        return True  # it is just being moved or removed


__all__ = ["clean", "finish", "finish_before_loading", "give_ordinary_modes", "replace_files"]
