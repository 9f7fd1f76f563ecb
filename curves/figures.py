"""Which figures are drawn from which stored results: those of one measurement, of a comparison, and the ones of the paper."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from curves import plots
from curves.class_distances import ClassDistances
from curves.curve import Curve
from curves.report import curve_points
from curves.store import Results
from curves.toys import crossing_pair, sine_points
from curves.transfer import correlations, image_scale, quantile_pairs, scales

PAIRS = (("linf", "l2"), ("linf", "l1"), ("l2", "l1"))


@dataclass(frozen=True)
class Look:
    """How figures are drawn: level and kind of the bands, units of the axes, file formats."""

    confidence: float = 0.95
    band: str = "dkw"
    units: str = "raw"
    formats: tuple[str, ...] = ("png",)


def shared_norms(several: list[Results]) -> tuple[str, ...]:
    """The norms that all results have."""
    return tuple(norm for norm in several[0].norms if all(norm in results.norms for results in several))


def panels(several: list[Results], look: Look) -> dict[str, list[dict]]:
    """norm -> models with the columns of their curves, as `plots.curves` takes them."""
    return {norm: [{"label": results.name, "n": len(results), "censored": Curve(results.upper(norm)).censored}
                   | curve_points(results.upper(norm), results.lower(norm), look.band, look.confidence) for results in several]
            for norm in shared_norms(several)}


def draw_curves(several: list[Results], folder: Path, look: Look, marks: dict[str, tuple[float, ...]]) -> list[Path]:
    """curves.png: R(t) of every model, a panel a norm."""
    return plots.curves(panels(several, look), folder / "curves", confidence=look.confidence, band=look.band, units=look.units, marks=marks,
                        formats=look.formats)


def draw_comparison(several: list[Results], compared: dict[str, list[dict]], folder: Path, look: Look) -> list[Path]:
    """difference.png of the first model and every other, and transfer.png and rank_correlation.png where there are several norms.

    compared: norm -> pairs as `curves.report.pair` gives them, with the models' names as `first` and `second`.
    """
    by_name = {results.name: results for results in several}
    rows = {norm: [_difference(by_name, entry, norm) for entry in entries if entry["first"] == several[0].name]
            for norm, entries in compared.items()}
    drawn = plots.differences(rows, folder / "difference", units=look.units, confidence=look.confidence, formats=look.formats)
    if len(norms := shared_norms(several)) > 1:
        drawn += draw_transfer(several, norms, folder, look)
    return drawn


def _difference(by_name: dict[str, Results], entry: dict, norm: str) -> dict[str, object]:
    first, second = (Curve(by_name[entry[side]].upper(norm)) for side in ("first", "second"))
    t = np.union1d(first.steps()[0], second.steps()[0])
    return {"first": entry["first"], "second": entry["second"], "t": t, "gap": first.at(t) - second.at(t),
            "half_width": entry["half_width"], "crossings": [crossing["at"] for crossing in entry["crossings"] if crossing["supported"]]}


def draw_transfer(several: list[Results], norms: tuple[str, ...], folder: Path, look: Look) -> list[Path]:
    """transfer.png, quantiles of one norm against another, and rank_correlation.png."""
    pairs = {(a, b): [{"label": results.name, **dict(zip(("first", "second"), quantile_pairs(results.upper(a), results.upper(b))))}
                      for results in several] for a, b in PAIRS if a in norms and b in norms}
    ranks = [{"label": results.name, "values": correlations({norm: results.upper(norm) for norm in norms})} for results in several]
    return (plots.quantiles(pairs, folder / "transfer", look.formats)
            + plots.rank_correlations(ranks, folder / "rank_correlation", look.formats))


def draw_classes(found: dict[str, ClassDistances], folder: Path, look: Look, title: str) -> list[Path]:
    """class_distances.png, and class_distances_subsets.png: how the smallest one falls as points are added."""
    spread = {norm: {"inter": part.inter_unit(), "intra": part.intra_unit()} for norm, part in found.items()}
    least = {norm: part.unit(part.prefix) for norm, part in found.items()}
    return (plots.class_distances(spread, folder / "class_distances", units=look.units, title=title, formats=look.formats)
            + plots.subsets(least, folder / "class_distances_subsets", units=look.units, title=title, formats=look.formats))


def draw_surfaces(found: dict[str, dict[str, np.ndarray]], epsilons: np.ndarray, alphas: np.ndarray, folder: Path,
                  look: Look) -> list[Path]:
    """surface_MODEL.png for each model, and surface_difference.png of the first two.  found: model -> as `curves.surface.both`."""
    drawn, names = [], list(found)
    for name, part in found.items():
        drawn += plots.surface(epsilons, alphas, {metric: part[metric] for metric in ("A_sa", "A_tr")}, part["n_eff_sa"],
                               folder / f"surface_{name.replace('/', '-')}", title=f"{name}: ", units=look.units, formats=look.formats)
    if len(names) > 1:
        apart = {metric: found[names[0]][metric] - found[names[1]][metric] for metric in ("A_sa", "A_tr")}
        drawn += plots.surface_difference(epsilons, alphas, apart, folder / "surface_difference", title=f"{names[0]} $-$ {names[1]}",
                                          units=look.units, formats=look.formats)
    return drawn


def draw_paper(several: list[Results], images: np.ndarray | None, folder: Path, look: Look) -> tuple[list[Path], list[str]]:
    """The paper's figures from stored results, and a line for each that they do not suffice for.

    images: the clean points of the first results, [n, C, H, W] in [0, 1], or None where their data set is not at hand.
    """
    norms, missing = shared_norms(several), []
    drawn = draw_toys(folder, look) + draw_sample_size(several, folder, look)
    if len(several) > 1:
        drawn += plots.grid({norm: rows for norm, rows in panels(several, look).items() if norm != "l1"} or panels(several, look),
                            folder / "model_comparison", units=look.units, formats=look.formats)
    else:
        missing.append("model_comparison: needs the results of two models")
    if {"linf", "l2"} <= set(norms) and images is not None:
        drawn += draw_scaled(several, images, folder, look)
    else:
        missing.append("scaled: needs distances in l_inf and l_2, and the images")
    if images is not None and all(f"x_adv_{norm}" in several[0].columns for norm in norms):
        drawn += draw_examples(several[0], images, folder, look)
    else:
        missing.append("examples: needs adversarial examples in the first results (compute --adversaries)")
    if not any((results.lower(norm) > 0).any() for results in several for norm in norms):
        missing.append("bracket: no result has lower bounds")
    return drawn, missing


def draw_toys(folder: Path, look: Look) -> list[Path]:
    """toy.png: two curves of equal area that cross, and three norms at a sine-shaped boundary."""
    first, second = map(Curve, crossing_pair(400))
    _, found = sine_points(4000)
    lines = {f"{name}: area under $1 - R$ {curve.area():.3f}": curve.steps() for name, curve in (("model A", first), ("model B", second))}
    sine = {plots.NORM_NAMES[norm]: Curve(values).steps() for norm, values in found.items()}
    return plots.distributions([{"title": "Equal area, order reversed at 1.5", "xlabel": r"perturbation size, $\epsilon$", "lines": lines},
                                {"title": r"Points at $\ell_2$ distance 1 from $y = \sin x$", "xlabel": "distance to the boundary",
                                 "lines": sine}], folder / "toy", look.formats)


def draw_sample_size(several: list[Results], folder: Path, look: Look) -> list[Path]:
    """sample_size.png: the first model's curve from all its points and from a tenth of them, each with its band."""
    results = several[0]
    rows = np.sort(np.random.default_rng(0).permutation(len(results))[:max(1, len(results) // 10)])
    norm = results.norms[0]
    models = [{"label": f"{len(values):,} points", "n": len(values), "censored": Curve(values).censored}
              | curve_points(values, np.zeros(len(values)), look.band, look.confidence)
              for values in (results.upper(norm), results.upper(norm)[rows])]
    return plots.curves({norm: models}, folder / "sample_size", confidence=look.confidence, band=look.band, units=look.units,
                        formats=look.formats)


def draw_scaled(several: list[Results], images: np.ndarray, folder: Path, look: Look) -> list[Path]:
    """scaled.png: l_inf curves stretched onto the l_2 axis by both of the paper's factors and by the paired one."""
    factor, models = image_scale(images), []
    for results in several[:4]:
        found = {"images": factor, **scales(results.upper("linf"), results.upper("l2"))}
        models.append({"label": results.name, "l2": Curve(results.upper("l2")).steps(), "linf": Curve(results.upper("linf")).steps(),
                       "scales": {name: value for name, value in found.items() if value is not None}})
    return plots.scaled(models, folder / "scaled", look.formats)


def draw_examples(results: Results, images: np.ndarray, folder: Path, look: Look) -> list[Path]:
    """examples.png: the first points that were attacked, and their perturbations in each norm."""
    sizes = results.upper(results.norms[0])
    rows = np.flatnonzero((sizes > 0) & np.isfinite(sizes))[:8]
    return plots.examples(images[rows], [(norm, results.columns[f"x_adv_{norm}"][rows] - images[rows]) for norm in results.norms],
                          folder / "examples", look.formats) if len(rows) else []
