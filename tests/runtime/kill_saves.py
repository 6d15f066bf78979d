"""Kill a save at every one of its file system calls, and look at what loads afterwards.

python tests/runtime/kill_saves.py FOLDER [--every N]      # prints a JSON line for each kind of save

Each save runs in a forked process that kills itself with SIGKILL. What it left is then loaded in another one, which is
killed at one of its own calls, too, and loaded again in a third; it must be the old model or the new one, whichever the
class that loads it, and the next save must leave nothing of it.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification, modeling_utils
from transformers.utils import logging

from repvgg_hf import RepVGGConfig, RepVGGForImageClassification

SHARDED = {"max_shard_size": "4KB"}
# what is there before, and what the killed save puts in its place
SAVES = {
    "whole_over_whole": ({}, {}),
    "sharded_over_whole": ({}, SHARDED),
    "whole_over_sharded": (SHARDED, {}),
    "sharded_over_sharded": (SHARDED, SHARDED),
    "first": (None, {}),
}
# events of Python's audit hooks that change files or come between such changes
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}


def make_models() -> tuple:
    """An old and a new model of other sizes, other forms and other weights, so that no mixture of them loads."""
    torch.manual_seed(0)
    sizes = {"stem_hidden_size": 8, "depths": [1, 1], "strides": [2, 2], "num_labels": 3}
    old = RepVGGForImageClassification(RepVGGConfig(hidden_sizes=[8, 8], hidden_act="silu", **sizes)).eval()
    new = RepVGGForImageClassification(RepVGGConfig(hidden_sizes=[8, 16], **sizes)).eval().reparameterize()
    return old, new


def fingerprint(model) -> str:
    digest = hashlib.sha256(model.config.hidden_act.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def kill_at(number: int, root: Path) -> None:
    """Kill this process before the call `number` that concerns files in `root`; writing weights counts as three."""
    seen = 0

    def count():
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        if event in EVENTS and any(str(root) in str(argument) for argument in arguments[:2]):
            count()

    write = modeling_utils.safe_save_file

    def write_in_parts(tensors, path, **kwargs):  # no Python code runs while it writes
        count()
        write(tensors, path, **kwargs)
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])
        count()
        Path(path).write_bytes(whole)
        count()

    modeling_utils.safe_save_file = write_in_parts
    sys.addaudithook(hook)


def in_a_fork(function) -> int:
    """Run `function` in a forked process; returns 0, or the signal that killed it, negative."""
    process = os.fork()
    if process == 0:
        try:
            function()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def loaded_by(cls, folder: Path, answer: Path, killed_at: int | None = None) -> str | None:
    """The fingerprint of what another process loads; `None` if it was killed."""

    def load():
        if killed_at is not None:
            kill_at(killed_at, folder)
        answer.write_text(fingerprint(cls.from_pretrained(folder)))

    code = in_a_fork(load)
    assert code in ((0, -signal.SIGKILL) if killed_at else (0,)), f"{cls.__name__} does not load {folder}: {code}"
    return answer.read_text() if code == 0 else None


def kill_saves(name: str, root: Path, every: int) -> dict:
    """Kill one kind of save at every `every`th call; returns how often what was found."""
    before, after = SAVES[name]
    old, new = make_models()
    pristine, folder, answer = root / "pristine", root / "folder", root / "answer"
    shutil.rmtree(pristine, ignore_errors=True)
    if before is None:
        pristine.mkdir()
    else:
        old.save_pretrained(pristine, **before)
    (pristine / "README.md").write_text("A card that stays.")
    names = {"old": fingerprint(old), "new": fingerprint(new)}
    found = {"save": name, "points": 0, "old": 0, "new": 0, "nothing": 0, "load_points": 0}
    number = 0
    while True:
        number += every

        def save(number=number):
            kill_at(number, folder)
            new.save_pretrained(folder, **after)

        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(pristine, folder)
        code = in_a_fork(save)
        if code == 0:  # it has no such call any more
            break
        assert code == -signal.SIGKILL, f"call {number}: {code}"
        found["points"] += 1
        left = root / "left"
        shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(folder, left)
        unfinished = (left / "config.json").exists() or any(left.glob(".saving-*/.complete.json"))
        if not unfinished:
            found["nothing"] += 1
            assert before is None, f"call {number}: neither the old model nor the new one"
        else:
            results = set()
            classes = [RepVGGForImageClassification]
            if (left / "config.json").exists():  # an Auto class looks for it first
                classes.append(AutoModelForImageClassification)
            for cls in classes:
                shutil.rmtree(folder)
                shutil.copytree(left, folder)
                kill_load = 1 + (number * 7) % 23
                if loaded_by(cls, folder, answer, kill_load) is None:
                    found["load_points"] += 1
                results.add(loaded_by(cls, folder, answer))
                assert not any(folder.glob(".saving-*/.complete.json")), f"call {number}: unfinished after loading"
            assert len(results) == 1, f"call {number}: the classes load different models"
            (result,) = results
            assert result in names.values(), f"call {number}: what loads is a mixture"
            found["old" if result == names["old"] else "new"] += 1
        shutil.rmtree(folder)
        shutil.copytree(left, folder)
        assert in_a_fork(lambda: old.save_pretrained(folder)) == 0
        assert loaded_by(AutoModelForImageClassification, folder, answer) == names["old"]
        expected = {"config.json", "model.safetensors", "README.md"}
        assert {path.name for path in folder.iterdir()} == expected, f"call {number}: {list(folder.iterdir())}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1, help="kill at every Nth call only")
    args = parser.parse_args()
    torch.set_num_threads(1)  # forks must not inherit a pool of threads
    logging.disable_progress_bar()
    for name in SAVES:
        print(json.dumps(kill_saves(name, args.folder, args.every)), flush=True)


if __name__ == "__main__":
    main()
