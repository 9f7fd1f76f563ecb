"""The tables of README.md and docs/ on all runs together: a defense and its base, collapse, hours."""
import csv
import json
from collections.abc import Iterator
from pathlib import Path

from harness.reporting.cells import RESULTS, difference, extremes, load, number
from harness.reporting.defense_tables import MNIST_GROUPS, label_of, printed
from harness.reporting.tables import markdown

GROUPS = {"mnist/lenet-*": "MNIST, LeNet, Zeng's four", "mnist/small_cnn-*": "MNIST, SmallCNN, Zeng's four",
          "vir/*": "MNIST, LeNet, VIR's recipes", "fast/*": "MNIST, LeNet, the fast three",
          "cifar10-w16/*": "CIFAR-10 (JPEG), ResNet-18 of width 16"}


def paired() -> str:
    """Every defense beside its base, defense by defense, with the papers' differences."""
    found = load("paired.json")["rows"]
    measures = [name for name, value in found[0].items() if isinstance(value, dict)]
    rows = [[*label_of(row["row"]), label_of(row["base"])[0], ", ".join(map(str, row["A_rob"]["seeds"])),
             *(compared(**row[name], all_seeds=row["A_rob"]["seeds"]) for name in measures)] for row in found]
    ours = {row[0] for row in rows}
    rows += [row for row in papers_differences(measures) if row[0] in ours]
    order = list(dict.fromkeys(row[0] for row in rows))
    rows.sort(key=lambda row: order.index(row[0]))
    return markdown(["defense", "network", "recipe", "minus", "seeds", *measures], rows, left=5)


def compared(seeds: list[int], differences: list[float], images: float | None, all_seeds: list[int]) -> str:
    """The mean difference with half its 95 % interval, bold where the interval lies on one side of 0.

    Where these are not all seeds of the row, they follow.
    """
    if not seeds:
        return "-"
    mean, half = difference(differences, images)
    text = f"{round(mean, 2) + 0.0:+.2f} (±{half:.2f})"  # + 0.0: zero has no sign
    text = f"**{text}**" if abs(mean) > half else text
    return text if seeds == all_seeds else f"{text}, of {', '.join(map(str, seeds))}"


def papers_differences(measures: list[str]) -> Iterator[list[str]]:
    """The papers' rows: Zeng et al., Tables 1 and 2; VIR, Table 1, with AutoAttack as the worst case.

    Table 2 prints AT's alpha as 2, Table 4 the same accuracy at 0.1, which is its recipe here
    (results/paper/settings.json).
    """
    for table, network, at in (("zeng_table1", "*SmallCNN, paper*", "0.5"),
                               ("zeng_table2", "*ResNet-18, CIFAR-10, paper*", "0.1")):
        lines = {line["defense"]: line for line in printed(table) if line["alpha_test"] == "2.0"}
        for plain, base, alpha in (("PGD", "AT", at), ("TRADES", "TRADES", "2")):
            found = {name: float(lines[f"{plain}+ours"][column]) - float(lines[plain][column])
                     for name, column in (("A_rob", "A_rob"), ("A_sa 2", "A_sa"))}
            yield [f"{base}, alpha {alpha}", network, "Zeng's", base, "",
                   *(signed(found.get(name)) for name in measures)]
    left = {line["defense"]: float(line["AA_mean"]) for line in printed("vir_table1")}
    for defense in left.keys() - {"AT", "TRADES"}:
        base = "TRADES" if "TRADES" in defense else "AT"
        found = {"worst case": left[defense] - left[base]}
        yield [defense, "*ResNet-18, CIFAR-10, paper*", "VIR's", base, "",
               *(signed(found.get(name)) for name in measures)]


def signed(value: float | None) -> str:
    """A printed difference, or "-" for one that is not printed."""
    return "-" if value is None else f"{value:+.2f}"


def logged() -> str:
    """The logs of the runs on MNIST under results/: whether one was ever at chance."""
    found: dict[tuple[str, str, str], list[tuple[str, list[dict[str, str]]]]] = {}
    for file in sorted(file for group in MNIST_GROUPS for file in RESULTS.glob(f"{group}/*/seed*/log.csv")):
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
