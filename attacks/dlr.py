"""Difference-of-logits-ratio losses (Croce & Hein, "Reliable Evaluation of Adversarial Robustness with an
Ensemble of Diverse Parameter-free Attacks", ICML 2020): a shift or a rescaling of the logits changes neither,
so that large logits hide no gradient.

z_(1) >= z_(2) >= ... are the logits in descending order.
"""
from torch import Tensor

from losses.margin import cw_loss, logit_margin

TINY = 1e-12  # all logits equal


def dlr_loss(logits: Tensor, y: Tensor) -> Tensor:
    """-(z_y - max_{k != y} z_k) / (z_(1) - z_(3)), Eq. 6 there.  logits [B, K], y [B] -> [B], in the graph.

    With two classes there is no z_(3), and z_(1) - z_(2) would make the loss a constant: the numerator alone
    is returned.
    """
    loss = cw_loss(logits, y)
    if logits.shape[1] == 2:
        return loss
    ranked = logits.sort(dim=1, descending=True).values
    return loss / (ranked[:, 0] - ranked[:, 2] + TINY)


def targeted_dlr_loss(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2), Eq. 7 there.  logits [B, K], y, target [B] -> [B], in the graph.

    With three classes z_(3) stands for the mean of z_(3) and z_(4); with two the numerator alone is returned.
    """
    loss = -logit_margin(logits, y, target)
    if logits.shape[1] == 2:
        return loss
    ranked = logits.sort(dim=1, descending=True).values
    return loss / (ranked[:, 0] - ranked[:, 2:4].mean(dim=1) + TINY)
