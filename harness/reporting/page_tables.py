"""The tables of README.md and docs/, each made from the files in results/ as one piece of Markdown."""
import csv
import statistics
from collections.abc import Iterable
from pathlib import Path

from harness.reporting.cells import NETWORKS, RESULTS, extremes, load, number, pair, rows_of, spread
from harness.reporting.tables import markdown

# ---- what is written by hand: the order of rows, and their labels ------------------------------------------

ALPHAS = ("1.0", "1.5", "2.0")  # of the attacker
BUDGETS = ("0.05", "0.2", "0.5")  # of his KL divergence, in nats
MNIST = {"at": ("AT", "PGD"), "at-alpha0.5": ("AT, alpha 0.5", "PGD+ours"),  # folder -> ours, the paper's
         "trades": ("TRADES", "TRADES"), "trades-alpha2": ("TRADES, alpha 2", "TRADES+ours")}
FAMILY = ("at", "trades", "mart", "gairat", "mail-at", "mail-trades", "vir-at", "vir-trades")
FAST = {"mnist/lenet-at": "AT", "fast/free": "Free AT, m = 8, five epochs", "fast/yopo": "YOPO-5-3",
        "fast/iaat": "IAAT"}
CIFAR10 = {"at": "PGD", "at-alpha0.1": "PGD+ours", "trades": "TRADES", "trades-alpha2": "TRADES+ours"}
STRONG = {"pgd100": "PGD-100", "cw": "CW", "fmn100": "FMN-100", "autoattack": "AutoAttack (ours)",
          "mde": "MDE"}
BLACK_BOX = {"square": "Square", "spsa": "SPSA, 100 images"}
PRINTED = {"NATURAL": "A_nat", "PGD100": "pgd100", "CW": "cw", "FMN100": "fmn100", "AA": "autoattack"}
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


def runs(place: str) -> list[Path]:
    """The folders of one defense's evaluated runs under results/, a seed each."""
    return sorted(file.parent for file in (RESULTS / place).glob("seed*/eval.json"))


def seeds(folders: Iterable[Path]) -> str:
    return ", ".join(folder.name.removeprefix("seed") for folder in folders)


def mnist() -> str:
    """The four defenses of Zeng et al. on both networks, beside the paper's Table 1."""
    rows = []
    for folder, (label, theirs) in MNIST.items():
        for network in ("lenet", "small_cnn"):
            found = runs(f"mnist/{network}-{folder}")
            rows.append([label, f"{NETWORKS[network]}, ours", seeds(found), *measures(found)])
        rows.append([label, "*SmallCNN, paper*", "", *zeng("zeng_table1", theirs)])
    return markdown(["defense", "network", "seeds", *metrics()], rows, left=3)


def zeng(table: str, defense: str) -> list[str]:
    """What a table of Zeng et al. has of a defense, in the columns of `measures`."""
    lines = [line for line in printed(table) if line["defense"] == defense]
    weighted = [number(float(line[metric])) for metric in ("A_sa", "A_tr") for line in lines]
    return ["-", number(float(lines[0]["A_rob"])), *weighted]


def printed(table: str) -> list[dict[str, str]]:
    """The lines of a paper's table."""
    with (RESULTS / f"paper/{table}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cifar10() -> str:
    """The rows on CIFAR-10, four of them beside Table 2 of Zeng et al."""
    rows = []
    for place in cifar10_rows():
        name = place.partition("/")[2]
        rows.append([label_of(place)[0], "ours", seeds(runs(place)), *measures(runs(place))])
        if name in CIFAR10:
            rows.append([rows[-1][0], "*ResNet-18, paper*", "", *zeng("zeng_table2", CIFAR10[name])])
    return markdown(["defense", "network", "seeds", *metrics()], rows, left=3)


def cifar10_rows() -> list[str]:
    """The rows on CIFAR-10 that have been measured: Zeng's four, then the others of VIR's tables."""
    places = [f"cifar10-w16/{name}" for name in dict.fromkeys((*CIFAR10, *FAMILY))]
    return [place for place in places if runs(place)]


def family() -> str:
    """The eight methods of the VIR tables, over their seeds."""
    rows = [[name.upper(), seeds(runs(f"vir/{name}")), *measures(runs(f"vir/{name}"))] for name in FAMILY]
    return markdown(["defense", "seeds", *metrics()], rows, left=2)


def equal_strength(rows: dict[tuple[str, ...], list[dict]], head: list[str], accuracy: str) -> str:
    """A_sa at equal alpha and at equal KL budgets, over seeds, with ranks.

    rows: labels -> results, or their worst cases; accuracy: the name of the unweighted accuracy in them.
    """
    columns = [[[place[accuracy] for place in places], [place["A_sa"]["2.0"] for place in places],
                *([place["A_sa_kl"][budget] for place in places] for budget in BUDGETS)]
               for places in rows.values()]
    means = [[statistics.mean(column) for column in row] for row in columns]
    ranks = [[str(1 + sum(other[k] > row[k] for other in means)) for k in (0, 1, 3)] for row in means]
    lines = [[*labels, *map(spread, row), *places] for labels, row, places in zip(rows, columns, ranks)]
    name = "worst case" if accuracy == "accuracy" else accuracy
    titles = [name, "A_sa 2", *(f"A_sa, {budget} nats" for budget in BUDGETS)]
    return markdown([*head, *titles, f"rank by {name}", "by A_sa 2", "by 0.2 nats"], lines, left=len(head))


def results_of(place: str) -> list[dict]:
    return [load(folder / "eval.json") for folder in runs(place)]


def equal_budget() -> str:
    """Attackers of equal strength on AT, TRADES, their margin weights, Free AT, YOPO and IAAT."""
    rows = {(label, NETWORKS[network]): results_of(f"mnist/{network}-{folder}")
            for network in ("lenet", "small_cnn") for folder, (label, _) in MNIST.items()}
    rows |= {(label, NETWORKS["lenet"]): results_of(folder) for folder, label in [*FAST.items()][1:]}
    return equal_strength(rows, ["defense", "network"], "A_rob")


def equal_budget_family() -> str:
    """Attackers of equal strength on the eight methods of the VIR tables."""
    return equal_strength({(name.upper(),): results_of(f"vir/{name}") for name in FAMILY}, ["defense"],
                          "A_rob")


def equal_budget_cifar10() -> str:
    """Attackers of equal strength on the rows of CIFAR-10."""
    return equal_strength({label_of(place)[:1]: results_of(place) for place in cifar10_rows()}, ["defense"],
                          "A_rob")


def losses() -> str:
    """The worst mean cross-entropy of the eight methods within KL budgets, and CVaR."""
    columns = {f"{budget} nats": ("loss_kl", budget) for budget in BUDGETS}
    columns |= {"largest 10 %": ("loss_cvar", "0.1"), "largest 1 %": ("loss_cvar", "0.01")}
    rows = [[name.upper(), *(spread(result[key][at] for result in results_of(f"vir/{name}"))
                             for key, at in columns.values())] for name in FAMILY]
    return markdown(["defense", *columns], rows, left=1)


def fast() -> str:
    """Free AT, YOPO and IAAT beside AT, with what they cost."""
    costs = {row["result"].partition("/seed")[0]: row for row in rows_of("cost")}
    rows = []
    for folder, label in FAST.items():
        cost = costs[f"results/{folder}"]
        times = [number(cost["seconds"] / cost["epochs"], 1), number(cost["seconds"] / 60, 1)]
        rows.append([label, seeds(runs(folder)), *measures(runs(folder)), *times])
    return markdown(["defense", "seeds", *metrics(), "s per epoch", "minutes"], rows, left=2)


def label_of(place: str) -> tuple[str, str, str]:
    """(defense, network, recipe) of a folder of runs."""
    group, name = place.split("/")
    if group == "cifar10-w16":
        return name.upper().replace("-ALPHA", ", alpha "), NETWORKS["resnet18_w16"], "CIFAR-10's"
    if group == "vir":
        return name.upper(), NETWORKS["lenet"], "VIR's"
    if group == "fast":
        return FAST[place].split(",")[0], NETWORKS["lenet"], "short"
    network, _, folder = name.partition("-")
    return MNIST[folder][0], NETWORKS[network], "short"


def attacked(groups: Iterable[str] = ("mnist", "vir", "fast")) -> dict[tuple[str, str, str], list[dict]]:
    """(defense, network, recipe) -> its results under strong attacks, the safest first."""
    found: dict[tuple[str, str, str], list[dict]] = {}
    for file in sorted(file for group in groups for file in RESULTS.glob(f"{group}/*/seed*/strong.json")):
        found.setdefault(label_of("/".join(file.relative_to(RESULTS).parts[:2])), []).append(load(file))
    worst = {label: statistics.mean(result["worst_case"]["accuracy"] for result in results)
             for label, results in found.items()}
    return {label: found[label] for label in sorted(found, key=worst.__getitem__, reverse=True)}


def strong() -> str:
    """What strong attacks leave of each result on MNIST, the safest first."""
    head = ["defense", "network", "recipe", "suspicious", "A_nat", "A_rob", *STRONG.values(), "worst case"]
    return markdown(head, strong_rows(attacked(), STRONG), left=4)


def strong_cifar10() -> str:
    """The same on CIFAR-10, each row beside Table 1 of VIR."""
    columns = STRONG | BLACK_BOX
    theirs = {line["defense"]: line for line in printed("vir_table1")}
    rows = []
    for defense, _, _, signs, *cells in strong_rows(attacked(["cifar10-w16"]), columns):
        rows.append([defense, "ours", signs, *cells])
        if line := theirs.get(defense):
            known = {ours: number(float(line[f"{name}_mean"]), 1) for name, ours in PRINTED.items()}
            rows.append([defense, "*ResNet-18, paper*", "",
                         *(known.get(column, "-") for column in ("A_nat", "A_rob", *columns, "worst case"))])
    head = ["defense", "network", "suspicious", "A_nat", "A_rob", *columns.values(), "worst case"]
    return markdown(head, rows, left=3)


def strong_rows(found: dict[tuple[str, str, str], list[dict]], columns: Iterable[str]) -> list[list[str]]:
    """For each label: it, the signs of a suspicious verdict, A_nat, A_rob, these attacks, the worst case."""
    rows = []
    for label, results in found.items():
        signs = {sign for result in results if result["verdict"] != "ok"
                 for sign in result["verdict"].removeprefix("suspicious: ").split(", ")}
        cells = [[result["A_nat"], result["A_rob"],
                  *(result["attacks"][attack]["accuracy"] for attack in columns),
                  result["worst_case"]["accuracy"]] for result in results]
        rows.append([*label, ", ".join(sorted(signs)) or "-",
                     *(number(statistics.mean(column), 1) for column in zip(*cells))])
    return rows


def equal_budget_strong() -> str:
    """Attackers of equal strength in the worst case under strong attacks on MNIST, the safest first."""
    return equal_strength(worst_cases(attacked()), ["defense", "network", "recipe"], "accuracy")


def equal_budget_strong_cifar10() -> str:
    """The same on CIFAR-10."""
    found = {label[:1]: cases for label, cases in worst_cases(attacked(["cifar10-w16"])).items()}
    return equal_strength(found, ["defense"], "accuracy")


def worst_cases(found: dict[tuple[str, str, str], list[dict]]) -> dict[tuple[str, ...], list[dict]]:
    return {label: [result["worst_case"] for result in results] for label, results in found.items()}


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
