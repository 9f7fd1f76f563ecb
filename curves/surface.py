"""The robustness surface: robust accuracy over the perturbation size and the preference for small margins.

    S(epsilon, alpha) = sum_i w_i 1[f(x_i + delta_i(epsilon)) = y_i] / sum_i w_i,
    w_i = exp(-alpha m_i(epsilon))

The weights are those of Zeng et al. (AAAI 2021, Eq. 17-19), m_i(epsilon) is the probability margin at the
perturbation. S(epsilon, 0) is 1 - R(epsilon). S never rises with alpha: its derivative is
-Cov_w(m, 1[correct]), and a wrong point's margin is never above a correct one's. In epsilon it may go either
way for alpha > 0, since the weights change too.
"""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from curves.measure import norms_of
from harness.datasets.batches import to_unit
from harness.datasets.split import Split
from losses.margin import probability_margin

FEW = 30  # effective points, below which an estimate rests on a handful
Found = tuple[np.ndarray, np.ndarray]  # margins [n] and norms [n] of perturbations


@dataclass(frozen=True)
class Ladder:
    """What attacks of growing size found at each of n points.

    distances [n]: the given ones, or smaller where an attack came closer, at `improved` points; margins
    [E, n]: the smallest within each epsilon. Margins never rise with epsilon, and at every epsilon those with
    distance <= epsilon are <= 0 and the others >= 0.
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
    """(sum w 1[correct], n_eff = 1 / sum w^2) for weights [n] of sum 1."""
    common = correct.sum() * 2 >= len(correct)  # the sum over the rarer outcome keeps 0 and 1 exact
    share = 1 - weights[~correct].sum() if common else weights[correct].sum()
    return float(share), float(1 / (weights**2).sum())


def climb(epsilons: np.ndarray, distances: np.ndarray, clean_margin: np.ndarray, stored_margin: np.ndarray,
          attack: Callable[[float], Found]) -> Ladder:
    """The margins m_i(epsilon) over rising epsilons [E], and the distances that agree with them.

    distances [n] and stored_margin [n]: the smallest known adversarial example of each point, its margin (not
    used where the distance is inf); clean_margin [n]; attack(epsilon): perturbations of norm at most epsilon.
    The point that counts at epsilon is the one of smallest margin among the clean point, all that attacks up
    to epsilon found, and the stored example once epsilon reaches its distance. So correctness matches the
    curve exactly.
    """
    before = np.array(distances, dtype=np.float64)
    distances = before
    lowest = np.array(clean_margin, dtype=np.float64)
    rows = []
    for epsilon in epsilons:
        margin, norm = attack(float(epsilon))
        norm = np.minimum(norm, epsilon)  # rounding in the images
        distances = np.where((margin < 0) & (norm < distances), norm, distances)
        lowest = np.minimum(lowest, margin)
        reached = np.isfinite(before) & (before <= epsilon)
        lowest = np.where(reached, np.minimum(lowest, stored_margin), lowest)
        rows.append(lowest)
    return Ladder(distances, np.stack(rows), int((distances < before).sum()))


def surface(epsilons: np.ndarray, distances: np.ndarray, margins: np.ndarray,
            alphas: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """S and n_eff, [E, A] each, from distances [n] and margins [E, n] as in `Ladder`."""
    values = [[weighted_share(distances > epsilon, margin_weights(margin, alpha)) for alpha in alphas]
              for epsilon, margin in zip(epsilons, margins)]
    shares, sizes = np.moveaxis(np.array(values), 2, 0)
    return shares, sizes


def both(epsilons: np.ndarray, alphas: tuple[float, ...], known: tuple[np.ndarray, np.ndarray, np.ndarray],
         attack: Callable[[float, float], Found]) -> dict[str, np.ndarray]:
    """A_sa, A_tr, their effective sample sizes and the tilted curve, [E, A], and the distances [n] of A_sa.

    known: distances, margins at the clean points, and margins at the stored examples, [n] each.
    attack(epsilon, alpha) as in `climb`, on the loss weighted by exp(-alpha m): one unweighted attack serves
    A_sa at every alpha, A_tr has one for each.
    """
    def ladder(alpha: float) -> Ladder:
        return climb(epsilons, *known, lambda epsilon: attack(epsilon, alpha))

    plain = ladder(0.0)
    found = dict(zip(("A_sa", "n_eff_sa"), surface(epsilons, plain.distances, plain.margins, alphas)))
    columns = []
    for alpha in alphas:
        own = ladder(alpha) if alpha else plain
        columns.append(surface(epsilons, own.distances, own.margins, (alpha,)))
    found |= {name: np.hstack(parts) for name, parts in zip(("A_tr", "n_eff_tr"), zip(*columns))}
    return found | {"tilted": tilted(epsilons, plain.distances, alphas), "distances": plain.distances,
                    "improved": plain.improved}


def tilted(epsilons: np.ndarray, distances: np.ndarray, betas: tuple[float, ...]) -> np.ndarray:
    """S [E, B] from distances alone: weights exp(-beta d_i / median d), nothing for a censored point."""
    attacked = distances[np.isfinite(distances) & (distances > 0)]
    scale = float(np.median(attacked)) if len(attacked) else 1.0
    relative = np.where(np.isfinite(distances), distances / scale, 1e6)
    weights = [margin_weights(relative, beta) for beta in betas]
    return np.array([[weighted_share(distances > epsilon, weight)[0] for weight in weights]
                     for epsilon in epsilons])


def attack_all(model: nn.Module, points: Split, batch_size: int,
               attack: Callable[[Tensor, Split, float, float], Tensor], bar: tqdm, epsilon: float,
               alpha: float) -> Found:
    """Margins [n] and l_inf norms [n] of attack(x, points, epsilon, alpha) -> x_adv, a batch at a time."""
    margins, sizes = [], []
    for rows in torch.arange(len(points), device=points.labels.device).split(batch_size):
        part = points[rows]
        x = to_unit(part.images)
        x_adv = attack(x, part, epsilon, alpha)
        with torch.no_grad():
            margins.append(probability_margin(model(x_adv).double(), part.labels).cpu().numpy())
        sizes.append(norms_of(x_adv.double() - x.double())["linf"].cpu().numpy())
        bar.update(len(rows))
    return np.concatenate(margins), np.concatenate(sizes)
