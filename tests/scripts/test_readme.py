"""The README: its commands run, its numbers have a file behind them, its columns and paths exist."""
import csv
import json
import re
import shlex
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from conftest import ROOT, TINY

from models import build_model

README = (ROOT / "README.md").read_text()
SPANS = re.findall(r"`((?:python|torchrun)[^`]*)`", README)
COMMANDS = sorted({command for command in SPANS if command.split()[0] == "python" and ".py" in command})
NETWORK = "import torch\ndef Net(num_classes=10):\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, num_classes))\n"


def quick(name, flags, colour_folder):
    """Flags that make the command a trial on tiny data, and leave the rest of it as it stands."""
    colour = "cifar10" in name
    data = ("--dataset", colour_folder) if colour else ("--dataset", "digits")
    if name == "tables.py":
        return ("--paths", ROOT / "results/mnist")
    if name.startswith("eval"):
        return (*data, "--num_steps", 1, "--num_restarts", 1, "--num_examples", 6)
    if "--resume" in flags:
        return ()
    if name == "train_free.py":  # its steps are replays: TINY without --num_steps
        return (*TINY[:4], *TINY[6:], "--model", "lenet", "--val_size", 4)
    network = () if "--model" in flags else ("--model", "lenet")
    if name.startswith("train_vir"):  # CIFAR-10 recipes crop and flip; at most one batch for each of several seeds
        return (*TINY[2:], "--dataset", "digits", *network, "--num_steps", 1, "--val_size", 4, "--crop_padding", 0)
    return (*TINY[2:], *data, *network, "--num_steps", 1, "--val_size", 4)


@pytest.fixture
def workplace(script, colour_folder):
    """What the commands' file names stand for: a network of one's own, two foreign checkpoints, two runs."""
    Path("net.py").write_text(NETWORK)
    script("train_at_mnist", *TINY, "--out_dir", "runs/train_at_mnist/2026-01-31_12-00-00")
    script("train_at_cifar10", *TINY[2:], "--dataset", colour_folder, "--val_size", 4, "--model", "lenet")


@pytest.fixture
def curves_workplace(script, shell):
    """The two runs of the commands on robustness curves, of a network whose distances can be proved, and their curves."""
    Path("net.py").write_text(NETWORK)
    for name in ("at", "trades"):
        script(f"train_{name}_mnist", *TINY, "--model", "net.py:Net", "--lr", 0.1, "--max_batches", 6, "--out_dir", f"runs/{name}")

    def measure(out):
        done = shell(CURVES, "compute", "--model", "runs/at", "runs/trades", *SMALL, "--adversaries", "--out", out)
        assert done.returncode == 0, done.stderr

    return measure


CURVES, SMALL = "generate_robustness_curves.py", ("--n_points", 6, "--budget", "fast", "--format", "png", "--arch", "net.py:Net")


@pytest.mark.parametrize("command", [command for command in COMMANDS if CURVES in command])
def test_the_command_on_robustness_curves_runs(command, curves_workplace, shell):
    _, name, *flags = shlex.split(command)
    if "--results" in flags:
        curves_workplace("runs/curves")
    quick_flags = {"compute": SMALL, "surface": ("--num_steps", 2), "distances": ("--dataset", "digits")}.get(flags[0], ())
    done = shell(name, *flags, *quick_flags)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [command for command in COMMANDS if "benchmarks" not in command and CURVES not in command])
def test_the_command_runs(command, workplace, script, colour_folder):
    name, *flags = shlex.split(command)[1:]
    if "theirs.pt" in flags:
        mine = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
        torch.save((mine if "net.py:Net" in flags else build_model("small_cnn", 10, 1)).state_dict(), "theirs.pt")
    script(name.removesuffix(".py"), *flags, *quick(name, flags, colour_folder))


def test_there_are_commands_for_every_script():
    assert len(COMMANDS) >= 18
    assert {shlex.split(command)[1] for command in COMMANDS} >= {path.name for path in ROOT.glob("*.py")}


def test_the_quickstart_is_two_commands_and_the_second_is_what_ci_runs():
    first, second = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)[:2]
    assert first.endswith("train_at_mnist.py --recipe digits && .venv/bin/python eval_mnist.py") and "\n" not in first
    assert second.endswith("-m pytest -q") and "\n" not in second
    assert "grep -m1 -F -e '-m pytest' README.md" in (ROOT / ".ci/run").read_text()


def columns(folder):
    return set(next(csv.reader(Path(folder, "log.csv").read_text().splitlines())))


def test_every_column_of_the_log_is_explained(script):
    script("train_trades_mnist", *TINY, "--out_dir", "run")
    script("train_vir", "--recipe", "vir-at-digits", *TINY, "--ema_decay", 0.9, "--out_dir", "vir")
    section = README.split("## log.csv")[1].split("\n## ")[0]
    explained = {name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    script("train_iaat", "--recipe", "digits", *TINY, "--out_dir", "iaat")
    assert explained == columns("run") | columns("vir") | columns("iaat")


def rows_of_results():
    """The README's results table, made again from results/mnist/*."""
    for file in sorted((ROOT / "results/mnist").glob("*/eval.json")):
        result = json.loads(file.read_text())
        weighted = [result[metric][alpha] for metric in ("A_sa", "A_tr") for alpha in ("1.0", "1.5", "2.0")]
        cells = [result["A_nat"], result["A_rob"], *weighted]
        yield file.parent.name, " | ".join(f"{cell:.2f}" for cell in cells)


def test_every_number_of_the_results_table_has_a_file_behind_it():
    rows = list(rows_of_results())
    assert len(rows) >= 8
    table = README.split("## Results")[1].split("\n## ")[0]
    for name, cells in rows:
        assert cells in table, name
    assert len(re.findall(r"^\| [^|]+ \| (?:LeNet|SmallCNN), ours ", table, re.MULTILINE)) == len(rows)


def test_the_table_of_the_reweighting_family_is_that_of_its_files():
    folders = sorted((ROOT / "results/vir").glob("*"))
    assert len(folders) == 8
    for folder in folders:
        results = [json.loads(file.read_text()) for file in folder.glob("seed*/eval.json")]
        columns = [[result["A_nat"], result["A_rob"], *(result[m][a] for m in ("A_sa", "A_tr") for a in ("1.0", "1.5", "2.0"))]
                   for result in results]
        cells = " | ".join(f"{mean(values):.2f} ± {stdev(values):.2f}" for values in zip(*columns, strict=True))
        assert len(results) >= 2 and f"| {folder.name.upper()} | {cells} |" in README, folder.name


NETWORKS = {"resnet18": "ResNet-18", "wrn34_10": "WRN-34-10", "lenet": "LeNet", "small_cnn": "SmallCNN"}


def test_the_table_of_training_steps_is_that_of_its_files():
    files = [ROOT / f"results/speed/train_step_{name}.json" for name in ("resnet18", "wrn34_10", "mnist")]
    rows = [row for file in files for row in json.loads(file.read_text())["rows"]]
    assert {(row["model"], row["method"]) for row in rows} == {(model, method) for model in NETWORKS for method in ("at", "trades", "vir")}
    for row in rows:
        cells = [NETWORKS[row["model"]], row["method"].upper(), row["batch_size"], row["num_steps"], f"{row['ours_seconds']:.3f}",
                 f"{row['published_form_seconds']:.3f}", f"{row['ratio']:.2f}",
                 f"{row['images_per_second']:,.1f} / {row['published_form_images_per_second']:,.1f}",
                 f"{row['overhead_percent']:.1f} %", f"{row['gflops']:.0f}", f"{row['peak_percent']:.1f} %",
                 f"{row['ours_mb']:,.0f} / {row['published_form_mb']:,.0f}"]
        assert f"| {' | '.join(map(str, cells))} |" in README, (row["model"], row["method"])


def test_the_table_of_measures_is_that_of_its_files():
    for model, file in (("resnet18", "resnet18"), ("small_cnn", "mnist"), ("lenet", "mnist")):
        rows = json.loads((ROOT / f"results/speed/train_step_{file}.json").read_text())["rows"]
        fused = next(row for row in rows if (row["model"], row["method"]) == (model, "trades"))
        steps = [json.loads((ROOT / f"results/speed/step_{model}_{precision}.json").read_text()) for precision in ("float32", "bf16")]
        ratios = " | ".join(f"{row['ratio']:.2f}" for row in (*steps, fused))
        assert f"| {NETWORKS[model]} | 1 | {ratios} |" in README, model


def test_the_table_of_seconds_per_step_is_that_of_its_file():
    for row in json.loads((ROOT / "results/speed/recipes_lenet.json").read_text())["rows"]:
        cells = f"{row['seconds']:.4f} | {row['spread']:.4f} | {row['ratio']:.3f} | {row['expected_ratio']:.3f}"
        assert f"| {row['recipe']} | {cells} |" in README, row["recipe"]


def test_the_table_of_training_times_is_that_of_its_files():
    costs = {row["result"]: row for row in json.loads((ROOT / "results/speed/cost.json").read_text())["rows"]}
    for folder in ("mnist/lenet-at", "fast/free", "fast/yopo", "fast/iaat"):
        result, cost = json.loads((ROOT / "results" / folder / "eval.json").read_text()), costs[f"results/{folder}"]
        cells = [result["A_nat"], result["A_rob"], *(result[m][a] for m in ("A_sa", "A_tr") for a in ("1.0", "1.5", "2.0"))]
        times = f"{cost['seconds'] / cost['epochs']:.1f} | {cost['seconds'] / 60:.1f}"
        assert cost["A_rob"] == result["A_rob"] and f"{' | '.join(f'{cell:.2f}' for cell in cells)} | {times} |" in README, folder


def test_the_table_of_strong_attacks_is_that_of_its_files():
    files = sorted((ROOT / "results/strong").glob("*.json"))
    assert len(files) >= 15
    for file in files:
        result = json.loads(file.read_text())
        attacked = [result["attacks"][name]["accuracy"] for name in ("pgd100", "cw", "fmn100", "autoattack", "mde")]
        worst = result["worst_case"]
        cells = [result["A_nat"], result["A_rob"], *attacked, worst["accuracy"], worst["A_sa"]["2.0"]]
        verdict = result["verdict"].removeprefix("suspicious: ").replace("ok", "-")
        assert f"| {file.stem} | {' | '.join(f'{cell:.1f}' for cell in cells)} | {verdict} |" in README, file.stem
        assert worst["accuracy"] <= min(attacked) and result["command"].startswith("python ") and result["environment"]["hardware"]


ATTACK_LABELS = {"fgsm": "FGSM", "pgd100": "PGD-100", "apgd-ce": "APGD-CE", "apgd-dlr": "APGD-DLR", "apgd-t": "APGD-T", "fab-t": "FAB-T",
                 "fmn100": "FMN-100", "square": "Square", "autoattack": "AutoAttack", "cw": "CW-20", "md": "MD", "mdmt": "MDMT",
                 "together": "MDE, CW-20 and the shorter SPSA together", "spsa": "SPSA", "spsa-short": "SPSA, a tenth of its passes"}


def test_the_table_beside_other_implementations_is_that_of_its_files():
    files = [json.loads((ROOT / f"results/attacks/lenet-{name}.json").read_text()) for name in ("at", "trades", "plain")]
    assert all(run["command"].startswith("python ") and run["environment"]["hardware"] for file in files for run in file["runs"])
    columns = [{(row["attack"], row["seed"]): row for row in file["rows"]} for file in files]
    for key in columns[0]:
        label = ATTACK_LABELS[key[0]] + (f", seed {key[1]}" if key[0] in ("autoattack", "md") else "")
        rows = [column[key] for column in columns]
        cells = [f"{row['ours']['accuracy']:.1f} / {row.get('published', row.get('reference'))['accuracy']:.1f}" for row in rows]
        assert f"| {label} | {' | '.join(cells)} |" in README, key
    for column in columns:  # what the text says of one seed and of several
        assert all(row["num_examples"] == 1000 for row in column.values())
        for attack in {row["attack"] for row in column.values()} - {"square"}:
            pairs = [(row["ours"]["robust"], row.get("published", row.get("reference"))["robust"])
                     for row in column.values() if row["attack"] == attack]
            assert mean(ours for ours, _ in pairs) <= mean(theirs for _, theirs in pairs) + 2, attack
        ours, theirs = ([column["autoattack", seed][side]["robust"] for seed in range(3)] for side in ("ours", "published"))
        assert mean(ours) <= mean(theirs) + 1
    for name in ("plain", "trades"):
        row = json.loads((ROOT / f"results/attacks/lenet-{name}-idle.json").read_text())["results"][0]["rows"][0]
        ours, theirs = row["ours"]["cpu_seconds"], row["published"]["cpu_seconds"]
        assert f"{ours:.0f} s against {theirs:.0f} ({theirs / ours:.1f} times)" in README


def test_the_table_of_evaluations_is_that_of_its_files():
    files = [ROOT / f"results/speed/{name}.json" for name in ("evaluation", "evaluation_pgd")]
    rows = [row for file in files for row in json.loads(file.read_text())["rows"]]
    for row in rows:
        assert row["verdicts_equal"] and f"| {row['epsilon']} | {row['num_examples']:,} | {row['robust_percent']:.2f} |" in README
        assert f"| {row['ratio']:.2f} | {row['bound']:.2f} |" in README
    assert len(rows) == 3


def test_the_comparison_of_precisions_is_that_of_its_files():
    labels = {"fast": "bfloat16", "rounding": "bfloat16, other rounding", "sixteen-bits": "bfloat16, first layer to sixteen bits",
              "float32": "float32, eager"}
    for path, label in labels.items():
        results = [json.loads((ROOT / f"results/proof/{path}-seed{seed}/eval.json").read_text()) for seed in range(3)]
        columns = [[result["A_nat"], result["A_rob"], result["A_sa"]["1.0"], result["A_sa"]["2.0"]] for result in results]
        cells = " | ".join(f"{mean(values):.2f} ± {stdev(values):.2f}" for values in zip(*columns, strict=True))
        assert f"| {label} | {cells} | {', '.join(f'{row[1]:.2f}' for row in columns)} |" in README


def test_the_table_of_robustness_curves_is_that_of_its_files():
    models = json.loads((ROOT / "results/curves/summary.json").read_text())["models"]
    norms = [norm for model in models.values() for norm in model["norms"].values()]
    assert len(models) >= 7 and all(norm["n"] == 1000 and not norm["censored"] for norm in norms)
    for name, model in models.items():
        found = {(key, one["t"]): f"{100 * one['R']:.1f}" for key, norm in model["norms"].items() for one in norm["thresholds"]}
        median = {key: f"{norm['median']:.3f}" for key, norm in model["norms"].items()}
        cells = (f"{100 * model['norms']['linf']['clean_error']:.1f}", found["linf", 0.2], found["linf", 0.3], median["linf"],
                 found["l2", 1.0], median["l2"], found["l1", 2.0], median["l1"])
        assert f"(`{name}`) | {' | '.join(cells)} |" in README, name
    pairs = json.loads((ROOT / "results/curves/compare/compare.json").read_text())["norms"]
    for norm in ("linf", "l2"):
        stretches = [stretch for pair in pairs[norm] if pair["second"] == "vir-at" for stretch in pair["stretches"]]
        assert f"{-100 * min(stretch['gap'] for stretch in stretches):.1f} points more" in README


RESULTS = sorted(path for pattern in ("mnist/*", "vir/*/seed*", "fast/*", "proof/*") for path in (ROOT / "results").glob(pattern))


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_result_names_command_seed_hardware_and_versions(folder):
    result, config = json.loads((folder / "eval.json").read_text()), json.loads((folder / "config.json").read_text())
    for source in (result, config):
        assert source["command"].startswith("python ") and isinstance(source["seed"], int)
        assert {"hardware", "torch", "python", "device"} <= source["environment"].keys()
    assert result["num_examples"] == 10_000 and result["certificate"]["ok"] and len(result["checkpoint_sha256"]) == 64


def test_every_path_that_the_readme_names_in_the_tree_exists():
    layout = README.split("## Layout")[1].split("```")[1]
    names = [word for line in layout.strip().splitlines() for word in line.split("   ")[0].split()]
    assert len(names) >= 12 and all((ROOT / name).exists() for name in names if "/" in name or name.endswith(".py"))
    assert all((ROOT / path).exists() for path in re.findall(r"\]\(([^)#:]+)\)", README))
