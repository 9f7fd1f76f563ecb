"""Runs, evaluations and curves that begin at the same moment: each ends whole, in a folder of its own."""
import json
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

from harness import checkpoint
from tests.forks import at_once

QUICK = ("--num_restarts", 1, "--num_steps", 1, "--alphas", 1, "--num_examples", 8)


@pytest.fixture
def run(script):
    script("train_at_mnist", *TINY, "--out_dir", "run")
    return "run/last.pt"


@pytest.mark.slow
def test_pairs_of_runs_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for pair in range(6):
        codes = at_once("train_at_mnist.py", *((*TINY, "--seed", 2 * pair + k) for k in (0, 1)))
        assert codes == [0, 0], [path.read_text() for path in Path().glob("stderr-*")]
    folders = list(Path("runs/train_at_mnist").iterdir())
    seeds = [json.loads((folder / "config.json").read_text())["seed"] for folder in folders]
    assert sorted(seeds) == list(range(12))
    for folder, seed in zip(folders, seeds):
        assert [checkpoint.read(folder / f"{name}.pt")["seed"] for name in ("last", "best")] == [seed, seed]
        names = {path.name for path in folder.iterdir()}
        assert names == {"config.json", "log.csv", "log.png", "last.pt", "best.pt"}


@pytest.mark.slow
def test_pairs_of_evaluations_have_a_result_each(run):
    for pair in range(3):
        commands = (("--checkpoint", run, *QUICK, "--seed", 2 * pair + k) for k in (0, 1))
        codes = at_once("eval_mnist.py", *commands)
        assert codes == [0, 0], [path.read_text() for path in Path().glob("stderr-*")]
    results = {path: json.loads(path.read_text()) for path in Path("run").glob("eval_last*.json")}
    assert sorted(result["seed"] for result in results.values()) == list(range(6))
    for path, result in results.items():
        about = json.loads((path.with_suffix(".record") / "last/about.json").read_text())
        assert about["seed"] == result["seed"] and len(np.load(path.with_suffix(".npz"))["label"]) == 8


@pytest.mark.slow
def test_the_same_evaluation_twice_at_once_gives_two_results_and_shards_one(run):
    assert at_once("eval_mnist.py", ("--checkpoint", run, *QUICK), ("--checkpoint", run, *QUICK)) == [0, 0]
    first, second = (json.loads(Path(f"run/{name}.json").read_text())
                     for name in ("eval_last", "eval_last-2"))
    assert first["A_rob"] == second["A_rob"]
    shared = ("--checkpoint", run, *QUICK, "--batch_size", 2, "--out", "shared.json")
    shards = ((*shared, "--shard", f"{k}/2") for k in (0, 1))
    assert at_once("eval_mnist.py", *shards) == [0, 0]
    assert json.loads(Path("shared.json").read_text())["A_rob"] == first["A_rob"]


@pytest.mark.slow
def test_one_place_named_by_two_is_one_of_theirs_and_the_other_is_told(run):
    codes = at_once("train_at_mnist.py", *((*TINY, "--seed", k, "--out_dir", "named") for k in (3, 4)))
    assert sorted(codes) == [0, 2]
    assert checkpoint.read(Path("named/last.pt"))["seed"] == 3 + codes.index(0)
    commands = (("--checkpoint", run, *QUICK, "--seed", k, "--out", "named.json") for k in (3, 4))
    codes = at_once("eval_mnist.py", *commands)
    assert sorted(codes) == [0, 2]
    assert json.loads(Path("named.json").read_text())["seed"] == 3 + codes.index(0)
    told = [path.read_text() for path in Path().glob("stderr-*") if "error" in path.read_text()]
    assert len(told) == 2 and all(text.count("\n") <= 2 and "Traceback" not in text for text in told)


@pytest.mark.slow
def test_a_run_is_gone_on_with_by_one_process(run):
    codes = at_once("train_at_mnist.py", *(("--resume", "run", "--epochs", 3) for _ in (0, 1)))
    assert sorted(codes) == [0, 2] and checkpoint.read(Path(run))["epoch"] == 3


@pytest.mark.slow
def test_pairs_of_curves_have_a_folder_each(run):
    flags = ("--model", run, "--n_points", 3, "--budget", "fast", "--norms", "inf", "--format", "png")
    for pair in range(2):
        codes = at_once("generate_robustness_curves.py", *((*flags, "--seed", 2 * pair + k) for k in (0, 1)))
        assert codes == [0, 0], [path.read_text() for path in Path().glob("stderr-*")]
    folders = list(Path("runs/generate_robustness_curves").iterdir())
    seeds = [json.loads((folder / "config.json").read_text())["seed"] for folder in folders]
    abouts = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    assert sorted(seeds) == list(range(4)) and len(abouts) == 4


UNUSED = """
import torch
class Net(torch.nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.used, self.spare = torch.nn.Linear(784, num_classes), torch.nn.Linear(784, 3)
    def forward(self, x):
        return self.used(x.flatten(1))
"""
LATE = """
import os, time, torch
def runs(name):
    try:
        with open(name) as file:
            os.kill(int(file.read()), 0)
    except (FileNotFoundError, ProcessLookupError) as error:
        return isinstance(error, FileNotFoundError)  # it has yet to begin
    return True
if os.environ["RANK"] == "1":
    with open("second.tmp", "w") as file:
        file.write(str(os.getpid()))
    os.rename("second.tmp", "second")
class Net(torch.nn.Module):
    waited = False
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(784, 10)
    def forward(self, x):
        if not Net.waited and os.environ["RANK"] == "0" and os.path.exists("result.record/config.json"):
            Net.waited = True
            while runs("second"):
                time.sleep(0.01)
        return self.fc(x.flatten(1))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_at_mnist", "train_trades_mnist"])
def test_processes_that_share_a_batch_may_leave_parameters_unused(name, torchrun):
    Path("net.py").write_text(UNUSED)
    done = torchrun(f"{name}.py", *TINY, "--model", "net.py:Net", "--out_dir", "two")
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("2 parameters are not used in a pass") == 1


@pytest.mark.slow
def test_no_process_of_an_evaluation_waits_for_a_late_one(torchrun, monkeypatch):
    monkeypatch.setattr("harness.distributed.PATIENCE", timedelta(seconds=12))
    Path("net.py").write_text(LATE)
    torch.manual_seed(0)
    torch.save({"fc.weight": torch.randn(10, 784), "fc.bias": torch.zeros(10)}, "net.pt")
    words = ("--checkpoint", "net.pt", "--arch", "net.py:Net", "--dataset", "digits", "--num_examples", 16,
             "--num_steps", 2, "--num_restarts", 1, "--alphas", 1, "--out", "result.json")
    done = torchrun("eval_mnist.py", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("result.json").read_text())["num_examples"] == 16
