"""Primal-dual proximal gradient descent (Matyasko & Chau, "PDPGD: Primal-Dual Proximal Gradient Descent
Adversarial Attack", 2021)."""
import torch
from torch import Tensor, nn

from attacks.checks import check_start
from attacks.frozen import frozen
from attacks.geometry import dual_norm_of, norm_of, per_example, shrink
from attacks.minimal import Closest, check_arguments, descend
from losses.margin import misclassified

MOMENTUM, SECOND_MOMENT = 0.9, 0.99
LAST_STEP, LAST_DUAL_STEP = 0.01, 0.1                   # the last step's size over the first's
STEP_SIZE = {"linf": 0.2, "l2": 0.1, "l1": 0.1}
NEWTON_STEPS = 8  # of the proximal operator of l_inf; it ends after a few
# of the two multipliers, in units of the balance at a minimum
FIRST_RATIO = {"linf": 1.0, "l2": 1.0, "l1": 10.0}


def pdpgd(model: nn.Module, x: Tensor, y: Tensor, *, norm: str = "linf", num_steps: int = 500,
          start: Tensor | None = None, target: Tensor | None = None, step_size: float | None = None,
          dual_step: float = 0.1, mode: str | None = "eval") -> Tensor:
    """Find a saddle of ||delta||_p + ratio * m(x + delta): proximal steps in delta, exponential ones in ratio.

        delta  <- clip( prox_{||.||_p / ratio, H}( delta - step * g / H ) ),    g, H: Adam's moments of grad m
        ratio  <- ratio * exp(+-dual_step), + where x + delta is correct, - where it is misclassified

    At a minimum the ratio is 1 / ||grad m||_q, 1/p + 1/q = 1; so it is counted in units of 1 / ||g||_q, and
    no unit of the logits is left. H is diagonal for l_inf, one number an example for l_2 and l_1; either way
    the proximal operator is exact.

    x: [B, C, H, W] in [0, 1]; y: [B]; start: the first iterate [B, C, H, W], x by default (an adversary helps
    where m is flat around x); target: [B] classes whose margin z_y - z_target is followed instead of z_y -
    max_{k != y} z_k. Both steps' sizes fall geometrically. num_steps gradients an example and one forward
    pass more. Returns the closest adversary found, x itself where none was, without a graph. Raises
    ValueError as `check_arguments` does.

    Differs from the paper: the constraint is the margin itself, not a surrogate of it, and l_2 is proximal
    like the others.
    """
    check_arguments(x, y, norm, num_steps)
    if start is not None:
        check_start(start, x)
    x = x.detach()
    closest = Closest(x, norm)
    x_adv = x if start is None else start.detach()
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    log_ratio = torch.full_like(closest.distance, FIRST_RATIO[norm]).log()
    step_size = STEP_SIZE[norm] if step_size is None else step_size
    with frozen(model, mode) as bare, torch.enable_grad():
        for step in range(num_steps):
            margin, wrong, gradient = descend(bare, x_adv, y, target)
            closest.offer(x_adv, wrong)
            log_ratio = log_ratio + margin.sign() * dual_step * LAST_DUAL_STEP ** (step / num_steps)
            first = MOMENTUM * first + (1 - MOMENTUM) * gradient
            second = SECOND_MOMENT * second + (1 - SECOND_MOMENT) * _square(gradient, norm)
            mean = first / (1 - MOMENTUM ** (step + 1))
            metric = (second / (1 - SECOND_MOMENT ** (step + 1))).sqrt() + 1e-12
            size = step_size * LAST_STEP ** (step / num_steps)
            delta = x_adv - x - size * mean / metric
            weight = dual_norm_of(mean, norm) * (-log_ratio).exp()
            x_adv = (x + _prox(delta, metric / size, weight, norm)).clamp_(0, 1)
        with torch.no_grad():
            closest.offer(x_adv, misclassified(bare(x_adv), y))
    return closest.x_adv


def _square(gradient: Tensor, norm: str) -> Tensor:
    """The squared gradient, averaged over each example except in l_inf.  [B, ...] -> [B, ...]."""
    square = gradient.square()
    return square if norm == "linf" else per_example(square.flatten(1).mean(dim=1), square).expand_as(square)


def _prox(point: Tensor, metric: Tensor, weight: Tensor, norm: str) -> Tensor:
    """argmin_r weight ||r||_p + 1/2 sum_i metric_i (r_i - point_i)^2, [B, ...]; metric > 0: [B, ...]; weight: [B]."""
    if norm == "l1":
        return shrink(point, per_example(weight, point) / metric)
    if norm == "l2":
        length = norm_of(point, "l2")
        shrunk = (length - weight / metric.flatten(1)[:, 0]).clamp_(min=0)
        return point * per_example(shrunk / length.clamp(min=1e-12), point)
    size, curvature = point.flatten(1).abs(), metric.flatten(1)
    bound = torch.zeros_like(weight)
    # on sum_i metric_i max(size_i - bound, 0) = weight, convex and falling: from below, never past the root
    for _ in range(NEWTON_STEPS):
        above = curvature * (size > bound[:, None])
        bound = torch.maximum(bound, ((above * size).sum(dim=1) - weight) / above.sum(dim=1).clamp(min=1e-30))
    return torch.clamp(point, -per_example(bound, point), per_example(bound, point))
