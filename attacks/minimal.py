"""What the minimal-norm attacks share: the margin they push down, and the closest adversary seen so far.

A minimal-norm attack looks for d_p(x, y) = min { ||x' - x||_p : x' in [0, 1]^D, f(x') misclassified } and
finds an upper bound of it.
"""
import math

import torch
from torch import Tensor, nn

from attacks.checks import check_at_least, check_batch, check_classes
from attacks.geometry import NORMS, choose, norm_of
from losses.margin import logit_margin, misclassified


def check_arguments(x: Tensor, y: Tensor, norm: str, num_steps: int, norms: tuple[str, ...] = NORMS) -> None:
    """Raise ValueError for images outside [0, 1], other labels, an unknown norm and num_steps < 0."""
    check_batch(x, y, norm, norms)
    check_at_least(0, num_steps=num_steps)


def descend(bare: nn.Module, x_adv: Tensor, y: Tensor,
            target: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The margin at `x_adv` (to `target` if given), whether it is misclassified, the margin's gradient."""
    x_adv = x_adv.detach().requires_grad_()
    logits = bare(x_adv)
    check_classes(y, logits)
    margin = logit_margin(logits, y, target)
    gradient, = torch.autograd.grad(margin.sum(), x_adv)
    return margin.detach(), misclassified(logits.detach(), y), torch.nan_to_num(gradient, nan=0.0)


class Closest:
    """The closest misclassified image seen of each example: x and distance inf until there is one."""

    def __init__(self, x: Tensor, norm: str):
        self.x, self.norm, self.x_adv = x, norm, x.clone()
        self.distance = torch.full(x.shape[:1], torch.inf, device=x.device, dtype=x.dtype)

    def offer(self, x_adv: Tensor, wrong: Tensor) -> Tensor:
        """Keep those of `x_adv` [B, ...] that are `wrong` [B] and closer than before; returns which, [B]."""
        distance = norm_of(x_adv - self.x, self.norm)
        better = wrong & (distance < self.distance)
        self.distance = torch.where(better, distance, self.distance)
        self.x_adv = choose(better, x_adv, self.x_adv)
        return better


def cosine(first: float, last: float, step: int, num_steps: int) -> float:
    """From `first` at step 0 to `last` at step num_steps - 1 along half a cosine."""
    phase = math.pi * step / max(num_steps - 1, 1)
    return last + (first - last) * (1 + math.cos(phase)) / 2
