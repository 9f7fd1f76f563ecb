"""TRADES (Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019)."""
import torch.nn.functional as F
from torch import Tensor

from losses import at_least_float32
from losses.divergence import kl_divergence


def trades_loss(logits: Tensor, logits_adv: Tensor, y: Tensor, beta: float,
                weights: Tensor | None = None) -> Tensor:
    """TRADES loss per example, its robust term optionally weighted (Zeng et al., Eq. 16).

        CE(logits, y) + beta * w * KL(softmax(logits) || softmax(logits_adv))

    logits, logits_adv: [B, K], y: [B], weights: [B] or None for w = 1. Returns [B]; gradients flow through
    both logits and, where they are in the graph, the weights. beta is the paper's 1 / lambda. Differs from
    the released code: one clean forward serves both terms, where that code makes a second one.
    """
    robust = kl_divergence(logits_adv=logits_adv, logits=logits)
    if weights is not None:
        robust = weights * robust
    return F.cross_entropy(at_least_float32(logits), y, reduction="none") + beta * robust
