"""--stop_after_minutes: a run ends where one more epoch would be too late, and goes on as if it had not."""
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

from harness.training import run as run_module
from harness.training import seeds


@pytest.fixture
def clock(monkeypatch):
    """A clock that a training moves on by a minute at each end of an epoch."""
    now = [0.0]
    for module in (run_module, seeds):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    end = run_module.Run.end_epoch

    def end_epoch(run, *given):
        now[0] += 60.0
        end(run, *given)

    monkeypatch.setattr(run_module.Run, "end_epoch", end_epoch)
    return now


FLAGS = (*TINY, "--epochs", 5)


def weights(folder):
    return torch.load(Path(folder, "last.pt"))["model"]


@pytest.mark.parametrize(("minutes", "done"), [(0.5, 1), (1.9, 1), (4.9, 4), (5, 5), (0, 5)])
def test_a_run_ends_before_an_epoch_that_would_be_too_late(minutes, done, clock, script, capsys):
    script("train_at_mnist", *FLAGS, "--stop_after_minutes", minutes, "--out_dir", "run")
    assert torch.load("run/last.pt")["epoch"] == done
    said = f"stopped after {done} of 5 epochs, as --stop_after_minutes {minutes:g} says; go on with: "
    assert (said in capsys.readouterr().out) == (done < 5)


def test_what_was_stopped_goes_on_to_the_same_bits(clock, script):
    script("train_at_mnist", *FLAGS, "--out_dir", "whole")
    script("train_at_mnist", *FLAGS, "--stop_after_minutes", 2.5, "--out_dir", "parts")
    script("train_at_mnist", "--resume", "parts")  # two epochs more
    assert torch.load("parts/last.pt")["epoch"] == 4
    script("train_at_mnist", "--resume", "parts", "--stop_after_minutes", 0)
    whole, parts = weights("whole"), weights("parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert json.loads(Path("parts/config.json").read_text())["stop_after_minutes"] == 0


def test_the_minutes_are_those_of_all_seeds_together(clock, monkeypatch, capsys, tmp_path):
    import train_at_mnist
    from harness.config import parse_config

    monkeypatch.chdir(tmp_path)
    cfg = parse_config(train_at_mnist.Config, ["--seeds", "1", "2", "3", "--stop_after_minutes", "3",
                                               "--out_dir", "runs"])
    left = []
    for one in seeds.one_a_seed(cfg, "train_at_mnist"):
        left.append((one.seed, one.stop_after_minutes))
        clock[0] += 120.0
    assert left == [(1, 3), (2, 1)]
    assert "seed 3 waits for --resume runs" in capsys.readouterr().out
