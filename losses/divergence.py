"""The Kullback-Leibler divergence between two predictions."""
import torch.nn.functional as F
from torch import Tensor

from losses import at_least_float32


def kl_divergence(logits_adv: Tensor, logits: Tensor) -> Tensor:
    """KL divergence from the clean to the adversarial prediction, per example.

        KL(p || p') = sum_k p_k (log p_k - log p'_k),    p = softmax(logits), p' = softmax(logits_adv)

    logits_adv, logits: [B, K]. Returns [B], float32 or wider, >= 0 up to rounding; gradients flow to both
    arguments. Log space on both sides: the form with probabilities gives NaN gradients where a probability
    underflows.
    """
    log_p = F.log_softmax(at_least_float32(logits), dim=1)
    log_p_adv = F.log_softmax(at_least_float32(logits_adv), dim=1)
    return F.kl_div(log_p_adv, log_p, reduction="none", log_target=True).sum(dim=1)
