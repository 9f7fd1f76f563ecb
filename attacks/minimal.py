"""What the minimal-norm attacks share: norms and their projections, the margin they push down, and the closest adversary seen so far.

A minimal-norm attack looks for d_p(x, y) = min { ||x' - x||_p : x' in [0, 1]^D, f(x') misclassified } and finds an upper bound of it.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.ball import norm_of, per_example
from attacks.pgd import check_images

NORMS = ("linf", "l2", "l1")


def check_arguments(x: Tensor, y: Tensor, norm: str, num_steps: int, norms: tuple[str, ...] = NORMS) -> None:
    """Raise ValueError for images outside [0, 1], labels that do not fit, a norm the attack has not, and a negative num_steps."""
    check_images(x)
    if y.shape != x.shape[:1] or y.is_floating_point():
        raise ValueError(f"labels of shape {tuple(y.shape)} and type {y.dtype} do not fit {len(x)} images")
    if norm not in norms:
        raise ValueError(f"unknown norm {norm!r}: choose one of {', '.join(norms)}")
    if num_steps < 0:
        raise ValueError(f"num_steps must be >= 0, not {num_steps}")


def dual_norm_of(gradient: Tensor, norm: str) -> Tensor:
    """||gradient||_q with 1/p + 1/q = 1: by how much a linear function changes along a step of unit l_p norm.  [B, ...] -> [B]."""
    return norm_of(gradient, {"linf": "l1", "l2": "l2", "l1": "linf"}[norm])


def project(delta: Tensor, radius: Tensor, norm: str) -> Tensor:
    """The nearest point (in l_2) of the l_p ball of `radius` [B] around 0.  delta: [B, ...] -> [B, ...]."""
    if norm == "linf":
        bound = per_example(radius, delta)
        return torch.clamp(delta, -bound, bound)
    if norm == "l2":
        length = norm_of(delta, "l2")
        return delta * per_example(torch.where(length > radius, radius / length, torch.ones_like(length)), delta)
    return shrink(delta, per_example(_l1_threshold(delta.flatten(1).abs(), radius), delta))


def shrink(delta: Tensor, threshold: Tensor) -> Tensor:
    """Soft thresholding, sign(delta) * max(|delta| - threshold, 0): the proximal operator of the l_1 norm."""
    return delta.sign() * (delta.abs() - threshold).clamp_(min=0)


def _l1_threshold(magnitude: Tensor, radius: Tensor) -> Tensor:
    """theta >= 0 [B] with sum_i max(magnitude_i - theta, 0) = radius, 0 inside the ball (Duchi et al., ICML 2008).  [B, D], [B] -> [B]."""
    ranked = magnitude.sort(dim=1, descending=True).values
    count = torch.arange(1, ranked.shape[1] + 1, device=ranked.device, dtype=ranked.dtype)
    theta = (ranked.cumsum(dim=1) - radius[:, None]) / count  # [B, D]
    kept = (ranked > theta).sum(dim=1).clamp_(min=1)
    return theta.gather(1, kept[:, None] - 1).squeeze(1).clamp_(min=0)


def logit_margin(logits: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """z_y - max_{k != y} z_k, or z_y - z_target: negative where y has lost.  [B, K], [B] -> [B], in float32 or wider."""
    logits = logits if logits.itemsize >= 4 else logits.float()
    true = logits.gather(1, y[:, None]).squeeze(1)
    if target is not None:
        return true - logits.gather(1, target[:, None]).squeeze(1)
    return true - logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -torch.inf).amax(dim=1)


def soft_margin(logits: Tensor, y: Tensor) -> Tensor:
    """z_y - log sum_{k != y} exp z_k: minus the logit of 1 - p_y, so its gradient has the direction of -CE's.  [B, K], [B] -> [B]."""
    logits = logits if logits.itemsize >= 4 else logits.float()
    others = logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -torch.inf)
    return logits.gather(1, y[:, None]).squeeze(1) - others.logsumexp(dim=1)


def descend(bare: nn.Module, x_adv: Tensor, y: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(margin steered by [B], whether misclassified [B], gradient of the margin) at `x_adv`, all without a graph."""
    x_adv = x_adv.detach().requires_grad_()
    logits = bare(x_adv)
    margin = logit_margin(logits, y, target)
    gradient, = torch.autograd.grad(margin.sum(), x_adv)
    return margin.detach(), is_wrong(logits, y), torch.nan_to_num(gradient, nan=0.0)


def is_wrong(logits: Tensor, y: Tensor) -> Tensor:
    """Whether some other class strictly beats y: a tie is no adversary, nor are logits that are not finite.  [B, K], [B] -> [B]."""
    return (logit_margin(logits.detach(), y) < 0) & logits.detach().isfinite().all(dim=1)


class Closest:
    """The closest misclassified image that an attack has seen of each example: x itself and distance inf until there is one."""

    def __init__(self, x: Tensor, norm: str):
        self.x, self.norm, self.x_adv = x, norm, x.clone()
        self.distance = torch.full(x.shape[:1], torch.inf, device=x.device, dtype=x.dtype)

    def offer(self, x_adv: Tensor, wrong: Tensor) -> Tensor:
        """Keep those of `x_adv` [B, ...] that are `wrong` [B] and closer than before; gives which these are [B]."""
        distance = norm_of(x_adv - self.x, self.norm)
        better = wrong & (distance < self.distance)
        self.distance = torch.where(better, distance, self.distance)
        self.x_adv = torch.where(per_example(better, x_adv), x_adv, self.x_adv)
        return better


def cosine(first: float, last: float, step: int, num_steps: int) -> float:
    """From `first` at step 0 to `last` at step num_steps - 1 along half a cosine."""
    phase = math.pi * step / max(num_steps - 1, 1)
    return last + (first - last) * (1 + math.cos(phase)) / 2
