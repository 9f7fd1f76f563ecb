"""What the figures of this room share: look, names of norms and units, and curves as the steps they are."""
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from curves.curve import Curve
from curves.report import curve_points
from harness.reporting.figures import COLOURS, GREY, STYLES, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NORM_NAMES = {"linf": r"$\ell_\infty$", "l2": r"$\ell_2$", "l1": r"$\ell_1$"}
UNITS = {"raw": (1.0, "pixels in [0, 1]"), "255": (255.0, "grey levels of 255")}
FEW = 4  # curves in one panel: with more of them no bands are drawn, only their half-width is said
Labelled = tuple[str, np.ndarray, np.ndarray]  # a model's name, its distances [n] and their lower bounds [n]


@dataclass(frozen=True)
class Look:
    """How results are shown: level and kind of the bands, sizes to mark (norm -> sizes), units, files."""

    confidence: float = 0.95
    band: str = "dkw"
    thresholds: dict[str, tuple[float, ...]] = field(default_factory=dict)
    units: str = "raw"
    formats: tuple[str, ...] = ("png",)
    plot: bool = True

    @property
    def scale(self) -> float:
        """What turns distances of pixels in [0, 1] into these units."""
        return UNITS[self.units][0]

    def size_label(self, norm: str, size: str = "perturbation size t") -> str:
        """The label of an axis of sizes in a norm."""
        return f"{size}, {NORM_NAMES[norm]} norm, {UNITS[self.units][1]}"


def save(figure: "Figure", stem: Path, look: Look) -> list[Path]:
    """Save as stem.png, stem.pdf, ...; returns the files."""
    import matplotlib
    from matplotlib import pyplot

    files = [stem.with_name(f"{stem.name}.{ending}") for ending in look.formats]
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        for file in files:
            figure.savefig(file, dpi=150)
    pyplot.close(figure)
    return files


def style(k: int) -> dict[str, str]:
    """Colour and line of the k-th curve: 21 told apart."""
    return {"color": COLOURS[k % len(COLOURS)], "linestyle": STYLES[k // len(COLOURS) % len(STYLES)][0]}


def steps(axis: "Axes", t: np.ndarray, values: np.ndarray, end: float, label: str, k: int) -> None:
    """The k-th right-continuous step function of a panel, from 0 to `end`, values in percent."""
    ends = np.append(t, max(end, t[-1]))
    axis.step(ends, 100 * np.append(values, values[-1]), where="post", linewidth=1.4, label=label, **style(k))


def halo() -> list:
    """A white rim that keeps text legible on lines and colours."""
    from matplotlib import patheffects

    return [patheffects.withStroke(linewidth=2, foreground="white")]


def note_at(axis: "Axes", x: float, text: str, colour: str) -> None:
    """A line of text at the top, beside x."""
    axis.annotate(text, (x, 1), xycoords=("data", "axes fraction"), xytext=(3, -10),
                  textcoords="offset points", fontsize=8, color=colour)


def legend_above(figure: "Figure", axes: np.ndarray) -> None:
    """One legend over all panels, each entry once: none of the curves is under it."""
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    widest = 0.7 + 0.075 * max(map(len, entries))  # inches: of the line, and of a character
    columns = max(1, min(len(entries), int(figure.get_figwidth() / widest)))
    figure.legend(entries.values(), entries, loc="outside upper center", ncols=columns, frameon=False,
                  fontsize=9)


def legend_inside(axis: "Axes", fontsize: int = 8) -> None:
    """A legend in the panel's upper left corner."""
    axis.legend(loc="upper left", frameon=True, framealpha=0.85, edgecolor="none", fontsize=fontsize)


def curve_panels(panels: dict[str, list[Labelled]], stem: Path, look: Look,
                 slacks: dict[str, list[dict | None]] | None = None) -> list[Path]:
    """R(t) of several models, one panel a norm, each with its band and a thin line at its thresholds.

    slacks: `curves.check.slack_of` each model, drawn as bars above the curves.
    """
    figure, axes = new_axes(1, len(panels))
    kind = f"{100 * look.confidence:g} % {'simultaneous' if look.band == 'dkw' else 'point-wise'} band"
    for axis, (norm, models) in zip(axes[0], panels.items()):
        half_width = curve_panel(axis, models, look, look.thresholds.get(norm, ()))
        few = len(models) <= FEW
        note = f"shaded: {kind}" if few else f"{kind}: $\\pm$ {100 * half_width:.1f} % at most"
        if slacks:
            note += "\n" + _draw_slack(axis, models, slacks[norm], look, few)
        axis.set_xlabel(look.size_label(norm))
        axis.set_title(f"{NORM_NAMES[norm]}  ({note})", fontsize=10)
    axes[0][0].set_ylabel("points with an adversarial example\nwithin t: R(t), %")
    legend_above(figure, axes[0])
    return save(figure, stem, look)


def _draw_slack(axis: "Axes", models: list[Labelled], slacks: list[dict | None], look: Look,
                few: bool) -> str:
    """Bars from R(t) up to what the check allows, in words where there are too many curves; the legend."""
    if None in slacks:
        return "not checked by another attack"
    highest = 100 * max(slack["high"] for slack in slacks)
    for k, ((_, upper, _), slack) in enumerate(zip(models, slacks) if few else ()):
        at = Curve(upper)
        for row in slack["radii"]:
            R = 100 * float(at.at(row["t"]))
            axis.vlines(look.scale * row["t"], R, min(R + 100 * row["high"], 100), linewidth=2.2, alpha=0.8,
                        **style(k))
    return f"bars: slack, up to {highest:.1f} %" if few else f"slack: up to {highest:.1f} %"


def curve_panel(axis: "Axes", models: list[Labelled], look: Look, marks: tuple[float, ...] = ()) -> float:
    """R(t) of several models with bands; dotted, what lower bounds allow.  -> the largest half-width."""
    columns = [curve_points(upper, lower, look.band, look.confidence) for _, upper, lower in models]
    end = 1.02 * look.scale * max(part["t"][-1] for part in columns) or 1.0
    for k, ((name, upper, _), part) in enumerate(zip(models, columns)):
        t = look.scale * part["t"]
        censored = Curve(upper).censored
        lost = f", {censored:,} censored" if censored else ""
        steps(axis, t, part["R"], end, f"{name} (n = {len(upper):,}{lost})", k)
        colour = style(k)["color"]
        if len(models) <= FEW:
            low, high = (100 * np.append(part[side], part[side][-1]) for side in ("low", "high"))
            axis.fill_between(np.append(t, end), low, high, step="post", color=colour, alpha=0.15,
                              linewidth=0)
        if "R_certified" in part:
            axis.step(t, 100 * part["R_certified"], where="post", linewidth=1.1, color=colour, linestyle=":",
                      label=f"{name}, certified: R is at most this")
        if censored and len(models) <= FEW:
            top = 100 * part["R"][-1]
            axis.annotate(f"{100 - top:.1f} % censored", (end, top), xytext=(-2, -4), fontsize=8, ha="right",
                          textcoords="offset points", va="top", path_effects=halo(), color=colour)
    for mark in marks:
        if look.scale * mark < end:
            axis.axvline(look.scale * mark, color=GREY, linewidth=0.9, linestyle="--")
    axis.set(xlim=(0, end), ylim=(0, 101))
    return max(np.max((part["high"] - part["low"]) / 2) for part in columns)
