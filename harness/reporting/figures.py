"""Figures, drawn from plain results and logs alone.  Colours: Okabe & Ito, legible to the colour-blind.

Drawn again from the files of runs and evaluations by

    python -m harness.reporting.figures FOLDER [FOLDER ...]
"""
import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness.errors import UserError
from harness.evaluation.metrics import WEIGHT_EDGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # times three STYLES
STYLES = (("-", "o"), ("--", "s"), (":", "^"))
MANY = 20       # classes: beyond these no line, tick or name for each one
LONG_NAME = 12  # characters: where a class name is longer, the classes are numbered


def new_axes(rows: int, columns: int, width: float = 5.2,
             height: float = 4.2) -> tuple["Figure", np.ndarray]:
    """A figure and its axes [rows, columns] of that size in inches each."""
    os.environ["MPLBACKEND"] = "Agg"  # before the import: a notebook's or a broken one is none of ours
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows),
                                   layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def new_figure(columns: int, width: float, height: float = 4.2) -> tuple["Figure", np.ndarray]:
    """A figure of that size in inches and its axes [columns]."""
    figure, axes = new_axes(1, columns, width / columns, height)
    return figure, axes[0]


def save(figure: "Figure", path: Path) -> None:
    """Write the figure to `path` and forget it."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def error_bars(values: Sequence[float], intervals: Iterable[list[float]]) -> np.ndarray:
    """[2, N]: how far the intervals reach below and above the values."""
    low, high = np.transpose(list(intervals))
    return np.maximum(0.0, [values - low, high - values])


def evaluation(result: dict, path: Path) -> None:
    """A_sa and A_tr against alpha with A_rob as the level, and the accuracy of each class."""
    figure, (left, right) = new_figure(2, 11)
    a_rob, ci95 = result["A_rob"], result["ci95"]
    left.axhspan(*ci95["A_rob"], color=GREY, alpha=0.2, linewidth=0)
    left.axhline(a_rob, color=GREY, linestyle="--", label="A_rob (every example equally)")
    for metric, colour, marker, size, note in (("A_sa", BLUE, "o", 9, "unweighted"),
                                               ("A_tr", ORANGE, "s", 4, "weighted")):
        values = [a_rob, *result[metric].values()]
        errors = error_bars(values, [ci95["A_rob"], *ci95[metric].values()])
        left.errorbar([0.0, *map(float, result[metric])], values, errors, color=colour, marker=marker,
                      markersize=size, markerfacecolor="none", capsize=3, label=f"{metric} (attack {note})")
    left.set(xlabel="alpha, the attacker's preference for small margins", ylabel="accuracy, %", ylim=(0, 101),
             title="Non-uniform attack (95 % intervals)")
    left.legend(loc="lower left", frameon=False)
    colours = {"A_nat": GREEN, "A_rob": BLUE}
    _class_bars(right, {name: (colour, result["class_accuracy"][name]) for name, colour in colours.items()},
                result.get("classes"))
    for name, colour in colours.items():
        right.axhline(result[name], color=colour, linewidth=0.8, linestyle=":")
    right.set_xlabel("class (dotted: all classes)")
    save(figure, path)


def _class_bars(axis: "Axes", pair: dict[str, tuple[str, list[float | None]]], classes: list[str] | None,
                alpha: float = 1.0) -> None:
    """Two bars a class; pair: label -> colour and accuracies in percent, None of a class without examples."""
    for shift, (label, (colour, values)) in zip((-0.2, 0.2), pair.items()):
        places = np.arange(len(values))
        heights = [value or 0 for value in values]
        axis.bar(places + shift, heights, 0.4, color=colour, alpha=alpha, label=label)
    axis.set(xlabel="class", ylabel="accuracy, %", ylim=(0, 113), title="Accuracy per class")
    ticks, names, rotation = _class_ticks(len(places), classes)
    axis.set_xticks(ticks, names, rotation=rotation)
    axis.set_yticks(range(0, 101, 20))
    axis.legend(loc="upper right", ncols=2, frameon=False)


def _class_ticks(num_classes: int, classes: list[str] | None) -> tuple[range, list[str], int]:
    """The classes that have a tick, what stands there, and its rotation in degrees."""
    ticks = range(0, num_classes, 1 if num_classes <= MANY else num_classes // 10)
    every = _names(num_classes, classes if num_classes <= MANY else None)
    names = [every[k] for k in ticks]
    return ticks, names, 90 if len(ticks) * max(map(len, names)) > 50 else 0


def training(rows: list[dict], path: Path) -> None:
    """The loss and the accuracies of a run against its epochs."""
    figure, (left, right) = new_figure(2, 12.5)
    epochs = [row["epoch"] for row in rows]
    marker = "." if len(rows) < 30 else None
    left.plot(epochs, [row["train_loss"] for row in rows], color=BLUE, marker=marker)
    left.set(ylabel="training loss", title="Loss")
    styles = {"val_A_nat": (GREEN, "-", "A_nat, held out"),
              "val_ema_A_nat": (GREEN, "--", "A_nat, held out, averaged weights"),
              "val_A_rob": (BLUE, "-", "A_rob, held out"),
              "val_ema_A_rob": (BLUE, "--", "A_rob, held out, averaged weights"),
              "train_A_nat": (GREEN, ":", "A_nat, training"),
              "train_A_rob": (BLUE, ":", "A_rob, training")}
    for name, (colour, style, label) in styles.items():
        if name in rows[0]:
            right.plot(epochs, [row[name] for row in rows], color=colour, linestyle=style, label=label,
                       marker=marker)
    right.set(ylabel="accuracy, %", ylim=(0, 101), title="Accuracy")
    right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=8)
    for axis in (left, right):
        _epoch_ticks(axis, epochs)
    save(figure, path)


def _epoch_ticks(axis: "Axes", epochs: list[int]) -> None:
    if len(epochs) <= 10:
        axis.set_xticks(epochs)
    else:
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("epoch")


def weights(rows: list[dict], path: Path, classes: list[str] | None = None,
            burn_in_epochs: int | None = None) -> None:
    """Each class's share of the total instance weight by epoch (VIR, Fig. 3), and the weights' histogram.

    rows: one an epoch, as `WeightStatistics.compute` gives them, with `epoch`; classes: their names. The
    weights of the first `burn_in_epochs` epochs are 1.
    """
    figure, (left, right) = new_figure(2, 12.5)
    epochs = [row["epoch"] for row in rows]
    num_classes = sum(name.startswith("share_") for name in rows[0])
    columns = [[row[f"share_{k}"] for row in rows] for k in range(num_classes)]
    shares = np.array(columns, dtype=float).T  # [epochs, K], None as nan
    if num_classes <= MANY:
        _each_class(left, epochs, shares, _names(num_classes, classes))
    else:
        _bands(left, epochs, shares)
    alike = 100 / num_classes
    left.axhline(alike, color=GREY, linestyle=":", linewidth=1.2, label="every class alike")
    if burn_in_epochs and burn_in_epochs < epochs[-1]:
        left.axvline(burn_in_epochs + 0.5, color=GREY, linewidth=1.2, label="end of the burn-in")
    left.set(ylabel="share of the total weight, %", ylim=(0, 1.05 * max(alike, np.nan_to_num(shares).max())),
             title=f"Weight of the {num_classes} classes")
    _epoch_ticks(left, epochs)
    left.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=8)
    _histogram(right, [row for row in rows if row["epoch"] > (burn_in_epochs or 0)] or rows[-1:])
    save(figure, path)


def _each_class(axis: "Axes", epochs: list[int], shares: np.ndarray, names: list[str]) -> None:
    """One line a class, in the legend in the order of the last epoch."""
    for k in sorted(range(len(names)), key=lambda k: -np.nan_to_num(shares[-1, k])):
        style, marker = STYLES[k // len(COLOURS)]
        axis.plot(epochs, shares[:, k], color=COLOURS[k % len(COLOURS)], linestyle=style, linewidth=1.3,
                  marker=marker, markersize=3.5, markevery=max(1, len(epochs) // 10), label=names[k])


def _bands(axis: "Axes", epochs: Sequence[float], shares: np.ndarray) -> None:
    """The median over the classes, with a band for the middle half of them and one for all."""
    if len(epochs) == 1:  # a band needs a width
        epochs, shares = [epochs[0] - 0.4, epochs[0] + 0.4], np.repeat(shares, 2, axis=0)
    low, first, median, third, high = np.percentile(shares, (0, 25, 50, 75, 100), axis=1)
    axis.plot(epochs, median, color=BLUE, label="median class")
    for bottom, top, alpha, label in ((first, third, 0.4, "middle half of the classes"),
                                      (low, high, 0.15, "all classes")):
        axis.fill_between(epochs, bottom, top, color=BLUE, alpha=alpha, linewidth=0, label=label)
        axis.plot(epochs, np.stack([bottom, top], axis=1), color=BLUE, alpha=2 * alpha, linewidth=0.7)


def _histogram(axis: "Axes", rows: list[dict]) -> None:
    """The weights of the last epoch, and those of the middle one where there are several."""
    smallest = 1.0
    middle = [(rows[(len(rows) - 1) // 2], ORANGE, "--")] if len(rows) > 1 else []
    for row, colour, style in (*middle, (rows[-1], BLUE, "-")):
        counts = np.array([row[f"bin_{k}"] for k in range(len(WEIGHT_EDGES) - 1)], dtype=float)
        percent = 100 * counts / counts.sum()
        smallest = min(smallest, percent[percent > 0].min())
        axis.stairs(percent, WEIGHT_EDGES, color=colour, linestyle=style, linewidth=1.4,
                    label=f"epoch {row['epoch']}")
        axis.stairs(percent, WEIGHT_EDGES, color=colour, fill=True, alpha=0.15)
    axis.set(xscale="log", yscale="log", xlim=(WEIGHT_EDGES[0], WEIGHT_EDGES[-1]), ylim=(smallest / 2, 150),
             xlabel="instance weight (the outer bins hold all beyond them)", ylabel="examples, %",
             title="Histogram of the weights")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(frameon=False)


def _names(num_classes: int, classes: list[str] | None) -> list[str]:
    """The classes by name; by number where a name is long, or has the number in it ("0 - zero")."""
    known = classes if classes and max(map(len, classes)) <= LONG_NAME else []
    known = [] if all(name.startswith(f"{k} ") for k, name in enumerate(known)) else known
    return [*known[:num_classes], *map(str, range(len(known), num_classes))]


def confusion(result: dict, path: Path) -> None:
    """How the images of each class are classified, clean and attacked, in percent of the true class."""
    from matplotlib.colors import PowerNorm

    figure, axes = new_figure(2, 13.5, 5.8)
    for axis, metric, title in zip(axes, ("A_nat", "A_rob"), ("Clean", "Adversarial")):
        counts = np.array(result["confusion"][metric], dtype=float)
        num_classes, totals = len(counts), counts.sum(1, keepdims=True)
        empty = np.full_like(counts, np.nan)  # what a class without examples stays
        percent = np.divide(100 * counts, totals, out=empty, where=totals > 0)
        image = axis.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
        for (row, column), value in np.ndenumerate(percent) if num_classes <= 12 else ():
            if value > 0:
                axis.text(column, row, f"{value:.0f}" if value >= 9.95 else f"{value:.1f}", ha="center",
                          va="center", fontsize=min(16, 90 / num_classes),
                          color="white" if value > 40 else "black")
        axis.grid(False)
        axis.spines[:].set_visible(True)
        axis.set_facecolor("#dddddd")
        axis.set(title=f"{title} test images ({metric} {result[metric]:.2f} %)", xlabel="predicted class",
                 ylabel="true class")
        ticks, names, rotation = _class_ticks(num_classes, result.get("classes"))
        axis.set_xticks(ticks, names, rotation=rotation)
        axis.set_yticks(ticks, names)
    figure.colorbar(image, ax=axes, label="images of the true class, %", shrink=0.8,
                    ticks=[0, 1, 5, 10, 25, 50, 75, 100])
    save(figure, path)


def attacks(result: dict, path: Path) -> None:
    """Accuracy under each strong attack and at worst, per class at worst, and against the number of steps."""
    facts = {label: {"accuracy": result[name], "ci95": result["ci95"][name]}
             for label, name in (("no attack", "A_nat"), ("A_rob", "A_rob"))}
    facts |= result["attacks"] | {"worst case": result["worst_case"]}
    figure, (left, middle, right) = new_figure(3, 15, max(4.2, 1.4 + 0.32 * len(facts)))
    _attack_bars(left, facts, result["num_examples"])
    _class_bars(middle, {"no attack": (GREEN, result["class_accuracy"]["A_nat"]),
                         "worst case": (ORANGE, result["worst_case"]["class_accuracy"])},
                result.get("classes"), alpha=0.75)
    steps = (result["probe"] or {}).get("steps", {})
    right.plot(range(len(steps)), list(steps.values()), color=BLUE, marker="o",
               clip_on=False)  # a marker at 100 % stays whole
    right.set_xticks(range(len(steps)), list(steps))
    count = result["probe"]["num_examples"] if steps else 0
    right.set(xlabel="PGD steps", ylabel="still correct, %", ylim=(0, 101),
              title=f"Attack steps ({count} images, correct unattacked)")
    save(figure, path)


def _attack_bars(axis: "Axes", facts: dict[str, dict], num_examples: int) -> None:
    """A bar an attack, with its interval; an attack on fewer images than `num_examples` says so."""
    values = [fact["accuracy"] for fact in facts.values()]
    errors = error_bars(values, [fact["ci95"] for fact in facts.values()])
    colours = [GREEN, *[BLUE] * (len(facts) - 2), ORANGE]
    axis.barh(range(len(facts)), values, color=colours, alpha=0.75, xerr=errors, capsize=3)
    for place, value in enumerate(values):
        axis.text(2, place, f"{value:.2f}", va="center", color="white" if value > 15 else "black")
    counts = [fact.get("num_examples", num_examples) for fact in facts.values()]
    axis.set_yticks(range(len(facts)), [name if count == num_examples else f"{name} ({count:,} images)"
                                        for name, count in zip(facts, counts)])
    axis.invert_yaxis()
    axis.set(xlabel="accuracy, %", xlim=(0, 101), title="Accuracy under each attack (95 % intervals)")


# ---- drawn again from files --------------------------------------------------------------------------------

def read_rows(path: Path) -> list[dict[str, int | float | str | None]]:
    """The rows of a CSV file with numbers as numbers and empty fields as None."""

    def value(text: str) -> int | float | str | None:
        """The number that the text is, else the text; None for nothing."""
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                pass
        return text or None

    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file, strict=True)
        return [{name: value(text) for name, text in line.items()} for line in lines]


def redraw_run(folder: Path) -> list[Path]:
    """Draw log.png and weights.png of a run from its files; returns those drawn."""
    saved = folder / "config.json"
    config = json.loads(saved.read_text(encoding="utf-8")) if saved.is_file() else {}
    more = config.get("classes"), None if config.get("weights") == "uniform" else config.get("burn_in_epochs")
    drawn = []
    for draw, name, options in ((training, "log", ()), (weights, "weights", more)):
        if (folder / f"{name}.csv").is_file() and (rows := read_rows(folder / f"{name}.csv")):
            drawn.append(folder / f"{name}.png")
            draw(rows, drawn[-1], *options)
    return drawn


def redraw_result(path: Path) -> list[Path]:
    """Draw the figures of an evaluation from its JSON; returns those drawn.

    They are STEM.png, STEM_confusion.png and STEM_attacks.png, and STEM_NAME*.png of a checkpoint NAME; a
    result without confusion matrices or strong attacks has fewer.
    """
    first = json.loads(path.read_text(encoding="utf-8"))
    others = [(f"{path.stem}_{name}", value) for name, value in first.items()
              if isinstance(value, dict) and {"class_accuracy", "A_rob"} <= value.keys()]
    drawn = []
    for stem, result in ((path.stem, first), *others):
        for draw, name in ((evaluation, ""), (confusion, "confusion"), (attacks, "attacks")):
            if not name or name in result:
                drawn.append(path.with_name(f"{stem}_{name}".removesuffix("_") + ".png"))
                draw(result, drawn[-1])
    return drawn


def redraw(folder: Path) -> list[Path]:
    """Draw every figure of a folder from its files alone; returns those drawn.

    Raises UserError where there is nothing to draw from.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    drawn = []
    for path in (folder, *sorted(folder.glob("eval*.json"))):
        try:
            drawn += redraw_run(path) if path == folder else redraw_result(path)
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, csv.Error) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{path} is no run or result of these scripts ({reason})") from error
    if not drawn:
        raise UserError(f"{folder} holds no log.csv, weights.csv or eval*.json to draw from")
    return drawn


def main() -> None:
    """Redraw the folders on the command line; exit code 2 where one of them cannot be."""
    parser = argparse.ArgumentParser("python -m harness.reporting.figures", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER",
                        help="run folder, or one with log.csv, weights.csv, eval*.json")
    failed = False
    for folder in parser.parse_args().folders:
        try:
            for path in redraw(folder):
                print(path)
        except (UserError, OSError) as error:
            print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
            failed = True
    sys.exit(2 if failed else 0)


if __name__ == "__main__":
    main()
