"""Accuracy against the strength of a non-uniform attacker, several results in one plot."""
import statistics
from pathlib import Path

from harness.errors import UserError
from harness.reporting.figures import COLOURS, STYLES, new_axes, save
from harness.reporting.tables import Row, setting_column, shown

PANELS = {"A_sa": ("at equal alpha", "alpha, the attacker's preference for small margins"),
          "A_sa_kl": ("at equal budget", "KL(w || uniform) in nats, what the attacker may spend")}


def draw_strengths(rows: list[Row], path: Path) -> None:
    """A_sa against alpha, and beside it against the KL budget; a row of panels a protocol, a line a result.

    Points are means over the seeds, bars their standard deviations, and strength 0 is A_rob. Raises UserError
    where no result has an A_sa_kl.
    """
    rows = [row for row in rows if strengths_of(row, "A_sa_kl")]
    if not rows:
        raise UserError("none of these results has an A_sa_kl: evaluate the checkpoints again (--resume "
                        "OUT.record --out NEW.json needs no attack)")
    protocols = {str(row.protocol): row.protocol for row in rows}
    figure, axes = new_axes(len(protocols), len(PANELS), 6.4, 4.6)
    for pair, (key, protocol) in zip(axes, protocols.items()):
        alike = [row for row in rows if str(row.protocol) == key]
        for axis, (metric, (title, label)) in zip(pair, PANELS.items()):
            for k, (row, setting) in enumerate(zip(alike, setting_column(alike, without=("epochs",)))):
                name = ", ".join(filter(None, (row.label, setting)))
                style, marker = STYLES[k // len(COLOURS) % len(STYLES)]
                axis.errorbar(*points_of(row, metric), label=name, linestyle=style, marker=marker,
                              markersize=4, capsize=3, color=COLOURS[k % len(COLOURS)])
            axis.set(xlabel=label, ylabel="A_sa, %", ylim=(0, 101),
                     title=f"{protocol['dataset']}, epsilon {shown(protocol['epsilon'])}: {title}")
        pair[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.02))
    save(figure, path)


def strengths_of(row: Row, metric: str) -> list[float]:
    """The strengths at which the results of a row have a metric, in rising order."""
    columns = {name for result in row.results for name in result.measured}
    return sorted(float(name.split()[1]) for name in columns if name.split()[0] == metric)


def points_of(row: Row, metric: str) -> tuple[list[float], list[float], list[float]]:
    """(strengths, means over seeds, standard deviations) of a metric, from A_rob at strength 0 on."""
    columns = {0.0: "A_rob"} | {at: f"{metric} {at:g}" for at in strengths_of(row, metric)}
    values = [row.values(column) for column in columns.values()]
    deviations = [statistics.stdev(found) if len(found) > 1 else 0.0 for found in values]
    return list(columns), [statistics.mean(found) for found in values], deviations
