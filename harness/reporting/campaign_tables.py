"""The tables of README.md and docs/ on all runs together: a weighting and its base, collapse, hours."""
import csv
import json
from collections.abc import Iterable
from functools import reduce
from operator import getitem
from pathlib import Path

from harness.reporting.cells import RESULTS, difference, extremes, load, number
from harness.reporting.page_tables import FAMILY, label_of, runs, seeds
from harness.reporting.tables import markdown

BASES = {f"mnist/{network}-{name}": f"mnist/{network}-{name.partition('-')[0]}"  # weighting -> its base
         for network in ("lenet", "small_cnn") for name in ("at-alpha0.5", "trades-alpha2")}
BASES |= {f"vir/{name}": f"vir/{'trades' if 'trades' in name else 'at'}" for name in FAMILY[2:]}
GROUPS = {"mnist/lenet-*": "MNIST, LeNet, Zeng's four", "mnist/small_cnn-*": "MNIST, SmallCNN, Zeng's four",
          "vir/*": "MNIST, LeNet, the eight of VIR's recipes", "fast/*": "MNIST, LeNet, the fast three"}


def paired() -> str:
    """Every weighting beside its base, seed by seed."""
    rows = []
    for place, base in BASES.items():
        both = [(folder, RESULTS / base / folder.name) for folder in runs(place)]
        both = [pair for pair in both if (pair[1] / "eval.json").exists()]
        attacked = [pair for pair in both if all((folder / "strong.json").exists() for folder in pair)]
        columns = (("eval.json", both, ("A_rob",)), ("eval.json", both, ("A_sa", "2.0")),
                   ("eval.json", both, ("A_sa_kl", "0.2")),
                   ("strong.json", attacked, ("worst_case", "accuracy")),
                   ("strong.json", attacked, ("worst_case", "A_sa_kl", "0.2")))
        found = [difference(value(ours / name, keys) - value(theirs / name, keys)
                                  for ours, theirs in pairs) for name, pairs, keys in columns]
        rows.append([*label_of(place), label_of(base)[0], seeds(folder for folder, _ in both), *found])
    head = ["defense", "network", "recipe", "minus", "seeds"]
    measured = ["A_rob", "A_sa 2", "A_sa, 0.2 nats", "worst case", "worst case, 0.2 nats"]
    return markdown([*head, *measured], rows, left=5)


def value(file: Path, keys: Iterable[str]) -> float:
    """What stands in a result file under these keys, one in the other."""
    return reduce(getitem, keys, load(file))


def logged() -> str:
    """The logs of all runs under results/ that have a table of results: whether one was ever at chance."""
    found: dict[tuple[str, str, str], list[tuple[str, list[dict[str, str]]]]] = {}
    for file in sorted(RESULTS.glob("*/*/seed*/log.csv")):
        group, name, seed = file.relative_to(RESULTS).parts[:3]
        with file.open(encoding="utf-8") as log:
            own = found.setdefault(label_of(f"{group}/{name}"), [])
            own.append((seed.removeprefix("seed"), list(csv.DictReader(log))))
    rows = []
    for label, logs in found.items():
        lengths = sorted({len(log) for _, log in logs})
        at_chance = sum(any(int(row["epochs_at_chance"]) for row in log) for _, log in logs)
        reached = extremes([float(log[-1]["train_A_rob"]) for _, log in logs])
        rows.append([*label, ", ".join(seed for seed, _ in logs), " or ".join(map(str, lengths)),
                     str(at_chance), reached])
    head = ["defense", "network", "recipe", "seeds", "epochs", "at chance",
            "A_rob in training, min / median / max"]
    return markdown(head, rows, left=4)


def hours() -> str:
    """The hours that the runs of each group took, one thread each; a burn-in counts once."""
    rows = []
    for pattern, label in GROUPS.items():
        folders = [file.parent for file in RESULTS.glob(f"{pattern}/seed*/log.csv")]
        cells = [str(len(folders)), number(sum(map(training_seconds, folders)) / 3600, 1)]
        for name in ("eval.json", "strong.json"):
            results = [load(folder / name) for folder in folders if (folder / name).exists()]
            cells += [str(len(results)), number(sum(result["seconds"] for result in results) / 3600, 1)]
        rows.append([label, *cells])
    parts = ("trained", "evaluated", "attacked strongly")
    return markdown(["runs", *(cell for part in parts for cell in (part, "hours"))], rows, left=1)


def training_seconds(folder: Path) -> float:
    """The seconds of the epochs in a run's log that are its own."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    others = config["burn_in_epochs"] if config.get("burn_in_from") else 0
    with (folder / "log.csv").open(encoding="utf-8") as log:
        return sum(float(row["seconds"]) for row in csv.DictReader(log) if int(row["epoch"]) > others)
