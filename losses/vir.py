"""Vulnerability-aware instance reweighting, "VIR" (VIR-AT and VIR-TRADES)."""
import torch
import torch.nn.functional as F
from torch import Tensor

from losses import at_least_float32, with_mean_one
from losses.divergence import kl_divergence

TERMS = ("both", "sv", "sd")


def vir_weights(logits: Tensor, logits_adv: Tensor, y: Tensor, alpha: float, beta: float, gamma: float, *,
                terms: str = "both", normalization: str = "none") -> Tensor:
    """VIR weights (Eq. 5-10): an example's vulnerability times how far the attack moves its prediction.

        w = S_v * S_d + beta,    S_v = alpha * exp(-gamma * p_y),    S_d = KL(p || p')
        p = softmax(logits), p' = softmax(logits_adv)

    logits, logits_adv: [B, K], y: [B]. Returns [B] in [beta, inf), float32 or wider, a constant: the paper
    says so of S_d only, but a differentiable S_v would reward a higher p_y through the weight.
    terms          "both", or the ablations of Tables 6 and 7: "sv" for w = S_v alone, "sd" for w = S_d alone (no
                   beta in either).
    normalization  "none" as the paper writes it: a typical weight is about beta, so after the burn-in VIR-AT
                   takes far smaller steps; "batch" rescales to mean 1.
    """
    with torch.no_grad():
        p_true = F.softmax(at_least_float32(logits), dim=1).gather(1, y[:, None]).squeeze(1)
        susceptibility = alpha * torch.exp(-gamma * p_true)
        # negative by rounding only
        shift = kl_divergence(logits_adv=logits_adv, logits=logits).clamp_min(0.0)
        weights = {"both": susceptibility * shift + beta, "sv": susceptibility, "sd": shift}[terms]
        return with_mean_one(weights) if normalization == "batch" else weights
