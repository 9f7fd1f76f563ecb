"""Auto-PGD in l_1: sparse steps whose length and sparsity set themselves (Croce & Hein, "Mind the box:
l_1-APGD for sparse adversarial attacks on image classifiers", ICML 2021, Alg. 1).

    z       = sign(grad f(x_k)) on its k_max largest magnitudes, 0 elsewhere
    x_{k+1} = Pi( x_k + eta * z / ||z||_1 )

Pi is the projection onto the l_1 ball and [0, 1] together; one after the other would lose most of the radius.
Every 4 % of the steps k_max becomes ||x_best - x||_0 / 1.5. If the best point has become sparser by 5 %, eta
is epsilon again and the example returns to that point; otherwise eta falls by 1.5, down to epsilon / 10.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.apgd import COMPACT_EVERY, checked_loss, evaluate, towards_each_target
from attacks.checks import check_at_least, check_batch, check_classes
from attacks.dlr import targeted_dlr_loss
from attacks.frozen import frozen, predict
from attacks.geometry import choose, per_example, project_l1_box, radii
from attacks.noise import example_keys, keyed_normal
from attacks.standing import Standing
from losses.margin import misclassified

SPARSITY = 0.2       # share of the pixels that the first steps change
SPARSER = 1.5        # how much fewer than the best point has changed the next steps do
FALL = 1.5           # of eta, at a check without progress ...
SMALLEST_STEP = 0.1  # ... down to this share of epsilon
PROGRESS = 0.95      # of the number of changed pixels, at most
CHECK_SHARE = 0.04   # of the steps lies between two checks
NORMS = ("l1",)
LARGER = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))  # radius over epsilon, share of the steps (Sec. 3.3)


def apgd_l1(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float | Tensor, norm: str = "l1",
            num_steps: int = 100, loss: str | Callable[[Tensor, Tensor], Tensor] = "ce",
            keys: Tensor | None = None) -> Tensor:
    """Maximise the loss over the l_1 ball of radius epsilon around x within [0, 1].

    The steps begin in a ball three times as large, and go on in one twice as large and then in the ball
    itself, each time from the projection of the best point so far. Arguments, result and errors as of
    `attacks.apgd.apgd`; norm: "l1".
    """
    keys, loss_fn = check_batch(x, y, norm, NORMS, keys), checked_loss(loss)
    check_at_least(0, num_steps=num_steps)
    radius, x = radii(epsilon, x), x.detach()
    with frozen(model) as bare:
        logits = predict(bare, x)
        check_classes(y, logits)
        rows = (~misclassified(logits, y)).nonzero().squeeze(1)
        if not len(rows):
            return x
        found = _within(bare, x[rows], y[rows], y[rows], radius[rows], num_steps, keys[rows], loss_fn)
        return x.index_copy(0, rows, found)


def apgd_l1_targeted(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float | Tensor, norm: str = "l1",
                     num_steps: int = 100, num_targets: int = 9, keys: Tensor | None = None) -> Tensor:
    """`apgd_l1` on the targeted DLR loss towards min(num_targets, K - 1) classes, by descending clean logit.

    As `attacks.apgd.apgd_targeted`.
    """
    keys = check_batch(x, y, norm, NORMS, keys)
    check_at_least(0, num_steps=num_steps)
    check_at_least(1, num_targets=num_targets)
    radius, x = radii(epsilon, x), x.detach()
    with frozen(model) as bare:
        return towards_each_target(bare, x, y, num_targets, lambda rows, target, rank: _within(
            bare, x[rows], y[rows], target, radius[rows], num_steps, example_keys(keys[rows], rank),
            targeted_dlr_loss))


@dataclass
class _Walk(Standing):
    """The examples still attacked, one row each."""
    x: Tensor          # [B, ...] clean image
    y: Tensor          # [B]
    target: Tensor     # [B] what the loss takes beside the logits and y; y itself for an untargeted loss
    radius: Tensor     # [B, 1, ...]
    x_adv: Tensor      # x_k
    gradient: Tensor   # at x_k
    x_best: Tensor     # the iterate of largest loss ...
    best_gradient: Tensor
    best_loss: Tensor  # [B], inf once it is misclassified
    eta: Tensor        # [B, 1, ...] step size
    k_max: Tensor      # [B] pixels that a step changes
    changed: Tensor    # [B] pixels changed in the best point at the last check


def _within(model: nn.Module, x: Tensor, y: Tensor, target: Tensor, radius: Tensor, num_steps: int,
            keys: Tensor, loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """The three balls, from the largest on, around correctly classified images."""
    start = keyed_normal(keys, x.shape[1:]).to(x.dtype)
    for number, (factor, share) in enumerate(LARGER):
        first = x + project_l1_box(start, x, factor * radius)
        k_max = radius.new_full(x.shape[:1], SPARSITY * x[0].numel())
        if number:
            k_max = _changed(first, x) / SPARSER
        best = _ascend(model, x, y, target, factor * radius, round(share * num_steps), first, k_max, loss_fn)
        start = best - x
    return best


def _ascend(model: nn.Module, x: Tensor, y: Tensor, target: Tensor, radius: Tensor, num_steps: int,
            first: Tensor, k_max: Tensor, loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Algorithm 1 from `first` within one ball."""
    loss, gradient = evaluate(model, first, y, target, loss_fn)
    rows = torch.arange(len(x), device=x.device)
    walk = _Walk(rows, x, y, target, radius, first, gradient, first, gradient, loss, radius, k_max,
                 k_max * SPARSER)
    result, period = first.clone(), max(1, round(CHECK_SHARE * num_steps))
    for k in range(num_steps):
        if k % COMPACT_EVERY == 0 and not walk.keep(~walk.best_loss.isposinf(), (result, walk.x_best)):
            return result
        _step(model, walk, loss_fn)
        if (k + 1) % period == 0:
            _check(walk)
    result[walk.row] = walk.x_best
    return result


def _step(model: nn.Module, walk: _Walk, loss_fn) -> None:
    """One step of every example, and the record of its best point."""
    step = walk.x_adv + walk.eta * _sparse_sign(walk.gradient, walk.k_max) - walk.x
    walk.x_adv = walk.x + project_l1_box(step, walk.x, walk.radius)
    loss, walk.gradient = evaluate(model, walk.x_adv, walk.y, walk.target, loss_fn)
    better = loss > walk.best_loss
    walk.x_best = choose(better, walk.x_adv, walk.x_best)
    walk.best_gradient = choose(better, walk.gradient, walk.best_gradient)
    walk.best_loss = loss.where(better, walk.best_loss)


def _check(walk: _Walk) -> None:
    """Set the sparsity by the best point; go back there if it has become sparser, else shorten the step."""
    changed = _changed(walk.x_best, walk.x)
    sparser = changed < PROGRESS * walk.changed
    shorter = torch.maximum(walk.eta / FALL, SMALLEST_STEP * walk.radius)
    walk.eta = walk.radius.where(per_example(sparser, walk.x), shorter)
    walk.x_adv = choose(sparser, walk.x_best, walk.x_adv)
    walk.gradient = choose(sparser, walk.best_gradient, walk.gradient)
    walk.changed, walk.k_max = changed, changed / SPARSER


def _sparse_sign(gradient: Tensor, count: Tensor) -> Tensor:
    """The signs of the `count` [B] entries of largest magnitude, divided by their number."""
    magnitude = gradient.flatten(1).abs()
    place = count.long().clamp(1, magnitude.shape[1]) - 1
    least = magnitude.sort(dim=1, descending=True).values.gather(1, place[:, None])
    sign = gradient.flatten(1).sign() * (magnitude >= least)
    return (sign / sign.abs().sum(1, keepdim=True).clamp_min(1.0)).view_as(gradient)


def _changed(x_adv: Tensor, x: Tensor) -> Tensor:
    """||x_adv - x||_0, [B]."""
    return (x_adv != x).flatten(1).sum(1).to(x.dtype)
