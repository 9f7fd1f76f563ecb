"""How distances in one norm tell of those in another: rank correlation, paired quantiles, scales."""
from itertools import combinations

import numpy as np
from scipy.stats import rankdata


def paired(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distances [n] in two norms of the points that are neither misclassified nor censored in either."""
    keep = (first > 0) & (second > 0) & np.isfinite(first) & np.isfinite(second)
    return first[keep], second[keep]


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """Rank correlation of the paired distances (Spearman 1904); None for fewer than two different points."""
    ranks = [rankdata(values) for values in paired(first, second)]
    if len(ranks[0]) < 2 or any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def correlations(distances: dict[str, np.ndarray]) -> dict[str, float | None]:
    """Spearman's correlation of each pair of norms: "linf-l2" -> value."""
    return {f"{a}-{b}": spearman(distances[a], distances[b]) for a, b in combinations(distances, 2)}


def image_scale(images: np.ndarray) -> float:
    """The paper's first scale from l_inf to l_2: mean of ||x||_2 / ||x||_inf over images [n, ...] not 0."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    peak = np.abs(flat).max(axis=1)
    return float((np.linalg.norm(flat[peak > 0], axis=1) / peak[peak > 0]).mean())


def scales(linf: np.ndarray, l2: np.ndarray) -> dict[str, float | None]:
    """The mean ratios of sorted (the paper's second scale) and of paired distances; None without a pair."""
    small, large = paired(linf, l2)
    if not len(small):
        return {"quantile": None, "paired": None}
    quantile = np.sort(large) / np.sort(small)
    return {"quantile": float(quantile.mean()), "paired": float((large / small).mean())}
