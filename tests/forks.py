"""Scripts in processes of their own that begin at once: forks of an interpreter
that has loaded everything."""
import importlib
import multiprocessing
import os
import sys

import torch

from harness.config import run_script

FORK = multiprocessing.get_context("fork")


def _run(barrier, name, words):
    with open(os.devnull, "w") as nothing, open(f"stderr-{os.getpid()}", "w") as errors:
        sys.stdout, sys.stderr = nothing, errors
        sys.argv = [f"{name}.py", *map(str, words)]
        module = importlib.import_module(name)
        torch.set_num_threads(1)
        barrier.wait()
        run_script(module.main, module.Config, getattr(module, "RECIPES", None))


def start(name, *commands):
    """Processes of one script, one a command, that begin at the same moment;
    stderr goes to a file of each."""
    importlib.import_module(name)
    barrier = FORK.Barrier(len(commands))
    processes = [FORK.Process(target=_run, args=(barrier, name, words)) for words in commands]
    for process in processes:
        process.start()
    return processes


def at_once(name, *commands):
    """The exit codes of one script, started with each of these commands at the same moment."""
    processes = start(name, *commands)
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]
