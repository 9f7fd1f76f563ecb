"""Cases whose curves are known: two of equal area that cross, and a curved boundary at distance one."""
import numpy as np


def crossing_pair(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances [n] of two models with one crossing, at 1.5, where R_first - R_second goes from 0.5 to -0.5.

    The first has half its points spread over (0.4, 0.6) and half over (2.4, 2.6), the second all over
    (1.4, 1.6): both areas under the robust accuracy are 1.5, so that no average tells them apart. n is
    divisible by 4.
    """
    if n < 4 or n % 4:
        raise ValueError(f"n is a positive multiple of 4, not {n}")
    half = (np.arange(n // 2) + 0.5) / (n // 2)
    return np.concatenate([0.4 + 0.2 * half, 2.4 + 0.2 * half]), 1.4 + 0.2 * (np.arange(n) + 0.5) / n


def sine_points(n: int, seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Points [n, 2] at l_2 distance 1 from the boundary y = sin x, and their distances in three norms, [n].

    The points lie on both normals of the boundary; one whose nearest boundary point is another is left out
    and drawn again. The distances are minima over a fine grid around each point, so upper bounds within 1e-5
    of the true ones.
    """
    random, kept = np.random.default_rng(seed), []
    while sum(map(len, kept)) < n:
        foot = random.uniform(0, 2 * np.pi, n)
        normal = np.stack([-np.cos(foot), np.ones(n)], axis=1) / np.sqrt(1 + np.cos(foot)[:, None] ** 2)
        side = random.choice([-1.0, 1.0], n)[:, None]
        points = np.stack([foot, np.sin(foot)], axis=1) + normal * side
        kept.append(points[_distances(points)["l2"] > 0.999])
    points = np.concatenate(kept)[:n]
    return points, _distances(points)


def _distances(points: np.ndarray) -> dict[str, np.ndarray]:
    """The smallest distance of each point to the sine on x - 2 ... x + 2, in three norms."""
    offset = np.linspace(-2, 2, 4001)  # [G]
    across = np.abs(offset)
    found = []
    for block in np.array_split(points, -(-len(points) // 500)):
        along = np.abs(np.sin(block[:, :1] + offset) - block[:, 1:])  # [b, G]
        sizes = np.maximum(across, along), np.hypot(across, along), across + along
        found.append([size.min(axis=1) for size in sizes])
    return dict(zip(("linf", "l2", "l1"), np.concatenate(found, axis=1)))
