"""The tables of README.md and docs/ on all runs together: a weighting and its base, collapse, hours."""
import csv
import json
from pathlib import Path

from harness.reporting.cells import RESULTS, difference, extremes, load, number
from harness.reporting.page_tables import label_of
from harness.reporting.tables import markdown

GROUPS = {"mnist/lenet-*": "MNIST, LeNet, Zeng's four", "mnist/small_cnn-*": "MNIST, SmallCNN, Zeng's four",
          "vir/*": "MNIST, LeNet, the eight of VIR's recipes", "fast/*": "MNIST, LeNet, the fast three",
          "cifar10-w16/*": "CIFAR-10 (JPEG), ResNet-18 of width 16"}


def paired() -> str:
    """Every weighting beside its base."""
    found = load("paired.json")["rows"]
    measures = [name for name, value in found[0].items() if isinstance(value, dict)]
    rows = [[*label_of(row["row"]), label_of(row["base"])[0], ", ".join(map(str, row["A_rob"]["seeds"])),
             *(compared(**row[name]) for name in measures)] for row in found]
    return markdown(["defense", "network", "recipe", "minus", "seeds", *measures], rows, left=5)


def compared(seeds: list[int], differences: list[float], images: list[float]) -> str:
    """The mean difference with its interval over the seeds; of one seed, with that over the images."""
    if len(seeds) == 1:
        return f"{differences[0]:+.1f} (±{images[0]:.1f})"
    return difference(differences)


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
        if not folders:
            continue
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
