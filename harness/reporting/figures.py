"""Figures, drawn from plain results and logs alone.  Colours: Okabe & Ito, legible to the colour-blind.

    python -m harness.reporting.figures FOLDER [FOLDER ...]    # draws the figures of runs and evaluations again, from their files
"""
import argparse
import csv
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np

from harness.errors import UserError
from harness.evaluation.metrics import WEIGHT_EDGES

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # times three line styles: 21 lines told apart
STYLES = (("-", "o"), ("--", "s"), (":", "^"))
MANY = 20       # classes: beyond these no line, tick or name for each one
LONG_NAME = 12  # characters: where a class name is longer, the classes are numbered


def new_axes(rows: int, columns: int, width: float = 5.2, height: float = 4.2):
    """A figure and its axes [rows, columns] of that size in inches each."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def new_figure(columns: int, width: float, height: float = 4.2):
    """A figure of that size in inches and its axes [columns]."""
    figure, axes = new_axes(1, columns, width / columns, height)
    return figure, axes[0]


def save(figure: object, path: Path) -> None:
    """Write the figure to `path` and forget it."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def evaluation(result: dict, path: Path) -> None:
    """A_sa and A_tr against alpha with A_rob as the level, and the accuracy of each class."""
    figure, (left, right) = new_figure(2, 11)
    low, high = result["ci95"]["A_rob"]
    left.axhspan(low, high, color=GREY, alpha=0.2, linewidth=0)
    left.axhline(result["A_rob"], color=GREY, linestyle="--", label="A_rob (every example equally)")
    for metric, colour, marker, size, note in (("A_sa", BLUE, "o", 9, "attack unweighted"), ("A_tr", ORANGE, "s", 4, "attack weighted")):
        alphas = [0.0, *map(float, result[metric])]
        values = [result["A_rob"], *result[metric].values()]
        bounds = [result["ci95"]["A_rob"], *result["ci95"][metric].values()]
        errors = [[v - b[0] for v, b in zip(values, bounds)], [b[1] - v for v, b in zip(values, bounds)]]
        left.errorbar(alphas, values, yerr=errors, color=colour, marker=marker, markersize=size, markerfacecolor="none", capsize=3,
                      label=f"{metric} ({note})")
    left.set(xlabel="alpha, the attacker's preference for small margins", ylabel="accuracy, %", ylim=(0, 101),
             title="Non-uniform attack (95 % intervals)")
    left.legend(loc="lower left", frameon=False)
    names = range(len(result["class_accuracy"]["A_rob"]))
    for metric, colour, shift in (("A_nat", GREEN, -0.2), ("A_rob", BLUE, 0.2)):
        right.bar([k + shift for k in names], [v or 0 for v in result["class_accuracy"][metric]], 0.4, color=colour, label=metric)
        right.axhline(result[metric], color=colour, linewidth=0.8, linestyle=":")
    right.set(xlabel="class (dotted: all classes)", ylabel="accuracy, %", ylim=(0, 113), title="Accuracy per class")
    right.set_xticks(list(names) if len(names) <= 20 else list(names)[::len(names) // 10])
    right.set_yticks(range(0, 101, 20))
    right.legend(loc="upper right", ncols=2, frameon=False)
    save(figure, path)


def training(rows: list[dict], path: Path) -> None:
    """The loss and the accuracies of a run against its epochs."""
    figure, (left, right) = new_figure(2, 11)
    epochs = [row["epoch"] for row in rows]
    left.plot(epochs, [row["train_loss"] for row in rows], color=BLUE, marker="." if len(rows) < 30 else None)
    left.set(ylabel="training loss", title="Loss")
    styles = {"val_A_nat": (GREEN, "-", "A_nat, held out"), "val_ema_A_nat": (GREEN, "--", "A_nat, held out, averaged weights"),
              "val_A_rob": (BLUE, "-", "A_rob, held out"), "val_ema_A_rob": (BLUE, "--", "A_rob, held out, averaged weights"),
              "train_A_rob": (BLUE, ":", "A_rob, training")}
    for name, (colour, style, label) in styles.items():
        if name in rows[0]:
            right.plot(epochs, [row[name] for row in rows], color=colour, linestyle=style, label=label,
                       marker="." if len(rows) < 30 else None)
    right.set(ylabel="accuracy, %", ylim=(0, 101), title="Accuracy")
    right.legend(loc="lower right", frameon=False)
    for axis in (left, right):
        _epoch_ticks(axis, epochs)
    save(figure, path)


def _epoch_ticks(axis: object, epochs: list[int]) -> None:
    if len(epochs) <= 10:
        axis.set_xticks(epochs)
    else:
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("epoch")


def weights(rows: list[dict], path: Path, classes: list[str] | None = None, burn_in_epochs: int | None = None) -> None:
    """The share of each class in the total instance weight against the epoch (VIR, Fig. 3), and the histogram of the weights.

    rows: one an epoch, as `WeightStatistics.compute` gives them, with `epoch`; classes: their names. The weights of the first
    `burn_in_epochs` epochs are 1.
    """
    figure, (left, right) = new_figure(2, 12.5)
    epochs = [row["epoch"] for row in rows]
    num_classes = sum(name.startswith("share_") for name in rows[0])
    shares = np.array([[row[f"share_{k}"] for k in range(num_classes)] for row in rows], dtype=float)  # [epochs, K], None as nan
    if num_classes <= MANY:
        _each_class(left, epochs, shares, _names(num_classes, classes))
    else:
        _bands(left, epochs, shares)
    left.axhline(100 / num_classes, color=GREY, linestyle=":", linewidth=1.2, label="every class alike")
    if burn_in_epochs and burn_in_epochs < epochs[-1]:
        left.axvline(burn_in_epochs + 0.5, color=GREY, linewidth=1.2, label="end of the burn-in")
    top = 1.05 * max(100 / num_classes, np.nan_to_num(shares).max())
    left.set(ylabel="share of the total weight, %", ylim=(0, top), title=f"Weight of the {num_classes} classes")
    _epoch_ticks(left, epochs)
    left.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=8)
    _histogram(right, [row for row in rows if row["epoch"] > (burn_in_epochs or 0)] or rows[-1:])
    save(figure, path)


def _each_class(axis: object, epochs: list[int], shares: np.ndarray, names: list[str]) -> None:
    """One line a class, in the legend in the order of the last epoch."""
    for k in sorted(range(len(names)), key=lambda k: -np.nan_to_num(shares[-1, k])):
        style, marker = STYLES[k // len(COLOURS)]
        axis.plot(epochs, shares[:, k], color=COLOURS[k % len(COLOURS)], linestyle=style, linewidth=1.3, marker=marker, markersize=3.5,
                  markevery=max(1, len(epochs) // 10), label=names[k])


def _bands(axis: object, epochs: list[int], shares: np.ndarray) -> None:
    """The median over the classes, with a band that holds the middle half of them and one that holds all."""
    if len(epochs) == 1:  # a band needs a width
        epochs, shares = [epochs[0] - 0.4, epochs[0] + 0.4], np.repeat(shares, 2, axis=0)
    low, first, median, third, high = np.percentile(shares, (0, 25, 50, 75, 100), axis=1)
    axis.plot(epochs, median, color=BLUE, label="median class")
    for bottom, top, alpha, label in ((first, third, 0.4, "middle half of the classes"), (low, high, 0.15, "all classes")):
        axis.fill_between(epochs, bottom, top, color=BLUE, alpha=alpha, linewidth=0, label=label)
        axis.plot(epochs, np.stack([bottom, top], axis=1), color=BLUE, alpha=2 * alpha, linewidth=0.7)


def _histogram(axis: object, rows: list[dict]) -> None:
    """The weights of the last epoch, and those of the middle one where there are several."""
    smallest, shown = 1.0, [(rows[-1], BLUE, "-")]
    if len(rows) > 1:
        shown.insert(0, (rows[(len(rows) - 1) // 2], ORANGE, "--"))
    for row, colour, style in shown:
        counts = np.array([row[f"bin_{k}"] for k in range(len(WEIGHT_EDGES) - 1)], dtype=float)
        percent = 100 * counts / counts.sum()
        smallest = min(smallest, percent[percent > 0].min())
        axis.stairs(percent, WEIGHT_EDGES, color=colour, linestyle=style, linewidth=1.4, label=f"epoch {row['epoch']}")
        axis.stairs(percent, WEIGHT_EDGES, color=colour, fill=True, alpha=0.15)
    axis.set(xscale="log", yscale="log", xlim=(WEIGHT_EDGES[0], WEIGHT_EDGES[-1]), ylim=(smallest / 2, 150), ylabel="examples, %",
             xlabel="instance weight (the outer bins hold all beyond them)", title="Histogram of the weights")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(frameon=False)


def _names(num_classes: int, classes: list[str] | None) -> list[str]:
    """The classes by name, where all names are short, or else by number."""
    named = classes and max(map(len, classes)) <= LONG_NAME
    return [classes[k] if named and k < len(classes) else str(k) for k in range(num_classes)]


def confusion(result: dict, path: Path) -> None:
    """How the test images of each class are classified, clean and under the attack of A_rob: two matrices in percent of the true class."""
    import matplotlib.colors

    figure, axes = new_figure(2, 13.5, 5.8)
    num_classes = len(result["confusion"]["A_nat"])
    step = 1 if num_classes <= MANY else num_classes // 10
    ticks, names = range(0, num_classes, step), _names(num_classes, result.get("classes") if step == 1 else None)
    for axis, (metric, title) in zip(axes, (("A_nat", "Clean"), ("A_rob", "Adversarial"))):
        counts = np.array(result["confusion"][metric], dtype=float)
        totals = counts.sum(1, keepdims=True)
        percent = np.divide(100 * counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)  # nan: a class without examples
        image = axis.imshow(percent, cmap="Blues", norm=matplotlib.colors.PowerNorm(0.5, 0, 100), interpolation="nearest")
        for (row, column), value in np.ndenumerate(percent) if num_classes <= 12 else ():
            if value > 0:
                axis.text(column, row, f"{value:.0f}" if value >= 9.95 else f"{value:.1f}", ha="center", va="center",
                          fontsize=min(16, 90 / num_classes), color="white" if value > 40 else "black")
        axis.grid(False)
        axis.spines[:].set_visible(True)
        axis.set_facecolor("#dddddd")
        axis.set(title=f"{title} test images ({metric} {result[metric]:.2f} %)", xlabel="predicted class", ylabel="true class")
        axis.set_xticks(ticks, [names[k] for k in ticks], rotation=90 if len(ticks) * max(map(len, names)) > 50 else 0)
        axis.set_yticks(ticks, [names[k] for k in ticks])
    figure.colorbar(image, ax=axes, label="images of the true class, %", ticks=[0, 1, 5, 10, 25, 50, 75, 100], shrink=0.8)
    save(figure, path)


def attacks(result: dict, path: Path) -> None:
    """The accuracy under each strong attack and at the worst case, that of each class at the worst case, and against attack steps."""
    shown = {"no attack": "A_nat", "A_rob": "A_rob"}
    facts = {label: {"accuracy": result[name], "ci95": result["ci95"][name]} for label, name in shown.items()}
    facts |= result["attacks"] | {"worst case": result["worst_case"]}
    figure, (left, middle, right) = new_figure(3, 15, max(4.2, 1.4 + 0.32 * len(facts)))
    colours = [GREEN, *[BLUE] * (len(facts) - 2), ORANGE]
    for place, (colour, fact) in enumerate(zip(colours, facts.values())):
        value, (low, high) = fact["accuracy"], fact["ci95"]
        left.barh(place, value, color=colour, alpha=0.75, xerr=[[max(0.0, value - low)], [max(0.0, high - value)]], capsize=3)
        left.text(2, place, f"{value:.2f}", va="center", color="white" if value > 15 else "black")
    counts = {name: fact.get("num_examples", result["num_examples"]) for name, fact in facts.items()}
    left.set_yticks(range(len(facts)), [name if counts[name] == result["num_examples"] else f"{name} ({counts[name]:,} images)"
                                        for name in facts])
    left.invert_yaxis()
    left.set(xlabel="accuracy, %", xlim=(0, 101), title="Accuracy under each attack (95 % intervals)")
    classes = range(len(result["worst_case"]["class_accuracy"]))
    for values, colour, shift, label in ((result["class_accuracy"]["A_nat"], GREEN, -0.2, "no attack"),
                                         (result["worst_case"]["class_accuracy"], ORANGE, 0.2, "worst case")):
        middle.bar([k + shift for k in classes], [value or 0 for value in values], 0.4, color=colour, alpha=0.75, label=label)
    middle.set(xlabel="class", ylabel="accuracy, %", ylim=(0, 113), title="Accuracy per class")
    middle.set_xticks(list(classes) if len(classes) <= MANY else list(classes)[::len(classes) // 10])
    middle.legend(loc="upper right", ncols=2, frameon=False)
    steps = (result["probe"] or {}).get("steps", {})
    right.plot(range(len(steps)), list(steps.values()), color=BLUE, marker="o")
    right.set_xticks(range(len(steps)), list(steps))
    count = result["probe"]["num_examples"] if steps else 0
    right.set(xlabel="PGD steps", ylabel="still correct, %", ylim=(0, 101), title=f"Attack steps ({count} images, correct unattacked)")
    save(figure, path)


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
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(file, strict=True)]


def redraw_run(folder: Path) -> list[Path]:
    """Draw log.png and weights.png of a run folder from its log.csv, weights.csv and config.json; returns those drawn."""
    saved = folder / "config.json"
    config = json.loads(saved.read_text(encoding="utf-8")) if saved.is_file() else {}
    burn_in_epochs = None if config.get("weights") == "uniform" else config.get("burn_in_epochs")
    drawn = []
    for name, draw in (("log", training), ("weights", partial(weights, classes=config.get("classes"), burn_in_epochs=burn_in_epochs))):
        if (folder / f"{name}.csv").is_file() and (rows := read_rows(folder / f"{name}.csv")):
            drawn.append(folder / f"{name}.png")
            draw(rows, drawn[-1])
    return drawn


def redraw_result(path: Path) -> list[Path]:
    """Draw the figures of an evaluation from its JSON: STEM.png, STEM_confusion.png, STEM_attacks.png; STEM_NAME*.png of a checkpoint NAME.

    Returns those drawn; a result without confusion matrices or strong attacks has fewer.
    """
    first = json.loads(path.read_text(encoding="utf-8"))
    others = {f"{path.stem}_{name}": value for name, value in first.items()
              if isinstance(value, dict) and {"class_accuracy", "A_rob"} <= value.keys()}
    drawn = []
    for stem, result in {path.stem: first, **others}.items():
        further = {"confusion": (confusion, "_confusion"), "attacks": (attacks, "_attacks")}
        for draw, end in ((evaluation, ""), *(further[key] for key in further if key in result)):
            drawn.append(path.with_name(f"{stem}{end}.png"))
            draw(result, drawn[-1])
    return drawn


def redraw(folder: Path) -> list[Path]:
    """Draw every figure of a folder from its files alone; returns those drawn.  Raises UserError where there is nothing to draw from."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    drawn = []
    for draw, path in ((redraw_run, folder), *((redraw_result, path) for path in sorted(folder.glob("eval*.json")))):
        try:
            drawn += draw(path)
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, csv.Error) as error:
            raise UserError(f"{path} is no run or result of these scripts ({type(error).__name__}: {error})") from error
    if not drawn:
        raise UserError(f"{folder} holds no log.csv, weights.csv or eval*.json to draw from")
    return drawn


def main() -> None:
    """Redraw the folders on the command line; exit code 2 where one of them cannot be."""
    parser = argparse.ArgumentParser("python -m harness.reporting.figures", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="run folder, or one with log.csv, weights.csv, eval*.json")
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
