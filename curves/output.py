"""What is written and printed of measured distances, of a comparison, of class distances and of surfaces."""
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from curves import figures, report, transfer
from curves import surface as surfaces
from curves.canvas import Look
from curves.check import slack_of
from curves.class_distances import ClassDistances, summarize
from curves.store import Results
from harness.datasets.split import Split
from harness.device import command_line, environment
from harness.evaluation.report import dumps
from harness.folder import write_csv, write_text

CPU = torch.device("cpu")


def facts(started: float, device: torch.device = CPU) -> dict[str, object]:
    """What a reader needs in order to repeat a measurement that began at `started` (monotonic clock)."""
    return {"version": 1, "command_line": command_line(), "date": time.strftime("%Y-%m-%d"),
            "seconds": round(time.monotonic() - started, 1), "environment": environment(device)}


def _nine_digits(row: dict[str, str | float]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else f"{value:.9g}" for name, value in row.items()}


def curves(several: list[Results], folder: Path, look: Look, run: dict) -> None:
    """curves.csv, summary.json, curves.png, and a table on the screen."""
    entries, rows = {}, []
    for results in several:
        norms = {}
        for norm in results.norms:
            _, upper, lower = results.labelled(norm)
            norms[norm] = report.summarize(upper, lower, look.thresholds[norm], look.confidence)
            norms[norm]["check"] = slack_of(results, norm, look.confidence)
            columns = report.curve_points(upper, lower, look.band, look.confidence)
            columns.setdefault("R_certified", [""] * len(columns["t"]))
            rows += [{"model": results.name, "norm": norm} | dict(zip(columns, values))
                     for values in zip(*columns.values())]
        entries[results.name] = {"about": results.about, "norms": norms}
    write_csv(folder / "curves.csv", list(map(_nine_digits, rows)))
    summary = run | {"confidence": look.confidence, "band": look.band, "models": entries}
    write_text(folder / "summary.json", dumps(summary))
    _print_curves(entries)
    if look.plot:
        figures.draw_curves(several, folder, look)
    print(f"written: {folder}")


def _print_curves(entries: dict[str, dict]) -> None:
    width = max(map(len, entries))
    print(f"\n{'model':<{width}}  norm  points   wrong  censored     mean   median   R(t) in %")
    for name, entry in entries.items():
        for norm, part in entry["norms"].items():
            mean, median = ("-" if part[key] is None else f"{part[key]:.5f}" for key in ("mean", "median"))
            at = "  ".join(f"{100 * point['R']:.1f} at {point['t']:g}" for point in part["thresholds"])
            counts = f"{part['n']:>7,} {part['misclassified']:>7,} {part['censored']:>9,}"
            print(f"{name:<{width}}  {norm:<4} {counts} {mean:>8} {median:>8}   {at}")
    for name, entry in entries.items():
        for norm, part in entry["norms"].items():
            print(f"{name}, {norm}: {_slack_in_words(part['check'])}")


def _slack_in_words(check: dict | None) -> str:
    """What the check of a curve found, in a line."""
    if check is None:
        return "not checked: no other attack was tried at these distances"
    places = ", ".join(f"{row['found']} at {row['t']:.4g}" for row in check["radii"])
    return (f"{check['points']:,} points checked, nearer than their distance said: {places}; slack "
            f"{100 * check['slack']:.1f} % ({100 * check['low']:.1f} to {100 * check['high']:.1f})")


def comparison(several: list[Results], folder: Path, look: Look, num_resamples: int, seed: int) -> None:
    """compare.json, the figures, and on the screen where models change places."""
    started = time.monotonic()
    found = {norm: [{"first": a.name, "second": b.name} | report.pair(
        a.upper(norm), b.upper(norm), look.thresholds[norm], look.confidence, num_resamples, seed,
        (highest_slack(a, norm, look.confidence), highest_slack(b, norm, look.confidence)))
        for a, b in combinations(several, 2)] for norm in figures.shared_norms(several)}
    across = {}
    for results in several:
        distances = {norm: results.upper(norm) for norm in results.norms}
        across[results.name] = transfer.correlations(distances)
        if {"linf", "l2"} <= set(distances):
            across[results.name]["scales"] = transfer.scales(distances["linf"], distances["l2"])
    about = {"points": len(several[0]), "confidence": look.confidence, "norms": found, "transfer": across}
    write_text(folder / "compare.json", dumps(facts(started) | about))
    _print_pairs(found, len(several[0]))
    if look.plot:
        figures.draw_curves(several, folder, look)
        figures.draw_comparison(several, found, folder, look)
    print(f"written: {folder}")


def highest_slack(results: Results, norm: str, confidence: float) -> float | None:
    """The upper end of a curve's slack, None where it was not checked."""
    check = slack_of(results, norm, confidence)
    return check and check["high"]


def _print_pairs(found: dict[str, list[dict]], points: int) -> None:
    print(f"\n{points:,} common points; R_first - R_second in points of %, where it is largest, with its "
          "simultaneous band")
    for norm, entries in found.items():
        for entry in entries:
            text = "equal everywhere"
            if gap := entry["largest_gap"]:
                text = f"{100 * gap['gap']:+.1f} at {gap['gap_at']:.4g} (p {gap['p_value']:.2g})"
            sure = [f"{crossing['at']:.4g}" for crossing in entry["crossings"] if crossing["supported"]]
            print(f"{norm:<4}  {entry['first']} - {entry['second']}: {text}, band "
                  f"+-{100 * entry['half_width']:.1f}{_doubts(entry)}; crossings: "
                  f"{', '.join(sure) or 'none supported'}")


def _doubts(entry: dict) -> str:
    """Why the largest difference of a pair is none, and that slack is not known."""
    gap = entry["largest_gap"]
    none = ", no more than band and slack allow" if gap and not gap["supported"] else ""
    return none + (", not checked" if None in entry["slack"] else "")


def class_distances(found: dict[str, ClassDistances], points: Split, folder: Path, about: dict, look: Look,
                    run: dict) -> None:
    """class_distances.npz and .json, the figures, and the extremes on the screen.  about: the data set."""
    entries = {norm: summarize(part, look.thresholds[norm]) for norm, part in found.items()}
    write_text(folder / "class_distances.json", dumps(run | about | {"norms": entries}))
    columns = {f"{kind}_{norm}": part.unit(getattr(part, kind))
               for norm, part in found.items() for kind in ("inter", "intra", "prefix")}
    np.savez_compressed(folder / "class_distances.npz", index=points.index.cpu().numpy(),
                        label=points.labels.cpu().numpy(), **columns)
    shown = " | ".join(" ".join(f"{entry['inter'][end]:.2f}" for entry in entries.values())
                       for end in ("min", "max"))
    names = " ".join(found)
    print(f"inter-class distances, smallest {names} | largest {names}: {shown}  "
          f"({about['num_points']:,} points, {run['seconds']} s)")
    for norm, entry in entries.items():
        scale = "; ".join(f"t {point['t']:g} is {point['of_half']:.2f} of it, "
                          f"{100 * point['within_2t']:.1f} % of points within 2t"
                          for point in entry["thresholds"])
        print(f"{norm:<4} half the smallest {entry['half_min_inter']:.4f}, copies in another class "
              f"{entry['duplicates']:,}; {scale}")
    if look.plot:
        title = f"{about['dataset'].partition(':')[0]}, "
        figures.draw_classes(found, folder, look, title)
        figures.draw_subsets(found, folder, look, title)
    print(f"written: {folder}")


def surface(found: dict[str, dict[str, np.ndarray]], epsilons: np.ndarray, alphas: np.ndarray, folder: Path,
            look: Look, run: dict) -> None:
    """surface.csv and .npz, the figures, warnings.  found: model -> `curves.surface.both`."""
    names, rows = ("A_sa", "A_tr", "n_eff_sa", "n_eff_tr", "tilted"), []
    for model, part in found.items():
        rows += [{"model": model, "epsilon": epsilons[e], "alpha": alphas[a]}
                 | {name: part[name][e, a] for name in names} for e, a in np.ndindex(part["A_sa"].shape)]
        np.savez_compressed(folder / f"surface_{model.replace('/', '-')}.npz", epsilons=epsilons,
                            alphas=alphas, **part)
        if few := int((np.minimum(part["n_eff_sa"], part["n_eff_tr"]) < surfaces.FEW).sum()):
            print(f"warning: {model}: fewer than {surfaces.FEW} points carry the weight at {few} of "
                  f"{part['A_sa'].size} grid points")
        if part["improved"]:
            print(f"note: {model}: PGD came closer than the stored distance of {part['improved']:,} points, "
                  "and the surface uses its own")
    write_csv(folder / "surface.csv", list(map(_nine_digits, rows)))
    grid = {"models": list(found), "epsilons": epsilons.tolist(), "alphas": alphas.tolist()}
    write_text(folder / "summary.json", dumps(run | grid))
    if look.plot:
        figures.draw_surfaces(found, epsilons, alphas, folder, look)
    print(f"written: {folder}")
