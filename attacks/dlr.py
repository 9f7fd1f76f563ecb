"""Difference-of-logits-ratio losses (Croce & Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
Parameter-free Attacks", ICML 2020): invariant to a shift and a rescaling of the logits, so that a large scale hides no gradient.

z_(1) >= z_(2) >= ... are the logits in descending order.
"""
from torch import Tensor

TINY = 1e-12  # all logits equal


def dlr_loss(logits: Tensor, y: Tensor) -> Tensor:
    """-(z_y - max_{k != y} z_k) / (z_(1) - z_(3)), Eq. 6 there.  logits [B, K], y [B] -> [B], in the graph.

    With two classes there is no z_(3), and z_(1) - z_(2) would make the loss a constant: the numerator alone is returned.
    """
    ranked, order = logits.sort(dim=1, descending=True)
    rival = ranked[:, 0].where(order[:, 0] != y, ranked[:, 1])
    margin = rival - logits.gather(1, y[:, None]).squeeze(1)
    return margin if logits.shape[1] == 2 else margin / (ranked[:, 0] - ranked[:, 2] + TINY)


def targeted_dlr_loss(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2), Eq. 7 there.  logits [B, K], y and target [B] -> [B], in the graph.

    With three classes z_(3) stands for the mean of z_(3) and z_(4); with two the numerator alone is returned.
    """
    margin = (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
    if logits.shape[1] == 2:
        return margin
    ranked = logits.sort(dim=1, descending=True).values
    return margin / (ranked[:, 0] - ranked[:, 2:4].mean(dim=1) + TINY)
