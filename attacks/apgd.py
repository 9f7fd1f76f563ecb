"""Auto-PGD: PGD with momentum that sets its own step size (Croce & Hein, "Reliable Evaluation of Adversarial
Robustness with an Ensemble of Diverse Parameter-free Attacks", ICML 2020, Alg. 1).

    z_{k+1} = Pi( x_k + eta_k * d(grad f(x_k)) )
    x_{k+1} = Pi( x_k + 0.75 * (z_{k+1} - x_k) + 0.25 * (x_k - x_{k-1}) )

The first step size is 2 epsilon. At each checkpoint an example halves its own and returns to its best point
if the loss rose in fewer than 75 % of the steps since the last checkpoint, or if neither the step size nor
the best loss has changed since then.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.checks import check_at_least, check_batch, check_classes, check_start
from attacks.dlr import dlr_loss, targeted_dlr_loss
from attacks.frozen import frozen, predict
from attacks.geometry import choose, per_example, projection, radii, random_point, steepest
from attacks.noise import example_keys
from attacks.pgd import cross_entropy
from attacks.standing import Standing
from losses.margin import misclassified, ranked_targets

MOMENTUM = 0.75     # alpha: the share of the gradient step
RISE_SHARE = 0.75   # rho: of the steps between two checkpoints that must raise the loss
COMPACT_EVERY = 5   # steps between two removals of the examples that are fooled
LOSSES = {"ce": cross_entropy, "dlr": dlr_loss}
NORMS = ("linf", "l2")


def apgd(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float | Tensor, norm: str = "linf",
         num_steps: int = 100, loss: str | Callable[[Tensor, Tensor], Tensor] = "ce",
         start: str | Tensor = "uniform", keys: Tensor | None = None) -> Tensor:
    """Maximise the loss over the epsilon ball around x within [0, 1], until an example is misclassified.

    x: [B, C, H, W] in [0, 1]; y: [B]; epsilon: a number, or one per example as a tensor [B]; loss: "ce",
    "dlr" or a function loss(logits, y) -> [B]; start: "uniform", or the first iterate as a tensor, which is
    projected; keys: [B] int64 from `attacks.noise.example_keys`, on which alone the random start of an
    example depends (its position in the batch without them).

    Returns x_adv, shaped as x, without a graph: x itself where x is misclassified, else the first
    misclassified iterate, else the iterate of largest loss. The model is in eval mode during the attack and
    as before after it. Raises ValueError for images outside [0, 1], a negative epsilon or num_steps, an
    unknown norm, loss or start.
    """
    keys = check_batch(x, y, norm, NORMS, keys)
    radius = radii(epsilon, x)
    x = x.detach()
    check_at_least(0, num_steps=num_steps)
    loss_fn = checked_loss(loss)
    first = _start(x, radius, norm, start, keys)
    with frozen(model) as bare:
        logits = predict(bare, x)
        check_classes(y, logits)
        return _attack_standing(bare, x, y, logits, radius, norm, num_steps, first, loss_fn)


def apgd_targeted(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float | Tensor, norm: str = "linf",
                  num_steps: int = 100, num_targets: int = 9, keys: Tensor | None = None) -> Tensor:
    """APGD on the targeted DLR loss towards min(num_targets, K - 1) classes, by descending clean logit.

    Arguments, errors and result as in `apgd`; an example that one target fools is not attacked again, and one
    that none fools comes back as the last target's best point. Each target has a random start of its own. For
    two and three classes see `attacks.dlr`.
    """
    keys = check_batch(x, y, norm, NORMS, keys)
    radius = radii(epsilon, x)
    x = x.detach()
    check_at_least(0, num_steps=num_steps)
    check_at_least(1, num_targets=num_targets)
    with frozen(model) as bare:
        return towards_each_target(bare, x, y, num_targets, lambda rows, target, rank: _attack_towards(
            bare, x[rows], y[rows], target, radius[rows], norm, num_steps, example_keys(keys[rows], rank)))


def towards_each_target(bare: nn.Module, x: Tensor, y: Tensor, num_targets: int,
                        attack: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
    """attack(rows [b], target [b], rank) -> x_adv [b, ...] on one class after the other, by descending logit.

    Each attacks what stands. Returns the last that was found of each example [B, ...], x where there was no
    need.
    """
    logits, x_adv = predict(bare, x), x
    check_classes(y, logits)
    targets = ranked_targets(logits, y, num_targets)
    for rank in range(targets.shape[1]):
        rows = (~misclassified(logits, y)).nonzero().squeeze(1)
        if not len(rows):
            break
        found = attack(rows, targets[rows, rank], rank)
        x_adv = x_adv.index_copy(0, rows, found)
        logits = logits.index_copy(0, rows, predict(bare, found))
    return x_adv


def checkpoints(num_steps: int) -> list[int]:
    """w_j = ceil(p_j * num_steps), p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06) (Eq. 3)."""
    shares, steps = [0.0, 0.22], []
    while shares[-1] <= 1.0:
        steps.append(math.ceil(round(shares[-1] * num_steps, 9)))
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return sorted(set(steps))


@dataclass
class _Walk(Standing):
    """The examples still attacked, one row each: their task, iterates and schedule."""
    x: Tensor            # [B, C, H, W] clean image
    y: Tensor            # [B]
    target: Tensor       # [B] what the loss takes beside the logits and y; y itself for an untargeted loss
    radius: Tensor       # [B, 1, 1, 1]
    x_adv: Tensor        # x_k
    x_last: Tensor       # x_{k-1}
    gradient: Tensor     # at x_k
    loss: Tensor         # [B] at x_k
    x_best: Tensor       # the iterate of largest loss ...
    best_gradient: Tensor
    best_loss: Tensor    # [B]
    step_size: Tensor    # [B, 1, 1, 1]
    rises: Tensor        # [B] steps since the last checkpoint that raised the loss
    checked_loss: Tensor  # [B] best loss at the last checkpoint
    halved: Tensor       # [B] whether the last checkpoint halved the step size


def _attack_standing(model, x, y, clean_logits, radius, norm, num_steps, first, loss_fn):
    standing = (~misclassified(clean_logits, y)).nonzero().squeeze(1)
    if not len(standing):
        return x
    found = _ascend(model, x[standing], y[standing], y[standing], radius[standing], norm, num_steps,
                    first[standing], loss_fn)
    return x.index_copy(0, standing, found)


def _attack_towards(model, x, y, target, radius, norm, num_steps, keys):
    return _ascend(model, x, y, target, radius, norm, num_steps, random_point(x, radius, norm, keys),
                   targeted_dlr_loss)


def _ascend(model: nn.Module, x: Tensor, y: Tensor, target: Tensor, radius: Tensor, norm: str, num_steps: int,
            first: Tensor, loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Algorithm 1 from `first`, on correctly classified examples; loss_fn(logits, y, target) -> [B]."""
    loss, gradient = evaluate(model, first, y, target, loss_fn)
    walk = _Walk(torch.arange(len(x), device=x.device), x, y, target, radius, first, first, gradient, loss,
                 first, gradient, loss, 2.0 * radius, torch.zeros_like(loss), loss,
                 torch.zeros_like(loss, dtype=torch.bool))
    result = first.clone()
    last_check = 0
    checks = set(checkpoints(num_steps))
    for k in range(1, num_steps + 1):
        if (k - 1) % COMPACT_EVERY == 0 and not walk.keep(~walk.best_loss.isposinf(), (result, walk.x_best)):
            return result
        _step(model, walk, norm, 1.0 if k == 1 else MOMENTUM, loss_fn)
        if k in checks:
            _check(walk, k - last_check)
            last_check = k
    result[walk.row] = walk.x_best
    return result


def _step(model, walk: _Walk, norm: str, momentum: float, loss_fn) -> None:
    """One step of every example, and the record of its best point."""
    project = projection(walk.x, walk.radius, norm)
    z = project(walk.x_adv + walk.step_size * steepest(walk.gradient, norm))
    if momentum < 1.0:
        z = project(walk.x_adv + momentum * (z - walk.x_adv) + (1.0 - momentum) * (walk.x_adv - walk.x_last))
    walk.x_last, walk.x_adv = walk.x_adv, z
    loss, walk.gradient = evaluate(model, z, walk.y, walk.target, loss_fn)
    walk.rises = walk.rises + (loss > walk.loss)
    walk.loss, better = loss, loss > walk.best_loss
    walk.x_best = choose(better, z, walk.x_best)
    walk.best_gradient = choose(better, walk.gradient, walk.best_gradient)
    walk.best_loss = loss.where(better, walk.best_loss)


def _check(walk: _Walk, num_steps: int) -> None:
    """Halve the step size of examples without progress and go back to their best point."""
    stuck = (walk.rises < RISE_SHARE * num_steps) | (~walk.halved & (walk.best_loss <= walk.checked_loss))
    walk.step_size = (walk.step_size / 2.0).where(per_example(stuck, walk.x), walk.step_size)
    walk.x_adv = choose(stuck, walk.x_best, walk.x_adv)
    walk.gradient = choose(stuck, walk.best_gradient, walk.gradient)
    walk.loss = walk.best_loss.where(stuck, walk.loss)
    walk.halved = stuck
    walk.checked_loss = walk.best_loss
    walk.rises = torch.zeros_like(walk.rises)


def evaluate(model, x_adv: Tensor, y: Tensor, target: Tensor, loss_fn) -> tuple[Tensor, Tensor]:
    """The loss [B], inf where x_adv is misclassified, so that it stays the best; and its gradient."""
    with torch.enable_grad():
        point = x_adv.detach().requires_grad_()
        logits = model(point)
        losses = loss_fn(logits, y, target)
        gradient, = torch.autograd.grad(losses.sum(), point)
    return losses.detach().masked_fill(misclassified(logits.detach(), y), torch.inf), gradient


def checked_loss(loss: str | Callable[[Tensor, Tensor], Tensor],
                 ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """loss_fn(logits, y, target) -> [B] of a name in LOSSES or a function of logits and labels."""
    if isinstance(loss, str) and loss not in LOSSES:
        names = ", ".join(LOSSES)
        raise ValueError(f"unknown loss {loss!r}: choose one of {names}, or a function of logits and labels")
    function = LOSSES.get(loss, loss) if isinstance(loss, str) else loss
    return lambda logits, y, _: function(logits, y)


def _start(x: Tensor, radius: Tensor, norm: str, start: str | Tensor, keys: Tensor) -> Tensor:
    if isinstance(start, Tensor):
        check_start(start, x)
        return projection(x, radius, norm)(start.detach().clone())
    if start != "uniform":
        raise ValueError(f"unknown start {start!r}: 'uniform', or the first iterate as a tensor")
    return random_point(x, radius, norm, keys)
