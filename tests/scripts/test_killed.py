"""Killed at random moments and gone on with, a training, an evaluation and a curve give the same bits.

A signal that ends one says how to go on.
"""
import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

from tests.forks import preload, said, start

TRAIN = ("--dataset", "digits", "--epochs", 4, "--num_steps", 2, "--val_num_steps", 2, "--val_size", 40,
         "--batch_size", 128)
EVAL = ("--checkpoint", "run/last.pt", "--num_examples", 24, "--num_restarts", 2, "--num_steps", 20,
        "--batch_size", 4, "--alphas", 1, "--attacks", "fgsm", "cw")
CURVE = ("compute", "--model", "run/last.pt", "--n_points", 10, "--budget", "fast", "--batch_size", 2,
         "--check_radii", 0, "--no-plot")


MOST = 3  # kills; the last start ends by itself


def undisturbed(name, *words):
    """How long a process of the script takes to its end, in seconds."""
    preload()
    began = time.monotonic()
    process, = start(f"{name}.py", words)
    process.join(240)
    assert process.exitcode == 0, said(process)
    return time.monotonic() - began


def killed_until_done(name, words, going_on, seconds, seed):
    """Start, kill after a random time, go on, until it ends by itself; returns the number of kills."""
    moments = random.Random(seed)
    for kills in range(MOST + 1):
        begun = Path("killed.record" if name == "eval_mnist" else "killed", "config.json")
        process, = start(f"{name}.py", going_on if begun.exists() else words)
        process.join(moments.uniform(0.02, seconds) if kills < MOST else 120)
        if not process.is_alive():
            assert process.exitcode == 0, said(process)
            return kills
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if Path("killed.json").exists():
            return kills + 1
        for empty in Path().glob("killed"):
            if not any(empty.iterdir()):
                empty.rmdir()
    raise AssertionError("it never ended")


def same_arrays(first, second):
    def same(name):
        return np.array_equal(first[name], second[name], equal_nan=first[name].dtype.kind == "f")

    return first.keys() == second.keys() and all(same(name) for name in first if name != "about")


@pytest.mark.slow
def test_a_training_killed_at_random_moments_gives_the_same_weights(tmp_path, monkeypatch, seed=0, least=2):
    monkeypatch.chdir(tmp_path)
    seconds = undisturbed("train_at_mnist", *TRAIN, "--out_dir", "whole")
    again = (*TRAIN, "--out_dir", "killed")
    assert killed_until_done("train_at_mnist", again, ("--resume", "killed"), seconds / 3, seed) >= least
    whole, killed = (torch.load(f"{name}/last.pt", weights_only=True)["model"]
                     for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.slow
def test_an_evaluation_killed_at_random_moments_gives_the_same_verdicts(script, seed=0, least=2):
    script("train_at_mnist", *TINY, "--out_dir", "run")
    seconds = undisturbed("eval_mnist", *EVAL, "--out", "whole.json")
    again = (*EVAL, "--out", "killed.json")
    going_on = ("--resume", "killed.record")
    assert killed_until_done("eval_mnist", again, going_on, seconds / 3, seed) >= least
    assert same_arrays(dict(np.load("whole.npz")), dict(np.load("killed.npz")))


@pytest.mark.slow
def test_a_curve_killed_at_random_moments_has_the_same_distances(script, seed=0, least=2):
    script("train_at_mnist", *TINY, "--out_dir", "run")
    seconds = undisturbed("generate_robustness_curves", *CURVE, "--out", "whole")
    again = (*CURVE, "--out", "killed")
    going_on = ("compute", "--resume", "killed")
    assert killed_until_done("generate_robustness_curves", again, going_on, seconds / 3, seed) >= least
    assert same_arrays(dict(np.load("whole/distances.npz")), dict(np.load("killed/distances.npz")))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number", "words", "says"), [
    *(("train_at_mnist", number, ("--recipe", "digits", "--val_num_steps", 1, "--out_dir", "out"),
       "go on with: python train_at_mnist.py --resume out")
      for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)),
    ("eval_mnist", signal.SIGHUP, (*EVAL, "--num_steps", 2000, "--out", "out.json"),
     "go on with: python eval_mnist.py --resume out.record"),
    ("generate_robustness_curves", signal.SIGTERM, (*CURVE, "--n_points", 360, "--out", "out"),
     "go on with: python generate_robustness_curves.py compute --resume out")])
def test_a_signal_says_how_to_go_on(name, number, words, says, script):
    if name != "train_at_mnist":
        script("train_at_mnist", *TINY, "--out_dir", "run")
    process, = start(f"{name}.py", words)
    deadline = time.monotonic() + 60
    wanted = {"train_at_mnist": "out/last.pt", "eval_mnist": "out.record/config.json",
              "generate_robustness_curves": "out/distances.npz"}[name]
    while not Path(wanted).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    told = said(process)
    assert process.exitcode == 128 + number and says in told and "Traceback" not in told
    assert json.loads((Path(wanted).parent / "config.json").read_text())
