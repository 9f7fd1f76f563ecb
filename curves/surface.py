"""The robustness surface: robust accuracy over the perturbation size epsilon and the attacker's preference alpha for small margins.

    S(epsilon, alpha) = sum_i w_i 1[f(x_i + delta_i(epsilon)) = y_i] / sum_i w_i,    w_i = exp(-alpha m_i(epsilon))

The weights are those of Zeng et al. (AAAI 2021, Eq. 17-19), m_i(epsilon) is the probability margin at the perturbation. S(epsilon, 0)
is 1 - R(epsilon). S never rises with alpha: its derivative is -Cov_w(m, 1[correct]), and a wrong point's margin is never above a correct
one's. In epsilon it may go either way for alpha > 0, since the weights change too.
"""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

FEW = 30  # effective points, below which an estimate rests on a handful


@dataclass(frozen=True)
class Ladder:
    """What attacks of growing size found at each of n points: distances [n], and the smallest margin within each epsilon, [E, n].

    distances: the given ones, or smaller where an attack came closer; margins never rise with epsilon, and at every epsilon those
    with distance <= epsilon are <= 0 and the others >= 0.
    """

    distances: np.ndarray
    margins: np.ndarray
    improved: int


def margin_weights(margin: np.ndarray, alpha: float) -> np.ndarray:
    """exp(-alpha m) of margins [n], divided by its sum, in float64."""
    exponent = -alpha * np.asarray(margin, dtype=np.float64)
    weights = np.exp(exponent - exponent.max())  # a common factor cancels
    return weights / weights.sum()


def weighted_share(correct: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """(sum w 1[correct], n_eff = 1 / sum w^2) for weights [n] of sum 1.  The sum runs over the rarer outcome, which keeps 0 and 1 exact."""
    n_eff = float(1 / (weights**2).sum())
    if not correct.any():
        return 0.0, n_eff
    return float(1 - weights[~correct].sum()) if correct.sum() * 2 >= len(correct) else float(weights[correct].sum()), n_eff


def climb(epsilons: np.ndarray, distances: np.ndarray, clean_margin: np.ndarray, stored_margin: np.ndarray,
          attack: Callable[[float], tuple[np.ndarray, np.ndarray]]) -> Ladder:
    """The margins m_i(epsilon) over rising epsilons [E], and the distances that agree with them.

    distances [n] and stored_margin [n]: the smallest known adversarial example of each point, its margin (not used where the distance
    is inf); clean_margin [n]; attack(epsilon) -> (margins [n], norms [n]) of perturbations of norm at most epsilon. The point that
    counts at epsilon is the one of smallest margin among the clean point, all that attacks up to epsilon found, and the stored
    example once epsilon reaches its distance. So correctness matches the curve exactly.
    """
    distances = np.array(distances, dtype=np.float64)
    before, lowest, rows = distances.copy(), np.array(clean_margin, dtype=np.float64), []
    for epsilon in epsilons:
        margin, norm = attack(float(epsilon))
        norm = np.minimum(norm, epsilon)  # rounding in the images
        distances = np.where((margin < 0) & (norm < distances), norm, distances)
        lowest = np.minimum(lowest, margin)
        reached = np.minimum(lowest, np.where(np.isfinite(before), stored_margin, np.inf))
        lowest = np.where(before <= epsilon, reached, lowest)
        rows.append(lowest)
    return Ladder(distances, np.stack(rows), int((distances < before).sum()))


def surface(epsilons: np.ndarray, distances: np.ndarray, margins: np.ndarray, alphas: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """S and n_eff, [E, A] each, from distances [n] and margins [E, n] as in `Ladder`."""
    values = np.array([[weighted_share(distances > epsilon, margin_weights(margins[e], alpha)) for alpha in alphas]
                       for e, epsilon in enumerate(epsilons)])  # [E, A, 2]
    return values[..., 0], values[..., 1]


def both(epsilons: np.ndarray, alphas: tuple[float, ...], known: tuple[np.ndarray, np.ndarray, np.ndarray],
         attack: Callable[[float, float], tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """A_sa and A_tr with their effective sample sizes, and the tilted curve, [E, A] each, and the distances [n] that A_sa agrees with.

    known: distances, margins at the clean points, and margins at the stored examples, [n] each. attack(epsilon, alpha) as in `climb`,
    on the loss weighted by exp(-alpha m): one unweighted attack serves A_sa at every alpha, A_tr has one for each.
    """
    distances, clean, stored = known
    plain = climb(epsilons, distances, clean, stored, lambda epsilon: attack(epsilon, 0.0))
    parts = [climb(epsilons, distances, clean, stored, lambda epsilon, alpha=alpha: attack(epsilon, alpha)) if alpha else plain
             for alpha in alphas]
    found = dict(zip(("A_sa", "n_eff_sa"), surface(epsilons, plain.distances, plain.margins, alphas)))
    columns = [surface(epsilons, part.distances, part.margins, (alpha,)) for part, alpha in zip(parts, alphas)]
    found |= {name: np.concatenate([column[k] for column in columns], axis=1) for k, name in enumerate(("A_tr", "n_eff_tr"))}
    return found | {"tilted": tilted(epsilons, plain.distances, alphas), "distances": plain.distances, "improved": plain.improved}


def tilted(epsilons: np.ndarray, distances: np.ndarray, betas: tuple[float, ...]) -> np.ndarray:
    """The same from distances alone: weights exp(-beta d_i / median d), [E, B].  A censored point weighs nothing unless beta = 0."""
    finite = np.isfinite(distances)
    scale = float(np.median(distances[finite & (distances > 0)])) if (finite & (distances > 0)).any() else 1.0
    relative = np.where(finite, distances / scale, 1e6)
    weights = [margin_weights(relative, beta) for beta in betas]
    return np.array([[weighted_share(distances > epsilon, weight)[0] for weight in weights] for epsilon in epsilons])
