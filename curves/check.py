"""The curve checks itself: an attack with no part in the distances, at a few radii, on some of the points.

What it finds nearer than a distance says becomes the distance, and how often it does is the curve's slack: by
how much R may be too low at the points that were not checked.
"""
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from curves.curve import Curve
from curves.measure import Candidates, measure
from curves.statistics import clopper_pearson
from curves.store import Results, saving
from harness.datasets.batches import to_unit
from harness.datasets.split import Split

TOGETHER = 32   # points between two times of saving: the check is slow, and a stop loses them
ROUNDING = 1e-6  # of a distance beyond a radius

# attack(norm, x [b, ...], y [b], index in the data set [b], radius [b]) -> x_adv [b, ...]
Check = Callable[[str, Tensor, Tensor, Tensor, Tensor], Tensor]


def radii_of(distances: np.ndarray, count: int) -> list[float]:
    """`count` radii spread over the curve of distances [n]: quantiles of those that an attack has found."""
    found = distances[(distances > 0) & np.isfinite(distances)]
    shares = (np.arange(count) + 0.5) / count
    return sorted({Curve(found).quantile(share) for share in shares}) if len(found) else []


def run(results: Results, model: nn.Module, points: Split, attack: Check, folder: Path, num_radii: int,
        num_points: int, seed: int) -> None:
    """Attack `num_points` random points within the largest radius below their distance, and save.

    A point that falls is attacked again within the next smaller radius. Every adversarial example is checked
    like any other, and counts in every norm. Points that were checked before are left as they are.
    """
    order = np.random.default_rng((seed, len(results))).permutation(len(results))[:num_points]
    radii = results.about.setdefault("check_radii", {
        norm: radii_of(results.upper(norm), num_radii) for norm in results.norms})
    pending = {norm: rows for norm in results.norms
               if len(rows := np.sort(order[np.isnan(results.checked(norm)[0][order])]))}
    attacks = results.about.get("attacks", [])
    results.about["attacks"] = attacks + ["check"] * ("check" not in attacks)
    total = sum(map(len, pending.values()))
    with tqdm(total=total, desc=f"{results.name} check", unit="point", disable=None) as bar, \
            saving(results, folder) as saved:
        for norm, rows in pending.items():
            for part in np.array_split(rows, -(-len(rows) // TOGETHER)):
                _check(results, model, points, attack, norm, np.array(radii[norm]), part)
                saved()
                bar.update(len(part))


def _check(results: Results, model: nn.Module, points: Split, attack: Check, norm: str, radii: np.ndarray,
           rows: np.ndarray) -> None:
    """The check of some points in one norm."""
    claimed, found = results.upper(norm)[rows].copy(), np.full(len(rows), np.inf)
    left = np.arange(len(rows))
    while len(left):
        below = np.searchsorted(radii * (1 + ROUNDING), np.minimum(claimed, found)[left]) - 1
        left, radius = left[below >= 0], torch.from_numpy(radii[below[below >= 0]])
        if not len(left):
            break
        part = points[torch.from_numpy(rows[left])]
        winner = torch.full_like(part.labels, results.about["attacks"].index("check"))

        def candidates(x: Tensor, y: Tensor, kept: Tensor, part=part, winner=winner,
                       radius=radius) -> Candidates:
            size = radius.to(x)[kept]
            return Candidates({norm: attack(norm, x, y, part.index[kept], size)}, {norm: winner[kept]})

        measured = measure(model, to_unit(part.images), part.labels, results.norms, candidates)
        results.put_closer(rows[left], measured)
        reached = measured.distance[norm].cpu().numpy()
        hit = reached <= radius.numpy() * (1 + ROUNDING)
        found[left[hit]] = reached[hit]
        left = left[hit]
    results.put_check(norm, rows, claimed, found)


def slack_of(results: Results, norm: str, confidence: float = 0.95) -> dict[str, object] | None:
    """How many of the checked points are nearer than their distance says, at every radius; None: unchecked.

    slack, low, high: the largest of the shares of the checked points, with its Clopper-Pearson interval.
    """
    claimed, found = results.checked(norm)
    seen = ~np.isnan(claimed)
    radii = results.about.get("check_radii", {}).get(norm, [])
    if not seen.any() or not radii:
        return None
    rows = []
    for t in radii:
        farther = claimed[seen] > t * (1 + ROUNDING)
        nearer = int((farther & (found[seen] <= t * (1 + ROUNDING))).sum())
        low, high = clopper_pearson(nearer, int(seen.sum()), confidence)
        rows.append({"t": t, "farther": int(farther.sum()), "found": nearer,
                     "slack": nearer / int(seen.sum()), "low": float(low), "high": float(high)})
    worst = max(rows, key=lambda row: row["slack"])
    return {"points": int(seen.sum()), "slack": worst["slack"], "low": worst["low"], "high": worst["high"],
            "radii": rows}
