"""A study as cells: commands that each leave a JSON file, run once, in the order of what they need.

A cell that has run is `cells/<name>.json` in the study's folder: its command, the versions, the device, the seconds,
and what the command wrote. Started again, a study goes on with the cells that are missing.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from repvgg_hf.interop.processor import processor_facts
from repvgg_hf.training.report import masked, write_json

ENVIRONMENT = ("ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS")  # what may change figures
PACKAGES = ("repvgg-hf", "torch", "transformers", "datasets", "coremltools", "nncf", "onnxruntime", "timm")


@dataclass(frozen=True)
class Cell:
    """One command of a study.

    Attributes:
        name: with a path's slashes, such as `cifar10/oabn-0/ptq`.
        module: below `repvgg_hf.recipes`, such as `train`.
        options: what it is given; paths are below the study's folder, in which it runs.
        result: the JSON file that it writes there, if any.
        needs: names of the cells that must have run.
        facts: what a report needs to know of it.
    """

    name: str
    module: str
    options: tuple[str, ...]
    result: str | None = None
    needs: tuple[str, ...] = ()
    facts: dict = field(default_factory=dict)

    def path(self, folder: Path) -> Path:
        """The file of the cell in a study's `folder`."""
        return folder / "cells" / f"{self.name}.json"

    def command(self) -> list[str]:
        """The command without the path of Python, and with tokens masked."""
        return masked(["python", "-m", f"repvgg_hf.recipes.{self.module}", *self.options])

    def state(self, folder: Path) -> str:
        """Return "" if it has not run in a study's `folder`, "done" if it has, or what its command was instead."""
        if not self.path(folder).exists():
            return ""
        before, now = json.loads(self.path(folder).read_text(encoding="utf-8"))["command"], self.command()
        if before == now:
            return "done"
        old, new = (" ".join(word for word in a if word not in b) for a, b in ((before, now), (now, before)))
        return f"done with {old or 'less'}, now {new or 'without'}"


def run_cells(cells: Sequence[Cell], folder: Path, parallel: int = 1) -> None:
    """Run the cells that have not run, so many at once; goes on with others where one fails.

    Raises `RuntimeError` at the end that names those that failed, with their logs, and `ValueError` for a cell that
    needs one that is not among them.
    """
    names = {cell.name for cell in cells}
    for cell in cells:
        if not names.issuperset(cell.needs):
            raise ValueError(f"{cell.name} needs {', '.join(set(cell.needs) - names)}, which is no cell of the study.")
    states = {cell.name: cell.state(folder) for cell in cells}
    for name, state in states.items():
        if state not in ("", "done"):
            print(f"{name}: {state}; without its file in {folder / 'cells'} it would run again.", flush=True)
    left = {cell.name: cell for cell in cells if not states[cell.name]}
    failed: dict[str, str] = {}
    running = {}
    with ThreadPoolExecutor(parallel) as pool:
        while left or running:
            for name, cell in list(left.items()):
                waiting = [other for other in cell.needs if other in left or other in running.values()]
                lost = [other for other in cell.needs if other in failed]
                if lost:
                    failed[left.pop(name).name] = f"needs {lost[0]}"
                elif not waiting and len(running) < parallel:
                    running[pool.submit(run_cell, left.pop(name), folder)] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, error = running.pop(future), future.exception()
                if error is not None:
                    failed[name] = str(error)
    if failed:
        lines = "\n".join(f"- {name}: {reason}" for name, reason in failed.items())
        raise RuntimeError(f"{len(failed)} cells failed; started again, the study tries them once more:\n{lines}")


def run_cell(cell: Cell, folder: Path) -> None:
    """Run one cell's command in a process, with its output in `logs/`, and write its file."""
    log = folder / "logs" / f"{cell.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{cell.name} ...", flush=True)
    start = time.perf_counter()
    command = [sys.executable, *cell.command()[1:3], *cell.options]  # tokens and all
    with log.open("a", encoding="utf-8") as output:
        output.write(f"$ {shlex.join(masked(command))}\n")
        output.flush()
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=_environment())
    seconds = time.perf_counter() - start
    if done.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
        raise RuntimeError(f"exit code {done.returncode}, {last:.300} (all of it in {log})")
    result = json.loads((folder / cell.result).read_text(encoding="utf-8")) if cell.result else None
    record = {
        "cell": cell.name,
        **cell.facts,
        "command": cell.command(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "versions": _versions(),
        "device": _device(),
        "seconds": round(seconds, 1),
        "result": result,
    }
    write_json(cell.path(folder), record)
    print(f"{cell.name}: {seconds:.0f} s", flush=True)


def read_cells(folder: Path) -> list[dict]:
    """Return the records of all cells that have run, by their names."""
    paths = sorted((folder / "cells").rglob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _environment() -> dict[str, str]:
    """The environment, with relative entries of the path for modules made absolute: the commands run elsewhere."""
    entries = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return os.environ | ({"PYTHONPATH": os.pathsep.join(entries)} if entries else {})


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _device() -> str:
    """The accelerator, if there is one, else the processor."""
    if torch.accelerator.is_available():
        return torch.get_device_module(torch.accelerator.current_accelerator()).get_device_name()
    return processor_facts()["cpu"]


__all__ = ["Cell", "read_cells", "run_cell", "run_cells"]
