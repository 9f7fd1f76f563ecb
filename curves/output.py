"""What is written and printed of measured distances, of a comparison, of class distances and of surfaces."""
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from curves import figures, report, transfer
from curves import surface as surfaces
from curves.class_distances import ClassDistances, summarize
from curves.figures import Look
from curves.store import Results, write_columns, write_json
from harness.datasets.split import Split
from harness.device import command_line, environment

Thresholds = dict[str, tuple[float, ...]]


def facts(started: float, device: torch.device) -> dict[str, object]:
    """What a reader needs in order to repeat a measurement that began at `started` of the monotonic clock."""
    return {"version": 1, "command_line": command_line(), "date": time.strftime("%Y-%m-%d"),
            "seconds": round(time.monotonic() - started, 1), "environment": environment(device)}


def curves(several: list[Results], folder: Path, thresholds: Thresholds, look: Look, plot: bool, run: dict) -> None:
    """curves.csv, summary.json, curves.png, and a table on the screen."""
    entries, rows, head = {}, [], ("t", "R", "low", "high", "R_certified")
    for results in several:
        norms = {norm: report.summarize(results.upper(norm), results.lower(norm), thresholds[norm], look.confidence)
                 for norm in results.norms}
        entries[results.name] = {"about": results.about, "norms": norms}
        for norm in results.norms:
            columns = report.curve_points(results.upper(norm), results.lower(norm), look.band, look.confidence)
            unknown = np.full(len(columns["t"]), np.nan)
            rows += [(results.name, norm, *values) for values in zip(*(columns.get(name, unknown) for name in head))]
    write_columns(folder / "curves.csv", ("model", "norm", *head), rows)
    write_json(folder / "summary.json", run | {"confidence": look.confidence, "band": look.band, "models": entries})
    _print_curves(entries)
    if plot:
        figures.draw_curves(several, folder, look, thresholds)
    print(f"written: {folder}")


def _print_curves(entries: dict[str, dict]) -> None:
    width = max(map(len, entries))
    print(f"\n{'model':<{width}}  norm  points   wrong  censored     mean   median   R(t) in %")
    for name, entry in entries.items():
        for norm, part in entry["norms"].items():
            mean, median = (f"{part[key]:.5f}" if part[key] is not None else "-" for key in ("mean", "median"))
            at = "  ".join(f"{100 * point['R']:.1f} at {point['t']:g}" for point in part["thresholds"])
            counts = f"{part['n']:>7,} {part['misclassified']:>7,} {part['censored']:>9,}"
            print(f"{name:<{width}}  {norm:<4} {counts} {mean:>8} {median:>8}   {at}")


def comparison(several: list[Results], folder: Path, thresholds: Thresholds, look: Look, plot: bool, num_resamples: int, seed: int) -> None:
    """compare.json, the figures, and on the screen where models change places."""
    started = time.monotonic()
    found = {norm: [{"first": a.name, "second": b.name} | report.pair(a.upper(norm), b.upper(norm), thresholds[norm], look.confidence,
                                                                     num_resamples, seed) for a, b in combinations(several, 2)]
             for norm in figures.shared_norms(several)}
    across = {results.name: transfer.correlations({norm: results.upper(norm) for norm in results.norms})
              | ({"scales": transfer.scales(results.upper("linf"), results.upper("l2"))} if {"linf", "l2"} <= set(results.norms) else {})
              for results in several}
    write_json(folder / "compare.json", facts(started, torch.device("cpu")) | {"points": len(several[0]), "confidence": look.confidence,
                                                                            "norms": found, "transfer": across})
    _print_pairs(found, len(several[0]))
    if plot:
        figures.draw_curves(several, folder, look, thresholds)
        figures.draw_comparison(several, found, folder, look)
    print(f"written: {folder}")


def _print_pairs(found: dict[str, list[dict]], points: int) -> None:
    print(f"\n{points:,} common points; R_first - R_second in points of %, where it is largest, with its simultaneous band")
    for norm, entries in found.items():
        for entry in entries:
            gap, sure = entry["largest_gap"], [crossing for crossing in entry["crossings"] if crossing["supported"]]
            text = f"{100 * gap['gap']:+.1f} at {gap['gap_at']:.4g} (p {gap['p_value']:.2g})" if gap else "equal everywhere"
            crossed = ", ".join(f"{crossing['at']:.4g}" for crossing in sure) or "none supported"
            print(f"{norm:<4}  {entry['first']} - {entry['second']}: {text}, band +-{100 * entry['half_width']:.1f}; crossings: {crossed}")


def class_distances(found: dict[str, ClassDistances], points: Split, folder: Path, about: dict, thresholds: Thresholds, look: Look,
                    plot: bool, run: dict) -> None:
    """class_distances.npz and .json, the figures, and on the screen the extremes of the inter-class distances.  about: the data set."""
    entries = {norm: summarize(part, thresholds[norm]) for norm, part in found.items()}
    write_json(folder / "class_distances.json", run | about | {"norms": entries})
    columns = {f"{kind}_{norm}": part.unit(getattr(part, kind)) for norm, part in found.items() for kind in ("inter", "intra", "prefix")}
    np.savez_compressed(folder / "class_distances.npz", index=points.index.cpu().numpy(), label=points.labels.cpu().numpy(), **columns)
    names, inter = " ".join(found), [entries[norm]["inter"] for norm in found]
    shown = " | ".join(" ".join(f"{part[end]:.2f}" for part in inter) for end in ("min", "max"))
    print(f"inter-class distances, smallest {names} | largest {names}: {shown}  ({about['num_points']:,} points, {run['seconds']} s)")
    for norm, entry in entries.items():
        print(f"{norm:<4} half the smallest {entry['half_min_inter']:.4f}, copies in another class {entry['duplicates']:,}; "
              + "; ".join(f"t {point['t']:g} is {point['of_half']:.2f} of it, {100 * point['within_2t']:.1f} % of points within 2t"
                          for point in entry["thresholds"]))
    if plot:
        figures.draw_classes(found, folder, look, f"{about['dataset'].partition(':')[0]}, ")
    print(f"written: {folder}")


def surface(found: dict[str, dict[str, np.ndarray]], epsilons: np.ndarray, alphas: np.ndarray, folder: Path, look: Look, plot: bool,
            run: dict) -> None:
    """surface.csv, surface.npz, the figures, and a warning where few points carry the weight.  found: model -> `curves.surface.both`."""
    names, rows = ("A_sa", "A_tr", "n_eff_sa", "n_eff_tr", "tilted"), []
    for model, part in found.items():
        rows += [(model, float(epsilon), float(alpha), *(part[name][e, a] for name in names))
                 for e, epsilon in enumerate(epsilons) for a, alpha in enumerate(alphas)]
        np.savez_compressed(folder / f"surface_{model.replace('/', '-')}.npz", epsilons=epsilons, alphas=alphas, **part)
        few = int((np.minimum(part["n_eff_sa"], part["n_eff_tr"]) < surfaces.FEW).sum())
        if few:
            print(f"warning: {model}: fewer than {surfaces.FEW} points carry the weight at {few} of {part['A_sa'].size} grid points")
        if part["improved"]:
            print(f"note: {model}: PGD came closer than the stored distance of {part['improved']:,} points, and the surface uses its own")
    write_columns(folder / "surface.csv", ("model", "epsilon", "alpha", *names), rows)
    write_json(folder / "summary.json", run | {"models": list(found), "epsilons": epsilons.tolist(), "alphas": alphas.tolist()})
    if plot:
        figures.draw_surfaces(found, epsilons, alphas, folder, look)
    print(f"written: {folder}")
