"""Margins of a prediction, and the margin weights of Zeng et al., "Are Adversarial Examples Created Equal?" (AAAI 2021)."""
import torch
import torch.nn.functional as F
from torch import Tensor

from losses import at_least_float32


def probability_margin(logits: Tensor, y: Tensor) -> Tensor:
    """Probability of the true class minus that of the most probable other class (Zeng et al.).

        m = p_y - max_{k != y} p_k,    p = softmax(logits)

    logits: [B, K], y: [B]. Returns [B] in [-1, 1], float32 or wider, differentiable; positive where the prediction is correct.
    """
    return -_other_minus_true(F.softmax(at_least_float32(logits), dim=1), y)


def margin_weights(logits_adv: Tensor, y: Tensor, alpha: float) -> Tensor:
    """Margin weights (Zeng et al., Eq. 7).

        w = exp(-alpha * m),    m = probability_margin(logits_adv, y)

    Returns [B] in [exp(-alpha), exp(alpha)], not normalised, in the graph: both the attack and the outer loss differentiate the
    weight, as the paper's formulation and its released code do. alpha = 0 gives ones.
    """
    if alpha == 0:
        return torch.ones_like(y, dtype=at_least_float32(logits_adv).dtype)
    return torch.exp(-alpha * probability_margin(logits_adv, y))


def cw_loss(logits: Tensor, y: Tensor) -> Tensor:
    """The margin loss of Carlini & Wagner (S&P 2017) that an attack maximises: max_{k != y} z_k - z_y.

    logits: [B, K], y: [B]. Returns [B], positive where the prediction is wrong; differentiable.
    Differs from the released code: no confidence clamp, whose gradient dies once an example is wrong by more than 50.
    """
    return _other_minus_true(at_least_float32(logits), y)


def _other_minus_true(scores: Tensor, y: Tensor) -> Tensor:
    true = y.unsqueeze(1)  # [B, 1]
    other = scores.scatter(1, true, -torch.inf).amax(dim=1)
    return other - scores.gather(1, true).squeeze(1)
