"""The papers' tables with ours: the papers' data, labels, rows over seeds, what fits, the text, refusals."""
import csv
import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from conftest import ROOT

import tables as script_module
import train_at_mnist
import train_free
import train_iaat
import train_trades_cifar10
import train_trades_mnist
import train_vir
import train_yopo
from harness.errors import UserError
from harness.reporting.papers import paper_tables
from harness.reporting.results import NO_SETTING, defense, find_files, read_results
from harness.reporting.strengths import points_of
from harness.reporting.tables import difference, group, markdown, mean_and_spread, setting_column
from harness.training.options import CompileOptions, Hyperparameters, RunOptions

PAPERS = paper_tables()
SCRIPTS = (train_vir, train_at_mnist, train_trades_mnist, train_trades_cifar10, train_free, train_yopo,
           train_iaat)
CONFIGS = {script.__name__: script.RECIPES for script in SCRIPTS}


def training(script="train_vir", recipe="vir-at", **changes):
    return {"script": script} | asdict(CONFIGS[script][recipe]) | changes


def evaluation(sha, config, *, threat=None, **measured):
    """What an eval script writes, with 20 steps of 0.003 unless `threat` says otherwise."""
    model = {"norm": "linf", "epsilon": 8 / 255, "step_size": 0.003, "num_steps": 20, "num_restarts": 1,
             "start": "uniform"}
    return {"A_nat": 80.0, "A_rob": 50.0, "num_examples": 10000, "dataset": "cifar10",
            "threat_model": model | (threat or {}),
            "checkpoint": "runs/x/last.pt", "checkpoint_sha256": sha * 16,
            "epoch": config["epochs"] if config else None,
            "architecture": "resnet18", "seed": 0, "training": config, "date": "2026-01-31",
            "command": "python eval_cifar10.py --checkpoint runs/x/last.pt"} | measured


@pytest.fixture
def write(tmp_path):
    """Write results to tmp_path/<name>.json; gives their files."""
    def run(**results):
        for name, result in results.items():
            path = tmp_path / name / "eval.json"
            path.parent.mkdir()
            path.write_text(json.dumps(result))
        return find_files([tmp_path])

    return run


@pytest.fixture
def rows(write):
    """The rows that results make, and the notes on them."""
    def run(kind="last", **results):
        found, notes = read_results(write(**results), kind)
        made, more = group(found)
        return made, notes + more

    return run


@pytest.fixture
def printed(script, tmp_path, capsys):
    """What tables.py prints about the files in the folder of the test."""
    def run(*flags):
        capsys.readouterr()
        script("tables", "--paths", tmp_path, *flags)
        return capsys.readouterr().out

    return run


def lines(text, *cells):
    """The cells of the table lines that have all of `cells`."""
    table = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()
             if line.startswith("| ")]
    return [line for line in table if set(cells) <= set(line)]


# ---- the papers' data --------------------------------------------------------------------------------------

SPOTS = [("vir_table1", "VIR-AT", "AA", 48.21, 0.08), ("vir_table1", "AT", "A_nat", 84.12, 0.16),
         ("vir_table2", "MART", "MDE", 50.92, 0.15),
         ("vir_table4", "VIR-TRADES", "PGD20", 25.82, 0.13), ("vir_table5", "GAIRAT", "SPSA", 52.15, 0.30),
         ("vir_table6", "VIR-AT, S_d only", "CW", 51.90, 0.35),
         ("vir_table7", "VIR-TRADES", "A_nat", 82.03, 0.13),
         ("vir_table8", "VIR-AT", "CW", 66.95, 0.17), ("vir_table9", "VIR-AT, beta 0.1", "AA", 48.17, 0.13),
         ("vir_table10", "VIR-TRADES, beta 2", "PGD100", 54.58, 0.15),
         ("vir_table11", "VIR-AT, alpha 8, beta 0.007, gamma 10", "PGD100", 56.68, 0.12),
         ("vir_table12", "VIR-TRADES, alpha 2, beta 1.6, gamma 3", "A_nat", 82.13, 0.13),
         ("zeng_table1", "TRADES+margin (alpha 2)", "A_tr 2", 65.61, None),
         ("zeng_table2", "AT", "A_sa 1.5", 17.33, None),
         ("zeng_table3", "AT+margin (alpha 0.3)", "A_tr 0.5", 18.53, None),
         ("zeng_table4", "AT+margin (alpha 0.1)", "A_rob", 49.53, None),
         ("zeng_table5", "TRADES+margin (alpha 3.5)", "A_nat", 45.35, None)]


@pytest.mark.parametrize(("table", "label", "column", "mean", "std"), SPOTS, ids=lambda value: str(value))
def test_a_number_of_a_paper(table, label, column, mean, std):
    found = [target for target in PAPERS[table][1] if (target.defense, target.column) == (label, column)]
    assert [(target.mean, target.std) for target in found] == [(mean, std)]


def test_the_prefix_of_a_column_is_its_data_set():
    (svhn,), (cifar,) = ([target for target in PAPERS["vir_table3"][1]
                          if (target.dataset, target.label, target.column) == key]
                         for key in (("svhn", "VIR-AT", "AA"), ("cifar100", "MAIL-AT", "PGD100")))
    assert (svhn.mean, cifar.mean, cifar.std) == (45.91, 27.62, 0.27)


@pytest.mark.parametrize("file", sorted((ROOT / "results/paper").glob("*.csv")), ids=lambda file: file.stem)
def test_every_number_of_every_table_is_read(file):
    with file.open(newline="") as stream:
        table = list(csv.DictReader(stream))
    settings = {"alpha_train", "alpha_test", "inv_lambda", "defense", "reweighting", "alpha", "beta", "gamma"}
    count = sum(name not in settings and not name.endswith("_std") for line in table for name in line)
    if "alpha_test" in table[0]:  # A_rob stands in every line again
        count -= len(table) - len({line["defense"] for line in table})
    targets = PAPERS[file.stem][1]
    assert len(targets) == len(set(targets)) == count
    assert all(0 < target.mean < 100 and (target.std is None) == file.stem.startswith("zeng")
               for target in targets)
    assert PAPERS[file.stem][0]["title"]
    assert set(PAPERS[file.stem][0]["test_images"]) == {target.dataset for target in targets}


def test_there_are_seventeen_tables_in_order():
    assert list(PAPERS) == [f"zeng_table{k}" for k in range(1, 6)] + [f"vir_table{k}" for k in range(1, 13)]


# ---- labels ------------------------------------------------------------------------------------------------

LABELS = [("at", "AT"), ("trades", "TRADES"), ("mart", "MART"), ("gairat", "GAIRAT"), ("mail-at", "MAIL-AT"),
          ("mail-trades", "MAIL-TRADES"), ("vir-at", "VIR-AT"), ("vir-trades", "VIR-TRADES"),
          ("vir-trades-wrn", "VIR-TRADES")]


@pytest.mark.parametrize(("recipe", "label"), LABELS)
def test_a_recipe_has_the_name_that_the_papers_give_it(recipe, label):
    assert defense(training(recipe=recipe)) == label


@pytest.mark.parametrize(("changes", "label"), [
    ({"base": "mart"}, "VIR-MART"), ({"base": "trades", "weights": "gairat"}, "GAIR-TRADES"),
    ({"base": "mart", "weights": "mail"}, "MAIL-MART"), ({"weights": "margin"}, "AT+margin (alpha 0.5)"),
    ({"weights": "margin", "margin_alpha": 0.0}, "AT"), ({"vir_terms": "sv"}, "VIR-AT, S_v only"),
    ({"base": "trades", "vir_terms": "sd"}, "VIR-TRADES, S_d only"),
    ({"weights": "mail", "vir_terms": "sd"}, "MAIL-AT")])
def test_any_base_with_any_weights_has_a_name(changes, label):
    assert defense(training(**changes)) == label


@pytest.mark.parametrize(("script", "alpha", "label"), [
    ("train_at_mnist", 0.0, "AT"), ("train_at_mnist", 0.5, "AT+margin (alpha 0.5)"),
    ("train_trades_cifar10", 0, "TRADES"),
    ("train_trades_mnist", 2.0, "TRADES+margin (alpha 2)")])
def test_the_margin_weight_is_in_the_name(script, alpha, label):
    assert defense(training(script, "short", alpha=alpha)) == label


@pytest.mark.parametrize(("script", "label"),
                         [("train_free", "AT4Free"), ("train_yopo", "YOPO-5-3"), ("train_iaat", "IAAT")])
def test_the_other_rows_of_zengs_table_4_have_its_names(script, label):
    assert defense(training(script, "paper")) == label


def test_another_script_is_named_by_itself():
    assert defense({"script": "train_other", "alpha": 0.5}) == "other"


# ---- mean and spread ---------------------------------------------------------------------------------------

def test_mean_and_spread_by_hand():
    assert mean_and_spread([50.0, 52.0, 57.0]) == "53.00 ± 3.61 (3)"  # sqrt((9 + 1 + 16) / 2)
    assert mean_and_spread([50.0]) == "50.00 ± - (1)"
    assert mean_and_spread([]) == "-"


def test_the_difference_is_that_of_the_numbers_shown():
    assert (difference([50.0, 52.0, 57.0], 51.5), difference([50.0], 51.25),
            difference([], 51.5)) == ("+1.50", "-1.25", "-")
    assert difference([48.2149], 48.21) == "+0.00"


def test_markdown_is_aligned_and_without_empty_columns():
    text = markdown(["a", "b", "c"], [["x|y", "", "1.00"], ["z", "", "-"]], left=2)
    assert text.splitlines() == ["| a    |    c |", "|:-----|-----:|", "| x\\|y | 1.00 |", "| z    |    - |"]


# ---- rows --------------------------------------------------------------------------------------------------

def test_seeds_make_one_row_whatever_says_nothing_about_the_training(rows):
    places = [{"out_dir": "a", "data_dir": "/x", "device": "cpu", "command": "python a"},
              {"out_dir": "b", "environment": {"commit": "f00"}}, {}]
    made, notes = rows(**{f"r{k}": evaluation(str(k), training(seed=k, **place), A_rob=rob,
                                              date=f"2026-01-0{k + 1}")
                          for k, (place, rob) in enumerate(zip(places, (50.0, 52.0, 57.0)))})
    assert [(row.label, mean_and_spread(row.values("A_rob")))
            for row in made] == [("VIR-AT", "53.00 ± 3.61 (3)")]
    assert not notes


def test_what_is_no_hyperparameter_makes_no_other_row():
    options = {field.name for cls in (RunOptions, CompileOptions) for field in fields(cls)}
    numeric = {"precision", "max_batches"}  # which change the result
    assert options - {field.name for field in fields(Hyperparameters)} - numeric <= NO_SETTING
    assert "burn_in_from" in NO_SETTING


@pytest.mark.parametrize(("change", "setting"), [
    ({"lr": 0.05}, "lr 0.05"), ({"gamma": 3.0}, "gamma 3"), ({"max_batches": 2}, "max_batches 2"),
    ({"lr_drop_after": (60, 80)}, "lr_drop_after 60 80"), ({"precision": "bf16"}, "precision bf16")])
def test_another_hyperparameter_makes_another_row_that_says_which(change, setting, rows):
    made, _ = rows(a=evaluation("a", training(seed=0)), b=evaluation("b", training(seed=1, **change)))
    assert [row.values("A_rob") for row in made] == [[50.0], [50.0]]
    assert setting in setting_column(made)


@pytest.mark.parametrize("change", [{"seed": 1, "beta": 5.0}, {"gairat_lambda": 0.0}, {"mail_slope": 2.0},
                                    {"inv_lambda": 6.0},
                                    {"burn_in_epochs": 10}, {"momentum": 0.9, "margin_alpha": 2.0},
                                    {"epsilon_warmup_epochs": 0.0}])
def test_a_field_that_the_method_does_not_read_makes_no_other_row(change, rows):
    made, _ = rows(a=evaluation("a", training(recipe="at", seed=0)),
                   b=evaluation("b", training(recipe="at", seed=3) | change))
    assert len(made) == 1


@pytest.mark.parametrize("change", [{"threat": {"num_restarts": 10}}, {"threat": {"epsilon": 0.031}},
                                    {"threat": {"num_steps": 40}},
                                    {"num_examples": 1000}, {"dataset": "cifar10-jpeg"}])
def test_other_protocols_are_never_averaged(change, rows):
    made, _ = rows(a=evaluation("a", training(seed=0)), b=evaluation("b", training(seed=1), **change))
    assert [len(row.results) for row in made] == [1, 1]
    assert all(setting_column(made))


def test_a_run_that_has_not_ended_is_another_row(rows):
    made, _ = rows(a=evaluation("a", training(seed=0)), b=evaluation("b", training(seed=1), epoch=40))
    assert [mean_and_spread(row.values("A_rob")) for row in made] == ["50.00 ± - (1)"] * 2
    assert any("stopped after epoch 40" in text for text in setting_column(made))


def test_rows_of_two_scripts_are_told_apart_by_what_both_have(rows):
    made, _ = rows(a=evaluation("a", training(recipe="trades")),
                   b=evaluation("b", training("train_trades_cifar10", "paper")))
    texts = setting_column(made)
    assert all("script train_" in text and "inv_lambda" in text and "burn_in_epochs" not in text
               for text in texts)


def test_one_checkpoint_and_protocol_counts_once_and_its_attacks_are_joined(rows):
    made, notes = rows(a=evaluation("a", training()),
                       b=evaluation("a", training(out_dir="elsewhere"), A_rob=49.0,
                                    attacks={"cw": {"accuracy": 48.0}}),
                       c=evaluation("a", training(), threat={"num_restarts": 10}))
    assert sorted((row.values("A_rob"), row.values("CW")) for row in made) == [([50.0], []), ([50.0], [48.0])]
    (note,) = notes
    assert "counts once" in note and "a/eval.json" in note
    assert "b/eval.json" in note and "c/eval.json" not in note


def test_two_trainings_with_one_seed_count_twice_and_are_told(rows):
    (row,), notes = rows(a=evaluation("a", training()), b=evaluation("b", training(), A_rob=52.0))
    assert mean_and_spread(row.values("A_rob")) == "51.00 ± 1.41 (2)"
    assert len(notes) == 1 and "2 trainings with seed 0" in notes[0]


def test_an_attack_on_fewer_images_is_not_averaged_with_the_others(rows):
    spsa = [{"accuracy": 60.0}, {"accuracy": 62.0}, {"accuracy": 10.0, "num_examples": 100}]
    (row,), notes = rows(**{f"r{k}": evaluation(str(k), training(seed=k), attacks={"spsa": one})
                            for k, one in enumerate(spsa)})
    assert mean_and_spread(row.values("SPSA")) == "61.00 ± 1.41 (2)" and len(row.values("A_rob")) == 3
    assert len(notes) == 1 and "1 of the values of SPSA" in notes[0]


# ---- files -------------------------------------------------------------------------------------------------

def test_the_configuration_may_lie_beside_the_result(write, rows, tmp_path):
    old = {name: value for name, value in evaluation("a", training()).items() if name != "training"}
    write(old=old)
    assert read_results(find_files([tmp_path]), "last")[0][0].label == "last.pt"
    (tmp_path / "old/config.json").write_text(json.dumps(training(recipe="mail-at", seed=5)))
    (result,), _ = read_results(find_files([tmp_path]), "last")
    assert (result.label, result.seed) == ("MAIL-AT", 5)


def test_a_foreign_checkpoint_has_its_file_name_and_no_configuration(rows, tmp_path):
    made, _ = rows(a=evaluation("a", None, checkpoint="theirs/net.pt"),
                   b=evaluation("b", None, checkpoint="theirs/net.pt"),
                   c=evaluation("c", training()))
    (tmp_path / "a/config.json").write_text(json.dumps(training()))
    results, _ = read_results(find_files([tmp_path]), "last")
    assert [row.label for row in made] == ["VIR-AT", "net.pt", "net.pt"]
    assert all(len(row.results) == 1 for row in made)
    assert [result.label for result in results] == ["net.pt", "net.pt", "VIR-AT"]


@pytest.mark.parametrize(("kind", "robust"), [("last", 50.0), ("best", 53.0), ("last_ema", 51.0)])
def test_the_kind_of_checkpoint_is_picked(kind, robust, rows):
    inner = {name: evaluation(name[0], training(), checkpoint=f"runs/x/{name}.pt", epoch=80, A_rob=value)
             for name, value in (("best", 53.0), ("last_ema", 51.0))}
    (row,), _ = rows(kind, a=evaluation("a", training()) | inner)
    assert row.values("A_rob") == [robust]


def test_a_checkpoint_that_was_not_measured_is_left_out_with_a_note(rows):
    only_best = evaluation("b", training(), checkpoint="runs/x/best.pt", epoch=80)
    made, notes = rows(a=evaluation("a", training()), b=only_best)
    assert [len(row.results) for row in made] == [1] and "b/eval.json has no last checkpoint" in notes[0]


def test_the_best_epoch_may_be_the_last_one(rows):
    whole = evaluation("a", training(), command="python eval_cifar10.py --checkpoint runs/x")
    assert len(rows("best", a=whole)[0]) == 1
    made, notes = rows("best", b=evaluation("b", training()))
    assert len(made[0].results) == 1 and "b/eval.json has no best checkpoint" in notes[0]


def test_what_must_not_be_used_and_what_is_no_result_is_left_out(rows):
    made, notes = rows(a=evaluation("a", training(), certificate={"ok": False}), b={"rows": []}, c=[1],
                       d=evaluation("d", training()))
    assert [len(row.results) for row in made] == [1]
    assert [note.split("/")[-2] for note in (note.split("eval.json")[0] for note in notes)] == ["a", "b", "c"]


def test_folders_are_searched_and_files_are_taken_as_they_are(write, tmp_path):
    files = write(a={}, b={})
    (tmp_path / "a/log.json").write_text("{}")
    (tmp_path / "a/eval_best-2.json").write_text("{}")
    (tmp_path / "a/eval-2.json").write_text("{}")
    assert [path.name for path in find_files([tmp_path])] == ["eval.json", "eval-2.json", "eval_best-2.json",
                                                              "eval.json"]
    assert find_files([tmp_path / "a/log.json", files[1],
                       tmp_path / "b"]) == [tmp_path / "a/log.json", files[1]]


# ---- what fits what ----------------------------------------------------------------------------------------

def fitting(made):
    return [name for name, (setting, targets) in PAPERS.items()
            if any(target.fits(row, setting) and row.values(target.source(row)) for target in targets
                   for row in made)]


@pytest.mark.parametrize(("config", "changes", "tables"), [
    (("train_vir", "vir-at"), {}, ["vir_table1", "vir_table6", "vir_table9", "vir_table11"]),
    (("train_vir", "vir-at"), {"beta": 0.1}, ["vir_table9"]),
    (("train_vir", "vir-at"), {"vir_terms": "sv"}, ["vir_table6"]),
    (("train_vir", "vir-at"), {"gamma": 6.0}, ["vir_table11"]),
    (("train_vir", "vir-trades-wrn"), {}, ["vir_table2"]),
    (("train_vir", "vir-trades-generated"), {}, ["vir_table8"]),
    (("train_vir", "mail-trades"), {}, []),
    (("train_vir", "vir-at"), {"extra_data": "edm.npz"}, []),
    (("train_vir", "at"), {}, ["zeng_table2", "zeng_table4", "vir_table1", "vir_table6"]),
    (("train_trades_cifar10", "paper"), {"alpha": 1.5}, ["zeng_table4"]),
    (("train_trades_cifar10", "paper"), {"alpha": 7.5}, [])])
def test_a_training_fits_the_tables_that_have_it(config, changes, tables, rows):
    made, _ = rows(a=evaluation("a", training(*config, **changes)))
    assert fitting(made) == tables


@pytest.mark.parametrize(("recipe", "changes", "tables"), [
    ("at", {"dataset": "cifar100"}, ["vir_table3"]), ("at", {"dataset": "svhn"}, ["vir_table3"]),
    ("at", {"dataset": "data/CIFAR-10-jpeg"}, None),
    ("vir-at-tiny-imagenet", {"dataset": "tiny-imagenet"}, ["vir_table4"]),
    ("vir-at", {"dataset": "tiny-imagenet"}, []),
    ("at", {"dataset": "fashion-mnist", "threat": {"epsilon": 0.3}}, []),
    ("at", {"threat": {"epsilon": 0.1}}, []),
    ("at", {"threat": {"norm": "l2"}}, []),
    ("at", {"dataset": "mnist", "threat": {"epsilon": 0.3}}, ["zeng_table1"])])
def test_the_evaluation_must_fit_too(recipe, changes, tables, rows):
    made, _ = rows(a=evaluation("a", training(recipe=recipe), **changes))
    of_cifar10 = ["zeng_table2", "zeng_table4", "vir_table1", "vir_table6"]
    assert fitting(made) == (of_cifar10 if tables is None else tables)


@pytest.mark.parametrize(("threat", "attacks", "expected"), [
    ({"num_steps": 100, "step_size": 1 / 255}, {}, "50.00 ± - (1)"),
    ({"num_steps": 100, "step_size": 0.001}, {}, "-"), ({}, {}, "-"),
    ({"num_steps": 100, "step_size": 1 / 255}, {"pgd100": {"accuracy": 49.5}}, "49.50 ± - (1)")])
def test_a_hundred_steps_of_one_grey_level_are_a_pgd100(threat, attacks, expected, write, printed):
    write(a=evaluation("a", training(), threat=threat, attacks=attacks))
    (line,) = lines(printed("--table", "vir_table1"), "PGD100", "VIR-AT")
    assert line[-3:] == [expected, "56.42 ± 0.18",
                         "-" if expected == "-" else f"{float(expected[:5]) - 56.42:+.2f}"]


# ---- the output --------------------------------------------------------------------------------------------

STRONG = {"fgsm": 61.0, "cw": {"accuracy": 52.0}, "fmn100": {"accuracy": 50.0},
          "autoattack": {"accuracy": 48.0}, "mde": {"accuracy": 47.9}}


def test_a_table_has_ours_the_papers_and_the_difference(write, printed):
    write(**{f"r{k}": evaluation(str(k), training(seed=k),
                                 attacks=STRONG | {"autoattack": {"accuracy": 48.0 + k}}) for k in range(3)},
          at=evaluation("a", training(recipe="at"), A_nat=84.5))
    text = printed("--table", "vir_table1")
    assert lines(text, "AA", "VIR-AT") == [["AA", "VIR-AT", "49.00 ± 1.00 (3)", "48.21 ± 0.08", "+0.79"]]
    assert lines(text, "AA", "AT") == [["AA", "AT", "-", "47.92 ± 0.35", "-"]]
    assert lines(text, "A_nat", "AT") == [["A_nat", "AT", "84.50 ± - (1)", "84.12 ± 0.16", "+0.38"]]
    assert "No result of ours: TRADES; MART; GAIRAT; MAIL-AT; VIR-TRADES." in text
    assert "All results" not in text
    assert [line[0] for line in lines(text, "VIR-AT")] == ["A_nat", "FGSM", "PGD100", "CW", "FMN100", "AA",
                                                           "MDE"]


def test_a_table_of_attacks_that_none_of_ours_has_is_not_printed(write, printed):
    write(a=evaluation("a", training(recipe="vir-at-wrn")))
    text = printed()
    assert "(vir_table2)" in text and "(vir_table5)" not in text


def test_the_differences_in_setting_are_told(write, printed):
    short = training("train_trades_cifar10", "short")
    write(a=evaluation("a", short, num_examples=1000, dataset="cifar10-jpeg", threat={"epsilon": 0.031}))
    text = printed("--table", "zeng_table4")
    told = re.search(r"Ours differ from the paper in: (.*)\.\n", text)[1].split("; ")
    assert set(told) == {"data set cifar10-jpeg (paper: cifar10)", "epochs 30 (paper: 100)",
                         "test images 1,000 (paper: 10,000)",
                         "step at test time 0.003 (paper: 0.0031)", "restarts 1 (paper: not stated)"}


def test_a_difference_of_one_defense_is_told_of_that_one(write, printed):
    write(a=evaluation("a", training(recipe="at")), b=evaluation("b", training(recipe="mart", epochs=30)))
    text = printed("--table", "vir_table1")
    assert "Ours differ from the paper in: epochs 115, 30 for MART (paper: 115)." in text


def test_the_paper_of_two_data_sets_names_them(write, printed):
    write(a=evaluation("a", training(recipe="at-svhn"), dataset="svhn", A_nat=93.0, num_examples=26032),
          b=evaluation("b", training(recipe="at-cifar100"), dataset="cifar100", A_nat=60.0))
    text = printed("--table", "vir_table3")
    assert [line[-1] for metric in ("svhn A_nat", "cifar100 A_nat")
            for line in lines(text, metric, "AT")] == ["+0.06", "+0.40"]


def test_without_a_table_every_one_that_fits_and_then_all_results_with_notes(write, printed, tmp_path):
    write(a=evaluation("a", training(), attacks={"cw": 52.0}, A_sa={"1.0": 30.0}, worst_case=47.0),
          b={"no": "result"})
    text = printed("--out", tmp_path / "tables.md")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[-2:] == ["All results", "Notes"]
    assert re.findall(r"\((vir_\w+|zeng_\w+)\)", text) == ["vir_table1", "vir_table6", "vir_table9",
                                                           "vir_table11"]
    head, row = text.split("## All results")[1].split("\n| ")[1:3]
    assert re.split(r" *\| *", head.split("\n")[0]) == ["defense", "network", "epochs", "A_nat", "A_rob",
                                                        "A_sa 1", "CW", "worst case", ""]
    assert re.split(r" *\| *", row.split("\n")[0])[3:5] == ["80.00 ± - (1)", "50.00 ± - (1)"]
    assert (tmp_path / "tables.md").read_text() == text


@pytest.mark.slow
def test_the_committed_results_give_the_first_table_of_zeng(shell):
    done = shell("tables.py", ROOT / "results/mnist", "--table", "zeng_table1")
    assert done.returncode == 0, done.stderr
    assert "restarts 1 (paper: not stated)" in done.stdout
    for file in sorted((ROOT / "results/mnist").glob("*/eval.json")):
        result, config = json.loads(file.read_text()), json.loads((file.parent / "config.json").read_text())
        for metric, value in [("A_rob", result["A_rob"]),
                              *((f"A_tr {float(a):g}", value) for a, value in result["A_tr"].items())]:
            found = [line for line in lines(done.stdout, metric, defense(config))
                     if f"model {config['model']}," in line[2] + ","]
            assert any(line[3].startswith(f"{value:.2f} ± ") for line in found), (file, metric)
            assert all(f"{float(line[3][:5]) - float(line[4]):+.2f}" == line[5] for line in found)
    assert lines(done.stdout, "A_tr 2", "TRADES+margin (alpha 2)")[0][4] == "65.61"


# ---- refusals ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("flags", "message"), [
    (("--table", "vir_table13"), r"no such table; choose one of zeng_table1, .*vir_table12$"),
    (("--table", "vir_table2"), r"none of the 1 results fits vir_table2"),
    (("--checkpoint_kind", "best_ema"), r"no best_ema result in .*1 of 1 files left out"),
    (("--out", "there.md"), r"there.md exists")])
def test_what_cannot_be_made_is_refused(flags, message, write, printed, tmp_path):
    write(a=evaluation("a", training()))
    (tmp_path / "there.md").write_text("mine")
    with pytest.raises(UserError, match=message):
        printed(*flags)
    assert (tmp_path / "there.md").read_text() == "mine"


def test_without_any_result_it_says_where_it_looked(script, tmp_path):
    with pytest.raises(UserError, match="no last result in results and runs"):
        script("tables")
    Path("runs").mkdir()
    with pytest.raises(UserError, match="no last result in runs "):
        script("tables")
    with pytest.raises(UserError, match="no file or folder nowhere"):
        script("tables", "--paths", "nowhere")


@pytest.mark.slow
def test_a_file_that_is_not_json_is_named_in_one_line(shell, tmp_path):
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "runs/x/eval.json").write_text('{"A_nat": 9')
    done = shell("tables.py", "runs", "--checkpoint-kind", "best")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("tables.py: error: runs/x/eval.json is not readable as JSON")


def test_leading_words_are_paths():
    assert script_module.with_flag(["a", "b", "--table", "x"]) == ["--paths", "a", "b", "--table", "x"]
    assert script_module.with_flag(["--table", "x"]) == ["--table", "x"] and script_module.with_flag([]) == []


# ---- the attacker's strength -------------------------------------------------------------------------------

def test_budgets_have_their_columns_and_older_results_are_read_beside_them(write, printed):
    write(old=evaluation("a", training(recipe="at"), A_sa={"2.0": 30.0}),
          new=evaluation("b", training(), A_sa={"2.0": 40.0}, A_sa_kl={"0.05": 45.0, "0.2": 38.0},
                         worst_case={"accuracy": 41.0, "A_sa_kl": {"0.2": 33.0}}))
    text = printed()
    head, = lines(text, "A_sa_kl 0.05", "A_sa_kl 0.2", "worst case KL 0.2")
    assert head.index("A_sa 2") < head.index("A_sa_kl 0.05") < head.index("A_sa_kl 0.2")
    old, = lines(text, "AT", "resnet18")
    new, = lines(text, "VIR-AT", "resnet18")
    assert (old[head.index("A_sa 2")], old[head.index("A_sa_kl 0.2")]) == ("30.00 ± - (1)", "-")
    assert [new[head.index(name)] for name in ("A_sa_kl 0.05", "A_sa_kl 0.2", "worst case KL 0.2")] == [
        "45.00 ± - (1)", "38.00 ± - (1)", "33.00 ± - (1)"]


def test_the_strengths_of_a_row_begin_with_a_rob_and_are_means_over_seeds(rows):
    results = {f"s{seed}": evaluation(str(seed), training(seed=seed), A_rob=50.0 + 2 * seed,
                                      A_sa_kl={"0.2": 30.0 + 2 * seed, "0.05": 40.0, "10.0": 0.0})
               for seed in range(2)}
    made, _ = rows(**results)
    row, = made
    strengths, means, deviations = points_of(row, "A_sa_kl")
    assert strengths == [0.0, 0.05, 0.2, 10.0] and means == [51.0, 40.0, 31.0, 0.0]
    assert deviations == pytest.approx([2**0.5, 0, 2**0.5, 0])
    assert points_of(row, "A_sa") == ([0.0], [51.0], [pytest.approx(2**0.5)])


def test_the_figure_shows_the_results_that_have_budgets_and_is_never_written_over(write, printed, tmp_path):
    write(a=evaluation("a", training(), A_sa={"2.0": 30.0}, A_sa_kl={"0.2": 40.0}),
          b=evaluation("b", training(recipe="at"), A_sa={"2.0": 20.0}, A_sa_kl={"0.2": 41.0}))
    printed("--figure", tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 10_000
    for name, says in (("both.png", "exists"), ("both.pdf", "ends in .png")):
        with pytest.raises(UserError, match=says):
            printed("--figure", tmp_path / name)


def test_without_budgets_there_is_no_figure_and_the_way_to_one_is_named(write, printed, tmp_path):
    write(a=evaluation("a", training(), A_sa={"2.0": 30.0}))
    with pytest.raises(UserError, match="none of these results has an A_sa_kl: evaluate"):
        printed("--figure", tmp_path / "none.png")
