"""The tables of README.md and docs/ on trained defenses: metrics, equal strength, strong attacks."""
import csv
import statistics
from collections.abc import Iterable
from pathlib import Path

from harness.reporting.cells import NETWORKS, RESULTS, load, number, rows_of, spread
from harness.reporting.tables import markdown

# ---- what is written by hand: the order of rows, and their labels ------------------------------------------

ALPHAS = ("1.0", "1.5", "2.0")  # of the attacker
BUDGETS = ("0.05", "0.2", "0.5")  # of his KL divergence, in nats
MNIST = {"at": ("AT", "PGD"), "at-alpha0.5": ("AT, alpha 0.5", "PGD+ours"),  # folder -> ours, the paper's
         "trades": ("TRADES", "TRADES"), "trades-alpha2": ("TRADES, alpha 2", "TRADES+ours")}
MNIST_GROUPS = ("mnist", "vir", "fast")  # folders under results/
FAMILY = ("at", "trades", "trades-5", "mart", "gairat", "mail-at", "mail-trades", "vir-at",
          "vir-trades")
VIR = tuple(f"vir/{name}" for name in FAMILY)
SIZES = (("at", "mail-at", "mail-at-mean1", "vir-at", "vir-at-mean1"),
         ("trades-5", "mail-trades", "mail-trades-mean1", "vir-trades", "vir-trades-mean1"))
FAST = {"mnist/lenet-at": "AT", "fast/free": "Free AT, m = 8, five epochs", "fast/yopo": "YOPO-5-3",
        "fast/iaat": "IAAT"}
CIFAR10 = {"at": "PGD", "at-alpha0.1": "PGD+ours", "trades": "TRADES", "trades-alpha2": "TRADES+ours"}
STRONG = {"pgd100": "PGD-100", "cw": "CW", "fmn100": "FMN-100", "autoattack": "AutoAttack (ours)",
          "mde": "MDE"}
BLACK_BOX = {"square": "Square", "spsa": "SPSA, 100 images"}
PRINTED = {"NATURAL": "A_nat", "PGD100": "pgd100", "CW": "cw", "FMN100": "fmn100", "AA": "autoattack",
           "MDE": "mde"}


# ---- the files ---------------------------------------------------------------------------------------------

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
    """The numbers at the end of these folders' names."""
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
        label, network, _ = label_of(place)
        rows.append([label, f"{network}, ours", seeds(runs(place)), *measures(runs(place))])
        if name in CIFAR10:
            rows.append([label, "*ResNet-18, paper*", "", *zeng("zeng_table2", CIFAR10[name])])
    return markdown(["defense", "network", "seeds", *metrics()], rows, left=3)


def cifar10_rows() -> list[str]:
    """The rows on CIFAR-10 that have been measured: Zeng's four, then the others of VIR's tables."""
    places = [f"cifar10-w16/{name}" for name in dict.fromkeys((*CIFAR10, *FAMILY))]
    return [place for place in places if runs(place)]


def family() -> str:
    """The methods of the VIR tables, over their seeds."""
    rows = [[label_of(place)[0], seeds(runs(place)), *measures(runs(place))] for place in VIR]
    return markdown(["defense", "seeds", *metrics()], rows, left=2)


def mean_one() -> str:
    """MAIL and VIR with weights as published and of mean 1, below their bases, on the seeds they share."""
    rows = []
    for names in SIZES:
        for place, folders in on_shared_seeds([f"vir/{name}" for name in names]).items():
            size = statistics.mean(map(last_weight, folders))
            cells = zip(*([result["A_nat"], result["A_rob"], result["A_sa"]["2.0"], result["A_sa_kl"]["0.2"]]
                          for result in (load(folder / "eval.json") for folder in folders)))
            rows.append([label_of(place)[0], seeds(folders), f"{size:.2g}", *map(spread, cells)])
    return markdown(["defense", "seeds", "mean weight", "A_nat", "A_rob", "A_sa 2", "A_sa, 0.2 nats"], rows,
                    left=2)


def on_shared_seeds(places: Iterable[str]) -> dict[str, list[Path]]:
    """Row -> the folders of its evaluated runs, of those seeds that all these rows have."""
    found = {place: runs(place) for place in places}
    shared = set.intersection(*({folder.name for folder in folders} for folders in found.values()))
    return {place: [folder for folder in folders if folder.name in shared]
            for place, folders in found.items()}


def last_weight(folder: Path) -> float:
    """The mean instance weight in the last epoch of a run."""
    with (folder / "log.csv").open(encoding="utf-8") as file:
        return float([*csv.DictReader(file)][-1]["train_weight"])


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
    """What the evaluations of one defense's runs hold."""
    return [load(folder / "eval.json") for folder in runs(place)]


def equal_budget() -> str:
    """Attackers of equal strength on AT, TRADES, their margin weights, Free AT, YOPO and IAAT."""
    names = {f"mnist/{network}-{folder}": (label, NETWORKS[network])
             for network in ("lenet", "small_cnn") for folder, (label, _) in MNIST.items()}
    names |= {place: (label, NETWORKS["lenet"]) for place, label in [*FAST.items()][1:]}
    rows = {(*labels, seeds(runs(place))): results_of(place) for place, labels in names.items()}
    return equal_strength(rows, ["defense", "network", "seeds"], "A_rob")


def equal_budget_family() -> str:
    """Attackers of equal strength on the methods of the VIR tables."""
    rows = {(label_of(place)[0], seeds(runs(place))): results_of(place) for place in VIR}
    return equal_strength(rows, ["defense", "seeds"], "A_rob")


def equal_budget_cifar10() -> str:
    """Attackers of equal strength on the rows of CIFAR-10."""
    return equal_strength({label_of(place)[:1]: results_of(place) for place in cifar10_rows()}, ["defense"],
                          "A_rob")


def losses() -> str:
    """The worst mean cross-entropy of the same methods within KL budgets, and CVaR."""
    columns = {f"{budget} nats": ("loss_kl", budget) for budget in BUDGETS}
    columns |= {"largest 10 %": ("loss_cvar", "0.1"), "largest 1 %": ("loss_cvar", "0.01")}
    rows = [[label_of(place)[0], seeds(runs(place)), *(spread(result[key][at] for result in results_of(place))
                                                       for key, at in columns.values())] for place in VIR]
    return markdown(["defense", "seeds", *columns], rows, left=2)


def fast() -> str:
    """Free AT, YOPO and IAAT beside AT on the seeds that they share, with what they cost."""
    costs = {row["result"].partition("/seed")[0]: row for row in rows_of("cost")}
    rows = []
    for place, folders in on_shared_seeds(FAST).items():
        cost = costs[f"results/{place}"]
        times = [number(cost["seconds"] / cost["epochs"], 1), number(cost["seconds"] / 60, 1)]
        rows.append([FAST[place], seeds(folders), *measures(folders), *times])
    return markdown(["defense", "seeds", *metrics(), "s per epoch", "minutes"], rows, left=2)


def label_of(place: str) -> tuple[str, str, str]:
    """(defense, network, recipe) of a folder of runs."""
    group, name = place.split("/")
    if group == "cifar10-w16":
        return name.upper().replace("-ALPHA", ", alpha "), NETWORKS["resnet18_w16"], "CIFAR-10's"
    if group == "vir":
        label = name.upper().replace("-5", ", 1/lambda 5").replace("-MEAN1", ", mean 1")
        return label, NETWORKS["lenet"], "VIR's"
    if group == "fast":
        return FAST[place].split(",")[0], NETWORKS["lenet"], "short"
    network, _, folder = name.partition("-")
    return MNIST[folder][0], NETWORKS[network], "short"


def attacked(groups: Iterable[str] = MNIST_GROUPS) -> dict[tuple[str, ...], list[dict]]:
    """(defense, network, recipe, seeds) -> its results under strong attacks, the safest first."""
    found = {}
    for row in sorted(row for group in groups for row in RESULTS.glob(f"{group}/*")):
        if files := sorted(row.glob("seed*/strong.json")):
            label = *label_of(f"{row.parent.name}/{row.name}"), seeds(file.parent for file in files)
            found[label] = [load(file) for file in files]
    worst = {label: statistics.mean(result["worst_case"]["accuracy"] for result in results)
             for label, results in found.items()}
    return {label: found[label] for label in sorted(found, key=worst.__getitem__, reverse=True)}


def strong() -> str:
    """What strong attacks leave of each result on MNIST, the safest first."""
    head = ["defense", "network", "recipe", "seeds", "suspicious", "A_nat", "A_rob", *STRONG.values(),
            "worst case"]
    return markdown(head, strong_rows(attacked(), STRONG), left=5)


def strong_cifar10() -> str:
    """The same on CIFAR-10, each row beside Table 1 of VIR."""
    columns = STRONG | BLACK_BOX
    theirs = {line["defense"]: line for line in printed("vir_table1")}
    rows = []
    for defense, _, _, own_seeds, signs, *cells in strong_rows(attacked(["cifar10-w16"]), columns):
        rows.append([defense, "ours", own_seeds, signs, *cells])
        if line := theirs.get(defense):
            known = {ours: number(float(line[f"{name}_mean"]), 1) for name, ours in PRINTED.items()}
            rows.append([defense, "*ResNet-18, paper*", "", "",
                         *(known.get(column, "-") for column in ("A_nat", "A_rob", *columns, "worst case"))])
    head = ["defense", "network", "seeds", "suspicious", "A_nat", "A_rob", *columns.values(), "worst case"]
    return markdown(head, rows, left=4)


def strong_rows(found: dict[tuple[str, ...], list[dict]], columns: Iterable[str]) -> list[list[str]]:
    """For each label: it, the signs of suspicious verdicts, A_nat, A_rob, these attacks, the worst case."""
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
    return equal_strength(worst_cases(attacked()), ["defense", "network", "recipe", "seeds"], "accuracy")


def equal_budget_strong_cifar10() -> str:
    """The same on CIFAR-10."""
    found = {(defense, own_seeds): cases
             for (defense, _, _, own_seeds), cases in worst_cases(attacked(["cifar10-w16"])).items()}
    return equal_strength(found, ["defense", "seeds"], "accuracy")


def worst_cases(found: dict[tuple[str, ...], list[dict]]) -> dict[tuple[str, ...], list[dict]]:
    """The part of results under strong attacks that is about the worst case over all of them."""
    return {label: [result["worst_case"] for result in results] for label, results in found.items()}
