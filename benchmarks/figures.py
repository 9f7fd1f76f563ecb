"""Figures of the benchmarks, drawn from their results alone."""
from collections import Counter
from pathlib import Path

from harness.reporting.figures import COLOURS, STYLES, new_figure, save


def cost(rows: list[dict], path: Path) -> None:
    """Robust accuracy against training time, one point a row: `defense`, `A_rob`, its interval `ci95` in %, and `seconds`.

    A defense that occurs more than once is told apart by its row's `result`, the folder that it was read from.
    """
    count = Counter(row["defense"] for row in rows)
    figure, axes = new_figure(1, 8.5, 4.8)
    axis = axes[0]
    styles = [(colour, marker) for _, marker in STYLES for colour in COLOURS]
    for row, (colour, marker) in zip(sorted(rows, key=lambda row: row["seconds"]), styles * (1 + len(rows) // len(styles))):
        low, high = row["ci95"]
        axis.errorbar(row["seconds"] / 60, row["A_rob"], [[row["A_rob"] - low], [high - row["A_rob"]]], color=colour, marker=marker,
                      linestyle="none", capsize=3,
                      label=row["defense"] + (f" ({row['result'].removeprefix('results/')})" if count[row["defense"]] > 1 else ""))
    axis.set_xlabel("training time, minutes")
    axis.set_ylabel("A_rob, % (95 % intervals)")
    axis.set_xlim(left=0)
    axis.set_title("Robust accuracy against the cost of training")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    save(figure, path)


def trace(rows: list[dict], path: Path) -> None:
    """Loss and gradient against the step on the left, silent units of each layer and the spread of the logits on the right."""
    figure, (left, right) = new_figure(2, 11, 4.2)
    steps = [row["step"] for row in rows]
    left.plot(steps, [row["loss"] for row in rows], color=COLOURS[0], label="loss")
    left.plot(steps, [row["gradient"] for row in rows], color=COLOURS[1], linestyle="--", label="length of the gradient")
    right.plot(steps, [row["spread"] for row in rows], color="black", linestyle=":", label="spread of the logits")
    for name, colour in zip((name for name in rows[0] if name.startswith("silent ")), COLOURS):
        right.plot(steps, [max(row[name], 1e-3) for row in rows], color=colour, label=name.replace("silent ", "silent units of "))
    left.set(xlabel="training step", title="What each step saw", yscale="log")
    right.set(xlabel="training step", title="What it left", yscale="log")
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=9)
    save(figure, path)
