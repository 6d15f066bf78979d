"""The whole state of a training run on disk: saved so that an interruption leaves a complete one."""

import json
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel


def save_state(
    accelerator: Accelerator, checkpoint: Path, settings: dict | None = None, average: AveragedModel | None = None
) -> None:
    """Save the state of all that `accelerator` prepared in the folder `checkpoint`.

    It is written beside the one before, which is removed last. `settings` are the model's `config.qat_config`,
    `average` is its moving average, if there is one.
    """
    new, old = checkpoint.with_name(checkpoint.name + ".new"), checkpoint.with_name(checkpoint.name + ".old")
    accelerator.save_state(new)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (new / "qat_config.json").write_text(json.dumps(settings), encoding="utf-8")
        if average is not None:
            torch.save(average.state_dict(), new / "average.pt")
        shutil.rmtree(old, ignore_errors=True)
        if checkpoint.exists():
            checkpoint.rename(old)
        new.rename(checkpoint)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def find_state(accelerator: Accelerator, checkpoint: Path) -> bool:
    """Whether there is a state in `checkpoint`; one that an interrupted `save_state` had set aside is put back."""
    old = checkpoint.with_name(checkpoint.name + ".old")
    if accelerator.is_main_process and not checkpoint.exists() and old.exists():
        old.rename(checkpoint)
    accelerator.wait_for_everyone()
    return checkpoint.exists()


def load_state(
    accelerator: Accelerator, checkpoint: Path, settings: dict | None, average: AveragedModel | None
) -> None:
    """Load what `save_state` wrote. Raises `ValueError` if it was saved with other quantization settings."""
    _check_settings(checkpoint, settings)
    accelerator.load_state(checkpoint)
    if average is not None:
        average.load_state_dict(torch.load(checkpoint / "average.pt", map_location=accelerator.device))


def _check_settings(checkpoint: Path, settings: dict | None) -> None:
    saved = json.loads((checkpoint / "qat_config.json").read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(settings))
    if saved == wanted:
        return
    parts = [(part, key) for part in wanted or {} for key in wanted[part]] if saved and wanted else []
    differing = [
        f"{key}={saved[part].get(key)!r}, now {wanted[part][key]!r}"
        for part, key in parts
        if saved[part].get(key) != wanted[part][key]
    ]
    raise ValueError(
        f"The checkpoint {checkpoint} was trained with other quantization options ({'; '.join(differing) or 'none'}): "
        "give the same ones to go on, or another --output_dir to begin anew."
    )
