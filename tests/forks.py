"""Scripts as their user starts them, in forks of an interpreter that has loaded what they import."""
import importlib
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
LOADED = ("train_at_mnist", "generate_robustness_curves", "torch._dynamo", "matplotlib.pyplot",
          "sklearn.datasets", "sklearn.model_selection")
FORK = multiprocessing.get_context("fork")
# The first backward pass starts a thread for each device that is known by then, and threads end with a fork:
# it comes before anything registers one, as torch.export and FakeTensorMode do.
torch.ones(1, requires_grad=True).sum().backward()


def _run(barrier, name, words, cwd, variables):
    os.chdir(cwd)
    os.environ.update(variables)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup around the tests has it ignored, and the shell
    signal.signal(signal.SIGINT, signal.default_int_handler)  # has this one, in a background job
    for number, kind in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{kind}-{os.getpid()}", os.O_WRONLY | os.O_CREAT, 0o600), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = [str(ROOT / name), *map(str, words)]
    torch.set_num_threads(1)
    barrier.wait()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def preload():
    """Import what scripts import, so that their processes need not."""
    for module in LOADED:
        importlib.import_module(module)


def start(name, *commands, cwd=".", variables=()):
    """Processes of one script, one a command, that begin at the same moment in the folder `cwd`.

    variables: a dict for each command, of what it finds in its environment besides.
    """
    preload()
    barrier = FORK.Barrier(len(commands))
    variables = variables or [{} for _ in commands]
    processes = [FORK.Process(target=_run, args=(barrier, name, words, cwd, own))
                 for words, own in zip(commands, variables)]
    for process in processes:
        process.start()
    return processes


def said(process, kind="stderr", cwd="."):
    """What a process of `start` has written to its standard output or error."""
    return Path(cwd, f"{kind}-{process.pid}").read_text()


def at_once(name, *commands):
    """The exit codes of one script, started with each of these commands at the same moment."""
    processes = start(name, *commands)
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def torchrun(name, *words, cwd, count=2):
    """A script in `count` processes with the environment of torchrun, to the end of all or of one that fails.

    Gives what `subprocess.run` gives, the output and errors of all processes together.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    known = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": port,
             "TORCHELASTIC_RUN_ID": "test"}
    variables = [known | {"RANK": str(k), "LOCAL_RANK": str(k)} for k in range(count)]
    processes = start(name, *[words] * count, cwd=cwd, variables=variables)
    waiting, code = list(processes), 0
    while waiting:
        ready = multiprocessing.connection.wait([process.sentinel for process in waiting], 240)
        ended = [process for process in waiting if process.sentinel in ready]
        waiting = [process for process in waiting if process not in ended]
        for process in ended:
            process.join()
        code = next((process.exitcode for process in ended if process.exitcode), 0 if ended else -1)
        if code:
            for process in waiting:
                process.kill()
                process.join()
            break
    output, errors = ("".join(said(process, kind, cwd) for process in processes)
                      for kind in ("stdout", "stderr"))
    return subprocess.CompletedProcess([name, *words], code, output, errors)


def run(name, *words, cwd, **variables):
    """A script run to its end, as `subprocess.run` gives it, with its output as text.

    variables: what it finds in its environment besides.
    """
    process, = start(name, words, cwd=cwd, variables=[variables])
    process.join(240)
    output, errors = (said(process, kind, cwd) for kind in ("stdout", "stderr"))
    done = subprocess.CompletedProcess([name, *words], process.exitcode, output, errors)
    for kind in ("stdout", "stderr"):
        Path(cwd, f"{kind}-{process.pid}").unlink()
    return done
