"""How distances in one norm tell of those in another: rank correlation, quantiles against quantiles, and scales between norms."""
import numpy as np
from scipy.stats import rankdata


def paired(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Which points count in a comparison of two norms [n]: neither misclassified (0) nor censored (inf) in either."""
    return (first > 0) & (second > 0) & np.isfinite(first) & np.isfinite(second)


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """Rank correlation of the paired distances (Spearman 1904, ties share their mean rank); None for fewer than two different points."""
    keep = paired(first, second)
    ranks = [rankdata(values[keep]) for values in (first, second)]
    if keep.sum() < 2 or any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def correlations(distances: dict[str, np.ndarray]) -> dict[str, float | None]:
    """Spearman's correlation of each pair of norms: "linf-l2" -> value."""
    names = list(distances)
    return {f"{a}-{b}": spearman(distances[a], distances[b]) for k, a in enumerate(names) for b in names[k + 1:]}


def quantile_pairs(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The i-th smallest distance in one norm beside the i-th smallest in the other, over the paired points."""
    keep = paired(first, second)
    return np.sort(first[keep]), np.sort(second[keep])


def image_scale(images: np.ndarray) -> float:
    """Mean over the images [n, ...] of ||x||_2 / ||x||_inf: stretches an l_inf axis onto an l_2 axis (the paper's first method).

    Images that are all zero are left out.
    """
    flat = images.reshape(len(images), -1).astype(np.float64)
    peak = np.abs(flat).max(axis=1)
    return float((np.linalg.norm(flat[peak > 0], axis=1) / peak[peak > 0]).mean())


def scales(linf: np.ndarray, l2: np.ndarray) -> dict[str, float | None]:
    """The other scales from l_inf to l_2: the mean ratio of the sorted distances (the paper's second method) and of the paired ones."""
    keep = paired(linf, l2)
    if not keep.any():
        return {"quantile": None, "paired": None}
    small, large = quantile_pairs(linf, l2)
    return {"quantile": float((large / small).mean()), "paired": float((l2[keep] / linf[keep]).mean())}
