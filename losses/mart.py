"""MART (Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR
2020)."""
import torch
import torch.nn.functional as F
from torch import Tensor

from losses import at_least_float32
from losses.margin import largest_other

# Constants of the released code. MISS keeps the loss finite where another class has probability 1, FLOOR caps the
# divergence of an example near 27.6, ABOVE_ONE keeps the factor of the divergence above 0.
MISS, FLOOR, ABOVE_ONE = 1.0001, 1e-12, 1.0000001


def mart_loss(logits: Tensor, logits_adv: Tensor, y: Tensor, beta: float,
              weights: Tensor | None = None) -> Tensor:
    """MART loss per example, its boosted cross-entropy optionally weighted (as in MAIL-MART).

        w * BCE + beta * KL(p || p') * (1 - p_y),    BCE = -log p'_y - log(1 - max_{k != y} p'_k)
        p = softmax(logits), p' = softmax(logits_adv)

    logits, logits_adv: [B, K], y: [B], weights: [B] or None for w = 1. Returns [B]; gradients flow through
    both logits, through 1 - p_y too, as in the released code, with its constants: log(1.0001 - ...), log(p' +
    1e-12) and 1.0000001 - p_y.
    """
    p = F.softmax(at_least_float32(logits), dim=1)
    p_adv = F.softmax(at_least_float32(logits_adv), dim=1)
    boosted = F.cross_entropy(at_least_float32(logits_adv), y, reduction="none")
    boosted = boosted - torch.log(MISS - largest_other(p_adv, y) + FLOOR)
    log_p = F.log_softmax(at_least_float32(logits), dim=1)
    divergence = (p * (log_p - torch.log(p_adv + FLOOR))).sum(dim=1)
    if weights is not None:
        boosted = weights * boosted
    return boosted + beta * divergence * (ABOVE_ONE - p.gather(1, y[:, None]).squeeze(1))
