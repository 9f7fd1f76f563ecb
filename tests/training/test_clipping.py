"""Clipped gradients and the warm-up of the learning rate: what a step does, in every script,
in one process and in two."""
import csv
from pathlib import Path

import pytest
import torch
from conftest import TINY

from models import build_model

ONE_STEP = ("--dataset", "digits", "--model", "lenet", "--val_size", 40, "--val_num_steps", 1,
            "--max_batches", 1, "--epochs", 1, "--momentum", 0, "--weight_decay", 0,
            "--precision", "float32", "--epsilon_warmup_epochs", 0, "--batch_size", 64)
PLAIN = ("--crop_padding", 0, "--no-flip")
STEPS = {"train_free": ("--num_replays", 1, "--schedule", "steps", *PLAIN),
         "train_yopo": ("--num_steps", 1, *PLAIN),
         "train_iaat": ("--num_steps", 1, *PLAIN),
         "train_vir": ("--num_steps", 1, "--start", "uniform", *PLAIN)}
every_script = pytest.mark.parametrize("name", ["train_at_mnist", "train_trades_mnist", *STEPS])


def parameters(folder):
    state = torch.load(Path(folder, "last.pt"), weights_only=True)["model"]
    return torch.cat([value.flatten() for value in state.values()]).double()


def moves(name, script, *flags):
    """How far the first step of `name` goes with these flags, as a vector over the parameters."""
    settings = (*ONE_STEP, *STEPS.get(name, ("--num_steps", 1)), "--lr", 0.5)
    script(name, *settings, "--lr_warmup_epochs", 0, *flags, "--out_dir", f"run{len(list(Path().iterdir()))}")
    newest = max(Path().glob("run*"), key=lambda path: int(path.name[3:]))
    torch.manual_seed({"train_vir": 0, "train_trades_mnist": 1}.get(name, 2))
    start = torch.cat([value.flatten()
                       for value in build_model("lenet", 10, 1).state_dict().values()]).double()
    return parameters(newest) - start


@every_script
def test_a_step_is_the_learning_rate_times_a_gradient_of_at_most_the_length_given(name, script):
    free = moves(name, script, "--max_grad_norm", 0)
    lr = 0.5 / (5 if name == "train_yopo" else 1)
    length = float(free.norm()) / lr
    cut = moves(name, script, "--max_grad_norm", length / 4)
    torch.testing.assert_close(cut, free / 4, rtol=1e-3, atol=1e-6)
    # a shorter one is left alone, to the bit
    assert torch.equal(moves(name, script, "--max_grad_norm", 2 * length), free)


@every_script
def test_the_first_step_of_a_warm_up_is_its_part_of_the_learning_rate(name, script):
    whole, part = (moves(name, script, "--max_grad_norm", 0, "--lr_warmup_epochs", epochs)
                   for epochs in (0, 4))
    torch.testing.assert_close(part, whole / 4, rtol=1e-3, atol=1e-6)  # one batch an epoch: the first of four


def test_the_schedule_goes_on_below_the_warm_up(script):
    script("train_at_mnist", *TINY, "--epochs", 4, "--lr", 0.1, "--lr_drop_after", 2, "--lr_drop_factor", 0.5,
           "--lr_warmup_epochs", 3, "--out_dir", "run")
    rows = list(csv.DictReader(Path("run/log.csv").read_text().splitlines()))
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.1, 0.1, 0.05, 0.05])


def test_a_run_with_both_is_resumed_to_the_same_bits(script):
    flags = (*TINY, "--max_grad_norm", 0.05, "--lr", 0.5, "--lr_warmup_epochs", 2.5)
    script("train_at_mnist", *flags, "--epochs", 4, "--out_dir", "whole")
    script("train_at_mnist", *flags, "--epochs", 2, "--out_dir", "parts")
    script("train_at_mnist", "--resume", "parts", "--epochs", 4)
    assert torch.equal(parameters("whole"), parameters("parts"))


@pytest.mark.slow
def test_two_processes_cut_the_gradient_of_the_whole_batch(shell, torchrun, tmp_path):
    flags = (*TINY, "--max_batches", 4, "--batch_size", 65, "--precision", "float32",
             "--epsilon_warmup_epochs", 0, "--lr", 1, "--max_grad_norm", 0.02, "--lr_warmup_epochs", 2)
    assert shell("train_at_mnist.py", *flags, "--out_dir", "one").returncode == 0
    done = torchrun("train_at_mnist.py", *flags, "--out_dir", "two")
    assert done.returncode == 0, done.stderr
    assert float((parameters(tmp_path / "one") - parameters(tmp_path / "two")).abs().max()) <= 1e-5
    rows = [next(csv.DictReader((tmp_path / name / "log.csv").read_text().splitlines()))
            for name in ("one", "two")]
    assert float(rows[0]["train_grad_norm"]) > 0.02  # it was cut
    assert float(rows[0]["train_grad_norm"]) == pytest.approx(float(rows[1]["train_grad_norm"]), rel=1e-4)
    assert rows[0]["epochs_at_chance"] == rows[1]["epochs_at_chance"]
