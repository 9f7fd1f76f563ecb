"""Figures, drawn from plain results and logs alone.  Colours: Okabe & Ito, legible to the colour-blind."""
from pathlib import Path

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"


def _figure(columns: int, width: float):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, 4.2), layout="constrained")
    for axis in axes:
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: object, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def evaluation(result: dict, path: Path) -> None:
    """A_sa and A_tr against alpha with A_rob as the level, and the accuracy of each class."""
    figure, (left, right) = _figure(2, 11)
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
    _save(figure, path)


def training(rows: list[dict], path: Path) -> None:
    """The loss and the accuracies of a run against its epochs."""
    figure, (left, right) = _figure(2, 11)
    epochs = [row["epoch"] for row in rows]
    left.plot(epochs, [row["train_loss"] for row in rows], color=BLUE, marker="." if len(rows) < 30 else None)
    left.set(xlabel="epoch", ylabel="training loss", title="Loss")
    styles = {"val_A_nat": (GREEN, "-", "A_nat, held out"), "val_A_rob": (BLUE, "-", "A_rob, held out"),
              "train_A_rob": (BLUE, ":", "A_rob, training")}
    for name, (colour, style, label) in styles.items():
        if name in rows[0]:
            right.plot(epochs, [row[name] for row in rows], color=colour, linestyle=style, label=label,
                       marker="." if len(rows) < 30 else None)
    right.set(xlabel="epoch", ylabel="accuracy, %", ylim=(0, 101), title="Accuracy")
    right.legend(loc="lower right", frameon=False)
    _save(figure, path)
