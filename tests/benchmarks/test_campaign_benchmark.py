"""benchmarks/campaign.py: the folder of each row, what it runs and keeps, that it goes on where it was."""
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import eval_cifar10
import train_vir
from benchmarks import campaign
from harness.config import parse_config
from harness.errors import UserError
from harness.reporting.results import OWN_FIELDS


@pytest.mark.parametrize(("setting", "defense", "place"), [
    ("mnist", "AT", "mnist/lenet-at"), ("mnist", "TRADES, alpha 2", "mnist/lenet-trades-alpha2"),
    ("mnist-small_cnn", "AT, alpha 0.5", "mnist/small_cnn-at-alpha0.5"),
    ("mnist", "MAIL-AT, VIR's recipe", "vir/mail-at"), ("mnist", "AT, VIR's recipe", "vir/at"),
    ("mnist", "TRADES, 1/lambda 5, VIR's recipe", "vir/trades-5"),
    ("mnist", "VIR-AT, mean 1, VIR's recipe", "vir/vir-at-mean1"),
    ("mnist", "Free AT", "fast/free"), ("mnist", "YOPO", "fast/yopo"),
    ("cifar10-w16", "AT, alpha 0.1", "cifar10-w16/at-alpha0.1"),
    ("cifar10-w16", "VIR-AT", "cifar10-w16/vir-at")])
def test_the_folder_of_a_row(setting, defense, place):
    assert campaign.row_of(setting, defense) == place


def test_every_row_has_a_folder_of_its_own():
    rows = [campaign.row_of(setting, defense) for setting in ("mnist", "mnist-small_cnn", "cifar10-w16")
            for defense in campaign.commands(campaign.Config(setting))]
    assert len(rows) == len(set(rows)) == 34


def test_every_command_of_cifar10_is_one_of_its_script():
    for script, *flags in campaign.commands(campaign.Config("cifar10-w16", cifar10="cifar10-jpeg")).values():
        assert script == "train_vir"
        cfg = parse_config(train_vir.Config, flags, train_vir.RECIPES)
        assert (cfg.model, cfg.dataset, cfg.epochs) == ("resnet18_w16", "cifar10-jpeg", 20)
        assert (cfg.weights == "margin") == (cfg.burn_in_epochs == 0)


@pytest.mark.parametrize(("setting", "weighting", "base"), [
    (setting, *pair) for setting, group in (("mnist", "vir"), ("cifar10-w16", "cifar10-w16"))
    for pair in campaign.BURN_IN[group].items()])
def test_a_weighting_and_its_base_have_one_burn_in(setting, weighting, base):
    known = {campaign.row_of(setting, defense).partition("/")[2]: flags
             for defense, (script, *flags) in campaign.commands(campaign.Config(setting)).items()
             if script == "train_vir"}
    weighted, plain = (dataclasses.asdict(parse_config(train_vir.Config, known[name], train_vir.RECIPES))
                       for name in (weighting, base))
    differ = {name for name in weighted if weighted[name] != plain[name]}
    assert differ <= {"weights"}.union(*OWN_FIELDS.values())


def test_a_weighting_goes_on_from_its_bases_burn_in(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(campaign, "start", stand_in(commands))
    defenses = ("VIR-AT", "AT", "TRADES")
    campaign.main(campaign.Config("cifar10-w16", defenses, (0,), strong=True, num_processes=1,
                                  runs=str(tmp_path / "runs"), out=str(tmp_path / "out")))
    trained = [flags for script, *flags in commands if script == "train_vir"]
    assert [flags[1] for flags in trained] == ["at-cifar10-w16", "trades-cifar10-w16", "vir-at-cifar10-w16"]
    assert [flags[-1] for flags in trained if "--burn_in_from" in flags] == [
        str(tmp_path / "runs/cifar10-w16/at/seed0")]
    assert {script for script, *_ in commands} == {"train_vir", "eval_cifar10"}
    attacked = [flags for flags in commands if "--attacks" in flags]
    cfg = parse_config(eval_cifar10.Config, attacked[0][1:])
    assert len(attacked) == 3 and {"autoattack", "square", "spsa"} <= {*cfg.attacks}
    assert (cfg.num_examples, cfg.num_spsa_examples, cfg.num_restarts) == (1000, 100, 1)


def stand_in(commands):
    """Write down what would be started, and leave what it would leave."""
    def start(script, *flags):
        commands.append((script, *flags))
        if script.startswith("train"):
            run = Path(flags[flags.index("--resume" if "--resume" in flags else "--out_dir") + 1])
            run.mkdir(parents=True, exist_ok=True)
            (run / "config.json").write_text("{}")
            (run / "burn_in.pt").touch()
            (run / "log.csv").write_text("epoch\n1\n")
        else:
            out = Path(flags[flags.index("--out") + 1])
            out.write_text(json.dumps({"A_rob": 50.0}))
            kind = "worst" if "--attacks" in flags else "adv"
            np.savez(out.with_suffix(".npz"), label=np.array([3, 1]),
                     **{f"margin_{kind}": np.array([0.25, -0.5]), f"prediction_{kind}": np.array([3, 2])})
    return start


def test_a_row_is_trained_measured_and_kept_and_gone_on_with(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(campaign, "start", stand_in(commands))
    run, out = tmp_path / "runs", tmp_path / "out"
    flags = ["--defenses", "TRADES", "--seeds", "3", "--runs", str(run), "--out", str(out)]
    flags += ["--device", "cuda:1"]
    campaign.main(parse_config(campaign.Config, flags))
    (script, *first), (evaluation, *second) = commands
    assert script == "train_trades_mnist" and first[:4] == ["--recipe", "short", "--seed", "3"]
    assert evaluation == "eval_mnist" and "--attacks" not in second
    assert [words[words.index("--device") + 1] for words in (first, second)] == ["cuda:1", "cuda:1"]
    place = out / "mnist/lenet-trades/seed3"
    assert {path.name for path in place.iterdir()} == {"config.json", "log.csv", "eval.json", "margins.npz"}
    with np.load(place / "margins.npz") as kept:
        assert kept["margin_adv"].tolist() == [0.25, -0.5] and kept["correct"].tolist() == [True, False]
    assert json.loads((out / "paired.json").read_text()) == {"rows": []}  # the base has not been measured
    commands.clear()
    campaign.main(parse_config(campaign.Config, [*flags, "--strong"]))
    folder = run / "mnist/lenet-trades/seed3"
    assert [command[0] for command in commands] == ["train_trades_mnist", "eval_mnist"]
    assert commands[0][1:] == ("--resume", str(folder)) and "autoattack" in commands[1]
    assert (place / "strong.json").exists() and (place / "margins_worst.npz").exists()


def test_a_stopped_evaluation_is_gone_on_with(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(campaign, "start", lambda *command: commands.append(command))
    (tmp_path / "eval.record").mkdir()
    campaign.evaluate(tmp_path, "eval", "cpu")  # stopped before there was anything to go on with
    (tmp_path / "eval.record/config.json").touch()
    campaign.evaluate(tmp_path, "eval", "cpu")
    assert commands[0][:2] == ("eval_mnist", "--checkpoint")
    assert commands[1:] == [("eval_mnist", "--resume", str(tmp_path / "eval.record"))]


def test_a_row_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="'FGSM'; choose among 'AT'"):
        campaign.main(parse_config(campaign.Config, ["--defenses", "FGSM"]))
