"""Runs recipes in processes of their own that need not import anything: forks of one that has done so.

python forks.py SOCKET

Importing what a recipe needs takes longer than a recipe that a test runs. Each connection to the Unix socket sends one
task as JSON and gets the exit code of its process: `module` to run with `arguments`, or `code` for `python -c`; the
`environment`, which is no longer looked at for what libraries read while they are imported; `folder` to run in; and
files for what it prints, `stdout` and `stderr`. A recipe that itself starts a Python process, which prints where the
recipe does, gets another fork of the first process: nothing that the recipe has done is in it.
"""

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

TIMEOUT = 580  # seconds for one process
run_for_real = subprocess.run


def import_all() -> None:
    """Import what recipes import. No tensor is computed, as a fork has none of the threads that might be left."""
    import sklearn.datasets  # noqa: F401
    from transformers import AutoImageProcessor, AutoModelForImageClassification, BitImageProcessor, Trainer  # noqa: F401

    import repvgg_hf.compression.api  # noqa: F401
    import repvgg_hf.runtime.modeling_repvgg  # noqa: F401
    from repvgg_hf.recipes import evaluate, publish, qat, quantize, train  # noqa: F401

    gc.freeze()  # a fork that collects garbage would copy all of this


def ask(path: str, task: dict) -> int:
    """Let the process that listens at `path` run a task; returns its exit code, negative for a signal."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(json.dumps(task).encode())
        connection.shutdown(socket.SHUT_WR)
        answer = connection.makefile().read()
    if not answer:
        raise RuntimeError("forks.py has gone: look at what it printed.")
    return int(answer)


def wait_for_task(path: str, parent: int) -> dict:
    """Listen until the process `parent` has gone; returns, in a fork for each, the tasks."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(1)
        while os.getppid() == parent:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                connection.settimeout(None)
                task = json.loads(connection.makefile().read())
                if (child := os.fork()) == 0:
                    connection.close()
                    return task
                _, status = os.waitpid(child, 0)
                connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                os._exit(0)
            connection.close()
    sys.exit()


def forked(path: str, task: dict):
    """`subprocess.run` for a process that runs `task`, with forks where that makes no difference."""
    captured = {"capture_output": True, "text": True}

    def run(command, check=False, env=None, **options):
        command = list(map(str, command))
        # what captures only its standard output measures memory, of which a fork has as much as the first process
        if command[0] != sys.executable or command[1] not in ("-m", "-c") or options not in ({}, captured):
            return run_for_real(command, check=check, env=env, **options)
        kind = {"-m": "module", "-c": "code"}[command[1]]
        inner = task | {"module": None, "code": None, kind: command[2], "arguments": command[3:]}
        inner |= {"environment": dict(os.environ if env is None else env), "folder": os.getcwd()}
        with tempfile.TemporaryDirectory() as folder:
            files = {name: os.path.join(folder, name) for name in ("stdout", "stderr")}
            code = ask(path, inner | (files if options else {}))
            printed = {name: Path(file).read_text() for name, file in files.items()} if options else {}
        done = subprocess.CompletedProcess(command, code, **printed)
        if check:
            done.check_returncode()
        return done

    return run


def become(task: dict) -> None:
    """Turn this process into the one of a task, as far as environment, folder, arguments and output go."""
    signal.alarm(TIMEOUT)
    os.chdir(task["folder"])
    os.environ.clear()
    os.environ.update(task["environment"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(task[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, number)
        os.close(file)


def main() -> None:
    path, parent = sys.argv[1], os.getppid()
    sys.path[0] = os.getcwd()  # as for `python -m`, not this folder
    import_all()
    task = wait_for_task(path, parent)
    become(task)
    subprocess.run = forked(path, task)
    if task["module"] is None:
        sys.argv = ["-c", *task["arguments"]]
        exec(compile(task["code"], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [task["module"], *task["arguments"]]
        sys.modules.pop(task["module"], None)  # or runpy would warn
        runpy.run_module(task["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
