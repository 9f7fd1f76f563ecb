"""MAIL (Liu et al., "Probabilistic Margins for Instance Reweighting in Adversarial Training", NeurIPS
2021)."""
import torch
from torch import Tensor

from losses import with_mean_one
from losses.margin import probability_margin

NORMALIZATIONS = ("x3", "batch", "none")


def mail_weights(logits_adv: Tensor, y: Tensor, slope: float, bias: float,
                 normalization: str = "x3") -> Tensor:
    """MAIL weights on the probability margin m = p'_y - max_{k != y} p'_k of the adversarial prediction.

        w = c * sigmoid(slope * (bias - m))

    logits_adv: [B, K], y: [B]. Returns [B] >= 0, float32 or wider, a constant. The weight is half its largest
    value at m = bias: with MAIL-AT's bias of -0.5 nearly all of it lies on clearly misclassified examples.
    normalization  "x3": c = 3, what the released code calls normalised and what its slopes and biases belong
                   to; "batch": mean 1, the form in the paper; "none": c = 1.
    """
    with torch.no_grad():
        weights = torch.sigmoid(slope * (bias - probability_margin(logits_adv, y)))
        return {"x3": lambda: 3.0 * weights, "batch": lambda: with_mean_one(weights),
                "none": lambda: weights}[normalization]()
