"""train_vir.py: every recipe, the burn-in, what it shares with the other scripts, seeds, averaged weights,
and the printed settings."""
import csv
import errno
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from test_scripts import read_log, same_bits, weights

import train_vir
from harness.config import parse_config, run_script
from harness.errors import UserError

QUICK = (*TINY, "--model", "lenet", "--crop_padding", 0, "--no-flip", "--batch_size", 32)
METHODS = tuple(train_vir.METHODS)
PAIRS = [(base, kind)
         for base in ("at", "trades", "mart") for kind in ("uniform", "vir", "gairat", "mail", "margin")]


def mean_weights(folder):
    return [float(row["train_weight"]) for row in read_log(Path(folder))]


@pytest.mark.parametrize(("base", "kind"), PAIRS)
def test_every_base_trains_with_every_kind_of_weights(base, kind, script):
    script("train_vir", *QUICK, "--base", base, "--weights", kind, "--burn_in_epochs", 0, "--num_steps", 4,
           "--out_dir", "run")
    files = {path.name for path in Path("run").iterdir()}
    assert files == {"config.json", "log.csv", "log.png", "weights.csv", "weights.png", "last.pt", "best.pt"}
    (row,) = read_log(Path("run"))
    assert np.isfinite(float(row["train_loss"]))
    assert (float(row["train_weight"]) == 1) == (kind == "uniform") or kind == "gairat"


@pytest.mark.parametrize("name", METHODS)
def test_weights_are_one_through_the_last_burn_in_epoch_and_not_after(name, script):
    script("train_vir", "--recipe", name, *QUICK, "--epochs", 4, "--burn_in_epochs", 2, "--out_dir", "run")
    logged = list(csv.DictReader(Path("run/weights.csv").read_text().splitlines()))
    spread = [len({cell for key, cell in row.items() if key.startswith("class_") and cell}) > 1
              for row in logged]
    weighted = name not in ("at", "trades", "mart")
    assert mean_weights("run")[:2] == [1.0, 1.0]
    assert spread == [False, False, weighted, weighted]


@pytest.mark.parametrize("name", ("vir-at", "gairat", "mail-trades"))
def test_a_run_resumed_across_the_burn_in_equals_the_undisturbed_one(name, script):
    common = ("--recipe", name, *QUICK, "--burn_in_epochs", 2, "--ema_decay", 0.9)
    script("train_vir", *common, "--epochs", 4, "--out_dir", "whole")
    script("train_vir", *common, "--epochs", 2, "--out_dir", "parts")
    script("train_vir", "--resume", "parts", "--epochs", 4)
    for file in ("last.pt", "last_ema.pt"):
        assert same_bits(weights(f"whole/{file}"), weights(f"parts/{file}"))
    assert Path("whole/weights.csv").read_text() == Path("parts/weights.csv").read_text()


def test_at_and_trades_are_the_runs_of_their_own_scripts(script):
    same = ("--start", "gaussian", "--attack_mode", "eval", "--weight_decay", "0.001", "--lr", "0.05",
            "--epsilon_warmup_epochs", 0, "--epsilon", 0.1, "--step_size", 0.05, "--seed", 4, *TINY,
            "--model", "lenet", "--batch_size", 32)
    ours = (*same, "--crop_padding", 0, "--no-flip", "--burn_in_epochs", 0)
    for script_name, flags, vir in (
            ("train_at_mnist", (), ("--base", "at", "--weights", "uniform")),
            ("train_at_mnist", ("--alpha", 2), ("--base", "at", "--weights", "margin", "--margin_alpha", 2)),
            ("train_trades_mnist", ("--beta", 6),
             ("--base", "trades", "--weights", "uniform", "--inv_lambda", 6)),
            ("train_trades_mnist", ("--beta", 6, "--alpha", 2),
             ("--base", "trades", "--weights", "margin", "--margin_alpha", 2, "--inv_lambda", 6))):
        folder = f"{script_name}{len(flags)}"
        script(script_name, *same, *flags, "--out_dir", folder)
        script("train_vir", *ours, *vir, "--out_dir", f"{folder}-vir")
        assert same_bits(weights(f"{folder}/last.pt"), weights(f"{folder}-vir/last.pt")), folder


@pytest.mark.parametrize(("flags", "terms"),
                         ((("--vir_terms", "sv"), "sv"), (("--vir_terms", "sd"), "sd"),
                          (("--alpha", 2), "alpha"), (("--beta", 0.1), "beta"), (("--gamma", 2), "gamma"),
                          (("--vir_norm", "batch"), "norm")))
def test_every_ablation_changes_the_weights(flags, terms, script):
    common = ("--recipe", "vir-at", *QUICK, "--burn_in_epochs", 0)
    script("train_vir", *common, "--out_dir", "whole")
    script("train_vir", *common, *flags, "--out_dir", "part")
    assert mean_weights("whole") != mean_weights("part")
    if terms == "norm":
        assert mean_weights("part") == [pytest.approx(1, abs=1e-5)]


def test_the_average_of_the_weights_is_what_it_says(script):
    common = (*QUICK, "--recipe", "at", "--seed", 3)
    for batches in (1, 2, 3):
        script("train_vir", *common, "--max_batches", batches, "--out_dir", f"run{batches}",
               "--ema_decay", 0.75)
    script("train_vir", *common, "--max_batches", 3, "--out_dir", "plain")
    first, second, third = (weights(f"run{k}/last.pt") for k in (1, 2, 3))
    averaged = weights("run3/last_ema.pt")
    assert same_bits(third, weights("plain/last.pt"))
    for name in averaged:
        expected = 0.75 * (0.75 * first[name] + 0.25 * second[name]) + 0.25 * third[name]
        torch.testing.assert_close(averaged[name], expected)
    assert {path.name for path in Path("run3").iterdir()} >= {"last_ema.pt", "best_ema.pt"}
    assert {"val_ema_A_nat", "val_ema_A_rob"} <= read_log(Path("run3"))[0].keys()
    assert not Path("plain/last_ema.pt").exists()


def test_both_weights_are_evaluated(script):
    script("train_vir", *QUICK, "--recipe", "at", "--epochs", 2, "--ema_decay", 0.9, "--out_dir", "run")
    script("eval_mnist", "--checkpoint", "run", "--num_restarts", 1, "--num_steps", 1, "--num_examples", 20)
    result = json.loads(Path("run/eval.json").read_text())
    assert (result["checkpoint"].endswith("last.pt")
            and result["last_ema"]["checkpoint"].endswith("last_ema.pt"))
    assert result["checkpoint_sha256"] != result["last_ema"]["checkpoint_sha256"]
    assert result["training"]["script"] == "train_vir" and result["training"]["ema_decay"] == 0.9


@pytest.mark.slow
def test_seeds_train_one_after_the_other_and_go_on_where_they_stopped(shell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = shell("train_vir.py", *QUICK, "--recipe", "at", "--seeds", 5, 6, "--out_dir", "all")
    assert done.returncode == 0, done.stderr
    alone = shell("train_vir.py", *QUICK, "--recipe", "at", "--seed", 6, "--out_dir", "alone")
    assert alone.returncode == 0, alone.stderr
    assert same_bits(weights("all/seed6/last.pt"), weights("alone/last.pt"))
    assert not same_bits(weights("all/seed5/last.pt"), weights("all/seed6/last.pt"))
    before = Path("all/seed5/last.pt").read_bytes()
    for path in Path("all/seed6").iterdir():
        path.unlink()
    Path("all/seed6").rmdir()
    again = shell("train_vir.py", "--resume", "all")
    assert again.returncode == 0, again.stderr
    assert "already finished" in again.stdout
    assert same_bits(weights("all/seed6/last.pt"), weights("alone/last.pt"))
    assert Path("all/seed5/last.pt").read_bytes() == before
    refused = shell("train_vir.py", *QUICK, "--recipe", "at", "--seeds", 5, 6, "--out_dir", "all")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    several = shell("eval_mnist.py", "--checkpoint", "all")
    assert (several.returncode, several.stderr.count("\n"), "all/seed6" in several.stderr) == (2, 1, True)
    twice = shell("train_vir.py", *QUICK, "--seeds", 5, 5)
    assert (twice.returncode, "twice" in twice.stderr) == (2, True)


@pytest.mark.slow
def test_seeds_train_under_torchrun(torchrun, script):
    done = torchrun("train_vir.py", *QUICK, "--recipe", "at", "--precision", "float32", "--seeds", 5, 6,
                    "--out_dir", "all")
    assert done.returncode == 0, done.stderr
    script("train_vir", *QUICK, "--recipe", "at", "--precision", "float32", "--seed", 6, "--out_dir", "alone")
    left, right = weights("all/seed6/last.pt"), weights("alone/last.pt")
    assert all(torch.allclose(left[name], right[name], atol=1e-5) for name in left)


@pytest.mark.slow
def test_dry_run_names_the_source_of_every_value_and_trains_nothing(shell, tmp_path):
    done = shell("train_vir.py", "--recipe", "vir-at-svhn", "--lr", "0.02", "--dry_run")
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (0, "", [])
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert rows.keys() == {*train_vir.Config.__dataclass_fields__}
    assert rows["lr"].endswith("command line")
    assert re.match(r"dataset +svhn +VIR", rows["dataset"])
    assert re.match(r"flip +False +VIR; the flip is ours", rows["flip"])
    assert re.match(r"burn_in_epochs +76 +VIR, Alg. 1", rows["burn_in_epochs"])
    assert re.match(r"gamma +10 +VIR", rows["gamma"])


class LeavesEarly(io.StringIO):
    """The pipe to a reader that leaves after the first thing it reads, as `head` may."""

    def write(self, text):
        if self.getvalue():
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(text)


def test_the_reader_of_a_dry_run_may_leave_early(monkeypatch):
    pipe = LeavesEarly()
    monkeypatch.setattr(sys, "argv", ["train_vir.py", "--dry_run"])
    monkeypatch.setattr(sys, "stdout", pipe)
    run_script(train_vir.main, train_vir.Config)
    assert len(pipe.getvalue().splitlines()) == len(train_vir.Config.__dataclass_fields__)


def test_every_default_names_its_source():
    fields = (ROOT / "train_vir.py").read_text().split("class Config")[1].split("\n\n\n")[0]
    comments = re.findall(r"^    (\w+): .*  # .*?(\[[^\]]+\])?$", fields, re.M)
    without = [name for name, bracket in comments if not bracket]
    assert without == ["dry_run"]


def test_the_recipes_are_those_of_the_papers_tables():
    assert set(METHODS) == {"at", "trades", "mart", "gairat", "mail-at", "mail-trades", "vir-at",
                            "vir-trades"}
    for name, recipe in train_vir.RECIPES.items():
        assert parse_config(train_vir.Config, ["--recipe", name], train_vir.RECIPES) == recipe
        assert len(recipe.lr_scales) == len(recipe.lr_drop_after)
        assert recipe.burn_in_epochs < recipe.epochs or name == "trades-original"
    common = [train_vir.RECIPES[name] for name in METHODS]
    assert ({(r.epochs, r.burn_in_epochs, r.lr, r.weight_decay, r.lr_drop_after, r.batch_size)
             for r in common} == {(115, 76, 0.01, 3.5e-3, (75, 90), 128)})
    wide = [train_vir.RECIPES[f"{name}-wrn"] for name in METHODS]
    assert {(r.model, r.epochs, r.lr, r.weight_decay) for r in wide} == {("wrn34_10", 115, 0.1, 7e-4)}
    regular = ("trades", "trades-wrn", "vir-trades", "vir-trades-wrn", "mart-wrn")
    assert [train_vir.RECIPES[name].inv_lambda for name in regular] == [4, 6, 5, 5, 5]
    at, trades = train_vir.RECIPES["vir-at"], train_vir.RECIPES["vir-trades"]
    assert (at.alpha, at.beta, at.gamma, trades.alpha, trades.beta, trades.gamma) == (7, 0.007, 10, 8, 1.6, 3)
    assert train_vir.RECIPES["vir-at-tiny-imagenet"].gamma == 3


def test_learning_rates_drop_after_the_epochs_that_the_recipe_names():
    recipe = train_vir.RECIPES["gairat-original"]
    rates = [recipe.lr * train_vir.learning_rate(completed, recipe) for completed in range(120)]
    assert [rates.index(rate) for rate in sorted(set(rates), reverse=True)] == [0, 59, 89, 109]
    assert [rates[k] for k in (0, 59, 89, 109)] == pytest.approx([0.1, 0.01, 0.001, 0.0005])
    recipe = train_vir.RECIPES["vir-at-generated"]
    assert recipe.schedule == "cosine"
    assert ([train_vir.learning_rate(completed, recipe) for completed in (0, 200, 400)]
            == pytest.approx([1.0, 0.5, 0.0]))


def test_drops_without_a_rate_are_refused(script):
    with pytest.raises(UserError, match="lr_scales"):
        script("train_vir", *QUICK, "--lr_drop_after", 1, 2, 3)


def test_generated_images_join_every_batch(script, colour_folder):
    np.savez("more.npz", image=np.full((40, 32, 32, 3), 77, np.uint8), label=np.arange(40) % 2)
    script("train_vir", *QUICK, "--dataset", colour_folder, "--val_size", 4, "--extra_data", "more.npz",
           "--extra_fraction", 0.5, "--batch_size", 4, "--out_dir", "run")
    assert json.loads(Path("run/config.json").read_text())["extra_data"] == "more.npz"
    script("train_vir", *QUICK, "--dataset", colour_folder, "--val_size", 4, "--batch_size", 4,
           "--out_dir", "without")
    assert not same_bits(weights("run/last.pt"), weights("without/last.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ("gairat", "mail-at"))
def test_torchrun_normalises_the_weights_over_the_batch_of_all_processes(recipe, shell, torchrun, tmp_path):
    # 65: an uneven split
    flags = (*QUICK, "--recipe", recipe, "--mail_norm", "batch", "--burn_in_epochs", 0, "--max_batches", 3,
             "--batch_size", 65, "--precision", "float32", "--epsilon_warmup_epochs", 0)
    assert shell("train_vir.py", *flags, "--out_dir", "one").returncode == 0
    done = torchrun("train_vir.py", *flags, "--out_dir", "two")
    assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "one/last.pt"), weights(tmp_path / "two/last.pt")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-5
