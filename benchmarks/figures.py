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


def sweep(result: dict, path: Path) -> None:
    """Milliseconds an image of a training step against batch size and attack steps, and of an attack step against batch size."""
    figure, (left, middle, right) = new_figure(3, 15, 4.6)
    names = list(dict.fromkeys(row["model"] for row in [*result["training"], *result["evaluation"]]))
    for axis, across, fixed in ((left, "batch_size", "num_steps"), (middle, "num_steps", "batch_size")):
        level = result["steps" if fixed == "num_steps" else fixed]
        for name, colour in zip(names, COLOURS):
            rows = sorted((row for row in result["training"] if row["model"] == name and row[fixed] == level), key=lambda row: row[across])
            for form, (style, marker) in zip(("ours", "published_form") if rows else (), STYLES):
                axis.plot([row[across] for row in rows], [1e3 * row[form] for row in rows], color=colour, linestyle=style, marker=marker,
                          label=f"{name}, {form.replace('_', ' ')}")
    for (name, colour), (_, marker) in zip(zip(names, COLOURS), STYLES * len(names)):
        rows = sorted((row for row in result["evaluation"] if row["model"] == name), key=lambda row: row["batch_size"])
        right.plot([row["batch_size"] for row in rows], [1e3 * row["seconds"] for row in rows], color=colour, marker=marker,
                   label=name)
    left.set(xlabel="images in a batch", ylabel="milliseconds an image", title=f"A training step, {result['steps']} attack steps")
    middle.set(xlabel="attack steps", ylabel="milliseconds an image", title=f"A training step, {result['batch_size']} images in a batch",
               xlim=(0, None), ylim=(0, None))
    right.set(xlabel="images in a batch", ylabel="milliseconds an image", title="One attack step of an evaluation, float32")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter("{x:.0f}")
        low, high = axis.get_ylim()
        axis.set_yticks([n * 10.0**k for k in range(-6, 7) for n in (1, 2, 5) if low <= n * 10.0**k <= high])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    middle.legend(frameon=False, fontsize=9, title="left and middle", alignment="left")
    right.legend(frameon=False, fontsize=9)
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
