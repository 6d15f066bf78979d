"""One side of the benchmark `engines`, in a process of its own: it loads a model and runs it when it is told to.

It is started by `engines.py` with what it is to be, as JSON, and answers each line of its input with a line.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from repvgg_hf.interop.engines import load_engine

TIMM = "timm"  # instead of an engine


def make_run(what: dict) -> Callable[[np.ndarray], np.ndarray]:
    """What runs images: an engine, or timm's network."""
    if what["engine"] != TIMM:
        return load_engine(what["path"], what["engine"], threads=what["threads"])
    import torch
    from safetensors.torch import load_file
    from timm.utils.model import reparameterize_model

    from repvgg_hf.recipes.benchmarks.peers import timm_model

    torch.set_num_threads(what["threads"])
    model = reparameterize_model(timm_model(what["variant"])).eval()
    model.load_state_dict(load_file(what["path"]))

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images)).numpy()

    return run


def answer(what: dict, run: Callable, images: np.ndarray, task: dict) -> dict:
    """Do one task: time some calls, load the model again, or save the logits."""
    if task["do"] == "time":
        run(images)  # fills the caches again after another side
        start, used = time.perf_counter(), time.process_time()
        for _ in range(task["calls"]):
            run(images)
        taken = {"wall": time.perf_counter() - start, "cpu": time.process_time() - used}
        return {clock: seconds / task["calls"] for clock, seconds in taken.items()}
    if task["do"] == "load":
        start = time.process_time()
        make_run(what)
        return {"seconds": time.process_time() - start}
    np.save(task["path"], run(images))
    return {}


class Side:
    """A side, seen from the process that compares them.

    Args:
        what (`dict`): `engine`, `path`, `threads`, and of timm the `variant`.
        environment (`dict[str, str]`): variables that it has besides this process's own.
    """

    def __init__(self, what: dict, environment: dict[str, str]):
        command = [sys.executable, "-m", "repvgg_hf.recipes.benchmarks.engine_side", json.dumps(what)]
        variables = os.environ | {"OMP_NUM_THREADS": str(what["threads"])} | environment
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=variables)

    def ask(self, **task) -> dict:
        """Send a task and wait for the answer. Raises `RuntimeError` with what the process said if it ended."""
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            said = self.process.communicate()[1].strip().splitlines()
            raise RuntimeError(f"The process {self.process.args[-1]} ended: {' '.join(said[-3:])}")
        return json.loads(line)

    def close(self) -> None:
        """Let the process end."""
        self.process.communicate()


def main() -> None:
    what = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    log = os.open(os.devnull, os.O_WRONLY)
    run, images = None, None
    for line in sys.stdin:
        task = json.loads(line)
        if run is None:
            run = make_run(what)
            os.dup2(log, 1)  # nobody reads it while the sides are timed, and a full pipe would wait
            os.dup2(log, 2)
        if task["do"] == "images":
            images = np.load(task["path"])
            run(images)  # lazy initialization, compilation
            done = {}
        else:
            done = answer(what, run, images, task)
        answers.write(json.dumps(done) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
