"""Checkpoints of a `Trainer`: which are whole, and which are of the same run."""

import json
import re
import tempfile
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from repvgg_hf.training.checkpoints import check_finite
from repvgg_hf.training.run_record import check_same_run
from repvgg_hf.training.trainer import AVERAGE

logger = logging.get_logger(__name__)

STATE = "trainer_state.json"  # the last file of a checkpoint that Trainer writes
# beginnings of names of files that a checkpoint has: without one of them Trainer begins that part anew, silently
NEEDED = {
    "the weights": ("model", "pytorch_model"),
    "the optimizer": ("optimizer",),
    "the schedule": ("scheduler",),
    "random states": ("rng_state",),
}
RESULTS = "train_results.json"  # what a run writes last
_OF_A_RUN = (RESULTS, "config.json", "*.safetensors", "training_args.bin", "preprocessor_config.json", "checkpoint-*")
# options of `TrainingArguments` that change no weights, by how they begin
_UNRELATED = (
    "output_dir", "resume_from", "log", "report", "run_name", "project", "trackio", "hub", "push_to_hub", "save",
    "do_", "disable_tqdm", "skip_memory", "include_", "prediction_loss", "restore_callback", "dataloader_pin",
    "dataloader_persistent", "dataloader_prefetch", "per_device_eval", "eval_accumulation", "load_best",
    "metric_for_best", "greater_is_better", "enable_jit_checkpoint", "ddp_timeout", "fp16_full_eval", "bf16_full_eval",
    "full_eval", "remove_unused", "label_names", "average_tokens", "local_rank", "debug",
)  # fmt: skip


def training_options(args: TrainingArguments) -> dict:
    """The options that the weights at the end of a training depend on."""
    return {name: value for name, value in args.to_dict().items() if not name.startswith(_UNRELATED)}


class RunCallback(TrainerCallback, ExportableState):
    """Saves the record of a run in each checkpoint, and none of a model that has diverged, with a `RuntimeError`.

    A checkpoint of an epoch's last step waits for what the log gets at the epoch's end, which would be lost with it.
    """

    def __init__(self, record: dict):
        self.record = record
        self.waits = False

    def state(self) -> dict:
        """What `Trainer` writes into its state."""
        return {"args": {"record": self.record}, "attributes": {}}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if control.should_save:
            check_finite(model)
        self.waits = control.should_save and (state.epoch.is_integer() or control.should_training_stop)
        control.should_save = control.should_save and not self.waits

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        control.should_save = control.should_save or self.waits
        if control.should_save:
            check_finite(model)


def check_folder(folder: Path, resume: bool | Path) -> None:
    """Raise `ValueError` if `folder` can't be written, or a new run would overwrite what another one has left in it.

    `resume` says whether, or where from, the run goes on; without any checkpoint a finished run has nothing to go on
    from, either.
    """
    _check_writable(folder)
    has_checkpoint = any(_step(path) for path in folder.glob("checkpoint-*"))
    left = sorted(path.name for pattern in _OF_A_RUN for path in folder.glob(pattern))
    if not left or (resume and (has_checkpoint or RESULTS not in left or isinstance(resume, Path))):
        return
    go_on = "" if resume or not has_checkpoint else ", or --resume_from_checkpoint to go on with that run"
    raise ValueError(
        f"--output_dir {folder} holds a run already ({', '.join(left[:3])}), which would be overwritten: give another "
        f"--output_dir{go_on}, or remove the folder."
    )


def _check_writable(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f"--output_dir {folder} can't be written ({error.strerror} in {existing}): give a folder that can, or make "
            "it writable."
        ) from error


def find_checkpoint(place: Path, record: dict) -> Path | None:
    """The checkpoint to go on from: `place`, or the last one in it that is whole and of the same run.

    Each one that is not whole is named in a warning. Returns `None` if there is none at all.

    Args:
        place: a checkpoint, or the folder of a run.
        record: the run's record, see `run_record`.

    Raises `ValueError` for a `place` that is a checkpoint and not whole, and if all whole ones are of other runs.
    """
    found = {int(match[1]): path for path in place.glob("checkpoint-*") if (match := _step(path))}
    if not found:
        if _step(place) is None and not (place / STATE).exists():
            return None
        if fault := find_fault(place):
            raise ValueError(f"The checkpoint {place} is not whole: {fault}. Choose an earlier one.")
        check_same_run(_record_of(place), record, f"The checkpoint {place}")
        return place
    others = []
    for _, checkpoint in sorted(found.items(), reverse=True):
        if fault := find_fault(checkpoint):
            logger.warning(f"The checkpoint {checkpoint} is not whole and left out: {fault}.")
        elif _record_of(checkpoint) == record:
            return checkpoint
        else:
            others.append(checkpoint)
    if others:
        check_same_run(_record_of(others[0]), record, f"The checkpoint {others[0]}")
    return None


def find_fault(checkpoint: Path) -> str | None:
    """What a checkpoint lacks, or which of its files can't be read; `None` if it is whole."""
    paths = sorted(path for path in checkpoint.iterdir() if path.is_file() or path.is_dir())
    names = [path.name for path in paths]
    if STATE not in names:
        return f"it has no {STATE}, which is written last"
    for what, beginnings in NEEDED.items():
        if not any(name.startswith(beginnings) for name in names):
            return f"it has no file for {what}"
    for path in paths:
        if fault := _fault_of_file(path):
            return f"{path.name} can't be read ({fault})"
    shards = {shard for path in checkpoint.glob("*.safetensors.index.json") for shard in _shards(path)}
    if missing := sorted(shards - set(names)):
        return f"it has no {missing[0]}, which its index names"
    if AVERAGE not in names and (_saved_record(checkpoint) or {}).get("--ema_decay"):
        return f"it has no {AVERAGE}, the moving average of the weights"
    return None


def _fault_of_file(path: Path) -> str | None:
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):  # compares the header with the length of the file
                pass
        elif path.suffix in (".pt", ".pth", ".bin") and path.is_file():
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            return damaged and f"its part {damaged} is damaged"
    except (ValueError, OSError, SafetensorError, zipfile.BadZipFile) as error:
        return str(error)
    return None


def _shards(index: Path) -> set[str]:
    return set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())


def _step(path: Path) -> re.Match | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name) if path.is_dir() else None


def _saved_record(checkpoint: Path) -> dict | None:
    callbacks = json.loads((checkpoint / STATE).read_text(encoding="utf-8")).get("stateful_callbacks", {})
    saved = callbacks.get(RunCallback.__name__)
    return saved["args"]["record"] if saved else None


def _record_of(checkpoint: Path) -> dict:
    record = _saved_record(checkpoint)
    if record is None:
        raise ValueError(
            f"The checkpoint {checkpoint} does not say what it was trained with: train.py has not written it. Start "
            "from its weights with --model_name_or_path."
        )
    return record
