"""From distances to the figures that are written down: of one norm of one model, and of a pair of models."""
import numpy as np

from curves.crossings import compare
from curves.curve import Curve
from curves.statistics import clopper_pearson, dkw_half_width, mcnemar

QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)


def summarize(upper: np.ndarray, lower: np.ndarray, thresholds: tuple[float, ...],
              confidence: float = 0.95) -> dict[str, object]:
    """One norm of one model, from [n] smallest distances found and lower bounds of the true ones (0: none).

    Shares are of all n points, `mean` and `median` of those neither misclassified nor censored.
    """
    curve, n = Curve(upper), len(upper)
    attacked = upper[(upper > 0) & np.isfinite(upper)]
    low, high = clopper_pearson(curve.count(np.array(thresholds)), n, confidence)
    certified = {}
    if (lower > 0).any():
        certified = {"lower_bounds": int((lower > 0).sum()), "area_certified": Curve(lower).area()}
    return {
        "n": n, "misclassified": int((upper == 0).sum()), "censored": curve.censored,
        "clean_error": float(curve.at(0.0)),
        "mean": float(attacked.mean()) if len(attacked) else None,
        "median": float(np.median(attacked)) if len(attacked) else None,
        "area": _finite(curve.area()), "band_half_width": dkw_half_width(n, confidence),
        "thresholds": [{"t": t, "R": float(curve.at(t)), "low": float(a), "high": float(b)}
                       for t, a, b in zip(thresholds, low, high)],
        "quantiles": {str(q): _finite(curve.quantile(q)) for q in QUANTILES}} | certified


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def band(curve: Curve, t: np.ndarray, kind: str, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) around R(t): "dkw" holds the whole curve at once, "cp" (Clopper-Pearson) each point."""
    if kind == "cp":
        return clopper_pearson(curve.count(t), len(curve), confidence)
    half = dkw_half_width(len(curve), confidence)
    return np.clip(curve.at(t) - half, 0, 1), np.clip(curve.at(t) + half, 0, 1)


def curve_points(upper: np.ndarray, lower: np.ndarray, kind: str = "dkw",
                 confidence: float = 0.95) -> dict[str, np.ndarray]:
    """The steps of a curve: t, R, low, high, and R_certified, R's upper end, where lower bounds are known."""
    curve = Curve(upper)
    t = np.union1d(curve.steps()[0], lower[lower > 0])
    low, high = band(curve, t, kind, confidence)
    columns = {"t": t, "R": curve.at(t), "low": low, "high": high}
    return columns | ({"R_certified": Curve(lower).at(t)} if (lower > 0).any() else {})


def pair(first: np.ndarray, second: np.ndarray, thresholds: tuple[float, ...], confidence: float = 0.95,
         num_resamples: int = 2000, seed: int = 0,
         slack: tuple[float | None, float | None] = (None, None)) -> dict[str, object]:
    """Two models at the same points [n] in one norm: `compare`, and McNemar's test at the thresholds.

    slack: by how much R of either may be too low, None where its curve was not checked.
    """
    tests = [{"t": t, "difference": float(Curve(first).at(t) - Curve(second).at(t)),
              "p_value": mcnemar(first <= t, second <= t)} for t in thresholds]
    found = compare(first, second, confidence, num_resamples, seed, (slack[0] or 0.0, slack[1] or 0.0))
    return found | {"slack": list(slack), "thresholds": tests}
