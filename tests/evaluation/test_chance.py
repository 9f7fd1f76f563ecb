"""Networks at chance: the definition, when a run is said to have collapsed,
and that training, evaluation and tables say so."""
import csv
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

from harness.config import run_script
from harness.errors import Collapsed
from harness.evaluation.chance import SOON, ClassCounts, at_chance, collapsed_since, metrics_at_chance

# ---- the definition ----------------------------------------------------------------------------------------

def counts_of(prediction, y, num_classes):
    counts = ClassCounts(num_classes, torch.device("cpu"))
    for some, labels in zip(prediction.split(100), y.split(100), strict=True):
        counts.add(some == labels, labels)
    return counts


def labels(counts):
    return torch.cat([torch.full((count,), k) for k, count in enumerate(counts)])


@pytest.mark.parametrize("counts", [[100] * 10, [5] * 200, [900, 50, 50], [1000, 100]])
def test_predictions_that_ignore_the_image_are_at_chance(counts):
    y, generator = labels(counts), torch.Generator().manual_seed(0)
    assert all(counts_of(torch.full_like(y, k), y, len(counts)).at_chance() for k in range(len(counts)))
    uniform = [counts_of(torch.randint(len(counts), y.shape, generator=generator), y, len(counts)).at_chance()
               for _ in range(400)]
    assert 0.95 <= sum(uniform) / 400 < 1  # one in forty is above by luck


@pytest.mark.parametrize("counts", [[100] * 10, [5] * 200, [900, 50, 50], [1000, 100]])
def test_predictions_that_know_something_are_not(counts):
    y, generator = labels(counts), torch.Generator().manual_seed(0)
    known = torch.rand(y.shape, generator=generator) < 0.5
    prediction = torch.where(known, y, torch.randint(len(counts), y.shape, generator=generator))
    assert not counts_of(prediction, y, len(counts)).at_chance()


def test_the_most_frequent_class_of_an_unbalanced_folder_is_a_guess_and_a_lower_accuracy_may_be_none():
    assert at_chance([950, 0], [950, 50])  # 95 % by always answering the first
    assert not at_chance([850, 45], [950, 50])  # 89.5 %


def test_the_limit_is_the_interval_of_a_uniform_guess():
    se = (0.1 * 0.9 / 1000) ** 0.5
    assert (at_chance([100 * (0.1 + 1.95 * se)] * 10, [100] * 10)
            and not at_chance([100 * (0.1 + 1.97 * se)] * 10, [100] * 10))


@pytest.mark.parametrize("counts", [[1, 1], [2, 1], [1, 0, 1]])
def test_all_right_is_never_at_chance_however_few_they_are(counts):
    assert not at_chance(counts, counts)


def test_nothing_right_is_at_chance_and_one_class_has_no_chance_level():
    assert at_chance([0] * 10, [100] * 10)
    assert not at_chance([50, 0], [100, 0]) and not at_chance([], [])


def test_confusion_matrices_are_judged_metric_by_metric():
    diagonal, constant = [[9, 1], [2, 8]], [[10, 0], [10, 0]]
    assert metrics_at_chance({"A_nat": diagonal, "A_rob": constant}) == ["A_rob"]


def test_processes_are_summed():
    y = labels([50, 50])
    assert not counts_of(y, y, 2).at_chance()
    assert counts_of(y, y, 2).at_chance(lambda counts: counts * torch.tensor([[0], [2]]))


# ---- when a run has collapsed ------------------------------------------------------------------------------

@pytest.mark.parametrize(("at_chance_for", "epochs", "since"), [
    ([], 10, None), ([0, 0, 0], 10, None),
    # it knew something, and lost it
    ([0, 1, 2], 30, None), ([0, 1, 2, 3], 30, 2), ([0, 0, 1, 2, 3, 4], 30, 3),
    ([0, *range(1, 10)], 100, None), ([0, *range(1, 11)], 100, 2),
    # never above chance: half of the run
    ([1, 2, 3], 30, None), (list(range(1, 15)), 30, None), (list(range(1, 16)), 30, 1),
    ([1, 2, 3], 6, 1), ([1, 2], 6, None), ([1, 2], 2, None),
    # it learned late
    ([*range(1, 15), 0, 0], 30, None), ([*range(1, 16), 0], 30, None),
])
def test_a_run_has_collapsed_when_it_stays_at_chance(at_chance_for, epochs, since):
    assert collapsed_since(at_chance_for, epochs) == since


def test_while_the_learning_rate_warms_up_nothing_has_collapsed():
    assert [collapsed_since(range(1, k + 1), 6, 4) for k in range(1, 8)] == [None] * 6 + [1]


def test_at_its_end_a_run_has_no_more_time():
    assert collapsed_since([1, 2, 3, 4], 100) is None
    assert collapsed_since([1, 2, 3, 4], 100, ended=True) == 1
    assert collapsed_since([1, 2], 2, ended=True) is None


# ---- training, evaluation and tables -----------------------------------------------------------------------

DIES = ("--dataset", "digits", "--val_size", 40, "--num_steps", 2, "--val_num_steps", 2, "--epochs", 6,
        "--epsilon_warmup_epochs", 0, "--max_grad_norm", 0, "--lr", 1.5)
STUCK = (*DIES, "--lr", 0, "--num_steps", 1, "--val_num_steps", 1)
QUICK = ("--num_steps", 3, "--num_restarts", 1, "--num_examples", 200)


def read_log(folder):
    return list(csv.DictReader(Path(folder, "log.csv").open()))


@pytest.mark.parametrize("name", ["train_at_mnist", "train_trades_mnist"])
def test_a_run_made_to_die_is_named_while_it_runs_at_its_end_and_wherever_its_numbers_stand(
        name, script, capsys):
    script(name, *DIES, "--out_dir", "runs/dead")
    said = capsys.readouterr().out.splitlines()
    column = [int(row["epochs_at_chance"]) for row in read_log("runs/dead")]
    since = collapsed_since(column, 6, ended=True)
    assert column[-1] >= 4 and since == 7 - column[-1]
    named = [line for line in said if line.startswith("COLLAPSED: ")]
    assert (len(named) == 1 and f"at chance since epoch {since} " in named[0]
            and "--max_grad_norm 1" in named[0])
    assert said.index(named[0]) < len(said) - 1
    assert (said[-1].startswith("finished, COLLAPSED: 6 epochs")
            and f"at chance since epoch {since} " in said[-1])
    assert torch.load("runs/dead/last.pt", weights_only=True)["epochs_at_chance"] == column[-1]

    script("eval_mnist", *QUICK, "--checkpoint", "runs/dead/last.pt", "--out", "dead.json")
    said = capsys.readouterr().out
    assert "AT CHANCE last: A_nat is no better than a guess" in said
    assert json.loads(Path("dead.json").read_text())["at_chance"] == ["A_nat", "A_rob"]

    script("tables", "--paths", "dead.json")
    said = capsys.readouterr().out
    assert (" (1) †" in said
            and "† dead.json is at chance, no better than a guess: A_nat and A_rob" in said)


def test_the_best_checkpoint_of_a_run_that_never_left_chance_is_named_too(script, capsys):
    script("train_at_mnist", *STUCK, "--out_dir", "run")
    last = capsys.readouterr().out.splitlines()[-1]
    assert "last.pt and best.pt in run are at chance" in last and "since epoch 1 " in last
    assert torch.load("run/best.pt", weights_only=True)["epochs_at_chance"] > 0


def test_a_strong_evaluation_of_a_network_at_chance_is_suspicious(script):
    script("train_at_mnist", *STUCK, "--epochs", 1, "--out_dir", "run")
    script("eval_mnist", *QUICK, "--checkpoint", "run/last.pt", "--attacks", "fgsm", "--out", "r.json")
    assert "above chance" in json.loads(Path("r.json").read_text())["verdict"]


def test_a_run_that_learns_late_is_not_named(script, capsys):
    script("train_at_mnist", *DIES, "--epochs", 24, "--lr", 0.1, "--max_grad_norm", 1,
           "--lr_warmup_epochs", 6, "--out_dir", "late")
    column, said = [int(row["epochs_at_chance"]) for row in read_log("late")], capsys.readouterr().out
    assert max(column) >= SOON and column[-1] == 0  # long enough at chance to be named, but for the patience
    assert "COLLAPSED" not in said and "at chance" not in said and "finished: 24 epochs" in said


def test_stop_on_collapse_ends_the_run_and_so_does_its_resumption(script, capsys):
    with pytest.raises(Collapsed,
                       match=r"stopped after epoch \d: the network has been at chance since epoch \d"):
        script("train_at_mnist", *DIES, "--epochs", 12, "--stop_on_collapse", "--out_dir", "run")
    done = len(read_log("run"))
    assert done < 12 and Path("run/log.png").exists()
    with pytest.raises(Collapsed):
        script("train_at_mnist", "--resume", "run")
    assert len(read_log("run")) == done
    script("train_at_mnist", "--resume", "run", "--no-stop_on_collapse")
    assert len(read_log("run")) == 12


def test_a_run_that_collapses_in_its_last_epochs_fails_too(script, capsys):
    with pytest.raises(Collapsed, match="has ended at chance, where it has been since epoch 1"):
        script("train_at_mnist", *STUCK, "--epochs", 4, "--lr_warmup_epochs", 3, "--stop_on_collapse",
               "--out_dir", "run")
    assert len(read_log("run")) == 4 and "finished, COLLAPSED" in capsys.readouterr().out


@pytest.mark.slow
def test_under_torchrun_a_collapsed_run_keeps_its_last_epoch(shell, torchrun, tmp_path):
    flags = (*STUCK, "--epochs", 12, "--stop_on_collapse", "--device", "cpu")
    done = torchrun("train_at_mnist.py", *flags, "--out_dir", "two")
    assert done.returncode != 0 and "last.pt and best.pt in two are at chance" in done.stderr
    alone = shell("train_at_mnist.py", *flags, "--out_dir", "one")
    assert alone.returncode == 1
    assert len(read_log(tmp_path / "two")) == len(read_log(tmp_path / "one")) < 12


def test_a_seed_that_collapses_does_not_end_the_others(monkeypatch, tmp_path, capsys):
    import train_at_mnist

    monkeypatch.chdir(tmp_path)
    flags = (*STUCK, "--epochs", 4, "--stop_on_collapse", "--seeds", 1, 2, "--out_dir", "runs")
    monkeypatch.setattr(sys, "argv", ["train_at_mnist.py", *map(str, flags)])
    with pytest.raises(SystemExit) as ended:
        run_script(train_at_mnist.main, train_at_mnist.Config, train_at_mnist.RECIPES)
    assert ended.value.code == 1 and "2 of 2 seeds collapsed: 1 2" in capsys.readouterr().err
    assert len(read_log("runs/seed1")) == len(read_log("runs/seed2")) == 3


def test_a_trial_run_of_two_batches_is_not_called_collapsed(script, capsys):
    script("train_at_mnist", *TINY, "--epochs", 4, "--lr", 0, "--out_dir", "run")
    assert "COLLAPSED" not in capsys.readouterr().out


# ---- what the papers set -----------------------------------------------------------------------------------

TRAINERS = ("at_mnist", "at_cifar10", "trades_mnist", "trades_cifar10", "vir", "free", "yopo", "iaat")


@pytest.mark.parametrize("name", [f"train_{name}" for name in TRAINERS])
def test_the_papers_own_settings_neither_clip_nor_warm_up(name):
    module = importlib.import_module(name)
    ours = {"short", "digits"} | {recipe for recipe in module.RECIPES
                                  if recipe.endswith(("-mnist", "-digits"))}
    settings = ([cfg for recipe, cfg in module.RECIPES.items() if recipe not in ours]
                + [module.Config()] * ("mnist" not in name))
    assert settings and all((cfg.max_grad_norm, cfg.lr_warmup_epochs) == (0, 0) for cfg in settings)
    assert all(module.RECIPES[recipe].max_grad_norm > 0
               for recipe in ours & module.RECIPES.keys() if "cifar10" not in name)
