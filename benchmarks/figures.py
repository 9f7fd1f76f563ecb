"""Figures of the benchmarks, drawn from their results alone."""
from collections import Counter
from itertools import cycle
from pathlib import Path

from harness.reporting.figures import COLOURS, STYLES, error_bars, new_figure, save


def cost(rows: list[dict], path: Path) -> None:
    """Robust accuracy against training time, a point a row: `defense`, `A_rob` and `ci95` in %, `seconds`.

    A defense that occurs more than once is told apart by its row's `result`, the folder that it is in.
    """
    count = Counter(row["defense"] for row in rows)
    figure, (axis,) = new_figure(1, 8.5, 4.8)
    styles = cycle((colour, marker) for _, marker in STYLES for colour in COLOURS)
    for row, (colour, marker) in zip(sorted(rows, key=lambda row: row["seconds"]), styles):
        folder = f" ({row['result'].removeprefix('results/')})" if count[row["defense"]] > 1 else ""
        axis.errorbar(row["seconds"] / 60, row["A_rob"], error_bars([row["A_rob"]], [row["ci95"]]),
                      color=colour, marker=marker, linestyle="none", capsize=3, label=row["defense"] + folder)
    axis.set_xlim(left=0)
    axis.set(xlabel="training time, minutes", ylabel="A_rob, % (95 % intervals)",
             title="Robust accuracy against the cost of training")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    save(figure, path)


def trace(rows: list[dict], path: Path) -> None:
    """Loss and gradient against the step; silent units of each layer and the spread of the logits."""
    figure, (left, right) = new_figure(2, 11, 4.2)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    steps = columns["step"]
    left.plot(steps, columns["loss"], color=COLOURS[0], label="loss")
    left.plot(steps, columns["gradient"], color=COLOURS[1], linestyle="--", label="length of the gradient")
    right.plot(steps, columns["spread"], color="black", linestyle=":", label="spread of the logits")
    for name, colour in zip((name for name in columns if name.startswith("silent ")), COLOURS):
        shares = [max(share, 1e-3) for share in columns[name]]
        right.plot(steps, shares, color=colour, label=name.replace("silent ", "silent units of "))
    left.set(xlabel="training step", title="What each step saw", yscale="log")
    right.set(xlabel="training step", title="What it left", yscale="log")
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=9)
    save(figure, path)
