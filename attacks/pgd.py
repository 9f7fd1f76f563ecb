"""Projected gradient descent (Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks",
ICLR 2018).

    x_0 = x + noise;    x_{t+1} = Pi( x_t + step_size * direction( grad_x loss(f(x_t), target) ) )

direction is the steepest ascent in the norm of the ball: the sign in l_inf, the gradient over its length in
l_2. Pi projects onto the ball of radius epsilon around x and then onto the box [0, 1].
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.checks import check_at_least, check_images, check_keys, check_norm, check_size, check_start
from attacks.frozen import frozen
from attacks.geometry import projection, random_point, steepest, unit_noise
from attacks.noise import example_keys, keyed_normal
from losses import at_least_float32

NORMS = ("linf", "l2")
STARTS = ("uniform", "clipped", "gaussian", "clean")
GAUSSIAN_SCALE = 0.001  # standard deviation of the Gaussian start (TRADES; Zeng et al., Alg. 1; VIR, Alg. 1)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy per example, in float32 or wider: logits [B, K] and y [B] -> [B]."""
    return F.cross_entropy(at_least_float32(logits), y, reduction="none")


def pgd(model: nn.Module, x: Tensor, target: object, *, epsilon: float | Tensor, step_size: float | Tensor,
        num_steps: int, loss_fn: Callable[[Tensor, object], Tensor] = cross_entropy,
        start: str | Tensor = "uniform", norm: str = "linf", mode: str | None = "eval",
        keys: Tensor | None = None, on_logits: Callable[[Tensor], object] | None = None) -> Tensor:
    """Maximise loss_fn(model(x_adv), target) over the epsilon ball around x within [0, 1].

    x: [B, C, H, W] in [0, 1]; target: whatever loss_fn(logits_adv, target) -> [B] takes, labels [B] by
    default; epsilon and step_size in pixel units, one number or one per example, [B]. Returns the last
    iterate, not the best: x_adv, shaped as x, without a graph.

    norm       of the ball, of epsilon and of step_size: "linf" or "l2".
    start      "uniform": x + U(-epsilon, epsilon), in l_2 a random direction of length epsilon; "clipped":
               the same, clamped to [0, 1] (GAIRAT's released code); "gaussian": x + 0.001 N(0, 1), which a KL
               loss needs, as its gradient at x is zero; "clean": x; or the first iterate as a tensor. Unless
               clipped it is not projected before the first step, as in the released code of Zeng et al.,
               TRADES and MART; every later iterate is, and so is the result.
    mode       of the model during the attack: "eval", "train", or None for as it is (see `frozen`).
    keys       [B] int64 from `attacks.noise.example_keys`: the noise of an example then depends on its key
               alone. Without keys it comes from torch's global generator.
    on_logits  called with the logits [B, K] of every iterate that a step starts from, without a graph.

    A model with a method `pgd_step` takes the steps itself: pgd_step(steps, whole_step, x_adv, settings)
    returns what steps(model, **settings) would, and may use either form of the step.

    Raises ValueError for images outside [0, 1], a negative epsilon, step_size or num_steps, and an unknown
    start or norm.
    """
    check_images(x)
    check_norm(norm, NORMS)
    check_at_least(0, num_steps=num_steps)
    if keys is not None:
        check_keys(keys, x)
    epsilon = check_size("epsilon", epsilon, x)
    step_size = check_size("step_size", step_size, x)
    x = x.detach()
    settings = {"x": x, "target": target, "epsilon": epsilon, "step_size": step_size, "loss_fn": loss_fn,
                "norm": norm}
    x_adv = first_iterate(x, epsilon, start, keys, norm).detach()
    with frozen(model, mode) as bare, torch.enable_grad():
        own = hasattr(bare, "pgd_step") and num_steps
        advance = bare.pgd_step(steps, whole_step, x_adv, settings) if own else steps(bare, **settings)
        for _ in range(num_steps):
            x_adv, logits_adv = advance(x_adv)
            if on_logits is not None:
                on_logits(logits_adv)
    return x_adv if num_steps else projection(x, epsilon, norm)(x_adv.clone())


def steps(model: nn.Module, *, x: Tensor, target: object, epsilon: float | Tensor, step_size: float | Tensor,
          loss_fn: Callable[[Tensor, object], Tensor],
          norm: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The step of `pgd`: x_adv -> the next x_adv, and the logits [B, K] of this one, both without a graph."""
    project = projection(x, epsilon, norm)  # with bounds that are the same for every step

    def advance(x_adv: Tensor) -> tuple[Tensor, Tensor]:
        """The next x_adv, and the logits of this one."""
        x_adv.requires_grad_()
        logits_adv = model(x_adv)
        losses = loss_fn(logits_adv, target)  # [B]
        ones = torch.ones_like(losses)  # the gradient of their sum: that of a mean underflows earlier
        gradient, = torch.autograd.grad(losses, x_adv, ones)
        moved = _move(x_adv.detach(), steepest(gradient, norm), step_size)
        return project(moved), logits_adv.detach()

    return advance


def whole_step(model: nn.Module, x_adv: Tensor, *, x: Tensor, target: object, epsilon: Tensor,
               step_size: Tensor, loss_fn: Callable[[Tensor, object], Tensor],
               norm: str) -> tuple[Tensor, Tensor]:
    """The step of `steps` in one call, by torch.func: torch.compile makes one graph of it.

    epsilon and step_size are tensors, of one value or [B, 1, 1, 1]: a number would be a constant of the
    graph, so that a ramp would compile a graph a batch.
    """

    def total(point):  # without annotations, at which torch 2.6 ends the graph
        logits_adv = model(point)
        return loss_fn(logits_adv, target).sum(), logits_adv

    gradient, logits_adv = torch.func.grad(total, has_aux=True)(x_adv)
    return projection(x, epsilon, norm)(x_adv + step_size * steepest(gradient, norm)), logits_adv


def _move(x_adv: Tensor, direction: Tensor, step_size: float | Tensor) -> Tensor:
    """x_adv + step_size * direction in one pass over the images, in the memory of `direction`."""
    if isinstance(step_size, Tensor):
        return torch.addcmul(x_adv, direction, step_size, out=direction)
    return torch.add(x_adv, direction, alpha=step_size, out=direction)


def pgd_by_index(model: nn.Module, x: Tensor, target: object, index: Tensor, restart: int,
                 loss_fn: Callable[[Tensor, object], Tensor], *, seed: int, **options: object) -> Tensor:
    """`pgd` with random starts that depend on (index in the data set, seed, restart) alone."""
    return pgd(model, x, target, loss_fn=loss_fn, keys=example_keys(index, seed, restart), **options)


def first_iterate(x: Tensor, epsilon: float | Tensor, start: str | Tensor, keys: Tensor | None = None,
                  norm: str = "linf") -> Tensor:
    """The point x_0 where an attack begins; arguments as in `pgd`, epsilon a number or broadcastable to x."""
    if isinstance(start, Tensor):
        check_start(start, x)
        return start
    if start == "clean":
        return x
    if start == "clipped":
        return random_point(x, epsilon, norm, keys)
    if start == "uniform":
        return x + epsilon * unit_noise(x, norm, keys)
    if start == "gaussian":
        noise = torch.randn_like(x) if keys is None else keyed_normal(keys, x.shape[1:]).to(x.dtype)
        return x + GAUSSIAN_SCALE * noise
    names = ", ".join(STARTS)
    raise ValueError(f"unknown start {start!r}: choose one of {names}, or give the first iterate as a tensor")
