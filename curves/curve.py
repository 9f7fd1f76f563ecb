"""The robustness curve as an empirical distribution function (Risse, Göpfert & Göpfert, "How to Compare
Adversarial Robustness of Classifiers from a Global Perspective", ICANN 2021).

    R(t) = #{i : d_i <= t} / n,    d_i = 0 where the clean point is misclassified,
                                   inf where no adversarial example was found (censored)
"""
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curve:
    """A right-continuous step function on [0, inf) from distances [n] in any order; robust accuracy is 1 - R.

    A censored point stays in the denominator and never enters the numerator, so R(inf) < 1 where there is
    one. Raises ValueError for no points, and for a distance that is negative or not a number.
    """

    distances: np.ndarray

    def __post_init__(self):
        values = np.sort(np.asarray(self.distances, dtype=np.float64).ravel())
        if not len(values):
            raise ValueError("a curve needs at least one point")
        if np.isnan(values).any() or values[0] < 0:
            raise ValueError("a distance is negative or not a number")
        object.__setattr__(self, "distances", values)

    def __len__(self) -> int:
        return len(self.distances)

    @property
    def censored(self) -> int:
        """The number of points for which no adversarial example was found."""
        return int(np.isinf(self.distances).sum())

    def count(self, t: np.ndarray | float) -> np.ndarray:
        """#{i : d_i <= t} at each t, for t = inf that of the points that are not censored."""
        t = np.minimum(np.asarray(t, dtype=np.float64), np.finfo(np.float64).max)
        return np.searchsorted(self.distances, t, side="right")

    def at(self, t: np.ndarray | float) -> np.ndarray:
        """R(t), for t = inf its limit."""
        return self.count(t) / len(self)

    def jumps(self) -> np.ndarray:
        """The finite distances, each once, in rising order."""
        return np.unique(self.distances[np.isfinite(self.distances)])

    def steps(self) -> tuple[np.ndarray, np.ndarray]:
        """(t, R(t)) at 0 and at every jump: R keeps its value up to the next t."""
        t = np.union1d(0.0, self.jumps())
        return t, self.at(t)

    def quantile(self, share: float) -> float:
        """The smallest t with R(t) >= share in (0, 1], inf where the curve never gets there."""
        if not 0 < share <= 1:
            raise ValueError(f"a share lies in (0, 1], not {share}")
        return float(self.distances[int(np.ceil(share * len(self) - 1e-9)) - 1])

    def area(self, t_max: float = np.inf) -> float:
        """The integral of the robust accuracy 1 - R from 0 to t_max, which is the mean of min(d_i, t_max)."""
        return float(np.minimum(self.distances, t_max).mean())
