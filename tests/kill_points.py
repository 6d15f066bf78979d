"""Kill a short run at each of its file-system calls, resume it, and compare all that it leaves with an unbroken run.

    python tests/kill_points.py                            # all points of qat.py and train.py, samples of variants
    python tests/kill_points.py --runs qat --sample 8      # eight points of one of them

A point is the moment before a call that changes a file or folder in the run's `--output_dir`, or, where it writes a
file, the moment when that one is there and is empty (written by Python) or cut in half (by safetensors or
`torch.save`). The whole process group gets SIGKILL there. Each run is a fork of one process that has imported
everything: importing takes much longer than these runs.
"""

import argparse
import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

TINY = (
    "--hidden_sizes 8 16 --depths 1 1 --max_train_samples 64 --max_eval_samples 16 --per_device_train_batch_size 16 "
    "--num_train_epochs 2"
)
QAT = f"{TINY} --num_float_epochs 2 --bits 2 --granularity per_channel --ema_decay 0.5 --codebook_momentum 0.5"
QAT_SWITCHES = "--blend_ratio 0.5 --activation_bits 8 --calibration_images 16"
# name: recipe, its options, processes, and how many of the points by default
RUNS = {
    "qat": ("qat", f"{QAT} {QAT_SWITCHES}", 1, None),
    "train": ("train", f"{TINY} --ema_decay 0.5", 1, None),
    "train_by_steps": ("train", f"{TINY} --save_strategy steps --save_steps 3 --eval_strategy no", 1, 12),
    "qat_workers": ("qat", f"{QAT} --dataloader_num_workers 2", 1, 6),
    "qat_two_processes": ("qat", QAT, 2, 12),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
TIMEOUT = 300  # seconds for one run


class Points:
    """Counts the points of the process that it is made in, and kills its group at number `stop`, from 1."""

    def __init__(self, folder: Path, stop: int | None):
        self.folder, self.stop, self.seen, self.busy = str(folder.resolve()), stop, [], False

    def reach(self, what: str) -> None:
        self.seen.append(what)
        if len(self.seen) == self.stop:
            os.killpg(0, signal.SIGKILL)

    def is_ours(self, path) -> bool:
        return os.path.realpath(os.fspath(path)).startswith(self.folder)

    def audit(self, event: str, arguments: tuple) -> None:
        """The audit hook, see `sys.addaudithook`."""
        if self.busy or not (event == "open" or event in CHANGES):
            return
        path = arguments[0]
        if event == "open":
            _, mode, flags = arguments
            if not isinstance(path, (str, bytes, os.PathLike)) or not (flags or 0) & WRITING or not self.is_ours(path):
                return
        # a name without its folder: of rmtree, which goes down by open folders, and removes nothing but ours
        elif isinstance(path, int) or not (self.is_ours(path) or not os.path.isabs(os.fspath(path))):
            return
        self.busy = True
        name = os.path.relpath(os.fspath(path), self.folder) if os.path.isabs(os.fspath(path)) else os.fspath(path)
        self.reach(f"before {event} of {name}")
        if event == "open" and flags & os.O_TRUNC:
            if len(self.seen) + 1 == self.stop:
                os.close(os.open(path, flags, 0o666))
            self.reach(f"{name} is empty")
        self.busy = False

    def wrap(self, module, function: str, position: int) -> None:
        """Make a native writer, which audits nothing, a point; its file is the argument at `position`."""
        write = getattr(module, function)

        def written(*arguments, **options):
            path = arguments[position] if len(arguments) > position else options.get("filename", options.get("f"))
            if not isinstance(path, (str, os.PathLike)) or not self.is_ours(path) or self.busy:
                return write(*arguments, **options)
            self.busy = True
            name = os.path.relpath(os.fspath(path), self.folder)
            self.reach(f"before {function} of {name}")
            result = write(*arguments, **options)
            if len(self.seen) + 1 == self.stop:
                os.truncate(path, os.path.getsize(path) // 2)
            self.reach(f"{name} is half written")
            self.busy = False
            return result

        setattr(module, function, written)


def fork(function, log: Path) -> int:
    """Run `function` in a fork that ends with 0, or with 1 if it raises; what it prints goes to `log`."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def forked_reload(command: list[str], check: bool) -> None:
    """Stands for `subprocess.run` in qat.py: the same code, in a fork instead of a process that imports all anew."""

    def reload():
        sys.argv = ["-c", *command[3:]]
        exec(command[2], {})

    _, status = os.waitpid(fork(reload, Path(os.devnull)), 0)
    if check and status:
        raise RuntimeError("the model can't be reloaded")


def run_once(name: str, folder: Path, resume: bool, stop: tuple[int, int] | None = None) -> tuple[list[int], list[int]]:
    """One run, which kills itself at point `stop = (rank, number)`.

    Returns (the exit code of each process, the number of points of each).
    """
    recipe, options, processes, _ = RUNS[name]
    arguments = [*options.split(), "--output_dir", str(folder), *["--resume_from_checkpoint"] * resume]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, group = folder.with_suffix(".log"), 0
    counts = [folder.with_suffix(f".points{rank}") for rank in range(processes)]

    def work(rank: int):
        signal.alarm(TIMEOUT)
        os.environ["ACCELERATE_USE_CPU"] = "true"
        if processes > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        points = Points(folder, stop[1] if stop and stop[0] == rank else None)
        points.wrap(sys.modules["safetensors.torch"], "serialize_file", 1)
        points.wrap(sys.modules["torch"], "save", 1)
        sys.addaudithook(points.audit)
        module = sys.modules[f"repvgg_hf.recipes.{recipe}"]
        if recipe == "qat":
            module.subprocess.run = forked_reload
        module.main(arguments)
        points.busy = True
        counts[rank].write_text(json.dumps(points.seen))

    children = []
    for rank in range(processes):
        child = fork(lambda rank=rank, group=group: (os.setpgid(0, group), work(rank)), log)
        with contextlib.suppress(OSError):  # the child may have done it, or be gone
            os.setpgid(child, group or child)
        group = group or child
        children.append(child)
    codes = []
    for child in children:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code not in (0, -signal.SIGKILL):  # the others wait for it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        codes.append(code)
    return codes, [len(json.loads(path.read_text())) if path.exists() else 0 for path in counts]


def contents(folder: Path) -> dict[str, str]:
    """A digest of each file of a run, by its name; where times or the command stand in it, only of the rest."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith("checkpoint-"):  # Trainer's, which leaves those that it was killed while it removed
            continue
        if path.name == "training_args.bin":  # paths
            found[name] = ""
        elif path.name.endswith("_results.json"):
            kept = {
                key: value
                for key, value in json.loads(path.read_text()).items()
                if key != "command" and "runtime" not in key and "per_second" not in key
            }
            found[name] = json.dumps(kept)
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def import_all() -> None:
    """Import and make what the runs need, once for all of them."""
    import safetensors.torch  # noqa: F401
    import sklearn.datasets  # noqa: F401
    from transformers import AutoImageProcessor, AutoModelForImageClassification, BitImageProcessor, Trainer  # noqa: F401

    import repvgg_hf.compression.api  # noqa: F401
    import repvgg_hf.recipes.qat
    import repvgg_hf.recipes.train
    import repvgg_hf.runtime.modeling_repvgg  # noqa: F401
    from repvgg_hf.training import sources, splits

    digits = sources.load_digits_dataset()
    sources.load_digits_dataset = splits.load_digits_dataset = lambda: digits
    gc.freeze()  # a fork that collects garbage would copy all of this


def check_point(task: tuple) -> str | None:
    """Kill a run at one point and resume it; returns what went wrong.

    The task is (name in `RUNS`, rank, number of the point, what it is, folder to work in, contents of the whole run).
    """
    name, rank, number, what, work, expected = task
    folder = work / f"{name}-{rank}-{number}"
    killed, _ = run_once(name, folder, resume=False, stop=(rank, number))
    resumed, _ = run_once(name, folder, resume=True)
    found = contents(folder) if folder.exists() else {}
    differing = [file for file in sorted(expected | found) if expected.get(file) != found.get(file)]
    fault = None
    if killed[rank] != -signal.SIGKILL:
        fault = f"was not killed, but ended with {killed}"
    elif any(resumed):
        fault = f"resumed, it ended with {resumed}: {folder.with_suffix('.log').read_text()[-1500:]}"
    elif differing:
        fault = f"resumed, it differs in {', '.join(differing)}"
    shutil.rmtree(folder, ignore_errors=True)
    for left in work.glob(f"{folder.name}.*"):
        left.unlink()
    return fault and f"{name}, process {rank}, point {number} ({what}): {fault}"


def check_run(name: str, work: Path, sample: int | None, jobs: int) -> list[str]:
    """Kill and resume one of `RUNS` at `sample` of its points, or all; returns what went wrong."""
    whole = work / f"{name}-whole"
    codes, numbers = run_once(name, whole, resume=False)
    if any(codes):
        raise SystemExit(f"{name} fails without being killed:\n{whole.with_suffix('.log').read_text()[-3000:]}")
    expected = contents(whole)
    tasks = [
        (name, rank, number, what, work, expected)
        for rank in range(len(numbers))
        for number, what in enumerate(json.loads(whole.with_suffix(f".points{rank}").read_text()), 1)
    ]
    print(f"{name}: {len(tasks)} points, {len(expected)} files", flush=True)
    if sample is not None and sample < len(tasks):
        tasks = random.Random(0).sample(tasks, sample)
    faults = []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        for done, fault in enumerate(pool.map(check_point, tasks), 1):
            if fault is not None:
                faults.append(fault)
                print(fault, flush=True)
            if done % 20 == 0:
                print(f"{name}: {done} of {len(tasks)} done", flush=True)
    print(f"{name}: {len(tasks) - len(faults)} of {len(tasks)} points give the same files", flush=True)
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="Which runs to kill.")
    parser.add_argument("--sample", type=int, help="Try so many points of each run instead of all.")
    parser.add_argument("--jobs", type=int, default=1, help="How many points to try at the same time.")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    import_all()
    with tempfile.TemporaryDirectory() as work:
        faults = []
        for name in args.runs:
            faults += check_run(name, Path(work), args.sample or RUNS[name][3], args.jobs)
    if faults:
        raise SystemExit(f"{len(faults)} points give other files")


if __name__ == "__main__":
    main()
