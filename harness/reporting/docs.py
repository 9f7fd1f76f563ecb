"""Write the tables of README.md and docs/ from the files in results/.

A table stands between a line `<!-- table: NAME -->` and a line `<!-- end -->`; what is between them is never edited by hand.

    python -m harness.reporting.docs            # write every table again
    python -m harness.reporting.docs --check    # change nothing; exit code 1, naming each table that is not that of its files
"""
import argparse
import csv
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from harness.errors import UserError
from harness.reporting.tables import defense, markdown

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
BLOCK = re.compile(r"^<!-- table: (\S+) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)

# ---- what is written by hand: the order of rows, and their labels ------------------------------------------------

ALPHAS = ("1.0", "1.5", "2.0")                                                         # of the attacker
NETWORKS = {"lenet": "LeNet", "small_cnn": "SmallCNN", "resnet18": "ResNet-18", "wrn34_10": "WRN-34-10", "wrn28_10": "WRN-28-10"}
MNIST = {"at": ("AT", "PGD"), "at-alpha0.5": ("AT, alpha 0.5", "PGD+ours"),           # folder -> ours, the paper's
         "trades": ("TRADES", "TRADES"), "trades-alpha2": ("TRADES, alpha 2", "TRADES+ours")}
FAMILY = ("at", "trades", "mart", "gairat", "mail-at", "mail-trades", "vir-at", "vir-trades")
FAST = {"mnist/lenet-at": "AT", "fast/free": "Free AT, m = 8, five epochs", "fast/yopo": "YOPO-5-3", "fast/iaat": "IAAT"}
STRONG = {"pgd100": "PGD-100", "cw": "CW", "fmn100": "FMN-100", "autoattack": "AutoAttack (ours)", "mde": "MDE"}
BESIDE = {"at": "AT, 0.3", "trades": "TRADES, 0.3", "plain": "no attack, 0.1"}
ATTACKS = {"fgsm": "FGSM", "pgd100": "PGD-100", "cw": "CW-20", "apgd-ce": "APGD-CE", "apgd-dlr": "APGD-DLR", "apgd-t": "APGD-T",
           "fab-t": "FAB-T", "fmn100": "FMN-100", "md": "MD", "mdmt": "MDMT", "square": "Square", "spsa": "SPSA",
           "spsa-short": "SPSA, a tenth of its passes", "autoattack": "AutoAttack",
           "together": "MDE, CW-20 and the shorter SPSA together"}
CURVES = {"at": "AT", "at-alpha0.5": "AT, alpha 0.5", "trades": "TRADES", "trades-alpha2": "TRADES, alpha 2",
          "vir-recipe-at": "AT, VIR's recipe", "vir-at": "VIR-AT", "gairat": "GAIRAT"}
PROOF = {"fast": "bfloat16", "rounding": "bfloat16, other rounding", "sixteen-bits": "bfloat16, first layer to sixteen bits",
         "float32": "float32, eager"}
EVALUATED = {"autoattack": "AutoAttack (ours)", "pgd100": "PGD-100", "cw": "CW, 20 steps"}
SPREADS = {"A_nat": "A_nat", "A_rob": "A_rob", "test_A_nat": "A_nat, test set", "test_A_rob": "A_rob, test set"}
BEFORE = ("mnist/*", "vir/*/seed*", "fast/*")  # whole runs by recipes without gradient clipping
CIFAR_TRAINED_ON = 49_000  # images of CIFAR-10 without those held out


# ---- reading and formatting --------------------------------------------------------------------------------------

def load(path: str | Path) -> dict:
    """A JSON file under results/."""
    return json.loads((RESULTS / path).read_text(encoding="utf-8"))


def number(value: float, digits: int = 2) -> str:
    return f"{value:,.{digits}f}"


def spread(values: Iterable[float]) -> str:
    """Mean ± sample standard deviation; of one value, the value."""
    values = list(values)
    return number(values[0]) if len(values) == 1 else f"{number(statistics.mean(values))} ± {number(statistics.stdev(values))}"


def extremes(values: list[float]) -> str:
    return " / ".join(number(value, 1) for value in (min(values), statistics.median(values), max(values))) if values else ""


def metrics(alphas: Iterable[str] = ALPHAS) -> list[str]:
    """The columns of `measures`."""
    return ["A_nat", "A_rob", *(f"{metric} {float(alpha):g}" for metric in ("A_sa", "A_tr") for alpha in alphas)]


def measures(folders: Iterable[Path], alphas: Iterable[str] = ALPHAS) -> list[str]:
    """What the evaluations of runs found, over their seeds."""
    results = [load(folder / "eval.json") for folder in folders]
    columns = [[result["A_nat"] for result in results], [result["A_rob"] for result in results]]
    columns += [[result[metric][alpha] for result in results] for metric in ("A_sa", "A_tr") for alpha in alphas]
    return [spread(values) for values in columns]


# ---- the results -------------------------------------------------------------------------------------------------

def mnist() -> str:
    with (RESULTS / "paper/zeng_table1.csv").open(encoding="utf-8") as file:
        printed = list(csv.DictReader(file))
    rows = []
    for folder, (label, theirs) in MNIST.items():
        for network in ("lenet", "small_cnn"):
            rows.append([label, f"{NETWORKS[network]}, ours", *measures([RESULTS / f"mnist/{network}-{folder}"])])
        lines = [line for line in printed if line["defense"] == theirs]
        weighted = [number(float(line[metric])) for metric in ("A_sa", "A_tr") for line in lines]
        rows.append([label, "*SmallCNN, paper*", "-", number(float(lines[0]["A_rob"])), *weighted])
    return markdown(["defense", "network", *metrics()], rows, left=2)


def family() -> str:
    rows = [[name.upper(), *measures(sorted((RESULTS / "vir" / name).glob("seed*")))] for name in FAMILY]
    return markdown(["defense", *metrics()], rows, left=1)


def fast() -> str:
    costs = {row["result"]: row for row in load("speed/cost.json")["rows"]}
    rows = []
    for folder, label in FAST.items():
        cost = costs[f"results/{folder}"]
        times = [number(cost["seconds"] / cost["epochs"], 1), number(cost["seconds"] / 60, 1)]
        rows.append([label, *measures([RESULTS / folder]), *times])
    return markdown(["defense", *metrics(), "s per epoch", "minutes"], rows, left=1)


def name_of(training: dict) -> str:
    """The defense of a training configuration, as these tables call it."""
    name = defense(training).replace("AT4Free", "Free AT")
    return re.sub(r"\+margin \(alpha (.*)\)", r", alpha \1", name)


def grouped(folders: Iterable[Path]) -> Iterator[tuple[dict, list[dict], list[Path]]]:
    """(configuration of the first, all configurations, folders) of the runs that differ in nothing but the seed."""
    groups: dict[tuple, list[tuple[dict, Path]]] = {}
    for folder in sorted(folders):
        config = load(folder / "config.json")
        key = config["script"], name_of(config), config["model"], config["precision"], config["training_images"]
        groups.setdefault(key, []).append((config, folder))
    for runs in groups.values():
        configs, places = zip(*runs)
        yield configs[0], list(configs), list(places)


def full() -> str:
    """The runs with today's recipes, each beside the ones before gradient clipping."""
    before = list(grouped(path for pattern in BEFORE for path in RESULTS.glob(pattern)))
    rows = []
    for config, configs, folders in grouped((RESULTS / "stability/full").glob("*/")):
        same = [run for run in before if all(run[0][key] == config[key] for key in ("script", "model"))
                and name_of(run[0]) == name_of(config)]
        for recipe, (one, all_of_them, places) in (("today's", (config, configs, folders)), *(("before", run) for run in same)):
            seeds = ", ".join(str(each["seed"]) for each in sorted(all_of_them, key=lambda each: each["seed"]))
            rows.append([name_of(one), NETWORKS.get(one["model"], one["model"]), recipe, one["precision"],
                         f"{one['training_images']:,}", seeds, *measures(places, ("2.0",))])
    return markdown(["defense", "network", "recipe", "precision", "images", "seed", *metrics(("2.0",))], rows, left=4)


def strong() -> str:
    results = {file.stem: load(file) for file in (RESULTS / "strong").glob("*.json")}
    rows = []
    for name, result in sorted(results.items(), key=lambda pair: (-pair[1]["worst_case"]["accuracy"], -pair[1]["A_rob"], pair[0])):
        worst = result["worst_case"]
        attacked = [result["attacks"][attack]["accuracy"] for attack in STRONG]
        cells = [result["A_nat"], result["A_rob"], *attacked, worst["accuracy"], worst["A_sa"]["2.0"]]
        signs = result["verdict"].removeprefix("suspicious: ").replace("ok", "-")
        rows.append([name, signs, *(number(cell, 1) for cell in cells)])
    return markdown(["result", "suspicious", "A_nat", "A_rob", *STRONG.values(), "worst case", "its A_sa 2"], rows, left=2)


def theirs(row: dict) -> dict:
    return row.get("published") or row["reference"]


def attacks() -> str:
    columns = [{(row["attack"], row["seed"]): row for row in load(f"attacks/lenet-{name}.json")["rows"]} for name in BESIDE]
    rows = []
    for attack, label in ATTACKS.items():
        seeds = sorted(seed for name, seed in columns[0] if name == attack)
        for seed in seeds if attack in ("md", "autoattack") else seeds[:1]:
            pairs = [(column[attack, seed]["ours"], theirs(column[attack, seed])) for column in columns]
            cells = [f"{number(ours['accuracy'], 1)} / {number(other['accuracy'], 1)}" for ours, other in pairs]
            rows.append([label + (f", seed {seed}" if len(seeds) > 1 and attack in ("md", "autoattack") else ""), *cells])
    return markdown(["attack", *BESIDE.values()], rows, left=1)


def curves() -> str:
    models = load("curves/summary.json")["models"]
    rows = []
    for name, label in CURVES.items():
        norms = models[name]["norms"]
        reached = {(norm, one["t"]): number(100 * one["R"], 1) for norm in norms for one in norms[norm]["thresholds"]}
        median = {norm: number(norms[norm]["median"], 3) for norm in norms}
        rows.append([f"{label} (`{name}`)", number(100 * norms["linf"]["clean_error"], 1), reached["linf", 0.2], reached["linf", 0.3],
                     median["linf"], reached["l2", 1.0], median["l2"], reached["l1", 2.0], median["l1"]])
    head = ["network", "wrong unattacked", "R(0.2) l_inf", "R(0.3)", "median", "R(1) l_2", "median", "R(2) l_1", "median"]
    return markdown(head, rows, left=1)


# ---- stability ---------------------------------------------------------------------------------------------------

def stability_table(rows: list[dict]) -> str:
    """The rows of benchmarks/stability.py, one line a defense and precision: minimum, median and maximum over the runs."""
    lines = []
    for name, precision in dict.fromkeys((row["defense"], row["precision"]) for row in rows):
        runs = [row for row in rows if (row["defense"], row["precision"]) == (name, precision)]
        sets = dict.fromkeys("native" if row["onednn"] == row["aten"] == "all" else f"{row['aten']}, {row['onednn']}" for row in runs)
        at_chance = sum(row["epochs_at_chance"] > 0 for row in runs)
        spreads = [extremes([row[metric] for row in runs if metric in row]) for metric in SPREADS]
        lines.append([name, precision, "; ".join(sets), str(len(runs)), str(at_chance), *spreads])
    head = ["defense", "precision", "instruction sets", "runs", "at chance"]
    return markdown([*head, *(f"{name}, min / median / max" for name in SPREADS.values())], lines, left=3)


def stability() -> str:
    """One table a file, under a line with a link to it."""
    parts = []
    for file in sorted((RESULTS / "stability").glob("*.json")):
        rows = load(file)["rows"]
        stopped = {row["epochs"] for row in rows if " --epochs " in row["command"]}
        note = f", stopped after {' or '.join(map(str, sorted(stopped)))} epochs" if stopped else ""
        parts.append(f"[`results/stability/{file.name}`](../results/stability/{file.name}){note}:\n\n{stability_table(rows)}")
    return "\n\n".join(parts)


# ---- speed -------------------------------------------------------------------------------------------------------

def train_step() -> str:
    rows = []
    for row in (row for name in ("resnet18", "wrn34_10", "mnist") for row in load(f"speed/train_step_{name}.json")["rows"]):
        rows.append([NETWORKS[row["model"]], row["method"].upper(), str(row["batch_size"]), str(row["num_steps"]),
                     number(row["ours_seconds"], 3), number(row["published_form_seconds"], 3), number(row["ratio"]),
                     f"{number(row['images_per_second'], 1)} / {number(row['published_form_images_per_second'], 1)}",
                     f"{number(row['overhead_percent'], 1)} %", number(row["gflops"], 0), f"{number(row['peak_percent'], 1)} %",
                     f"{number(row['ours_mb'], 0)} / {number(row['published_form_mb'], 0)}"])
    head = ["network", "method", "batch", "attack steps", "ours, s", "published form, s", "ratio", "images/s, ours / published form",
            "overhead", "GFLOP/s", "of peak", "MB, ours / published form"]
    return markdown(head, rows, left=2)


def gains() -> str:
    rows = []
    for model, file in (("resnet18", "resnet18"), ("small_cnn", "mnist"), ("lenet", "mnist")):
        steps = load(f"speed/train_step_{file}.json")["rows"]
        last = next(row for row in steps if (row["model"], row["method"]) == (model, "trades"))
        before = [load(f"speed/step_{model}_{precision}.json") for precision in ("float32", "bf16")]
        rows.append([NETWORKS[model], "1", *(number(row["ratio"]) for row in (*before, last))])
    head = ["network, TRADES", "published form", "frozen parameters, one clean pass, channels last", "and bfloat16", "and fused layers"]
    return markdown(head, rows, left=1)


def precisions() -> str:
    rows = []
    for path, label in PROOF.items():
        results = [load(f"proof/{path}-seed{seed}/eval.json") for seed in range(3)]
        columns = zip(*([one["A_nat"], one["A_rob"], one["A_sa"]["1.0"], one["A_sa"]["2.0"]] for one in results))
        rows.append([label, *map(spread, columns), ", ".join(number(one["A_rob"]) for one in results)])
    return markdown(["path", "A_nat", "A_rob", "A_sa 1", "A_sa 2", "A_rob of each seed"], rows, left=1)


def breakdown() -> str:
    results = load("speed/breakdown.json")["results"]
    kinds = sorted({kind for one in results for kind in one["percent"]}, key=lambda kind: -sum(one["percent"].get(kind, 0) for one in results))
    rows = [[kind, *(number(one["percent"].get(kind, 0), 0) for one in results)] for kind in kinds]
    return markdown(["% of the attack's time", *(NETWORKS[one["model"]] for one in results)], rows, left=1)


def expectation() -> str:
    at = next(row for row in load("speed/cost.json")["rows"] if row["result"] == "results/mnist/lenet-at")
    steps = load("speed/train_step_resnet18.json")["rows"]
    fused, plain = next(row for row in steps if row["method"] == "trades"), load("speed/step_resnet18_float32.json")
    epoch = [row["ours_seconds"] * (CIFAR_TRAINED_ON / row["batch_size"]) for row in (fused, plain)]
    rows = [["two cores with AMX", f"{number(at['seconds'] / 60, 1)} minutes", f"{number(epoch[0] / 60, 0)} minutes"],
            ["two cores without", "not measured", f"{number(epoch[1] / 3600, 1)} hours (`--precision float32`)"],
            ["one GPU, or several", "not measured", "not measured"]]
    return markdown(["you have", "MNIST, LeNet, ten epochs of AT", "CIFAR-10, ResNet-18, one epoch of TRADES"], rows, left=3)


def memory() -> str:
    rows = []
    for row in (row for name in ("memory", "memory_mnist_epoch", "memory_tiny-imagenet") for row in load(f"speed/{name}.json")["rows"]):
        rows.append([row["dataset"], NETWORKS[row["model"]], str(row["batches"]),
                     *(number(row[key], 0) for key in ("images_mb", "first_mb", "end_mb", "peak_mb"))])
    head = ["data set", "network", "batches", "images, MB", "after twenty batches, MB", "at the end, MB", "at most, MB"]
    return markdown(head, rows, left=2)


def evaluation() -> str:
    rows = []
    for row in (row for name in ("evaluation", "evaluation_pgd") for row in load(f"speed/{name}.json")["rows"]):
        cells = [number(row["robust_percent"]), number(row["compacted_seconds"], 1), number(row["whole_seconds"], 1)]
        rows.append([EVALUATED[row["attack"]], str(row["epsilon"]), f"{row['num_examples']:,}", *cells, number(row["ratio"]),
                     number(row["bound"])])
    return markdown(["attack", "epsilon", "images", "robust, %", "s", "all steps, s", "ratio", "1 / R"], rows, left=1)


def recipes() -> str:
    rows = []
    for row in load("speed/recipes_lenet.json")["rows"]:
        cells = [number(row["seconds"], 4), number(row["spread"], 4), number(row["ratio"], 3), number(row["expected_ratio"], 3)]
        rows.append([row["recipe"], *cells])
    return markdown(["recipe", "s per step", "spread", "over AT", "expected"], rows, left=1)


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table for table in (mnist, family, fast, full, strong, attacks, curves, stability, train_step, gains, precisions,
                                        breakdown, expectation, memory, evaluation, recipes)}


# ---- pages -------------------------------------------------------------------------------------------------------

def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def fill(text: str) -> tuple[str, list[str]]:
    """(the page with every table made again, the names of the tables that were not as they should be).

    Raises UserError for a table of an unknown name, or one that does not end.
    """
    stale = []

    def table(block: re.Match[str]) -> str:
        name, old = block.groups()
        if name not in TABLES:
            raise UserError(f"there is no table {name!r}; there are {', '.join(TABLES)}")
        new = f"\n{TABLES[name]()}\n\n"  # Markdown renders a table after an empty line only
        if new != old:
            stale.append(name)
        return f"<!-- table: {name} -->\n{new}<!-- end -->"

    filled = BLOCK.sub(table, text)
    if len(re.findall("^<!-- table: ", text, re.MULTILINE)) != len(BLOCK.findall(text)):
        raise UserError("a table has no line `<!-- end -->`")
    return filled, stale


def main() -> None:
    """Write the tables of every page, or with --check name those that are stale: exit code 1."""
    parser = argparse.ArgumentParser("python -m harness.reporting.docs", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with code 1 where a table is not that of its files")
    check, failed = parser.parse_args().check, False
    for page in pages():
        text = page.read_text(encoding="utf-8")
        try:
            filled, stale = fill(text)
        except UserError as error:
            parser.exit(2, f"{parser.prog}: error: {page.name}: {error}\n")
        for name in stale:
            print(f"{page.relative_to(ROOT)}: table {name} is {'stale' if check else 'written'}")
        if not check and stale:
            page.write_text(filled, encoding="utf-8")
        failed |= check and bool(stale)
    sys.exit(failed)


if __name__ == "__main__":
    main()
