"""What a prediction says of the true class: its margins, whether it is wrong, and the classes that come next.

Margins are positive where the prediction is correct. The margin weights are those of Zeng et al., "Are
Adversarial Examples Created Equal?" (AAAI 2021).
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from losses import at_least_float32


def other_scores(scores: Tensor, y: Tensor) -> Tensor:
    """The scores with the true class's at -inf: [B, K], [B] -> [B, K], in the graph."""
    return scores.scatter(1, y[:, None], -torch.inf)


def largest_other(scores: Tensor, y: Tensor) -> Tensor:
    """max_{k != y} scores_k: [B, K], [B] -> [B].  The gradient is shared evenly among ties."""
    return other_scores(scores, y).amax(dim=1)


def logit_margin(logits: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Logit of the true class minus the largest other one, or minus that of `target`.

        m = z_y - max_{k != y} z_k        or  m = z_y - z_target

    logits: [B, K]; y, target: [B]. Returns [B], float32 or wider, differentiable; positive where the
    prediction is correct.
    """
    return _margin(at_least_float32(logits), y, target)


def probability_margin(logits: Tensor, y: Tensor) -> Tensor:
    """Probability of the true class minus that of the most probable other class (Zeng et al.).

        m = p_y - max_{k != y} p_k,    p = softmax(logits)

    logits: [B, K], y: [B]. Returns [B] in [-1, 1], float32 or wider, differentiable; positive where the
    prediction is correct.
    """
    return _margin(F.softmax(at_least_float32(logits), dim=1), y)


def soft_margin(logits: Tensor, y: Tensor) -> Tensor:
    """z_y - log sum_{k != y} exp z_k: the logit of p_y, so its gradient has the direction of -CE's.

    logits: [B, K], y: [B]. Returns [B], float32 or wider, differentiable.
    """
    logits = at_least_float32(logits)
    return _of_class(logits, y) - other_scores(logits, y).logsumexp(dim=1)


def margin_weights(logits_adv: Tensor, y: Tensor, alpha: float) -> Tensor:
    """Margin weights (Zeng et al., Eq. 7).

        w = exp(-alpha * m),    m = probability_margin(logits_adv, y)

    Returns [B] in [exp(-alpha), exp(alpha)], not normalised, in the graph: both the attack and the outer loss
    differentiate the weight, as the paper's formulation and its released code do. alpha = 0 gives ones.
    """
    if alpha == 0:
        return torch.ones_like(y, dtype=at_least_float32(logits_adv).dtype)
    return torch.exp(-alpha * probability_margin(logits_adv, y))


def cw_loss(logits: Tensor, y: Tensor) -> Tensor:
    """The margin loss of Carlini & Wagner (S&P 2017) that an attack maximises: max_{k != y} z_k - z_y.

    logits: [B, K], y: [B]. Returns [B], positive where the prediction is wrong; differentiable. Differs from
    the released code: no confidence clamp, whose gradient dies once an example is wrong by more than 50.
    """
    return -logit_margin(logits, y)


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Whether each prediction is a class other than y: argmax_k z_k != y, and all logits are finite.

    logits: [B, K], y: [B]. Returns [B] bool. Of tied classes argmax takes the first one: an example whose
    true class ties with a later one is correct, with an earlier one misclassified, so that this and the
    accuracy, argmax_k z_k == y, always agree. Logits that are not finite are no prediction: no perturbation
    that leads to them is an adversarial example.
    """
    return (logits.argmax(dim=1) != y) & logits.isfinite().all(dim=1)


def ranked_targets(logits: Tensor, y: Tensor, num_targets: int) -> Tensor:
    """The min(num_targets, K - 1) classes other than y by descending logit: [B, K], [B] -> [B, T]."""
    ranked = other_scores(logits, y).argsort(dim=1, descending=True, stable=True)
    return ranked[:, :min(num_targets, logits.shape[1] - 1)]


def _margin(scores: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    other = largest_other(scores, y) if target is None else _of_class(scores, target)
    return _of_class(scores, y) - other


def _of_class(scores: Tensor, y: Tensor) -> Tensor:
    return scores.gather(1, y[:, None]).squeeze(1)
