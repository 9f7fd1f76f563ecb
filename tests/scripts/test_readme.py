"""README.md and docs/: their commands run, what they name exists, their sentences have the files' figures."""
import csv
import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
from itertools import chain, product, takewhile
from operator import sub
from pathlib import Path
from statistics import mean

import numpy
import pytest
import torch
from conftest import ROOT, TINY

import train_yopo
from benchmarks.paired import MEASURES, compare, examples
from harness.config import parse_config
from harness.evaluation.budget import accuracy_at_budget
from harness.evaluation.metrics import paired_half_width
from harness.reporting.campaign_tables import compared, papers_differences
from harness.reporting.cells import difference
from harness.reporting.defense_tables import MNIST_GROUPS, last_weight
from models import build_model
from tests import forks

PAGES = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
         for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES["README.md"]
SENTENCES = {name: " ".join(text.split()) for name, text in PAGES.items()}
FENCED = [line for text in PAGES.values() for block in re.findall(r"```bash\n(.*?)\n```", text, re.DOTALL)
          for line in block.splitlines()]
SPANS = [" ".join(span.split()) for text in PAGES.values()
         for span in re.findall(r"`((?:python|torchrun) [^`]*)`", text)]
COMMANDS = sorted({line for line in (*SPANS, *FENCED) if line.startswith(("python ", "torchrun "))})
CURVES = "generate_robustness_curves.py"
SMALL = ("--n_points", 6, "--budget", "fast", "--format", "png", "--arch", "net.py:Net")
SCRIPTS = [line for line in COMMANDS if re.match(r"python \w+\.py", line) and CURVES not in line]
RENDERED = "python eval_mnist.py"  # with the training before it
NETWORK = """import torch
def Net(num_classes=10):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, num_classes))
"""


# ---- the commands ------------------------------------------------------------------------------------------

def quick(name, flags, colour_folder):
    """Flags that make the command a trial on tiny data, and leave the rest of it as it stands."""
    colour = "cifar10" in name
    data = ("--dataset", colour_folder) if colour else ("--dataset", "digits")
    if name == "tables.py":
        return ("--paths", ROOT / "results/mnist", ROOT / "results/fast")
    if name == "eval_recheck.py":
        return ()
    if name.startswith("eval"):
        return (*data, "--num_steps", 1, "--num_restarts", 1, "--num_examples", 6)
    if "--resume" in flags:
        return ()
    if name == "train_free.py":  # its steps are replays: TINY without --num_steps
        return (*TINY[:4], *TINY[6:], "--model", "lenet", "--val_size", 4)
    network = () if "--model" in flags else ("--model", "lenet")
    short = (*network, "--num_steps", 1, "--val_size", 4)
    if name.startswith("train_vir"):  # CIFAR-10 recipes crop and flip
        burn_in = ("--burn_in_epochs", 1, "--epochs", 2) if "--burn_in_from" in flags else ()
        return (*TINY[2:], "--dataset", "digits", *short, "--crop_padding", 0, *burn_in)
    return (*TINY[2:], *data, *short)


@pytest.fixture
def workplace(script, colour_folder):
    """Make what a command's file names stand for: a network of one's own, a foreign checkpoint, a run."""

    def prepare(name, flags):
        Path("net.py").write_text(NETWORK)
        if "theirs.pt" in flags:
            network = build_model("net.py:Net" if "net.py:Net" in flags else "small_cnn", 10, 1)
            torch.save(network.state_dict(), "theirs.pt")
        elif name == "eval_cifar10.py":
            flags = (*TINY[2:], "--val_size", 4, "--model", "lenet")
            script("train_at_cifar10", "--dataset", colour_folder, *flags)
        elif name in ("eval_mnist.py", "eval_recheck.py") or "--resume" in flags:
            script("train_at_mnist", *TINY, "--out_dir", "runs/train_at_mnist/2026-01-31_12-00-00")
        if "--burn_in_from" in flags:
            folder = flags[flags.index("--burn_in_from") + 1]
            script(name.removesuffix(".py"), "--recipe", "gairat", *quick(name, flags, colour_folder),
                   "--out_dir", folder)
        if name == "eval_recheck.py":
            evaluation = ("--dataset", "digits", "--num_steps", 1, "--num_restarts", 1, "--num_examples", 6)
            script("eval_mnist", *evaluation, "--out", "eval.json", "--save_adversaries")

    return prepare


@pytest.fixture(scope="module")
def curves_workplace(tmp_path_factory):
    """A folder with two runs of a network whose distances can be proved, and their curves, made once."""
    folder = tmp_path_factory.mktemp("curves")
    (folder / "net.py").write_text(NETWORK)

    def run(name, *flags):
        done = forks.run(name, *flags, cwd=folder)
        assert done.returncode == 0, done.stderr

    for name in ("at", "trades"):
        run(f"train_{name}_mnist.py", *TINY, "--model", "net.py:Net", "--lr", 0.1, "--max_batches", 6,
            "--out_dir", f"runs/{name}")
    models = ("--model", "runs/at", "runs/trades")
    run(CURVES, "compute", *models, *SMALL, "--adversaries", "--check_radii", 0, "--out", "runs/measured")
    return folder


@pytest.mark.parametrize("command", [
    pytest.param(line, marks=[pytest.mark.rendered] * (line == RENDERED)) for line in SCRIPTS])
def test_the_command_runs(command, workplace, script, colour_folder):
    name, *flags = shlex.split(command)[1:]
    workplace(name, flags)
    script(name.removesuffix(".py"), *flags, *quick(name, flags, colour_folder))


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if CURVES in command])
def test_the_command_on_robustness_curves_runs(command, curves_workplace, shell, tmp_path):
    _, name, *flags = shlex.split(command)
    shutil.copytree(curves_workplace, tmp_path, dirs_exist_ok=True)
    if "--results" in flags:
        (tmp_path / "runs/measured").rename(tmp_path / "runs/curves")
    # of the two commands that compute, AutoAttack checks one
    check = ("--check_radii", 0) if "--out" in flags else ("--check_points", 2)
    quick_flags = {"compute": (*SMALL, "--norms", "inf", *check), "distances": ("--dataset", "digits"),
                   "surface": ("--num_steps", 2, "--format", "png")}
    done = shell(name, *flags, *quick_flags.get(flags[0], ()))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [line for line in COMMANDS if re.search("benchmarks/|^torchrun", line)])
def test_the_flags_of_a_command_that_takes_long_are_real(command):
    words = shlex.split(command)
    at = next(k for k, word in enumerate(words) if word.endswith(".py"))
    module = importlib.import_module(words[at].removesuffix(".py").replace("/", "."))
    parse_config(module.Config, words[at + 1:], getattr(module, "RECIPES", None))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("python -m harness.")])
def test_the_command_of_a_module_has_its_flags(command, monkeypatch, capsys):
    _, _, module, *words = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    said = capsys.readouterr().out
    flags = [word for word in words if word.startswith("-")]
    assert not ended.value.code and all(re.search(rf"^  {flag}\b", said, re.MULTILINE) for flag in flags)


def test_no_command_is_left_out():
    others = [line for line in COMMANDS if line not in SCRIPTS and not re.search(
        rf"{CURVES}|benchmarks/|^torchrun|^python -m (?:harness\.|pytest|tests\.)", line)]
    assert not others and len(SCRIPTS) >= 30 and RENDERED in SCRIPTS
    named = {shlex.split(command)[1] for command in COMMANDS if command.startswith("python ")}
    ours = {path.name for path in ROOT.glob("*.py") if "run_script(" in path.read_text(encoding="utf-8")}
    assert len(ours) >= 13 and named >= ours  # a network in a file of the user's own may stand there too


def test_the_quickstart_is_two_commands_and_the_second_is_what_ci_runs():
    first, second = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)[:2]
    assert first.endswith("train_at_mnist.py --recipe digits && .venv/bin/python eval_mnist.py")
    assert second.endswith("-m pytest -q") and "\n" not in first + second
    assert "grep -m1 -F -e '-m pytest' README.md" in (ROOT / ".ci/run").read_text()
    assert "bash .ci/run" in (ROOT / ".github/workflows/ci.yml").read_text()


# ---- what the pages name -----------------------------------------------------------------------------------

def heading_anchors(text):
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_image_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in heading_anchors(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_a_page_names_exists(page):
    rooms = "attacks|benchmarks|curves|docs|harness|losses|models|results|tests"
    named = set(re.findall(rf"`((?:{rooms})/[^`\s]*)", PAGES[page])) - {"results/`"}
    missing = [path for path in named if "yours" not in path and not list(ROOT.glob(path.rstrip("/")))]
    assert not missing


def test_every_path_of_the_layout_exists_and_the_readme_is_short():
    layout = README.split("## Layout")[1].split("```")[1]
    names = [word for line in layout.strip().splitlines()
             for word in takewhile(lambda word: word.endswith(("/", ".py")), line.split())]
    assert len(names) >= 12 and all(list(ROOT.glob(name.rstrip("/"))) for name in names)
    assert len(README.splitlines()) <= 150


def columns(folder):
    return set(next(csv.reader(Path(folder, "log.csv").read_text().splitlines())))


def test_every_column_of_the_log_is_explained(script):
    script("train_trades_mnist", *TINY, "--out_dir", "run")
    script("train_vir", "--recipe", "vir-at-digits", *TINY, "--ema_decay", 0.9, "--out_dir", "vir")
    script("train_iaat", "--recipe", "digits", *TINY, "--out_dir", "iaat")
    section = PAGES["docs/training.md"].split("### log.csv")[1].split("\n## ")[0]
    first_cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    explained = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    assert explained == columns("run") | columns("vir") | columns("iaat")


# ---- the figures in sentences ------------------------------------------------------------------------------

def load(path):
    return json.loads((ROOT / "results" / path).read_text(encoding="utf-8"))


def assert_says(page, *sentences):
    missing = [sentence for sentence in sentences if sentence not in SENTENCES[f"docs/{page}.md"]]
    assert not missing


def over_seeds(place, *path):
    """The mean over a row's runs of one figure of their eval.json, or of strong.json."""
    name, *path = path if path[0] == "strong" else ("eval", *path)
    found = [load(file) for file in sorted((ROOT / "results").glob(f"{place}/seed*/{name}.json"))]
    for key in path:
        found = [result[key] for result in found]
    return mean(found)


def lead(name, base, *path):
    return round(over_seeds(name, *path) - over_seeds(base, *path), 4)


def says(measure, *names):
    """(the cells of these rows in the table of differences, whether the interval of each holds 0)"""
    rows = {row["row"]: row[measure] for row in load("paired.json")["rows"]}
    found = [compared(**rows[name], all_seeds=rows[name]["seeds"]) for name in names]
    return [cell.strip("*") for cell in found], ["*" not in cell for cell in found]


def one_seed_of(name, measure, seed):
    """The difference of one seed with what its images leave open, then those of the other seeds."""
    row = next(row for row in load("paired.json")["rows"] if row["row"] == name)
    file, accuracy = MEASURES[measure]
    images = 100 * paired_half_width([accuracy(**examples(ROOT / f"results/{place}/seed{seed}" / file))
                                      for place in (name, row["base"])])
    found = dict(zip(row[measure]["seeds"], row[measure]["differences"]))
    first = found.pop(seed)
    assert abs(first) > images
    return [f"{first:+.2f} (±{images:.2f})", *signed(found.values())]


def signed(values):
    return [f"{value:+.2f}" for value in values]


def listed(words):
    return f"{', '.join(words[:-1])} and {words[-1]}"


def test_the_figures_about_the_margin_weight_are_those_of_their_files():
    weights = [f"mnist/{network}-{name}" for name in ("at-alpha0.5", "trades-alpha2")
               for network in ("lenet", "small_cnn")]
    (a_sa, open_sa), (a_rob, open_rob), (nats, open_nats) = (
        says(measure, *weights) for measure in ("A_sa 2", "A_rob", "A_sa, 0.2 nats"))
    assert not any(open_sa) and open_rob == open_nats == [True, False, True, False]
    rows = {row["row"]: row for row in load("paired.json")["rows"]}
    seeds = [rows[name]["A_rob"]["seeds"] for name in weights]
    assert seeds[0] == seeds[2] == [0, 1, 2, 3, 4] and len(seeds[1]) == len(seeds[3]) == 1
    assert all(value < 0 for value in rows[weights[2]]["A_rob"]["differences"][:3])
    at, at_weighted, trades, weighted = (
        [load(f"{place}/seed{seed}/eval.json")["A_rob"] for seed in rows[name]["A_rob"]["seeds"]]
        for name in weights[::2] for place in (rows[name]["base"], name))
    training = [[float(row["train_A_rob"]) for row in csv.DictReader(file.read_text().splitlines())]
                for file in sorted((ROOT / "results/mnist/lenet-trades").glob("seed*/log.csv"))]
    assert all(min(epoch[:3]) > max(epoch[3:]) for epoch in [*zip(*training)][1:])
    (worst, at_worst), opens = says("worst case", weights[2], weights[0])
    (case, at_case), opens_at_budget = says("worst case, 0.2 nats", weights[2], weights[0])
    assert all((*opens, *opens_at_budget))
    assert [rows[weights[k]]["worst case"]["seeds"] for k in (2, 0)] == [[0, 1, 2, 3, 4], [0, 1, 2]]
    *less, safer = [-value for value in rows[weights[2]]["worst case"]["differences"]]
    assert min(less) > 0 > safer
    by_seed = listed(signed(rows[weights[0]]["worst case"]["differences"]))
    (rob, *rob_of_others), (lost_nats, *lost_nats_of_others), (won, *won_of_others) = (
        one_seed_of(weights[2], "A_rob", 1), one_seed_of(weights[2], "A_sa, 0.2 nats", 1),
        one_seed_of(weights[0], "A_sa, 0.2 nats", 2))
    left = (rows[weights[k]]["A_sa, 0.2 nats"]["differences"][0] for k in (1, 3))
    lost = -rows[weights[3]]["A_rob"]["differences"][0]
    assert ("by 8 to 17 points. On SmallCNN (one seed) equally strong attackers leave {:.1f} to {:.1f} "
            "points of that, and TRADES loses {:.1f} of A_rob.".format(*left, lost)) in SENTENCES["README.md"]
    change = {key: [[load(f"{name}/seed{seed}/eval.json")[key[0]][key[1]]
                     - load(f"{rows[name]['base']}/seed{seed}/eval.json")[key[0]][key[1]]
                     for seed in rows[name]["A_rob"]["seeds"]] for name in weights]
              for key in (("A_tr", "2.0"), ("A_sa", "1.0"))}
    assert all(value > 0 for found in change["A_tr", "2.0"] for value in found)
    gains = [float(cell.split()[0]) for cell in a_sa]
    assert (round(min(gains)), round(max(gains))) == (8, 17)
    assert_says("results",
                "A_rob on LeNet lies between {:.2f} and {:.2f} for AT, {:.2f} and {:.2f} at alpha 0.5, "
                "{:.2f} and {:.2f} for TRADES, {:.2f} and {:.2f} at alpha 2.".format(
                    *(end(found) for found in (at, at_weighted, trades, weighted) for end in (min, max))),
                "the same, {:.2f}, {:.2f} and {:.2f}, the other two {:.2f} and {:.2f}".format(*trades),
                "AT gains {0} and TRADES {2}, on the one seed of SmallCNN {1} and {3}.".format(*a_sa),
                f"A_sa(1) of TRADES on LeNet changes by {listed(signed(change['A_sa', '1.0'][2]))}.",
                "AT {0}, TRADES {2}. On SmallCNN AT's rose, {1}, and TRADES' fell, {3}.".format(*a_rob),
                "AT {0}, TRADES {2}. On the one seed of SmallCNN it is {1} and {3}.".format(*nats),
                "on four of five seeds, by {:.2f}, {:.2f}, {:.2f} and {:.2f} points, and safer by {:.2f} on "
                "the last; the mean, {}, is not resolved, nor is it at equal strength, {}.".format(
                    *less, -safer, worst, case),
                f"AT at alpha 0.5 is not resolved, {at_worst}, by seed {by_seed}, nor is it at equal "
                f"strength, {at_case}.",
                f"its margin weight, {rob} on seed 1, but {listed(rob_of_others)} on the others, and at 0.2 "
                f"nats {lost_nats}, but {listed(lost_nats_of_others)}.",
                f"AT gains at 0.2 nats {won} on seed 2, but {listed(won_of_others)} on the others.")


def test_the_differences_in_the_answers_are_those_of_their_files():
    family = ("gairat", "mail-at", "mart", "vir-at", "mail-trades", "vir-trades")
    places = [f"vir/{name}" for name in family]
    (worst, open_worst), (case, open_case) = (says(measure, *places) for measure in (
        "worst case", "worst case, 0.2 nats"))
    assert open_worst == [False, True, True, True, True, True]
    assert open_case == [True, False, True, False, True, True]
    rows = {row["row"]: row for row in load("paired.json")["rows"]}
    assert all(rows[place]["worst case"]["seeds"] == [0, 1, 2] for place in places)
    below = [-value for value in rows["vir/gairat"]["worst case, 0.2 nats"]["differences"]]
    ours = {name: difference(*(rows[f"vir/{name}"]["worst case"][key] for key in ("differences", "images")))
            for name in ("mail-at", "vir-trades", "vir-at")}
    theirs = {defense.lower(): cell for defense, *_, cell in papers_differences(["worst case"])}
    assert all(abs(float(theirs[name]) - ours[name][0]) > ours[name][1] for name in ("mail-at", "vir-trades"))
    assert abs(float(theirs["vir-at"])) < ours["vir-at"][1]
    colour = [f"cifar10-w16/{name}"
              for name in ("at-alpha0.1", "mail-at", "vir-at", "mail-trades", "vir-trades", "gairat")]
    found = [says(measure, *colour) for measure in ("A_sa 2", "A_rob", "A_sa, 0.2 nats")]
    no = [False] * 6
    assert [opens for _, opens in found] == [no, [False, False, True, False, True, False], no]
    margin, mail, vir, mail_trades, vir_trades, gairat = zip(*(cells for cells, _ in found))
    lost = [over_seeds(base, "A_nat") - over_seeds(name, "A_nat") for name, base in zip(
        colour[1:5], (f"cifar10-w16/{base}" for base in ("at", "at", "trades", "trades")))]
    four, five = ([load(f"vir/{name}/seed{seed}/strong.json")["worst_case"]["accuracy"]
                   for seed in range(3)] for name in ("trades", "trades-5"))
    of_four, of_five = ([load(f"vir/{name}/seed{seed}/eval.json")["A_rob"] for seed in range(5)]
                        for name in ("trades", "trades-5"))
    assert_says("results",
                f"VIR-AT is not resolved: {worst[3]}; the paper's {theirs['vir-at']} is smaller than that",
                f"The paper's {theirs['vir-trades']} (CIFAR-10) lies beyond that interval",
                f"the paper's {theirs['mail-at']} (CIFAR-10) lies beyond that interval",
                f"VIR-TRADES is not resolved: {worst[5]}.",
                "by itself {:.1f}, {:.1f} and {:.1f} points safer".format(*map(sub, four, five)),
                f"has {listed(signed(map(sub, of_four, of_five)))} points of A_rob more",
                "GAIRAT does: {}. MAIL-AT is not resolved: {};".format(*worst),
                f"MART is not resolved: {worst[2]}. Nor is MAIL-TRADES, which the table lacks: {worst[4]}.",
                f"MAIL-AT and VIR-AT are above AT, {case[1]} and {case[3]}.",
                "GAIRAT is not resolved, {}: it is below AT on each seed, "
                "by {:.2f}, {:.2f} and {:.2f}.".format(
                    case[0], *below),
                "MART, {2}, MAIL-TRADES, {4}, and VIR-TRADES, {5}, are not resolved.".format(*case),
                "AT at alpha 0.1 has more A_sa(2), {}, at no less A_rob, {}, and keeps {} at equal "
                "strength".format(*margin),
                "So do MAIL-AT, {}, {} and {}, and VIR-AT, {}, {} and {}; both lose A_nat, by {:.2f} and "
                "{:.2f} points".format(*mail, *vir, *lost[:2]),
                "MAIL-TRADES adds {}, {} and {} to TRADES, VIR-TRADES {}, {} and {}, and they lose {:.2f} "
                "and {:.2f} points of A_nat".format(*mail_trades, *vir_trades, *lost[2:]),
                "ahead of AT, by {} in A_rob and by {} at 0.2 nats".format(*gairat[1:]),
                "Of the {} comparisons".format(sum(bool(value["seeds"]) for row in load("paired.json")["rows"]
                                                   for value in row.values() if isinstance(value, dict))))


def test_the_differences_over_five_seeds_are_those_of_their_files():
    over_at, over_trades = ("gairat", "mail-at", "vir-at"), ("mail-trades", "vir-trades")
    places = [f"vir/{name}" for name in (*over_at, *over_trades, "mart")]
    (a_sa, open_sa), (a_rob, open_rob), (nats, open_nats) = (
        says(measure, *places) for measure in ("A_sa 2", "A_rob", "A_sa, 0.2 nats"))
    assert open_sa == [*[False] * 5, True] and open_nats == [False, False, False, True, True, True]
    assert open_rob == [False, True, True, True, True, True]
    rows = {row["row"]: row for row in load("paired.json")["rows"]}
    assert all(rows[place]["A_rob"]["seeds"] == [0, 1, 2, 3, 4] for place in places)
    alone = [cell for name, measure in (("mail-at", "A_rob"), ("mail-trades", "A_sa, 0.2 nats"),
                                        ("vir-trades", "worst case, 0.2 nats"))
             for cell in one_seed_of(f"vir/{name}", measure, 0)]
    assert_says("results",
                "GAIRAT {}, MAIL-AT {}, VIR-AT {}, MAIL-TRADES {}, VIR-TRADES {}.".format(*a_sa),
                "keep {}, {} and {}; the two over TRADES are not resolved, {} and {}.".format(*nats),
                "GAIRAT lowers A_rob, {}; MAIL-AT, {}, VIR-AT, {}, MAIL-TRADES, {}, and VIR-TRADES, {}, are "
                "not resolved".format(*a_rob),
                f"MART is not resolved in any: {a_sa[5]}, {nats[5]} and {a_rob[5]}.",
                "than its images leave open, {}. On the others the difference is {}, {}, {} and {}.".format(
                    *alone[:5]),
                "gain at 0.2 nats, {}, is {}, {}, {} and {} there; VIR-TRADES' in the worst case, {}, is {} "
                "and {} on seeds 1 and 2.".format(*alone[5:]))


def test_the_figures_about_the_size_of_the_weights_are_those_of_their_files():
    names = ("mail-at", "vir-at", "mail-trades", "vir-trades")
    places = [f"vir/{name}-mean1" for name in names]
    (a_sa, open_sa), (a_rob, open_rob), (nats, open_nats), (worst, open_worst) = (
        says(measure, *places) for measure in ("A_sa 2", "A_rob", "A_sa, 0.2 nats", "worst case"))
    assert open_sa == [False, False, False, True] and open_nats == [False, True, True, True]
    assert all((*open_rob, *open_worst))
    rows = {row["row"]: row for row in load("paired.json")["rows"]}
    assert all(rows[place][measure]["seeds"] == [0, 1, 2] for place in places for measure in MEASURES)
    depends = rows["vir/vir-at-mean1"]["A_sa, 0.2 nats"]["differences"]
    for name, low, high in (("mail-at", 0.005, 0.015), ("vir-at", 0.005, 0.015), ("mail-trades", 0.5, 0.9),
                            ("vir-trades", 1.5, 1.9)):
        assert low < last_weight(ROOT / f"results/vir/{name}/seed0") < high
    sizes = [last_weight(ROOT / f"results/cifar10-w16/{name}/seed0")
             for name in ("mail-trades", "vir-trades")]
    beta = load("cifar10-w16/vir-trades/seed0/config.json")["beta"]
    published = {name: compare(ROOT / f"results/vir/{name}-mean1", ROOT / f"results/vir/{name}")
                 for name in names}
    shifts = {(name, measure): compared(**found, all_seeds=[0, 1, 2])
              for name, measures in published.items() for measure, found in measures.items()}
    assert len(shifts) == 20 and {key for key, cell in shifts.items() if "*" in cell} == {
        ("vir-at", "worst case"), ("vir-at", "worst case, 0.2 nats"), ("mail-trades", "A_sa 2"),
        ("vir-trades", "A_sa 2")}
    shifts = {key: cell.strip("*") for key, cell in shifts.items()}
    below = [[-value for value in found["worst case"]["differences"]]
             for found in (rows["vir/mail-at-mean1"], published["mail-at"])]
    verdicts = [[load(f"{place}/seed{seed}/strong.json")["verdict"] == "ok" for seed in range(3)]
                for place in (*places, "vir/mail-at", "vir/vir-at")]
    assert verdicts == [[False, True, True]] * 2 + [[True] * 3] * 4
    assert_says("results",
                "still gain A_sa(2) on AT over three seeds, {} and {}, and MAIL-AT at equal strength (0.2 "
                "nats), {}.".format(*a_sa[:2], nats[0]),
                "depends on the seed, {:+.2f}, {:+.2f} and {:+.2f}, and is not resolved, {}.".format(
                    *depends, nats[1]),
                "Nor is either's A_rob, {} and {}.".format(*a_rob[:2]),
                "on each seed, by {:.2f}, {:.2f} and {:.2f} points, {}, and below its published form by "
                "{:.2f}, {:.2f} and {:.2f}, {}: neither".format(
                    *below[0], worst[0], *below[1], shifts["mail-at", "worst case"]),
                "against AT, {}, but is below its published form, {}, also at equal strength, {}.".format(
                    worst[1], shifts["vir-at", "worst case"], shifts["vir-at", "worst case, 0.2 nats"]),
                f"gains {a_sa[2]} at mean 1, more than as published, {shifts['mail-trades', 'A_sa 2']}.",
                f"less than as published, {shifts['vir-trades', 'A_sa 2']}, and that gain, {a_sa[3]}, is not "
                "resolved.",
                "not A_rob, {2} and {3},".format(*a_rob),
                "nor the gain at equal strength, {2} and {3}, nor".format(*nats),
                "nor the worst case, {2} and {3}.".format(*worst),
                "mean weight of MAIL-TRADES is {:.2f}, that of VIR-TRADES {:.2f}".format(*sizes),
                "a 1/lambda of {:.1f} and {:.1f} instead of 5".format(*(5 * size for size in sizes)),
                f"there {100 * beta / sizes[1]:.0f} % are the constant beta, {beta}, the same")


def test_the_figures_about_the_training_attack_of_trades_are_those_of_its_log():
    log = list(csv.DictReader((ROOT / "results/cifar10-w16/trades/seed0/log.csv").read_text().splitlines()))
    left, held_out = (float(log[-1][name]) for name in ("train_A_rob", "val_A_rob"))
    assert_says("training", f"it leaves {left:.1f} % of the training images right in the last epoch, PGD on "
                            f"the cross-entropy {held_out:.1f} % of the held-out ones")


def test_the_figures_about_gairat_under_a_stronger_attack_are_those_of_its_files():
    gairat, at = (load(f"cifar10-w16/{name}/seed0/apgd_t.json") for name in ("gairat", "at"))
    left = [[result["attacks"][attack]["accuracy"] for attack in ("cw", "apgd-t", "pgd100")]
            for result in (gairat, at)]
    assert gairat["verdict"] == "suspicious: gap from PGD" and at["verdict"] == "ok"
    whole = load("cifar10-w16/at/seed0/strong.json")
    assert whole["worst_case"]["accuracy"] == whole["attacks"]["autoattack"]["accuracy"] == left[1][1]
    assert {gairat["num_examples"], at["num_examples"]} == {1000}
    ours, theirs = ("{:.1f} to {:.1f}".format(*result["attacks"]["apgd-t"]["ci95"])
                    for result in (gairat, at))
    assert_says("results",
                "leaves it {:.1f} % and targeted Auto-PGD {:.1f} % (95 % interval {}), where PGD-100 leaves "
                "{:.1f}; of AT they leave {:.1f}, {:.1f} ({}) and {:.1f} ".format(
                    *left[0][:2], ours, left[0][2], *left[1][:2], theirs, left[1][2]),
                f"So GAIRAT is {left[1][1] - left[0][1]:.1f} points behind AT")


def test_the_figures_about_the_family_are_those_of_its_files():
    results = [load(f"vir/{name}/seed0/eval.json") for name in ("gairat", "at")]
    gairat, at = (f"{result['effective_size']['A_sa']['2.0']:,.0f}" for result in results)
    alphas = [result["alpha_of_kl"]["0.2"] for result in results]
    (gairat_lead, mail_lead, vir_lead) = (
        f"{lead(f'vir/{name}', 'vir/at', 'A_sa', '2.0'):.0f}" for name in ("gairat", "mail-at", "vir-at"))
    at_rob, vir_rob = ([load(f"vir/{name}/seed{seed}/eval.json")["A_rob"] for seed in range(5)]
                       for name in ("at", "vir-at"))
    assert all(abs(first - second) < 0.5 for first, second in zip(at_rob, vir_rob))
    raised = []
    for name in ("gairat", "mail-at", "vir-at", "mail-trades", "vir-trades"):
        base = "trades-5" if name.endswith("trades") else "at"
        raised.append(lead(f"vir/{name}", f"vir/{base}", "A_rob"))
        assert all(lead(f"vir/{name}", f"vir/{base}", metric, alpha) > 0
                   for metric, alpha in product(("A_sa", "A_tr"), ("1.5", "2.0")))
    assert max(raised) == raised[1]
    slower = load("proof/vir-recipe-float32-seed0/eval.json")["A_rob"]
    assert slower < min(at_rob) < at_rob[0]
    assert_says("results", "A_rob of AT is {:.2f}, {:.2f}, {:.2f}, {:.2f} and {:.2f}, that of VIR-AT, "
                           "which goes on from the same burn-ins, {:.2f}, {:.2f}, {:.2f}, {:.2f} and {:.2f}."
                           .format(*at_rob, *vir_rob),
                f"in float32 it has {slower:.2f}",
                f"by more than {raised[1]:.2f} points (MAIL-AT)",
                f"(by {gairat_lead} and {mail_lead} points at alpha 2, VIR-AT by {vir_lead})",
                f"GAIRAT's effective sample size at alpha 2 is {gairat} of 10,000, AT's {at} (seed 0)",
                "(at 0.2 nats {:.1f} for GAIRAT, {:.1f} for AT)".format(*alphas))


def test_the_figures_about_the_fast_defenses_are_those_of_their_files():
    rates = {row["lr"]: row["A_rob"] for row in load("stability/yopo/rates.json")["rows"]}
    assert max(rates, key=rates.get) == 0.03 == train_yopo.RECIPES["short"].lr
    minutes = {row["result"]: row["seconds"] / 60 for row in load("speed/cost.json")["rows"]}
    places = ("fast/free", "fast/yopo", "fast/iaat")
    at, free, yopo, iaat = ([load(f"{place}/seed{seed}/eval.json")["A_rob"] for seed in range(5)]
                            for place in ("mnist/lenet-at", *places))
    assert [max(found) for found in (at, free, yopo)] == [at[2], free[2], yopo[2]]
    rows = {row["row"]: row for row in load("paired.json")["rows"]}
    assert all(rows[place]["A_rob"]["seeds"] == list(range(5)) for place in places)
    a_rob, opens = says("A_rob", *places)
    (a_sa,), sure = says("A_sa 2", "fast/iaat")
    assert opens == [False, False, True] and sure == [False]
    slower = [load(f"proof/{name}-float32-seed2/eval.json")["A_rob"] for name in ("free", "yopo")]
    assert all(found[2] - again < again - sorted(found)[-2] for found, again in zip((free, yopo), slower))
    of_free, of_iaat, of_at = (minutes[f"results/{row}"]
                               for row in ("fast/free", "fast/iaat", "mnist/lenet-at"))
    assert_says("results",
                "A_rob {} % at 0.1, {} at 0.03, {} at 0.01".format(*(rates[lr] for lr in (0.1, 0.03, 0.01))),
                f"best of five, and Free AT has {free[2]:.2f} and YOPO {yopo[2]:.2f} on it;",
                "on the other four Free AT has {:.2f} to {:.2f} and YOPO {:.2f} to {:.2f}.".format(
                    *(extreme(found[:2] + found[3:]) for found in (free, yopo) for extreme in (min, max))),
                f"in float32 Free AT has {slower[0]:.2f} on seed 2",
                f"and YOPO {slower[1]:.2f}",
                f"**Free AT** takes {of_free:.1f} minutes, AT {of_at:.1f}.",
                f"It loses A_rob to AT, {a_rob[0]}, over five seeds, "
                "by {:.2f}, {:.2f}, {:.2f}, {:.2f} and {:.2f} points".format(*map(sub, at, free)),
                f"**YOPO** loses A_rob to AT, {a_rob[1]}, and saves",
                f"**IAAT** takes {of_iaat:.1f} minutes",
                f"hardly depends on the seed: {min(iaat):.2f} to {max(iaat):.2f}.",
                f"in A_rob, {a_rob[2]}, is not resolved; in A_sa(2) it is behind, {a_sa}.")


def test_the_figures_about_attackers_of_equal_strength_are_those_of_their_files():
    ahead = {name: (lead(f"vir/{name}", f"vir/{base}", "A_sa", "2.0"),
                    lead(f"vir/{name}", f"vir/{base}", "A_sa_kl", "0.2"))
             for name, base in (("gairat", "at"), ("mail-at", "at"), ("vir-at", "at"),
                                ("mail-trades", "trades-5"), ("vir-trades", "trades-5"))}
    for budget in ("0.05", "0.2"):
        assert all(lead(f"vir/{name}", "vir/at", "loss_kl", budget) > 0 for name in ("gairat", "mail-at"))
    worst = {name: over_seeds(f"vir/{name}", "loss_cvar", "0.01") for name in ("at", "gairat", "mail-at")}
    assert all(0.4 < worst[name] / worst["at"] < 0.6 for name in ("gairat", "mail-at"))
    assert_says("results",
                "GAIRAT is {1:.1f} points ahead of AT instead of {0:.1f} at alpha 2".format(*ahead["gairat"]),
                "MAIL-AT {1:.1f} instead of {0:.1f}".format(*ahead["mail-at"]),
                "VIR-AT {1:.1f} instead of {0:.1f}".format(*ahead["vir-at"]),
                "MAIL-TRADES is {1:.1f} ahead of TRADES with its 1/lambda instead of {0:.1f}".format(
                    *ahead["mail-trades"]),
                "VIR-TRADES {1:.1f} instead of {0:.1f}.".format(*ahead["vir-trades"]))
    for file in sorted((ROOT / "results").glob("*/*/seed*/margins.npz")):
        result = json.loads((file.parent / "eval.json").read_text(encoding="utf-8"))
        with numpy.load(file) as kept:
            correct, margin = (torch.from_numpy(kept[name]) for name in ("correct", "margin_adv"))
        for budget, accuracy in result["A_sa_kl"].items():
            found = accuracy_at_budget(correct, margin, float(budget))["accuracy"]
            assert 100 * found == pytest.approx(accuracy, abs=2e-3), file


def test_the_figures_about_mean_budgets_are_those_of_their_files():
    with (ROOT / "results/curves/budget/budget.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    curves, bands = {}, []  # percent
    for row in rows:
        curve = curves.setdefault((row["norm"], row["p"]), {}).setdefault(row["model"], [])
        curve.append(100 * float(row["accuracy"]))
        if row["model"] == "at" and row["p"] != "inf":
            bands.append(50 * (float(row["upper"]) - float(row["lower"])))

    def behind(name, base, norm, *orders):
        """How far a network is at most behind another."""
        return max(second - first for order in orders
                   for first, second in zip(curves[norm, order][name], curves[norm, order][base]))

    norms, leaders = ("linf", "l2", "l1"), ("at", "at-alpha0.5")
    apart = max(behind(*pair, norm, "1", "2") for norm in norms for pair in (leaders, leaders[::-1]))
    for norm, order in product(norms, ("1", "2")):
        models = curves[norm, order]
        assert all(min(models[name][k] for name in leaders) >= max(models[name][k] for name in models
                                                                   if name not in leaders) - 0.05
                   for k in range(len(models["at"])))
        if norm == "linf":
            budgets = [float(row["mean_budget"]) for row in rows
                       if (row["norm"], row["p"], row["model"]) == (norm, order, "at")]
            assert max(budget for k, budget in enumerate(budgets)
                       if models["gairat"][k] > min(curve[k] for curve in models.values())) < 0.02
    assert apart < max(bands)
    left = load("curves/budget/summary.json")["mean_budget_that_leaves"]
    gairat, base = (left[name]["linf"]["1"]["0.9"] for name in ("gairat", "vir-recipe-at"))
    at_most = [behind("gairat", "vir-recipe-at", "linf", order) for order in ("inf", "1", "2")]
    assert_says("curves",
                f"never more than {apart:.1f} points apart, within the bands (up to ±{max(bands):.1f})",
                "the {:.1f} points that it is at most behind AT by VIR's recipe there (l_inf), at most "
                "{:.1f} are left at p = 1 and {:.1f} at p = 2".format(*at_most),
                f"falls to 90 % at a mean budget of {gairat:.3f} (p = 1), its base at {base:.3f}",
                "at most {:.1f} points behind its base in l_inf, {:.1f} in l_2 and {:.1f} in l_1".format(
                    *(behind("vir-at", "vir-recipe-at", norm, "1", "2") for norm in norms)))
    with (ROOT / "results/exact/tiny-exact-budget/budget.csv").open(encoding="utf-8") as file:
        proved, = (row for row in csv.DictReader(file) if (row["p"], row["mean_budget"]) == ("2", "0.02"))
    assert_says("curves", "the two are {:.3f} and {:.3f} % at p = 2, epsilon 0.02".format(
        *(100 * float(proved[name]) for name in ("accuracy", "certified"))))


def test_the_figures_about_the_first_order_attack_are_those_of_their_files():
    found = {}
    for name in ("gairat", "at"):
        file = load(f"curves/budget/first_order_{name}.json")
        assert file["num_examples"] == 1000
        assert all(row["first_order"] > row["ours"] and row["nearer"] == 0 for row in file["rows"])
        for row in file["rows"]:
            found.setdefault((name, row["norm"]), []).append((row["first_order"], row["one_radius"]))
    linf, l2, at = (found[key] for key in (("gairat", "linf"), ("gairat", "l2"), ("at", "linf")))
    assert all(abs(first - radius) < 1.6 for first, radius in linf)
    assert_says("curves", "leaves {:.1f}, {:.1f}, {:.1f}, {:.1f} and {:.1f} % in l_inf".format(
        *(first for first, _ in linf)), f"for all points does ({linf[-1][1]:.1f} % at the last)",
                "{:.1f} % at the last, against {:.1f}".format(*l2[-1]),
                "({:.1f} % at the last, one radius {:.1f})".format(*at[-1]))


def test_the_figures_about_strong_attacks_are_those_of_their_files():
    results = {}  # place -> of each seed
    for file in (file for group in MNIST_GROUPS
                 for file in sorted((ROOT / "results").glob(f"{group}/*/seed*/strong.json"))):
        place = "/".join(file.relative_to(ROOT / "results").parts[:2])
        results.setdefault(place, []).append(json.loads(file.read_text()))
    assert len(results) == 20
    left = {attack: {place: over_seeds(place, "strong", "attacks", attack, "accuracy") for place in results}
            for attack in ("pgd100", "autoattack", "mde")}
    rob = {place: over_seeds(place, "strong", "A_rob") for place in results}
    worst, alpha, nats = ({place: over_seeds(place, "strong", "worst_case", *path) for place in results}
                          for path in (("accuracy",), ("A_sa", "2.0"), ("A_sa_kl", "0.2")))

    def behind(values, *pairs):
        return [values[base] - values[name] for name, base in pairs]

    gaps = [rob[name] - left["autoattack"][name] for name in results]
    more = [left["mde"][name] - left["autoattack"][name] for name in results]
    found = max((rob[name] - left["pgd100"][name]) / gap for name, gap in zip(results, gaps))
    assert min(worst, key=worst.get) in ("vir/gairat", "fast/yopo")
    assert {place for place, found in results.items() if any(one["verdict"] != "ok" for one in found)} == {
        "vir/gairat", "fast/free", "fast/yopo", "vir/mail-at-mean1", "vir/vir-at-mean1"}
    assert [one["verdict"] == "ok" for one in results["vir/gairat"]] == [False, False, True]
    at = "vir/at"
    fast = ("fast/free", "fast/yopo", "fast/iaat")
    assert [[one["verdict"] == "ok" for one in results[name]] for name in fast] == [
        [False, False, False], [True, True, False], [True, True, True]]
    by_seed = {place: [one["worst_case"]["accuracy"] for one in found] for place, found in results.items()}
    assert all(found[0] < min(found[1:]) for place, found in by_seed.items() if place.startswith("vir/"))
    assert max(by_seed["mnist/lenet-trades"][3:]) < min(by_seed["mnist/lenet-trades"][:3])
    means, opens = says("worst case", *fast)
    assert opens == [False, False, True]
    below = {row["row"]: [-value for value in row["worst case"]["differences"]]
             for row in load("paired.json")["rows"] if row["row"] in fast}
    assert_says("results", "suspicious on seeds 0 and 1",
                f"AutoAttack takes {min(gaps):.1f} to {max(gaps):.1f} points more",
                f"PGD-100 finds at most {100 * found:.0f} % of that",
                f"It leaves {min(more):.1f} to {max(more):.1f} points more",
                f"from {rob['vir/gairat']:.1f} to {worst['vir/gairat']:.1f} % (AT by the same recipe from "
                f"{rob[at]:.1f} to {worst[at]:.1f})",
                "by {:.1f}, {:.1f} and {:.1f} points on seeds 0, 1 and 2, {}, and **YOPO** by {:.1f}, "
                "{:.1f} and {:.1f}, {}.".format(*below["fast/free"], means[0], *below["fast/yopo"], means[1]),
                "**IAAT** is not resolved, {}, by seed {:+.2f}, {:+.2f} and {:+.2f}.".format(
                    means[2], *(0 - value for value in below["fast/iaat"])),
                "GAIRAT leads AT of its recipe by {:.1f} points at alpha 2 and is {:.1f} behind it at 0.2 "
                "nats".format(*behind(alpha, (at, "vir/gairat")), *behind(nats, ("vir/gairat", at))))
    for result in chain(*results.values()):
        assert result["num_examples"] == 1000
        attacked = [found["accuracy"] for found in result["attacks"].values()]
        assert result["worst_case"]["accuracy"] <= min(attacked)
        assert result["command"].startswith("python ") and result["environment"]["hardware"]


def robust(row):
    """How many images our attack leaves, and how many theirs does."""
    return row["ours"]["robust"], (row.get("published") or row["reference"])["robust"]


def test_the_figures_beside_other_implementations_are_those_of_their_files():
    files = [load(f"attacks/lenet-{name}.json") for name in ("at", "trades", "plain")]
    assert all(run["command"].startswith("python ") and run["environment"]["hardware"]
               for file in files for run in file["runs"])
    columns = [{(row["attack"], row["seed"]): row for row in file["rows"]} for file in files]
    means = []
    for column in columns:  # what the text says of one seed and of several
        assert all(row["num_examples"] == 1000 for row in column.values())
        for attack in {row["attack"] for row in column.values()} - {"square"}:
            ours, theirs = zip(*(robust(row) for row in column.values() if row["attack"] == attack))
            assert mean(ours) <= mean(theirs) + 2, attack
        ours, theirs = zip(*(robust(column["autoattack", seed]) for seed in range(3)))
        means.append(f"{mean(ours) / 10:.2f} and {mean(theirs) / 10:.2f}")
        assert mean(ours) <= mean(theirs) + 1
    at, trades, plain = means
    assert_says("results", f"three seeds AutoAttack leaves AT {at}, TRADES {trades}, no attack {plain} %")
    row, = load("attacks/lenet-trades-epyc.json")["results"][0]["rows"]
    ours, theirs = row["ours"]["cpu_seconds"], row["published"]["cpu_seconds"]
    assert_says("results", f"{ours:.0f} s of processor time against {theirs:.0f} ({theirs / ours:.1f} times)")


def test_the_figures_about_robustness_curves_are_those_of_their_files():
    models = load("curves/summary.json")["models"]
    norms = [norm for model in models.values() for norm in model["norms"].values()]
    assert len(models) >= 7 and all(norm["n"] == 1000 and not norm["censored"] for norm in norms)
    pairs = load("curves/compare/compare.json")["norms"]
    behind = {(norm, pair["second"]): -100 * min(one["gap"] for one in pair["stretches"])
              for norm in ("linf", "l2") for pair in pairs[norm] if pair["first"] == "vir-recipe-at"}
    assert_says("curves", "it is {:.1f} points behind, at 0.323".format(behind["linf", "gairat"]),
                "it is {:.1f} behind at 1.02".format(behind["l2", "gairat"]),
                "the largest difference, {:.1f} points at 0.333".format(behind["linf", "vir-at"]),
                "In l_2 it is {:.1f} points behind at 1.03".format(behind["l2", "vir-at"]))


def test_no_attack_contradicts_the_curves():
    for network in ("at", "vir-at", "gairat", "plain", "wong-kolter", "mmr"):
        rows = load(f"curves-check/bound-{network}.json")["rows"]
        assert {row["norm"] for row in rows} == {"linf", "l2"} and all(row["points"] == 100 for row in rows)
        assert max(row["nearer"] for row in rows) <= 1
    norms = [model["norms"] for model in load("curves/summary.json")["models"].values()]
    slack = {norm: [round(100 * one[norm]["check"]["slack"]) for one in norms]
             for norm in ("linf", "l2", "l1")}
    assert [(min(found), max(found)) for found in slack.values()] == [(1, 2), (0, 2), (1, 5)]
    assert_says("curves", "finds 1 or 2 of 100 points nearer than the curve said in l_inf",
                "0 to 2 in l_2", "In l_1 it finds 1 to 5")


def test_the_figures_about_speed_are_those_of_their_files():
    rob = {name: [load(f"proof/{name}-seed{seed}/eval.json")["A_rob"] for seed in range(3)]
           for name in ("fast", "rounding", "sixteen-bits", "float32")}
    lower = mean(rob["float32"]) - mean(rob["fast"] + rob["rounding"] + rob["sixteen-bits"])
    files = [load(f"speed/train_step_{name}.json") for name in ("lenet_float32", "mnist")]
    steps = [{(row["model"], row["method"]): row["ours_seconds"] for row in file["rows"]} for file in files]
    slow, fast = (step["lenet", "at"] for step in steps)
    assert_says("speed", f"together lie {lower:.1f} points below the three in float32",
                f"takes {slow:.2f} s instead of {fast:.2f}")
    rows = [row for name in ("evaluation", "evaluation_pgd") for row in load(f"speed/{name}.json")["rows"]]
    assert len(rows) == 3 and all(row["verdicts_equal"] for row in rows)


WHOLE_RUNS = ("mnist/*/seed*", "vir/*/seed*", "fast/*/seed*", "proof/*")
FOLDERS = sorted(file.parent for runs in WHOLE_RUNS for file in (ROOT / "results").glob(f"{runs}/eval.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_result_names_command_seed_hardware_and_versions(folder):
    result, config = load(folder / "eval.json"), load(folder / "config.json")
    for source in (result, config):
        assert source["command"].startswith("python ") and isinstance(source["seed"], int)
        assert {"hardware", "torch", "python", "device"} <= source["environment"].keys()
    assert result["num_examples"] == 10_000 and result["certificate"]["ok"]
    assert len(result["checkpoint_sha256"]) == 64
