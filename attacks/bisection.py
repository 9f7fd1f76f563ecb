"""The smallest radius at which PGD succeeds, by bisection of each example's own radius.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, at a radius that is
halved in on; with momentum (Dong et al., "Boosting Adversarial Attacks with Momentum", CVPR 2018) and a
falling step; and the same with targeted APGD (Croce & Hein, "Reliable Evaluation of Adversarial Robustness
with an Ensemble of Diverse Parameter-free Attacks", ICML 2020) in PGD's place.
"""
import torch
from torch import Tensor, nn

from attacks.apgd import NORMS as APGD_NORMS
from attacks.apgd import apgd_targeted
from attacks.checks import check_keys
from attacks.frozen import frozen, predict
from attacks.geometry import norm_of, per_example, projection, unit_noise
from attacks.minimal import Closest, check_arguments, descend
from attacks.noise import example_keys
from losses.margin import misclassified

MOMENTUM = 0.75
FIRST_STEP, LAST_STEP = 1.0, 0.02  # in radii; the step falls linearly


def pgd_bisection(model: nn.Module, x: Tensor, y: Tensor, *, norm: str = "linf", num_steps: int = 40,
                  num_rounds: int = 8, upper: Tensor | None = None, target: Tensor | None = None,
                  keys: Tensor | None = None, mode: str | None = "eval") -> Tensor:
    """Bisect the l_inf radius by PGD on the margin: the distance of an adversary becomes the upper end.

    x: [B, C, H, W] in [0, 1]; y: [B]; upper: the radii to begin from [B], 1 by default, the first tried being
    half of it; target: [B] classes whose margin z_y - z_target is followed; keys: [B] of
    `attacks.noise.example_keys`, then PGD starts at x + U(-radius, radius), else at x. num_rounds * num_steps
    gradients and num_rounds forward passes an example. Returns the closest adversary found, x itself where
    none was, without a graph. Raises ValueError as `check_arguments` does; the only norm is l_inf.
    """
    check_arguments(x, y, norm, num_steps, ("linf",))
    x = x.detach()
    closest = Closest(x, norm)
    upper = torch.ones_like(closest.distance) if upper is None else upper.to(x.dtype).clamp(max=1)
    lower = torch.zeros_like(upper)
    noise = None if keys is None else unit_noise(x, "linf", check_keys(keys, x))
    with frozen(model, mode) as bare, torch.enable_grad():
        for _ in range(num_rounds):
            radius = (lower + upper) / 2
            found = _within(bare, x, y, radius, num_steps, target, noise)
            closest.offer(found.x_adv, found.distance.isfinite())
            lower = torch.where(found.distance.isfinite(), lower, radius)
            upper = torch.where(found.distance.isfinite(), found.distance, upper)
    return closest.x_adv


def apgd_bisection(model: nn.Module, x: Tensor, y: Tensor, *, norm: str = "linf", num_steps: int = 40,
                   num_rounds: int = 8, num_targets: int = 9, upper: Tensor | None = None,
                   keys: Tensor | None = None) -> Tensor:
    """Bisect each example's radius by `attacks.apgd.apgd_targeted` towards min(num_targets, K - 1) classes.

    x: [B, C, H, W] in [0, 1]; y: [B]; norm: "linf" or "l2"; upper: the radii to begin from [B], those not
    finite and the default being the box's diameter, the first tried being half of it; keys: [B] of
    `attacks.noise.example_keys`, for APGD's random starts. At most num_rounds * num_targets * (num_steps + 1)
    gradients an example. Returns and raises as `pgd_bisection`.
    """
    check_arguments(x, y, norm, num_steps, APGD_NORMS)
    x, closest = x.detach(), Closest(x.detach(), norm)
    diameter = norm_of(torch.ones_like(x), norm)
    upper = diameter if upper is None else torch.where(upper.isfinite(), upper.to(x.dtype), diameter)
    lower = torch.zeros_like(upper)
    keys = check_keys(keys, x)
    for number in range(num_rounds):
        radius = (lower + upper) / 2
        x_adv = apgd_targeted(model, x, y, epsilon=radius, norm=norm, num_steps=num_steps,
                              num_targets=num_targets, keys=example_keys(keys, number))
        wrong = misclassified(predict(model, x_adv), y)
        closest.offer(x_adv, wrong)
        upper = torch.where(wrong, torch.minimum(radius, norm_of(x_adv - x, norm)), upper)
        lower = torch.where(wrong, lower, radius)
    return closest.x_adv


def _within(bare: nn.Module, x: Tensor, y: Tensor, radius: Tensor, num_steps: int, target: Tensor | None,
            noise: Tensor | None) -> Closest:
    """The closest adversary that PGD meets in the balls of `radius` [B]."""
    bound = per_example(radius, x)
    project = projection(x, bound, "linf")
    found, velocity = Closest(x, "linf"), torch.zeros_like(x)
    x_adv = x if noise is None else project(x + bound * noise)
    for step in range(num_steps):
        _, wrong, gradient = descend(bare, x_adv, y, target)
        found.offer(x_adv, wrong)
        velocity = MOMENTUM * velocity + (1 - MOMENTUM) * gradient.sign()
        size = FIRST_STEP + (LAST_STEP - FIRST_STEP) * step / max(num_steps - 1, 1)
        x_adv = project(x_adv - size * bound * velocity)
    with torch.no_grad():
        found.offer(x_adv, misclassified(bare(x_adv), y))
    return found
