"""The figures of a measurement, of a comparison, of class distances and of surfaces, from stored results."""
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from curves import surface as surfaces
from curves.canvas import NORM_NAMES, Look, curve_panels, halo, legend_above, note_at, save, steps, style
from curves.check import slack_of
from curves.class_distances import ClassDistances
from curves.curve import Curve
from curves.store import Results
from curves.transfer import correlations, paired
from harness.reporting.figures import BLUE, GREY, ORANGE, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAIRS = (("linf", "l2"), ("linf", "l1"), ("l2", "l1"))


def shared_norms(several: list[Results]) -> tuple[str, ...]:
    """The norms that all results have."""
    return tuple(norm for norm in several[0].norms if all(norm in results.norms for results in several))


def draw_curves(several: list[Results], folder: Path, look: Look) -> list[Path]:
    """curves.png: R(t) of every model, a panel a norm."""
    panels = {norm: [results.labelled(norm) for results in several] for norm in shared_norms(several)}
    slacks = {norm: [slack_of(results, norm, look.confidence) for results in several] for norm in panels}
    return curve_panels(panels, folder / "curves", look, slacks)


# ---- a comparison ------------------------------------------------------------------------------------------

def draw_comparison(several: list[Results], compared: dict[str, list[dict]], folder: Path,
                    look: Look) -> None:
    """difference.png; where there are several norms, transfer.png and rank_correlation.png too.

    compared: norm -> `curves.report.pair` of every pair of models in their order.
    """
    draw_differences(several, compared, folder / "difference", look)
    if len(norms := shared_norms(several)) > 1:
        draw_quantiles(several, norms, folder / "transfer", look)
        draw_rank_correlations(several, norms, folder / "rank_correlation", look)


def draw_differences(several: list[Results], compared: dict[str, list[dict]], stem: Path, look: Look) -> None:
    """R_first(t) - R_second(t) of the first model and every other with its band, one column a norm."""
    figure, axes = new_axes(len(several) - 1, len(compared), height=3.4)
    for column, (norm, entries) in zip(axes.T, compared.items()):
        for axis, second, entry in zip(column, several[1:], entries):
            _difference(axis, Curve(several[0].upper(norm)), Curve(second.upper(norm)), entry, look)
            axis.set_title(f"{several[0].name} $-$ {second.name}, {NORM_NAMES[norm]}", fontsize=9)
        column[-1].set_xlabel(look.size_label(norm))
    for axis in axes[:, 0]:
        axis.set_ylabel(f"difference of R, points of %\n({100 * look.confidence:g} % simultaneous band)",
                        fontsize=9)
    save(figure, stem, look)


def _difference(axis: "Axes", first: Curve, second: Curve, entry: dict, look: Look) -> None:
    """The difference of two curves with its band, and a line at each crossing that is supported."""
    t = np.union1d(first.steps()[0], second.steps()[0])
    end = 1.02 * look.scale * t[-1] or 1.0
    gap = 100 * (first.at(t) - second.at(t))
    gap, half = np.append(gap, gap[-1]), 100 * entry["half_width"]
    ends = np.append(look.scale * t, end)
    axis.step(ends, gap, where="post", color=BLUE, linewidth=1.4)
    axis.fill_between(ends, gap - half, gap + half, step="post", color=BLUE, alpha=0.18, linewidth=0)
    axis.axhline(0, color="black", linewidth=0.9)
    for crossing in entry["crossings"]:
        if crossing["supported"]:
            at = look.scale * crossing["at"]
            axis.axvline(at, color=ORANGE, linestyle="--", linewidth=1.2)
            note_at(axis, at, f"cross at {at:.3g}", ORANGE)
    axis.set_xlim(0, end)


def draw_quantiles(several: list[Results], norms: tuple[str, ...], stem: Path, look: Look) -> None:
    """Quantiles of the distances in one norm against those in another."""
    pairs = [pair for pair in PAIRS if set(pair) <= set(norms)]
    figure, axes = new_axes(1, len(pairs), 4.8)
    for axis, (first, second) in zip(axes[0], pairs):
        for k, results in enumerate(several):
            x, y = paired(results.upper(first), results.upper(second))
            axis.plot(np.sort(x), np.sort(y), linewidth=1.4, label=results.name, **style(k))
        axis.set(xlabel=f"distance, {NORM_NAMES[first]} norm", ylabel=f"distance, {NORM_NAMES[second]} norm",
                 title=f"Quantiles, {NORM_NAMES[second]} against {NORM_NAMES[first]}")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
    legend_above(figure, axes[0])
    save(figure, stem, look)


def draw_rank_correlations(several: list[Results], norms: tuple[str, ...], stem: Path, look: Look) -> None:
    """Spearman's correlations between norms as a table of colours, a row a model."""
    rows = [correlations({norm: results.upper(norm) for norm in norms}) for results in several]
    table = np.array([list(row.values()) for row in rows], dtype=float)  # None becomes nan
    figure, axes = new_axes(1, 1, 1.9 + 1.3 * table.shape[1] + 2.0, 1.4 + 0.42 * len(rows))
    axis = axes[0][0]
    axis.imshow(table, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        text = "-" if np.isnan(value) else f"{value:.3f}"
        axis.text(column, row, text, ha="center", va="center", fontsize=9,
                  color="black" if value > 0.5 else "white")
    pairs = [" and ".join(NORM_NAMES[norm] for norm in pair.split("-")) for pair in rows[0]]
    axis.set_xticks(range(len(pairs)), pairs)
    axis.set_yticks(range(len(rows)), [results.name for results in several])
    axis.grid(False)
    axis.set_title("Rank correlation of the distances in two norms", fontsize=10)
    save(figure, stem, look)


# ---- class distances ---------------------------------------------------------------------------------------

def draw_classes(found: dict[str, ClassDistances], folder: Path, look: Look, title: str) -> None:
    """class_distances.png: how far the nearest points of another and of the same class are."""
    figure, axes = new_axes(1, len(found))
    for axis, (norm, part) in zip(axes[0], found.items()):
        inter, intra = (look.scale * np.sort(values) for values in (part.inter_unit(), part.intra_unit()))
        for k, (name, t) in enumerate((("another class", inter), ("the same class", intra))):
            shares = np.arange(len(t) + 1) / len(t)
            steps(axis, np.append(0, t), shares, t[-1], f"nearest point of {name}", k)
        half = inter[0] / 2
        axis.axvline(half, color=GREY, linestyle="--", linewidth=1.1,
                     label="half the smallest inter-class distance")
        note_at(axis, half, f"{half:.3g}", GREY)
        axis.set(xlabel=look.size_label(norm, "distance"), title=f"{title}{NORM_NAMES[norm]}", ylim=(0, 101))
        axis.set_xlim(left=0)
    axes[0][0].set_ylabel("points within that distance, %")
    legend_above(figure, axes[0])
    save(figure, folder / "class_distances", look)


def draw_subsets(found: dict[str, ClassDistances], folder: Path, look: Look, title: str) -> None:
    """class_distances_subsets.png: the smallest inter-class distance among the first j points against j."""
    figure, axes = new_axes(1, len(found))
    for axis, (norm, part) in zip(axes[0], found.items()):
        least = look.scale * part.unit(part.prefix)
        shown = np.isfinite(least)
        axis.step(1 + np.flatnonzero(shown), least[shown], where="post", color=BLUE, linewidth=1.4)
        axis.set(xscale="log", xlabel="number of points (random order)", title=f"{title}{NORM_NAMES[norm]}",
                 ylabel=look.size_label(norm, "smallest inter-class distance").replace(", ", ",\n", 1))
        axis.set_ylim(bottom=0)
    save(figure, folder / "class_distances_subsets", look)


# ---- surfaces ----------------------------------------------------------------------------------------------

def draw_surfaces(found: dict[str, dict[str, np.ndarray]], epsilons: np.ndarray, alphas: np.ndarray,
                  folder: Path, look: Look) -> None:
    """surface_MODEL.png of each model, surface_difference.png of the first two.

    found: model -> as `curves.surface.both`. Hatched where fewer than surfaces.FEW effective points are; the
    thick line of a difference is where the two agree: the crossing curve.
    """
    grid = look.scale * epsilons, alphas
    levels = [0, surfaces.FEW]
    for name, part in found.items():
        figure, axes = new_axes(1, 2, 5.6)
        few = (part["n_eff_sa"] < surfaces.FEW).any()
        note = f"   (hatched: fewer than {surfaces.FEW} effective points)" if few else ""
        for axis, metric in zip(axes[0], ("A_sa", "A_tr")):
            _heat(axis, grid, 100 * part[metric], "cividis", (0, 100), f"{metric}, %", look)
            if few:
                axis.contourf(*grid, part["n_eff_sa"].T, levels=levels, colors="none", hatches=["//"])
            axis.set_title(f"{name}: {metric}{note}", fontsize=10)
        save(figure, folder / f"surface_{name.replace('/', '-')}", look)
    if len(found) > 1:
        first, second, *_ = found
        figure, axes = new_axes(1, 2, 5.6)
        for axis, metric in zip(axes[0], ("A_sa", "A_tr")):
            table = found[first][metric] - found[second][metric]
            size = max(100 * np.abs(table).max(), 1e-9)
            label = f"difference of {metric}, points of %"
            _heat(axis, grid, 100 * table, "PuOr_r", (-size, size), label, look)
            if table.min() < 0 < table.max():
                axis.contour(*grid, table.T, levels=[0.0], colors="black", linewidths=2.4)
            axis.set_title(f"{metric}: {first} $-$ {second}", fontsize=10)
        save(figure, folder / "surface_difference", look)


def _heat(axis: "Axes", grid: tuple[np.ndarray, np.ndarray], table: np.ndarray, cmap: str,
          limits: tuple[float, float], label: str, look: Look) -> None:
    """A heat map of table [E, A] over the grid (epsilons, alphas), with contours."""
    mesh = axis.pcolormesh(*grid, table.T, cmap=cmap, vmin=limits[0], vmax=limits[1], shading="gouraud")
    if np.ptp(table) > 0:
        lines = axis.contour(*grid, table.T, levels=8, colors="black", linewidths=0.7)
        for text in axis.clabel(lines, fontsize=8, fmt="%g"):
            text.set_path_effects(halo())
    axis.figure.colorbar(mesh, ax=axis, label=label)
    axis.grid(False)
    axis.set(xlabel=look.size_label("linf", r"perturbation size $\epsilon$"),
             ylabel=r"$\alpha$, the attacker's preference for small margins")
