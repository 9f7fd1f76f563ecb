"""README.md and docs/: their commands run, what they name exists, their sentences have the files' figures."""
import csv
import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
from itertools import takewhile
from pathlib import Path
from statistics import mean

import pytest
import torch
from conftest import ROOT, TINY

from harness.config import parse_config
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
        return ("--paths", ROOT / "results/mnist", ROOT / "results/stability/full")
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
        return (*TINY[2:], "--dataset", "digits", *short, "--crop_padding", 0)
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


def test_the_figures_about_margin_weights_are_those_of_their_files():
    found = {name: load(f"mnist/{name}/eval.json") for name in (
        "small_cnn-at", "small_cnn-at-alpha0.5", "small_cnn-trades", "small_cnn-trades-alpha2", "lenet-at",
        "lenet-at-alpha0.5", "lenet-trades", "lenet-trades-alpha2")}
    rob = {name: result["A_rob"] for name, result in found.items()}
    sa, tr = ({name: f"{result[metric]['2.0']:.1f}" for name, result in found.items()}
              for metric in ("A_sa", "A_tr"))
    at, trades = "small_cnn-at", "small_cnn-trades"
    assert_says("results",
                f"A_rob is {rob[at + '-alpha0.5']:.1f} against {rob[at]:.1f}, A_sa(2) rises from {sa[at]} to "
                f"{sa[at + '-alpha0.5']} and A_tr(2) from {tr[at]} to {tr[at + '-alpha0.5']}",
                f"(A_sa(2) {sa[trades]} to {sa[trades + '-alpha2']}, "
                f"A_tr(2) {tr[trades]} to {tr[trades + '-alpha2']})",
                f"({rob[trades]:.1f} to {rob[trades + '-alpha2']:.1f})",
                f"AT loses {rob['lenet-at'] - rob['lenet-at-alpha0.5']:.1f} points of A_rob",
                f"(A_sa(2) {sa['lenet-at']} to {sa['lenet-at-alpha0.5']})",
                f"TRADES loses {rob['lenet-trades'] - rob['lenet-trades-alpha2']:.1f} points",
                f"(A_sa(2) {sa['lenet-trades']} to {sa['lenet-trades-alpha2']})")


def test_the_figures_about_the_family_are_those_of_its_files():
    gairat, at = (load(f"vir/{name}/seed0/eval.json")["effective_size"]["A_sa"]["2.0"]
                  for name in ("gairat", "at"))
    assert_says("results", f"{gairat:,.0f} for GAIRAT and {at:,.0f} for AT (seed 0)")


def recovered(name="recovered"):
    """Result file -> middle of its A_sa_kl at 0.2 nats, and the widest range of any at 0.2 and at 0.5."""
    rows = load(f"budget/{name}.json")["rows"]
    widest = [max(high - low for low, high in (row["A_sa_kl"][budget] for row in rows))
              for budget in ("0.2", "0.5")]
    return {row["file"].removeprefix("results/"): mean(row["A_sa_kl"]["0.2"]) for row in rows}, *widest


def test_the_figures_about_attackers_of_equal_strength_are_those_of_their_files():
    found, at_02, at_05 = recovered()
    assert at_02 < 0.2 and at_05 < 0.75

    def gain(first, second, folder="vir"):
        """(at alpha 2, at 0.2 nats): how far the first is ahead of the second, over its seeds."""
        files = [[file for file in found if file.startswith(f"{folder}/{name}/")] for name in (first, second)]
        alpha, budget = ([mean(measure(file) for file in group) for group in files]
                         for measure in (lambda file: load(file)["A_sa"]["2.0"], found.get))
        return f"{abs(alpha[0] - alpha[1]):.1f}", f"{abs(budget[0] - budget[1]):.1f}", budget[0] > budget[1]

    (gairat, gairat_kl, _), (mail, mail_kl, _), (vir, vir_kl, _) = (
        gain(name, "at") for name in ("gairat", "mail-at", "vir-at"))
    (one, one_kl, ahead), (other, other_kl, too) = (
        gain(name, "trades") for name in ("mail-trades", "vir-trades"))
    assert not ahead and not too
    small, lenet = ([gain(f"{net}-{name}", f"{net}-{name.split('-')[0]}", "mnist")
                     for name in ("at-alpha0.5", "trades-alpha2")] for net in ("small_cnn", "lenet"))
    assert [row[2] for row in small + lenet] == [True, True, False, False]
    assert_says("results",
                f"GAIRAT by {gairat_kl} points instead of {gairat} at alpha 2, MAIL-AT by {mail_kl} instead "
                f"of {mail}, VIR-AT by {vir_kl} instead of {vir}",
                f"lead TRADES by {one} and {other} points at alpha 2, and are {one_kl} and {other_kl} behind",
                f"gain {small[0][0]} points (AT) and {small[1][0]} (TRADES) on SmallCNN at alpha 2, and "
                f"{small[0][1]} and {small[1][1]} at 0.2 nats",
                f"gains of {lenet[0][0]} and {lenet[1][0]} become losses of {lenet[0][1]} and {lenet[1][1]}")


FAMILY = ("at", "trades", "gairat", "mart", "mail-at", "mail-trades", "vir-at", "vir-trades")


def test_the_figures_about_todays_recipes_are_those_of_their_files():
    def lead(name, base):
        """In A_rob, A_sa at alpha 2, and A_sa at 0.2 nats."""
        one, other = (load(f"stability/full/{run}/eval.json") for run in (name, base))
        return (one["A_rob"] - other["A_rob"], one["A_sa"]["2.0"] - other["A_sa"]["2.0"],
                one["A_sa_kl"]["0.2"] - other["A_sa_kl"]["0.2"])

    margin, trades = lead("lenet-at-alpha0.5", "lenet-at"), lead("lenet-trades-alpha2", "lenet-trades")
    (gairat, mail, vir), (vir_trades, mail_trades) = (
        [lead(name, f"vir-recipe-{base}") for name in names] for base, names in (
            ("at", ("gairat", "mail-at", "vir-at")), ("trades", ("vir-trades", "mail-trades"))))
    assert 0 < margin[0] < 0.5 and f"{gairat[1]:.0f}" == f"{mail[1]:.0f}"
    before = {"lenet-at": "mnist/lenet-at", "lenet-at-alpha0.5": "mnist/lenet-at-alpha0.5",
              "lenet-trades": "mnist/lenet-trades", "lenet-trades-alpha2": "mnist/lenet-trades-alpha2"}
    before |= {{"at": "vir-recipe-at", "trades": "vir-recipe-trades"}.get(name, name): f"vir/{name}/seed*"
               for name in FAMILY}
    before |= {name: f"fast/{name}" for name in ("free", "yopo", "iaat")}
    change = {name: load(f"stability/full/{name}/eval.json")["A_rob"] - mean(
        json.loads(file.read_text())["A_rob"] for file in (ROOT / "results").glob(f"{runs}/eval.json"))
        for name, runs in before.items()}
    gained, lost = change.pop("lenet-at-alpha0.5"), -change.pop("yopo")
    assert_says("results",
                f"within {max(map(abs, change.values())):.1f} points of that of before, but for AT at alpha "
                f"0.5, which gains {gained:.1f}, and YOPO, which loses {lost:.1f}",
                f"{margin[2]:.1f} points are left at 0.2 nats",
                f"is {-trades[2]:.1f} points behind TRADES there, and {-trades[0]:.1f} in A_rob",
                f"by {gairat[1]:.0f} points at alpha 2 and by {gairat[2]:.1f} and {mail[2]:.1f} at 0.2 nats",
                f"by {vir[1]:.0f} and {vir[2]:.1f}",
                f"by {vir_trades[1]:.1f} and {mail_trades[1]:.1f} points at alpha 2, and are "
                f"{-vir_trades[2]:.1f} and {-mail_trades[2]:.1f} behind it at 0.2 nats")


def test_the_figures_about_equal_strength_in_the_worst_case_are_those_of_their_files():
    found, at_02, at_05 = recovered("recovered_strong")
    assert at_02 < 0.7 and at_05 < 3.05
    budget = {file.removeprefix("strong/").removesuffix(".json"): value for file, value in found.items()}
    alpha = {name: load(f"strong/{name}.json")["worst_case"]["A_sa"]["2.0"] for name in budget}
    place = {name: 1 + sum(other > value for other in budget.values()) for name, value in budget.items()}
    assert (place["vir_gairat"], place["vir_mail-at"], len(place)) == (12, 16, 17)
    assert sorted(alpha, key=alpha.get)[-2:] == ["vir_mail-at", "vir_gairat"]
    gaps = [f"{alpha[name] - alpha['vir_at']:.0f}" for name in ("vir_gairat", "vir_mail-at")]
    assert_says("results", f"0.2 nats ({budget['vir_gairat']:.1f} %), where AT by the same recipe has "
                           f"{budget['vir_at']:.1f}", f"sixteenth ({budget['vir_mail-at']:.1f} %)",
                f"VIR-AT keeps {budget['vir_vir-at'] - budget['vir_at']:.1f} points over AT",
                f"{gaps[0]} and {gaps[1]} points over AT at alpha 2")


def test_the_figures_about_mean_budgets_are_those_of_their_files():
    with (ROOT / "results/curves/budget/budget.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    curves = {}
    for row in rows:
        curves.setdefault((row["norm"], row["p"]), {}).setdefault(row["model"], []).append(
            (float(row["mean_budget"]), float(row["accuracy"])))
    for (norm, order), models in curves.items():
        values = {name: [accuracy for _, accuracy in curve] for name, curve in models.items()}
        if order != "inf":
            assert all(at >= other - 0.002 for curve in values.values()
                       for at, other in zip(values["at"], curve))
        if norm == "linf" and order != "inf":
            last = [budget for (budget, gairat), *others in zip(models["gairat"], *values.values())
                    if gairat > min(others)]
            assert max(last) < 0.02
    behind = {name: [100 * max(a - b for (_, a), (_, b) in zip(models["vir-recipe-at"], models[name]))
                     for models in (curves["linf", "1"], curves["linf", "2"])]
              for name in ("gairat", "vir-at")}
    first_order = load("curves/budget/first_order.json")["rows"]
    assert all(row["first_order"] > row["ours"] and row["nearer"] == 0 for row in first_order)
    linf, l2 = ([row["first_order"] for row in first_order if row["norm"] == norm] for norm in ("linf", "l2"))
    assert_says("curves", "{:.1f}, {:.1f}, {:.1f}, {:.1f} and {:.1f} % in l_inf".format(*linf),
                f"at least {min(l2):.1f} % in l_2")
    left = load("curves/budget/summary.json")["mean_budget_that_leaves"]
    gairat, at = (left[name]["linf"]["1"]["0.9"] for name in ("gairat", "at"))
    assert_says("curves", "{:.1f} are left at p = 1 and {:.1f} at p = 2".format(*behind["gairat"]),
                f"VIR-AT is at most {max(behind['vir-at']):.1f} points behind its base",
                f"it falls to 90 % at a mean budget of {gairat:.3f} (p = 1), half of what AT needs "
                f"({at:.3f})")


def test_the_figures_about_strong_attacks_are_those_of_their_files():
    results = {file.stem: json.loads(file.read_text()) for file in (ROOT / "results/strong").glob("*.json")}
    accuracy = {name: {attack: found["accuracy"] for attack, found in result["attacks"].items()}
                for name, result in results.items()}
    gaps = [results[name]["A_rob"] - found["autoattack"] for name, found in accuracy.items()]
    assert len(results) >= 17 and all(found["mde"] >= found["autoattack"] for found in accuracy.values())
    most = max(accuracy, key=lambda name: accuracy[name]["mde"] - accuracy[name]["autoattack"])
    assert most == "vir_mail-at"
    assert_says("results", f"AutoAttack takes {min(gaps):.1f} to {max(gaps):.1f} points more",
                f"up to {accuracy[most]['mde'] - accuracy[most]['autoattack']:.0f} points more (MAIL-AT: "
                f"{accuracy[most]['mde']:.0f} and {accuracy[most]['autoattack']:.0f})")
    for result in results.values():
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
    for name in ("plain", "trades"):
        row = load(f"attacks/lenet-{name}-idle.json")["results"][0]["rows"][0]
        ours, theirs = row["ours"]["cpu_seconds"], row["published"]["cpu_seconds"]
        assert_says("results", f"{ours:.0f} s against {theirs:.0f} ({theirs / ours:.1f} times)")


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


WHOLE_RUNS = ("mnist/*", "vir/*/seed*", "fast/*", "proof/*", "stability/full/*")
FOLDERS = sorted(file.parent for runs in WHOLE_RUNS for file in (ROOT / "results").glob(f"{runs}/eval.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_result_names_command_seed_hardware_and_versions(folder):
    result, config = load(folder / "eval.json"), load(folder / "config.json")
    for source in (result, config):
        assert source["command"].startswith("python ") and isinstance(source["seed"], int)
        assert {"hardware", "torch", "python", "device"} <= source["environment"].keys()
    assert result["num_examples"] == 10_000 and result["certificate"]["ok"]
    assert len(result["checkpoint_sha256"]) == 64
