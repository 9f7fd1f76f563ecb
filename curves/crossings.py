"""Where one robustness curve lies above another, and whether the sample supports that they cross."""
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np

from curves.curve import Curve
from curves.statistics import difference_half_width, mcnemar


@dataclass(frozen=True)
class Stretch:
    """A largest interval [start, end) on which R_first - R_second keeps its sign.

    `gap` is its value of largest size, taken first at `gap_at`, `p_value` McNemar's there, `supported`
    whether |gap| exceeds the half-width of the simultaneous band, and what the distances of the model that is
    ahead may be too large by (its slack).
    """

    start: float
    end: float
    gap: float
    gap_at: float
    p_value: float
    supported: bool


def difference(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(t, R_first(t) - R_second(t)) at every jump of the curves of two models' distances [n]."""
    one, other = Curve(first), Curve(second)
    t = np.union1d(one.jumps(), other.jumps())
    return t, one.at(t) - other.at(t)


def stretches(first: np.ndarray, second: np.ndarray, half_width: float,
              slack: tuple[float, float] = (0.0, 0.0)) -> list[Stretch]:
    """Every stretch of the difference of the curves of two models' distances [n] at the same points.

    slack: by how much R of the first and of the second may be too low.
    """
    t, gaps = difference(first, second)
    signs = np.sign(gaps)
    ends = np.append(t[1:], np.inf)
    found = []
    for rows in np.split(np.arange(len(t)), np.flatnonzero(np.diff(signs)) + 1):
        if not len(rows) or signs[rows[0]] == 0:
            continue
        peak = rows[np.abs(gaps[rows]).argmax()]
        p_value = mcnemar(first <= t[peak], second <= t[peak])
        needed = max(half_width, slack[1] if gaps[peak] > 0 else slack[0])
        found.append(Stretch(float(t[rows[0]]), float(ends[rows[-1]]), float(gaps[peak]), float(t[peak]),
                             p_value, bool(abs(gaps[peak]) > needed)))
    return found


def crossings(parts: list[Stretch]) -> list[dict[str, float | bool]]:
    """The changes of sign between stretches that follow one another: the curves change places at `at`.

    Where both sides are `supported`, the supported stretches end at `after` and begin at `before`. Near a
    crossing two samples' curves change places many times by chance: those changes are listed as unsupported,
    and between two supported stretches of opposite sign one crossing is, at the last change of sign before
    the second of them.
    """
    kept = [part for part in parts if part.supported]
    ends = {right.start: left.end for left, right in pairwise(kept) if left.gap * right.gap < 0}
    return [{"at": right.start, "supported": right.start in ends,
             "after": ends.get(right.start, left.end), "before": right.start}
            for left, right in pairwise(parts) if left.gap * right.gap < 0]


def compare(first: np.ndarray, second: np.ndarray, confidence: float = 0.95, num_resamples: int = 2000,
            seed: int = 0, slack: tuple[float, float] = (0.0, 0.0)) -> dict[str, object]:
    """Stretches, crossings and the band of R_first - R_second as plain values.

    first, second: distances [n] of two models at the same points; slack: as in `stretches`.
    """
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} and {len(second)} points: a paired comparison needs the same ones")
    t, _ = difference(first, second)
    half_width = difference_half_width(first, second, t, confidence, num_resamples, seed)
    parts = stretches(first, second, half_width, slack)
    largest = max(parts, key=lambda part: abs(part.gap), default=None)
    return {"half_width": half_width, "stretches": [asdict(part) for part in parts],
            "crossings": crossings(parts), "largest_gap": asdict(largest) if largest else None}
