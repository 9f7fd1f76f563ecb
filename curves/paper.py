"""The figures of Risse, Göpfert & Göpfert (ICANN 2021), from stored results."""
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from curves.canvas import NORM_NAMES, Look, curve_panel, curve_panels, legend_inside, save, steps
from curves.curve import Curve
from curves.figures import shared_norms
from curves.models import reopen
from curves.points import pick
from curves.store import Results
from curves.toys import crossing_pair, sine_points
from curves.transfer import image_scale, scales
from harness.datasets.batches import to_unit
from harness.errors import UserError
from harness.reporting.figures import new_axes


def draw_paper(several: list[Results], folder: Path, look: Look,
               build: Callable[..., nn.Module]) -> tuple[list[Path], list[str]]:
    """The files drawn, and a line for each figure that these results do not suffice for."""
    images, norms, missing = _images(several[0], build), shared_norms(several), []
    drawn = draw_toys(folder, look) + draw_sample_size(several[0], folder, look)
    if len(several) > 1:
        drawn += draw_grid(several, [norm for norm in norms if norm != "l1"] or norms, folder, look)
    else:
        missing.append("model_comparison: needs the results of two models")
    if {"linf", "l2"} <= set(norms) and images is not None:
        drawn += draw_scaled(several[:4], images, folder, look)
    else:
        missing.append("scaled: needs distances in l_inf and l_2, and the images")
    if images is not None and all(f"x_adv_{norm}" in several[0].columns for norm in norms):
        drawn += draw_examples(several[0], images, folder, look)
    else:
        missing.append("examples: needs adversarial examples in the first results (compute --adversaries)")
    if not any((results.lower(norm) > 0).any() for results in several for norm in norms):
        missing.append("bracket: no result has lower bounds")
    return drawn, missing


def _images(results: Results, build: Callable[..., nn.Module]) -> np.ndarray | None:
    """The clean points [n, C, H, W] in [0, 1]; None, and a note, where network or data are not at hand."""
    try:
        split = reopen(results.about, build).split
        return to_unit(pick(split, results.columns["index"]).images).numpy()
    except UserError as error:
        print(f"note: {error}")
        return None


def draw_toys(folder: Path, look: Look) -> list[Path]:
    """toy.png: two curves of equal area that cross, and three norms at a sine-shaped boundary."""
    pair = {f"{name}: area under $1 - R$ {curve.area():.3f}": curve
            for name, curve in zip(("model A", "model B"), map(Curve, crossing_pair(400)))}
    sine = {NORM_NAMES[norm]: Curve(values) for norm, values in sine_points(4000)[1].items()}
    panels = (("Equal area, order reversed at 1.5", r"perturbation size, $\epsilon$", pair),
              (r"Points at $\ell_2$ distance 1 from $y = \sin x$", "distance to the boundary", sine))
    figure, axes = new_axes(1, len(panels))
    for axis, (title, label, curves) in zip(axes[0], panels):
        end = 1.02 * max(curve.distances[-1] for curve in curves.values())
        for k, (name, curve) in enumerate(curves.items()):
            steps(axis, *curve.steps(), end, name, k)
        axis.set(xlabel=label, title=title, ylim=(0, 101), xlim=(0, end))
        legend_inside(axis)
    axes[0][0].set_ylabel("R(t), %")
    return save(figure, folder / "toy", look)


def draw_sample_size(results: Results, folder: Path, look: Look) -> list[Path]:
    """sample_size.png: a model's curve from all its points and from a tenth of them, each with its band."""
    norm = results.norms[0]
    size = max(1, len(results) // 10)
    tenth = np.sort(np.random.default_rng(0).permutation(len(results))[:size])
    parts = results.upper(norm), results.upper(norm)[tenth]
    models = [(f"{len(part):,} points", part, np.zeros(len(part))) for part in parts]
    return curve_panels({norm: models}, folder / "sample_size", replace(look, thresholds={}))


def draw_grid(several: list[Results], norms: list[str], folder: Path, look: Look) -> list[Path]:
    """model_comparison.png: every model against the first one, a column each, a row a norm."""
    figure, axes = new_axes(len(norms), len(several) - 1, 4.2, 3.4)
    for row, norm in zip(axes, norms):
        for axis, other in zip(row, several[1:]):
            curve_panel(axis, [several[0].labelled(norm), other.labelled(norm)], look)
            axis.set_xlabel(look.size_label(norm), fontsize=9)
            legend_inside(axis, 7)
        row[0].set_ylabel("R(t), %")
    return save(figure, folder / "model_comparison", look)


def draw_scaled(several: list[Results], images: np.ndarray, folder: Path, look: Look) -> list[Path]:
    """scaled.png: l_inf curves stretched onto the l_2 axis by the paper's factors and by the paired one."""
    figure, axes = new_axes(1, len(several), 5.0)
    for axis, results in zip(axes[0], several):
        l2, linf = Curve(results.upper("l2")), Curve(results.upper("linf"))
        end = 1.02 * l2.steps()[0][-1]
        steps(axis, *l2.steps(), end, r"$\ell_2$", 0)
        factors = {"images": image_scale(images), **scales(results.upper("linf"), results.upper("l2"))}
        for k, (name, factor) in enumerate(factors.items(), 1):
            if factor is not None:
                t, values = linf.steps()
                steps(axis, factor * t, values, end, rf"$\ell_\infty \times$ {factor:.2f} ({name})", k)
        axis.set(xlabel=Look().size_label("l2"), title=results.name, ylim=(0, 101), xlim=(0, end))
        legend_inside(axis)
    axes[0][0].set_ylabel("R(t), %")
    return save(figure, folder / "scaled", look)


def draw_examples(results: Results, images: np.ndarray, folder: Path, look: Look) -> list[Path]:
    """examples.png: the first points that were attacked, and their perturbations in each norm.

    A perturbation is drawn around mid-grey, stretched so that its largest pixel change, which is written
    below, is the whole range.
    """
    sizes = results.upper(results.norms[0])
    chosen = np.flatnonzero((sizes > 0) & np.isfinite(sizes))[:8]
    if not len(chosen):
        return []
    figure, axes = new_axes(1 + len(results.norms), len(chosen), 1.35, 1.5)
    for row, name in enumerate(("image", *results.norms)):
        axes[row][0].set_ylabel(NORM_NAMES.get(name, name), fontsize=9)
        for axis, place in zip(axes[row], chosen):
            shown = images[place]
            if row:
                change = results.columns[f"x_adv_{name}"][place] - shown
                size = float(np.abs(change).max())
                shown = 0.5 + change / (2 * size or 1)
                axis.set_xlabel(rf"max $\pm${size:.2g}", fontsize=7, labelpad=1)
            pixels = shown[0] if len(shown) == 1 else shown.transpose(1, 2, 0)
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set_visible(False)
    return save(figure, folder / "examples", look)
