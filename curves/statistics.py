"""Sampling errors of robustness curves: bands, point-wise intervals, paired tests.

They speak of the points that were drawn. That an attack's distances are upper bounds is an error of one sign
which no band covers.
"""
import numpy as np
from scipy.stats import beta, binom


def dkw_half_width(n: int, confidence: float = 0.95) -> float:
    """Half-width of the band that holds the whole population curve with at least this probability.

        sqrt( ln(2 / (1 - confidence)) / (2 n) )

    Dvoretzky, Kiefer & Wolfowitz 1956 with the constant of Massart 1990.
    """
    if n < 1 or not 0 < confidence < 1:
        raise ValueError(f"a band needs n >= 1 and a confidence in (0, 1), not {n} and {confidence}")
    return float(np.sqrt(np.log(2 / (1 - confidence)) / (2 * n)))


def clopper_pearson(k: np.ndarray | int, n: int, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) around k successes in n trials, exact (Clopper & Pearson, Biometrika 1934), shaped as k."""
    k = np.asarray(k)
    if n < 1 or (k < 0).any() or (k > n).any():
        raise ValueError(f"{k} successes in {n} trials")
    tail = (1 - confidence) / 2
    with np.errstate(invalid="ignore"):
        low = np.where(k == 0, 0.0, beta.ppf(tail, k, n - k + 1))
        high = np.where(k == n, 1.0, beta.ppf(1 - tail, k + 1, n - k))
    return low, high


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p-value of the exact McNemar test that two paired yes/no outcomes [n] have one probability.

    Of the b + c pairs that differ, b have `first` true; under the hypothesis b is Binomial(b + c, 1/2).
    """
    b = int((first & ~second).sum())
    c = int((~first & second).sum())
    return float(min(1.0, 2 * binom.cdf(min(b, c), b + c, 0.5)))


def difference_half_width(first: np.ndarray, second: np.ndarray, t: np.ndarray, confidence: float = 0.95,
                          num_resamples: int = 2000, seed: int = 0) -> float:
    """Half-width of a simultaneous band for R_first(t) - R_second(t) over all of t, by the paired bootstrap.

    first, second: [n], distances of two models at the same points; t: [T]. Points are drawn with replacement
    `num_resamples` times, each with both its distances; the half-width is the `confidence` quantile over the
    resamples of max_t |difference* - difference|. All resamples are one matrix product of their counts [R, n]
    with the points' differences [n, T], a block of T at a time.
    """
    n = len(first)
    random = np.random.default_rng(seed)
    drawn = [np.bincount(random.integers(0, n, n), minlength=n) for _ in range(num_resamples)]
    counts = np.stack(drawn).astype(np.float32) - 1  # [R, n]
    largest = np.zeros(num_resamples)
    for block in np.array_split(t, max(1, -(-len(t) // 1024))):
        differences = (first[:, None] <= block).astype(np.float32) - (second[:, None] <= block)  # [n, T]
        largest = np.maximum(largest, np.abs(counts @ differences).max(axis=1, initial=0.0) / n)
    return float(np.quantile(largest, confidence, method="higher"))
