"""Figures of robustness curves, class distances and robustness surfaces, from plain arrays.  Curves are drawn as the steps they are."""
from pathlib import Path

import numpy as np

from harness.reporting.figures import BLUE, COLOURS, GREY, ORANGE, STYLES, new_axes

NORM_NAMES = {"linf": r"$\ell_\infty$", "l2": r"$\ell_2$", "l1": r"$\ell_1$"}
UNITS = {"raw": (1.0, "pixels in [0, 1]"), "255": (255.0, "grey levels of 255")}
FEW = 4  # curves in one panel: with more of them no bands are drawn, only their half-width is said


def _write(figure: object, stem: Path, formats: tuple[str, ...]) -> list[Path]:
    """Save as stem.png, stem.pdf, ...; returns the files."""
    import matplotlib
    from matplotlib import pyplot

    files = [stem.with_name(f"{stem.name}.{ending}") for ending in formats]
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        for file in files:
            figure.savefig(file, dpi=150)
    pyplot.close(figure)
    return files


def _style(k: int) -> dict[str, object]:
    """Colour and line of the k-th curve: 21 told apart."""
    return {"color": COLOURS[k % len(COLOURS)], "linestyle": STYLES[k // len(COLOURS) % len(STYLES)][0]}


def _size_label(norm: str, units: str) -> str:
    return f"perturbation size t, {NORM_NAMES[norm]} norm, {UNITS[units][1]}"


def _steps(axis: object, t: np.ndarray, values: np.ndarray, end: float, **options: object) -> None:
    """A right-continuous step function from 0 to `end`, values in percent."""
    axis.step(np.append(t, max(end, t[-1])), 100 * np.append(values, values[-1]), where="post", linewidth=1.4, **options)


def curves(panels: dict[str, list[dict]], stem: Path, *, confidence: float = 0.95, band: str = "dkw", units: str = "raw",
           marks: dict[str, tuple[float, ...]] | None = None, formats: tuple[str, ...] = ("png",)) -> list[Path]:
    """R(t) of several models, one panel a norm, each with its band.

    panels: norm -> models, each with `label`, `n`, `censored` (a number of points) and the columns t, R, low, high and, where lower
    bounds are known, R_certified: the bracket is drawn dotted. marks: norm -> sizes with a thin line.
    """
    figure, axes = new_axes(1, len(panels))
    kind = f"{100 * confidence:g} % {'simultaneous' if band == 'dkw' else 'point-wise'} band"
    for axis, (norm, models) in zip(axes[0], panels.items()):
        _curve_panel(axis, models, units, (marks or {}).get(norm, ()))
        note = f"shaded: {kind}" if len(models) <= FEW else f"{kind}: $\\pm$ {_half_width(models)} at most"
        axis.set_xlabel(_size_label(norm, units))
        axis.set_title(f"{NORM_NAMES[norm]}  ({note})", fontsize=10)
    axes[0][0].set_ylabel("points with an adversarial example\nwithin t: R(t), %")
    _legend_above(figure, axes[0])
    return _write(figure, stem, formats)


def _legend_above(figure: object, axes: np.ndarray) -> None:
    """One legend over all panels, each entry once: none of the curves is under it."""
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    fitting = int(figure.get_figwidth() / (0.7 + 0.075 * max(map(len, entries))))  # inches: of the line, and of a character
    columns = max(1, min(len(entries), fitting))
    figure.legend(entries.values(), entries, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)


def _half_width(models: list[dict]) -> str:
    widest = [np.max((model["high"] - model["low"]) / 2) for model in models]
    return f"{100 * max(widest):.1f} %"


def _curve_panel(axis: object, models: list[dict], units: str, marks: tuple[float, ...]) -> None:
    scale = UNITS[units][0]
    end = 1.02 * scale * max(model["t"][-1] for model in models) or 1.0
    for k, model in enumerate(models):
        t = scale * model["t"]
        censored = f", {model['censored']:,} censored" if model["censored"] else ""
        label = f"{model['label']} (n = {model['n']:,}{censored})"
        _steps(axis, t, model["R"], end, label=label, **_style(k))
        if len(models) <= FEW:
            low, high = (100 * np.append(model[name], model[name][-1]) for name in ("low", "high"))
            axis.fill_between(np.append(t, end), low, high, step="post", color=_style(k)["color"], alpha=0.15, linewidth=0)
        if "R_certified" in model:
            axis.step(t, 100 * model["R_certified"], where="post", linewidth=1.1, color=_style(k)["color"], linestyle=":",
                      label=f"{model['label']}, certified: R is at most this")
        if model["censored"] and len(models) <= FEW:
            top = 100 * model["R"][-1]
            axis.annotate(f"{100 - top:.1f} % censored", (end, top), xytext=(-2, -4), textcoords="offset points", ha="right", va="top",
                          fontsize=8, path_effects=_halo(), color=_style(k)["color"])
    for mark in marks:
        if scale * mark < end:
            axis.axvline(scale * mark, color=GREY, linewidth=0.9, linestyle="--")
    axis.set(xlim=(0, end), ylim=(0, 101))


def differences(panels: dict[str, list[dict]], stem: Path, *, units: str = "raw", confidence: float = 0.95,
                formats: tuple[str, ...] = ("png",)) -> list[Path]:
    """R_first(t) - R_second(t) with its simultaneous band, one row a pair of models, one column a norm.

    panels: norm -> pairs, each with `first`, `second`, `t`, `gap`, `half_width` and `crossings` (supported ones alone: a line each).
    """
    scale, pairs = UNITS[units][0], len(next(iter(panels.values())))
    figure, axes = new_axes(pairs, len(panels), height=3.4)
    for column, (norm, entries) in enumerate(panels.items()):
        for row, entry in enumerate(entries):
            axis, t = axes[row][column], scale * entry["t"]
            end, gap, half = 1.02 * t[-1] or 1.0, 100 * entry["gap"], 100 * entry["half_width"]
            axis.step(np.append(t, end), np.append(gap, gap[-1]), where="post", color=BLUE, linewidth=1.4)
            axis.fill_between(np.append(t, end), np.append(gap, gap[-1]) - half, np.append(gap, gap[-1]) + half, step="post", color=BLUE,
                              alpha=0.18, linewidth=0)
            axis.axhline(0, color="black", linewidth=0.9)
            for at in entry["crossings"]:
                axis.axvline(scale * at, color=ORANGE, linestyle="--", linewidth=1.2)
                axis.annotate(f"cross at {scale * at:.3g}", (scale * at, 1), xycoords=("data", "axes fraction"), xytext=(3, -10),
                              textcoords="offset points", fontsize=8, color=ORANGE)
            axis.set(xlim=(0, end), title=f"{entry['first']} $-$ {entry['second']}, {NORM_NAMES[norm]}")
            axis.title.set_fontsize(9)
            if row == pairs - 1:
                axis.set_xlabel(_size_label(norm, units))
            if column == 0:
                axis.set_ylabel(f"difference of R, points of %\n({100 * confidence:g} % simultaneous band)", fontsize=9)
    return _write(figure, stem, formats)


def quantiles(panels: dict[tuple[str, str], list[dict]], stem: Path, formats: tuple[str, ...] = ("png",)) -> list[Path]:
    """Quantiles of the distances in one norm against those in another.  panels: (norm, norm) -> models with `label`, `first`, `second`."""
    figure, axes = new_axes(1, len(panels), 4.8)
    for axis, ((first, second), models) in zip(axes[0], panels.items()):
        for k, model in enumerate(models):
            axis.plot(model["first"], model["second"], linewidth=1.4, label=model["label"], **_style(k))
        axis.set(xlabel=f"distance, {NORM_NAMES[first]} norm", ylabel=f"distance, {NORM_NAMES[second]} norm",
                 title=f"Quantiles, {NORM_NAMES[second]} against {NORM_NAMES[first]}")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
    _legend_above(figure, axes[0])
    return _write(figure, stem, formats)


def rank_correlations(models: list[dict], stem: Path, formats: tuple[str, ...] = ("png",)) -> list[Path]:
    """Spearman's correlations between norms as a table of colours.  models: `label` and `values`, pair of norms -> number or None."""
    columns = list(models[0]["values"])
    figure, axes = new_axes(1, 1, 1.9 + 1.3 * len(columns) + 2.0, 1.4 + 0.42 * len(models))
    axis = axes[0][0]
    table = np.array([[np.nan if value is None else value for value in model["values"].values()] for model in models], dtype=float)
    axis.imshow(table, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(*table.shape):
        value = table[row, column]
        text = "-" if np.isnan(value) else f"{value:.3f}"
        axis.text(column, row, text, ha="center", va="center", fontsize=9, color="black" if value > 0.5 else "white")
    axis.set_xticks(range(len(columns)), [" and ".join(NORM_NAMES[norm] for norm in pair.split("-")) for pair in columns])
    axis.set_yticks(range(len(models)), [model["label"] for model in models])
    axis.grid(False)
    axis.set_title("Rank correlation of the distances in two norms", fontsize=10)
    return _write(figure, stem, formats)


def class_distances(panels: dict[str, dict], stem: Path, *, units: str = "raw", title: str = "",
                    formats: tuple[str, ...] = ("png",)) -> list[Path]:
    """The distribution of the distances to the nearest point of another and of the same class, one panel a norm.

    panels: norm -> `inter` and `intra`, distances in units of [0, 1].
    """
    scale = UNITS[units][0]
    figure, axes = new_axes(1, len(panels))
    for axis, (norm, part) in zip(axes[0], panels.items()):
        for k, (name, values) in enumerate((("another class", part["inter"]), ("the same class", part["intra"]))):
            t = scale * np.sort(values)
            _steps(axis, np.append(0, t), np.arange(len(t) + 1) / len(t), t[-1], label=f"nearest point of {name}", **_style(k))
        half = scale * part["inter"].min() / 2
        axis.axvline(half, color=GREY, linestyle="--", linewidth=1.1, label="half the smallest inter-class distance")
        axis.annotate(f"{half:.3g}", (half, 1), xycoords=("data", "axes fraction"), xytext=(3, -10), textcoords="offset points", fontsize=8,
                      color=GREY)
        axis.set(xlabel=f"distance, {NORM_NAMES[norm]} norm, {UNITS[units][1]}", title=f"{title}{NORM_NAMES[norm]}", ylim=(0, 101))
        axis.set_xlim(left=0)
    axes[0][0].set_ylabel("points within that distance, %")
    _legend_above(figure, axes[0])
    return _write(figure, stem, formats)


def subsets(panels: dict[str, np.ndarray], stem: Path, *, units: str = "raw", title: str = "",
            formats: tuple[str, ...] = ("png",)) -> list[Path]:
    """The smallest inter-class distance among the first j points of a random order against j.  panels: norm -> values [n], inf at first."""
    scale = UNITS[units][0]
    figure, axes = new_axes(1, len(panels))
    for axis, (norm, values) in zip(axes[0], panels.items()):
        count = np.arange(1, len(values) + 1)
        shown = np.isfinite(values)
        axis.step(count[shown], scale * values[shown], where="post", color=BLUE, linewidth=1.4)
        axis.set(xscale="log", xlabel="number of points (random order)", title=f"{title}{NORM_NAMES[norm]}",
                 ylabel=f"smallest inter-class distance,\n{NORM_NAMES[norm]} norm, {UNITS[units][1]}")
        axis.set_ylim(bottom=0)
    return _write(figure, stem, formats)


def surface(epsilons: np.ndarray, alphas: np.ndarray, values: dict[str, np.ndarray], n_eff: np.ndarray, stem: Path, *, title: str = "",
            units: str = "raw", formats: tuple[str, ...] = ("png",)) -> list[Path]:
    """Heat maps over (epsilon, alpha) with contours.  values: metric -> [E, A] in [0, 1]; hatched where n_eff [E, A] is below 30."""
    figure, axes = new_axes(1, len(values), 5.6)
    for axis, (name, table) in zip(axes[0], values.items()):
        _heat(figure, axis, UNITS[units][0] * epsilons, alphas, 100 * table, "cividis", (0, 100), f"{name}, %")
        if (n_eff < 30).any():
            axis.contourf(UNITS[units][0] * epsilons, alphas, n_eff.T, levels=[0, 30], colors="none", hatches=["//"])
        note = "   (hatched: fewer than 30 effective points)" if (n_eff < 30).any() else ""
        axis.set_title(f"{title}{name}{note}", fontsize=10)
        _surface_labels(axis, units)
    return _write(figure, stem, formats)


def surface_difference(epsilons: np.ndarray, alphas: np.ndarray, values: dict[str, np.ndarray], stem: Path, *, title: str = "",
                       units: str = "raw", formats: tuple[str, ...] = ("png",)) -> list[Path]:
    """One surface minus another, metric -> [E, A]; the thick line is where they agree: the crossing curve."""
    figure, axes = new_axes(1, len(values), 5.6)
    for axis, (name, table) in zip(axes[0], values.items()):
        size = max(100 * np.abs(table).max(), 1e-9)
        _heat(figure, axis, UNITS[units][0] * epsilons, alphas, 100 * table, "PuOr_r", (-size, size), f"difference of {name}, points of %")
        if table.min() < 0 < table.max():
            axis.contour(UNITS[units][0] * epsilons, alphas, table.T, levels=[0.0], colors="black", linewidths=2.4)
        axis.set_title(f"{name}: {title}", fontsize=10)
        _surface_labels(axis, units)
    return _write(figure, stem, formats)


def _heat(figure: object, axis: object, x: np.ndarray, y: np.ndarray, table: np.ndarray, cmap: str, limits: tuple[float, float],
          label: str) -> None:
    mesh = axis.pcolormesh(x, y, table.T, cmap=cmap, vmin=limits[0], vmax=limits[1], shading="gouraud")
    if np.ptp(table) > 0:
        lines = axis.contour(x, y, table.T, levels=8, colors="black", linewidths=0.7)
        labels = axis.clabel(lines, fontsize=8, fmt="%g")
        for text in labels:
            text.set_path_effects(_halo())
    figure.colorbar(mesh, ax=axis, label=label)
    axis.grid(False)


def _halo() -> list:
    """A white rim that keeps text legible on lines and colours."""
    from matplotlib import patheffects

    return [patheffects.withStroke(linewidth=2, foreground="white")]


def _surface_labels(axis: object, units: str) -> None:
    axis.set(xlabel=f"perturbation size $\\epsilon$, {NORM_NAMES['linf']} norm, {UNITS[units][1]}",
             ylabel=r"$\alpha$, the attacker's preference for small margins")


def scaled(models: list[dict], stem: Path, formats: tuple[str, ...] = ("png",)) -> list[Path]:
    """l_inf curves stretched onto the l_2 axis beside the l_2 curve, one panel a model.

    models: `label`, and (t, R) as `l2` and `linf`, and `scales`, name -> factor.
    """
    figure, axes = new_axes(1, len(models), 5.0)
    for axis, model in zip(axes[0], models):
        end = 1.02 * model["l2"][0][-1]
        _steps(axis, *model["l2"], end, label=r"$\ell_2$", **_style(0))
        for k, (name, factor) in enumerate(model["scales"].items(), 1):
            t, values = model["linf"]
            _steps(axis, factor * t, values, end, label=rf"$\ell_\infty \times$ {factor:.2f} ({name})", **_style(k))
        axis.set(xlabel=_size_label("l2", "raw"), title=model["label"], ylim=(0, 101), xlim=(0, end))
        axis.legend(loc="upper left", frameon=True, framealpha=0.85, edgecolor="none", fontsize=8)
    axes[0][0].set_ylabel("R(t), %")
    return _write(figure, stem, formats)


def grid(rows: dict[str, list[dict]], stem: Path, *, units: str = "raw", formats: tuple[str, ...] = ("png",)) -> list[Path]:
    """Every model against the first one, a column each, a row a norm.  rows: norm -> models as in `curves`."""
    others = len(next(iter(rows.values()))) - 1
    figure, axes = new_axes(len(rows), others, 4.2, 3.4)
    for row, (norm, models) in enumerate(rows.items()):
        for column in range(others):
            axis = axes[row][column]
            _curve_panel(axis, [models[0], models[column + 1]], units, ())
            axis.set_xlabel(_size_label(norm, units), fontsize=9)
            axis.legend(loc="upper left", frameon=True, framealpha=0.85, edgecolor="none", fontsize=7)
            if column == 0:
                axis.set_ylabel("R(t), %")
    return _write(figure, stem, formats)


def examples(images: np.ndarray, rows: list[tuple[str, np.ndarray]], stem: Path, formats: tuple[str, ...] = ("png",)) -> list[Path]:
    """Images and the perturbations that change their class.  images: [k, C, H, W] in [0, 1]; rows: (name, perturbations, shaped alike).

    A perturbation is drawn around mid-grey, stretched so that its largest pixel change is the whole range; that change is written below.
    """
    figure, axes = new_axes(1 + len(rows), len(images), 1.35, 1.5)
    for axis in axes.flat:
        axis.spines[:].set_visible(False)
    for row, (name, values) in enumerate([("image", images), *rows]):
        for column, value in enumerate(values):
            axis, size = axes[row][column], float(np.abs(value).max())
            shown = value if row == 0 else 0.5 + value / (2 * size or 1)
            axis.imshow(shown[0] if len(shown) == 1 else shown.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(False)
            if column == 0:
                axis.set_ylabel(NORM_NAMES.get(name, name), fontsize=9)
            if row:
                axis.set_xlabel(rf"max $\pm${size:.2g}", fontsize=7, labelpad=1)
    return _write(figure, stem, formats)


def distributions(panels: list[dict], stem: Path, formats: tuple[str, ...] = ("png",)) -> list[Path]:
    """Step curves in panels of their own axes: each with `title`, `xlabel`, and `lines`, name -> (t, R)."""
    figure, axes = new_axes(1, len(panels))
    for axis, panel in zip(axes[0], panels):
        end = 1.02 * max(t[-1] for t, _ in panel["lines"].values())
        for k, (name, (t, values)) in enumerate(panel["lines"].items()):
            _steps(axis, t, values, end, label=name, **_style(k))
        axis.set(xlabel=panel["xlabel"], title=panel["title"], ylim=(0, 101), xlim=(0, end))
        axis.legend(loc="upper left", frameon=True, framealpha=0.85, edgecolor="none", fontsize=8)
    axes[0][0].set_ylabel("R(t), %")
    return _write(figure, stem, formats)
