"""The output folder of a run that may be killed at any time: what it has finished, and what it goes on from."""

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel
from transformers.hf_argparser import string_to_bool

from repvgg_hf.training.optimizer import MovingAverage
from repvgg_hf.training.report import write_json
from repvgg_hf.training.run_record import check_same_run, file_digest

RECORD = "run.json"  # in the folder of a state: the record of the run that it belongs to


def resume_field() -> Any:
    """The field of the option `--resume_from_checkpoint`, which all recipes that train have alike."""
    text = (
        "Go on from the last checkpoint in --output_dir, if there is one (alone or with True), or from the one in this "
        "folder."
    )
    return field(default=None, metadata={"help": text, "nargs": "?", "const": "True"})


def resume_place(value: str | bool | None) -> bool | Path:
    """What `--resume_from_checkpoint` says: whether to go on, or where from.

    Raises `ValueError` for a path where there is no folder.
    """
    if value is None or isinstance(value, bool):
        return bool(value)
    try:
        return string_to_bool(value)
    except Exception:  # an ArgumentTypeError: it is a path
        pass
    if not Path(value).is_dir():
        raise ValueError(
            f"--resume_from_checkpoint {value} is no folder: give that of a checkpoint, or nothing for the last one in "
            "--output_dir."
        )
    return Path(value)


class RunFolder:
    """The folder that a run saves its models and the states of its training in.

    A model `<name>` lies in `folder/<name>/`. It is *finished* when its marker `folder/checkpoint/<name>.json` is
    there, which is written last, and names the files and their checksums. The state of a phase of training lies in
    `folder/checkpoint/<phase>/`, which is a checkpoint of the model for `from_pretrained`, too. Markers and states hold
    the record of their run, and serve no other one.

    Args:
        accelerator (`Accelerator`): the run's.
        folder (`str` or `Path`): the run's `--output_dir`.
        record (`dict`): the run's record, see `run_record`.
        resume (`bool` or `Path`): whether to use what is there. A path must be `folder` or lie in it.
        processor: the image processor, which is saved with each model and state.

    Raises `ValueError` if all that is there belongs to other runs, naming what differs.

    Attributes:
        finished (`set[str]`): names of the models that were there when the run began.
        states (`set[str]`): names of the phases whose states were there.
    """

    def __init__(self, accelerator: Accelerator, folder: str | Path, record: dict, resume: bool | Path, processor):
        self.accelerator, self.folder, self.checkpoint = accelerator, Path(folder), Path(folder) / "checkpoint"
        self.record, self.processor = record, processor
        self.finished: set[str] = set()
        self.states: set[str] = set()
        if resume is False:
            return
        if isinstance(resume, Path) and not resume.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(
                f"--resume_from_checkpoint {resume} is not in --output_dir {folder}: a run goes on where it was, from "
                f"the last state there. Give its folder as --output_dir."
            )
        if accelerator.is_main_process:
            self._recover()
        accelerator.wait_for_everyone()
        self._find()
        accelerator.wait_for_everyone()  # nobody writes while another still looks
        there = ", ".join(sorted(self.finished) + [f"the state of {phase}" for phase in sorted(self.states)])
        accelerator.print(f"{folder}: going on with {there}" if there else f"{folder}: nothing to go on from")

    def save_model(self, name: str, model: PreTrainedModel) -> None:
        """Save the model `name` with the image processor, if it is not finished; from the main process only."""
        if name in self.finished:
            return
        if self.accelerator.is_main_process:
            folder = self.folder / name
            model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
            files = {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()}
            write_json(self.checkpoint / f"{name}.json", {"files": files, "run": self.record})
        self.accelerator.wait_for_everyone()

    def save_state(self, phase: str, model: PreTrainedModel, average: MovingAverage | None = None) -> None:
        """Save the state of all that the accelerator prepared, of which `model` is the bare model.

        It is written beside the one before, which is removed last. `average` is the model's moving average.
        """
        state, new, old = (self.checkpoint / f"{phase}{suffix}" for suffix in ("", ".new", ".old"))
        if self.accelerator.is_main_process:
            shutil.rmtree(new, ignore_errors=True)  # of an interrupted run
        self.accelerator.wait_for_everyone()
        with _removed(self.accelerator.register_save_state_pre_hook(self._take_bare_weights)):
            self.accelerator.save_state(new)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            _config_to_save(model).save_pretrained(new)
            self.processor.save_pretrained(new)
            if average is not None:
                torch.save(average.state_dict(), new / "average.pt")
            write_json(new / RECORD, self.record)
            shutil.rmtree(old, ignore_errors=True)
            if state.exists():
                state.rename(old)
            new.rename(state)
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def load_state(self, phase: str, average: MovingAverage | None = None) -> None:
        """Load what `save_state` wrote."""
        state = self.checkpoint / phase
        with _removed(self.accelerator.register_load_state_pre_hook(self._load_into_bare_models)):
            self.accelerator.load_state(state)
        if average is not None:
            # torch.load takes no "cpu:0", the device of several processes on the CPU
            average.load_state_dict(torch.load(state / "average.pt", map_location="cpu"))

    def _take_bare_weights(self, models: list[nn.Module], weights: list[dict], folder: str) -> None:
        """Save weights by the names that the models themselves have, without those of several processes' wrappers."""
        if weights:  # empty where Accelerate saves shards
            weights[:] = [self._bare(model).state_dict() for model in models]

    def _load_into_bare_models(self, models: list[nn.Module], folder: str) -> None:
        models[:] = [self._bare(model) for model in models]

    def _bare(self, model: nn.Module) -> nn.Module:
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def _recover(self) -> None:
        """Put back states that an interrupted `save_state` had set aside, and remove what it had not completed."""
        for old in self.checkpoint.glob("*.old"):
            if not old.with_suffix("").exists():
                old.rename(old.with_suffix(""))
            shutil.rmtree(old, ignore_errors=True)
        for new in self.checkpoint.glob("*.new"):
            shutil.rmtree(new, ignore_errors=True)

    def _find(self) -> None:
        markers = {path: _read(path) for path in self.checkpoint.glob("*.json")}
        records = {path: marker["run"] for path, marker in markers.items()}
        records |= {path: _read(path) for path in self.checkpoint.glob(f"*/{RECORD}")}
        ours = [path for path, record in records.items() if record == self.record]
        if records and not ours:
            latest = max(records, key=lambda path: path.stat().st_mtime)
            check_same_run(records[latest], self.record, f"What {self.folder} holds")
        self.states = {path.parent.name for path in ours if path.name == RECORD}
        for path in ours:
            if path in markers and self._is_whole(path.stem, markers[path]["files"]):
                self.finished.add(path.stem)

    def _is_whole(self, name: str, files: dict[str, str]) -> bool:
        paths = {self.folder / name / file: digest for file, digest in files.items()}
        changed = [path for path, digest in paths.items() if not path.is_file() or file_digest(path) != digest]
        if changed:
            self.accelerator.print(f"{changed[0]} is not as this run saved it: {name} is made again.")
        return not changed


@contextmanager
def _removed(hook) -> Iterator[None]:
    """Remove a `hook` at the end."""
    try:
        yield
    finally:
        hook.remove()


def _config_to_save(model: PreTrainedModel):
    """What `model.save_pretrained` makes of its configuration, for weights that are saved otherwise."""
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], str(model.dtype).removeprefix("torch.")
    config.weights_checksum = None  # that of the files it was loaded from
    return config


def check_finite(model: nn.Module) -> None:
    """Raise `RuntimeError` that names them if parameters or buffers are NaN or infinite: the training diverged."""
    names = [
        name
        for name, tensor in model.state_dict().items()  # which other libraries' modules add lists to
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    if names:
        raise RuntimeError(
            f"{names[0]} and {len(names) - 1} other tensors of the model are NaN or infinite: the training has "
            "diverged, and nothing more is saved. Lower the learning rate and begin anew."
        )


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to go on without what it belongs to.") from error
