"""The tables of README.md and docs/, each made from the files in results/ as one piece of Markdown."""
import csv
import re
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

from harness.reporting.cells import NETWORKS, RESULTS, extremes, load, number, pair, rows_of, spread
from harness.reporting.tables import defense, markdown

# ---- what is written by hand: the order of rows, and their labels ------------------------------------------

ALPHAS = ("1.0", "1.5", "2.0")  # of the attacker
BUDGETS = ("0.05", "0.2", "0.5")  # of his KL divergence, in nats
MNIST = {"at": ("AT", "PGD"), "at-alpha0.5": ("AT, alpha 0.5", "PGD+ours"),  # folder -> ours, the paper's
         "trades": ("TRADES", "TRADES"), "trades-alpha2": ("TRADES, alpha 2", "TRADES+ours")}
FAMILY = ("at", "trades", "mart", "gairat", "mail-at", "mail-trades", "vir-at", "vir-trades")
FAST = {"mnist/lenet-at": "AT", "fast/free": "Free AT, m = 8, five epochs", "fast/yopo": "YOPO-5-3",
        "fast/iaat": "IAAT"}
BEFORE = ("mnist/*", "vir/*/seed*", "fast/*")  # whole runs by recipes without gradient clipping
STRONG = {"pgd100": "PGD-100", "cw": "CW", "fmn100": "FMN-100", "autoattack": "AutoAttack (ours)",
          "mde": "MDE"}
BESIDE = {"at": "AT, 0.3", "trades": "TRADES, 0.3", "plain": "no attack, 0.1"}
ATTACKS = {"fgsm": "FGSM", "pgd100": "PGD-100", "cw": "CW-20", "apgd-ce": "APGD-CE", "apgd-dlr": "APGD-DLR",
           "apgd-t": "APGD-T", "fab-t": "FAB-T", "fmn100": "FMN-100", "md": "MD", "mdmt": "MDMT",
           "square": "Square", "spsa": "SPSA", "spsa-short": "SPSA, a tenth of its passes",
           "autoattack": "AutoAttack", "together": "MDE, CW-20 and the shorter SPSA together"}
SEVERAL_SEEDS = ("md", "autoattack")
CURVES = {"at": "AT", "at-alpha0.5": "AT, alpha 0.5", "trades": "TRADES", "trades-alpha2": "TRADES, alpha 2",
          "vir-recipe-at": "AT, VIR's recipe", "vir-at": "VIR-AT", "gairat": "GAIRAT"}
KINDS = {"at": "AT", "gairat": "GAIRAT", "wong_kolter_mnist": "certified", "plain": "plain"}
HELD_OUT = {"A_nat": "A_nat", "A_rob": "A_rob", "test_A_nat": "A_nat, test set",
            "test_A_rob": "A_rob, test set"}


# ---- metrics and results -----------------------------------------------------------------------------------

def metrics(alphas: Iterable[str] = ALPHAS) -> list[str]:
    """The columns of `measures`."""
    weighted = [f"{metric} {float(alpha):g}" for metric in ("A_sa", "A_tr") for alpha in alphas]
    return ["A_nat", "A_rob", *weighted]


def measures(folders: Iterable[Path], alphas: Iterable[str] = ALPHAS) -> list[str]:
    """What the evaluations of runs found, over their seeds."""
    results = [load(folder / "eval.json") for folder in folders]
    found = [spread(result[metric] for result in results) for metric in ("A_nat", "A_rob")]
    return found + [spread(result[metric][alpha] for result in results)
                    for metric in ("A_sa", "A_tr") for alpha in alphas]


def mnist() -> str:
    """The four defenses of Zeng et al. on both networks, beside the paper's Table 1."""
    with (RESULTS / "paper/zeng_table1.csv").open(encoding="utf-8") as file:
        printed = list(csv.DictReader(file))
    rows = []
    for folder, (label, theirs) in MNIST.items():
        rows += [[label, f"{NETWORKS[network]}, ours", *measures([RESULTS / f"mnist/{network}-{folder}"])]
                 for network in ("lenet", "small_cnn")]
        lines = [line for line in printed if line["defense"] == theirs]
        weighted = [number(float(line[metric])) for metric in ("A_sa", "A_tr") for line in lines]
        rows.append([label, "*SmallCNN, paper*", "-", number(float(lines[0]["A_rob"])), *weighted])
    return markdown(["defense", "network", *metrics()], rows, left=2)


def family() -> str:
    """The eight methods of the VIR tables, over their seeds."""
    rows = [[name.upper(), *measures(sorted((RESULTS / "vir" / name).glob("seed*")))] for name in FAMILY]
    return markdown(["defense", *metrics()], rows, left=1)


def equal_strength(rows: dict[tuple[str, ...], list[str]], head: list[str], source: str = "recovered",
                   at: str = "A_rob") -> str:
    """A_sa at equal alpha and at equal KL budgets, over seeds, with ranks; rows: labels -> result files.

    A_sa at a budget is what the result measured; in older ones, which did not, the middle of what
    results/budget/SOURCE.json says it may be; at A_rob's examples or at the worst case under strong attacks.
    """
    found = {row["file"]: row["A_sa_kl"] for row in load(f"budget/{source}.json")["rows"] if row["at"] == at}

    def values(file: str) -> list[float]:
        """A_rob or the worst case, A_sa at alpha 2 and at BUDGETS."""
        result = load(file)
        place = result | {"accuracy": result["A_rob"]} if at == "A_rob" else result[at]
        at_budgets = place.get("A_sa_kl") or {budget: statistics.mean(found[f"results/{file}"][budget])
                                              for budget in BUDGETS}
        return [place["accuracy"], place["A_sa"]["2.0"], *(at_budgets[budget] for budget in BUDGETS)]

    columns = [list(zip(*map(values, files))) for files in rows.values()]
    means = [[statistics.mean(column) for column in row] for row in columns]
    places = [[1 + sum(other[k] > row[k] for other in means) for k in (0, 1, 3)] for row in means]
    lines = [[*labels, *map(spread, row), *map(str, ranks)]
             for labels, row, ranks in zip(rows, columns, places)]
    accuracy = at.replace("_case", " case")
    titles = [accuracy, "A_sa 2", *(f"KL {budget}" for budget in BUDGETS)]
    return markdown([*head, *titles, f"rank: {accuracy}", "A_sa 2", "KL 0.2"], lines, left=len(head))


def equal_budget() -> str:
    """Attackers of equal strength on the single runs: AT, TRADES, Free AT, YOPO and IAAT."""
    rows = {(label, NETWORKS[network]): [f"mnist/{network}-{folder}/eval.json"]
            for network in ("lenet", "small_cnn") for folder, (label, _) in MNIST.items()}
    rows |= {(label, NETWORKS["lenet"]): [f"{folder}/eval.json"] for folder, label in [*FAST.items()][1:]}
    return equal_strength(rows, ["defense", "network"])


def equal_budget_family() -> str:
    """Attackers of equal strength on the eight methods of the VIR tables, over their seeds."""
    rows = {(name.upper(),): [f"vir/{name}/{folder.name}/eval.json"
                              for folder in sorted((RESULTS / "vir" / name).glob("seed*"))]
            for name in FAMILY}
    return equal_strength(rows, ["defense"])


def equal_budget_full() -> str:
    """Attackers of equal strength on the runs with today's recipes."""
    rows = {}
    for config, _, folders in over_seeds(file.parent for file in
                                         (RESULTS / "stability/full").glob("*/eval.json")):
        recipe = "VIR's" if config["script"] == "train_vir" else "short"
        rows[name_of(config), NETWORKS[config["model"]], recipe] = [
            f"stability/full/{folder.name}/eval.json" for folder in folders]
    return equal_strength(rows, ["defense", "network", "recipe"])


def equal_budget_strong() -> str:
    """Attackers of equal strength in the worst case under strong attacks."""
    files = sorted((RESULTS / "strong").glob("*.json"))
    return equal_strength({(file.stem,): [f"strong/{file.name}"] for file in files}, ["result"],
                          "recovered_strong", "worst_case")


def fast() -> str:
    """Free AT, YOPO and IAAT beside AT, with what they cost."""
    costs = {row["result"]: row for row in rows_of("cost")}
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


def kind_of(training: dict) -> tuple[str, str, str]:
    return training["script"], name_of(training), training["model"]


def over_seeds(folders: Iterable[Path]) -> Iterator[tuple[dict, str, list[Path]]]:
    """(configuration, seeds, folders) of the runs that differ in nothing but the seed, in order of folder."""
    groups: dict[tuple, list[tuple[int, Path, dict]]] = {}
    for folder in sorted(folders):
        config = load(folder / "config.json")
        key = *kind_of(config), config["precision"], config["training_images"]
        groups.setdefault(key, []).append((config["seed"], folder, config))
    for runs in groups.values():
        runs.sort(key=lambda run: run[:2])
        yield runs[0][2], ", ".join(str(seed) for seed, _, _ in runs), [folder for _, folder, _ in runs]


def full() -> str:
    """The runs with today's recipes, each beside the ones before gradient clipping."""
    today = over_seeds(file.parent for file in (RESULTS / "stability/full").glob("*/eval.json"))
    before = list(over_seeds(folder for pattern in BEFORE for folder in RESULTS.glob(pattern)))
    rows = []

    def add(recipe: str, config: dict, seeds: str, folders: list[Path]) -> None:
        network, images = NETWORKS.get(config["model"], config["model"]), config["training_images"]
        facts = [name_of(config), network, recipe, config["precision"], number(images, 0), seeds]
        rows.append([*facts, *measures(folders, ("2.0",))])

    for config, seeds, folders in today:
        add("today's", config, seeds, folders)
        for other, *rest in before:
            if kind_of(other) == kind_of(config):
                add("before", other, *rest)
    head = ["defense", "network", "recipe", "precision", "images", "seed", *metrics(("2.0",))]
    return markdown(head, rows, left=4)


def strong() -> str:
    """What strong attacks leave of each result, the safest first."""
    results = {file.stem: load(file) for file in (RESULTS / "strong").glob("*.json")}
    rows = []
    for name, result in sorted(results.items(), key=lambda item: (-item[1]["worst_case"]["accuracy"],
                                                                  -item[1]["A_rob"], item[0])):
        worst = result["worst_case"]
        attacked = [result["attacks"][attack]["accuracy"] for attack in STRONG]
        cells = [result["A_nat"], result["A_rob"], *attacked, worst["accuracy"], worst["A_sa"]["2.0"]]
        signs = result["verdict"].removeprefix("suspicious: ").replace("ok", "-")
        rows.append([name, signs, *(number(cell, 1) for cell in cells)])
    head = ["result", "suspicious", "A_nat", "A_rob", *STRONG.values(), "worst case", "its A_sa 2"]
    return markdown(head, rows, left=2)


def attacks() -> str:
    """Our attacks beside others' implementations of the same."""
    files = [load(f"attacks/lenet-{name}.json") for name in BESIDE]
    columns = [{(row["attack"], row["seed"]): row for row in file["rows"]} for file in files]
    rows = []
    for attack, label in ATTACKS.items():
        seeds = sorted(seed for name, seed in columns[0] if name == attack)
        for seed in seeds if attack in SEVERAL_SEEDS else seeds[:1]:
            both = [column[attack, seed] for column in columns]
            theirs = [row.get("published") or row["reference"] for row in both]
            cells = [pair(row["ours"]["accuracy"], other["accuracy"]) for row, other in zip(both, theirs)]
            rows.append([f"{label}, seed {seed}" if attack in SEVERAL_SEEDS else label, *cells])
    return markdown(["attack", *BESIDE.values()], rows, left=1)


def curves() -> str:
    """Robustness curves at a few radii, and median distances."""
    models = load("curves/summary.json")["models"]
    rows = []
    for name, label in CURVES.items():
        norms = models[name]["norms"]
        reached = {(norm, one["t"]): number(100 * one["R"], 1)
                   for norm in norms for one in norms[norm]["thresholds"]}
        median = {norm: number(norms[norm]["median"], 3) for norm in norms}
        wrong = number(100 * norms["linf"]["clean_error"], 1)
        rows.append([f"{label} (`{name}`)", wrong, reached["linf", 0.2], reached["linf", 0.3], median["linf"],
                     reached["l2", 1.0], median["l2"], reached["l1", 2.0], median["l1"]])
    head = ["network", "wrong unattacked", "R(0.2) l_inf", "R(0.3)", "median", "R(1) l_2", "median",
            "R(2) l_1", "median"]
    return markdown(head, rows, left=1)


def mean_budget() -> str:
    """The mean budgets that leave 90 and 50 % of the points right, for p = 1, 2 and infinity."""
    left = load("curves/budget/summary.json")["mean_budget_that_leaves"]
    shown = [(norm, share, order) for norm in ("linf", "l2") for share in ("0.9", "0.5")
             for order in ("1", "2", "inf")]
    rows = [[label, *(number(left[name][norm][order][share], 3) for norm, share, order in shown)]
            for name, label in CURVES.items()]
    norms = {"linf": "l_inf", "l2": "l_2"}
    heads = [f"{norms[norm]}, {100 * float(share):g} %, p = {order}" if order == "1" else f"p = {order}"
             for norm, share, order in shown]
    return markdown(["network", *heads], rows, left=1)


def members() -> str:
    """What each attack of the pool gains in l_inf, on networks of four kinds."""
    found, before = ({(row["member"], row["model"]): row for row in load(f"curves-check/{file}.json")["rows"]
                      if row["norm"] == "linf"} for file in ("members", "members-before"))
    rows = []
    for name in dict.fromkeys(member for member, _ in found):
        each = [found[name, model] for model in KINDS]
        if any(row["gain"] is None or row["gain"] >= 0.01 for row in each):
            gains = ["-" if row["gain"] is None else number(row["gain"]) for row in each]
            seconds = [number(file[name, "at"]["seconds"], 3) if (name, "at") in file else "-"
                       for file in (before, found)]
            rows.append([name, *seconds, *gains])
    total = [number(sum(row["seconds"] for (_, model), row in file.items() if model == "at"), 3)
             for file in (before, found)]
    rows.append(["all, in three norms", *total, *("" for _ in KINDS)])
    return markdown(["attack", "s a point (AT), before", "now", *KINDS.values()], rows, left=1)


# ---- stability ---------------------------------------------------------------------------------------------

def stability_table(rows: list[dict]) -> str:
    """The rows of benchmarks/stability.py, a line for each defense and precision, with the runs' extremes."""
    lines = []
    for name, precision in dict.fromkeys((row["defense"], row["precision"]) for row in rows):
        runs = [row for row in rows if (row["defense"], row["precision"]) == (name, precision)]
        used = dict.fromkeys((row["aten"], row["onednn"]) for row in runs)
        sets = ["native" if both == ("all", "all") else ", ".join(both) for both in used]
        at_chance = sum(row["epochs_at_chance"] > 0 for row in runs)
        found = [extremes([row[metric] for row in runs if metric in row]) for metric in HELD_OUT]
        lines.append([name, precision, "; ".join(sets), str(len(runs)), str(at_chance), *found])
    head = ["defense", "precision", "instruction sets", "runs", "at chance"]
    return markdown([*head, *(f"{name}, min / median / max" for name in HELD_OUT.values())], lines, left=3)


def stability() -> str:
    """A table for each file, under a line with a link to it."""
    parts = []
    for file in sorted((RESULTS / "stability").glob("*.json")):
        rows = load(file)["rows"]
        stopped = sorted({row["epochs"] for row in rows if " --epochs " in row["command"]})
        note = f", stopped after {' or '.join(map(str, stopped))} epochs" if stopped else ""
        link = f"[`results/stability/{file.name}`](../results/stability/{file.name})"
        parts.append(f"{link}{note}:\n\n{stability_table(rows)}")
    return "\n\n".join(parts)
