"""benchmarks/stability.py and trace.py: what they run and write, and that they go on where they were."""
import csv
import json
import threading
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import campaign, stability, trace
from harness.config import parse_config
from harness.errors import RunError, UserError

ONE = ("--epochs", "1", "--defenses", "AT", "--precisions", "float32", "--out", "runs/stability.json")


def test_a_file_is_written_and_gone_on_with(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    stability.main(parse_config(stability.Config, [*ONE, "--seeds", "0"]))
    contents = stability.read_file("runs/stability.json")
    first, = contents["rows"]
    assert (first["defense"], first["seed"], first["epochs"], first["onednn"]) == ("AT", 0, 1, "all")
    assert contents["calls"][0]["command"].startswith("python ")
    assert contents["calls"][0]["environment"]["commit"] == first["commit"]
    started = "python train_at_mnist.py --recipe digits --seed 0 --precision float32"
    assert first["command"].startswith(started)
    at_chance = {"A_nat": 50.0, "epochs_at_chance": 1}
    monkeypatch.setattr(stability, "train", lambda command, folder, own, evaluate: first | own | at_chance)
    stability.main(parse_config(stability.Config, [*ONE, "--seeds", "0", "1"]))
    contents = stability.read_file("runs/stability.json")
    rows = contents["rows"]
    assert len(contents["calls"]) == 2
    assert rows[0] == first and rows[1]["seed"] == 1 and len(rows) == 2
    low, high = sorted((first["A_nat"], 50.0))
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].strip("|").split("|")]
    assert cells[:6] == ["AT", "float32", "native", "2", str(1 + (first["epochs_at_chance"] > 0)),
                         f"{low:.1f} / {(low + high) / 2:.1f} / {high:.1f}"]


def row(defense, seed, **facts):
    return {"defense": defense, "seed": seed, "precision": "float32", **stability.instruction_sets(),
            "epochs": 20, **facts}


@pytest.mark.parametrize(("flags", "missing"), [
    ((), 1), (("--epochs", "20"), 1), (("--epochs", "4"), 2), (("--evaluate",), 2),
    (("--evaluate", "--seeds", "3"), 0)])
def test_what_is_missing_is_what_no_row_answers(flags, missing):
    rows = [row("AT", 0), row("AT", 3, test_A_nat=95.0)]
    seeds = () if "--seeds" in flags else ("--seeds", "0", "1")
    cfg = parse_config(stability.Config, ["--defenses", "AT", "--precisions", "float32", *seeds, *flags])
    assert len(list(stability.planned(cfg, rows))) == missing


def test_a_failure_leaves_the_runs_that_were_not_begun(tmp_path, monkeypatch):
    begun = []

    def fail(command, folder, facts, evaluate):
        begun.append(facts["seed"])
        raise RunError("no")

    monkeypatch.setattr(stability, "train", fail)
    flags = ["--defenses", "AT", "--num_processes", "1", "--out", str(tmp_path / "s.json"), "--seeds",
             *map(str, range(50))]
    with pytest.raises(RunError):
        stability.main(parse_config(stability.Config, flags))
    assert begun == [0]


def test_a_failure_begins_no_other_run_while_an_earlier_one_goes_on():
    begun, second, third = [], threading.Event(), threading.Event()

    def work(job):
        begun.append(job)
        if job == 0:
            second.wait(10)
            third.wait(1)  # time for a third run to begin, if the failure of the second lets it
        elif job == 1:
            second.set()
            raise RunError("no")
        else:
            third.set()

    with pytest.raises(RunError):
        stability.side_by_side(work, range(5), 2)
    assert sorted(begun) == [0, 1]


def test_an_interrupted_run_is_gone_on_with(tmp_path, monkeypatch):
    started, folder = [], tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "log.csv").write_text("epoch,epochs_at_chance,val_A_nat,val_A_rob,seconds\n1,0,95,80,1.0\n")
    monkeypatch.setattr(stability, "start", lambda *words: started.append(words))
    stability.train(("train_at_mnist", "--recipe", "digits"), folder, {}, False)
    assert started == [("train_at_mnist", "--resume", str(folder))]


@pytest.mark.parametrize(("setting", "count"), [("digits", 15), ("mnist", 15), ("mnist-small_cnn", 4)])
def test_every_recipe_of_ours_is_in_its_setting(setting, count):
    found = stability.recipes(setting)
    assert len(found) == count
    assert all((ROOT / f"{script}.py").exists() for script, *_ in found.values())


def test_what_is_missing_is_refused_in_one_line(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "mnist.json").write_text('{"setting": "mnist", "calls": [], "rows": []}')
    for words, says in ((["--out", tmp_path / "other.json"], "no file of this script"),
                        ([], "name the file to write"),
                        (["--out", tmp_path / "mnist.json"], "is about --setting mnist"),
                        (["--out", tmp_path / "new.json", "--defenses", "None"], "there is no 'None'")):
        with pytest.raises(UserError, match=says):
            stability.main(parse_config(stability.Config, list(map(str, words))))


def test_a_trace_has_a_row_a_step_and_a_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trace.main(parse_config(trace.Config, ["--epochs", "1", "--out", "trace.csv"]))
    rows = list(csv.DictReader(Path("trace.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, 22))
    assert float(rows[0]["loss"]) == pytest.approx(2.3, abs=0.05)
    assert {"silent conv1", "silent fc3", "spread", "gradient"} <= rows[0].keys()
    assert Path("trace.png").stat().st_size > 10_000
    assert "of 21" in capsys.readouterr().out


@pytest.mark.parametrize("file", sorted((ROOT / "results/stability").glob("*.json")),
                         ids=lambda path: path.stem)
def test_no_run_of_our_recipes_ended_at_chance(file):
    facts = json.loads(file.read_text())
    assert facts["rows"]
    assert all("python " in call["command"] and call["environment"]["hardware"] for call in facts["calls"])
    assert all(row["epochs_at_chance"] == 0 for row in facts["rows"])


@pytest.mark.parametrize("setting", ("mnist", "mnist-small_cnn"))
def test_five_seeds_of_every_recipe_on_mnist_were_never_at_chance(setting):
    early = json.loads((ROOT / "results/stability/mnist.json").read_text())["rows"]
    for defense in stability.recipes(setting):
        group, name = campaign.row_of(setting, defense).split("/")
        seeds = {row["seed"] for row in early if setting == "mnist" and row["defense"] == defense}
        # a weighting and its base are one run until the burn-in ends
        for place in (name, campaign.BURN_IN.get(group, {}).get(name, name)):
            for file in (ROOT / "results" / group / place).glob("seed*/log.csv"):
                log = list(csv.DictReader(file.read_text().splitlines()))
                assert len(log) >= 4 and all(row["epochs_at_chance"] == "0" for row in log), file
                seeds.add(int(file.parent.name.removeprefix("seed")))
        assert len(seeds) >= 5, f"{defense}: {sorted(seeds)}"
