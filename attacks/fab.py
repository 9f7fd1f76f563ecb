"""FAB, the fast adaptive boundary attack, in its targeted form (Croce & Hein, "Minimally distorted
adversarial examples with a fast adaptive boundary attack", ICML 2020, Alg. 1; targeted as in AutoAttack, ICML
2020).

The boundary towards class t is linearised at x_k: w = grad(z_t - z_y), c = (z_t - z_y)(x_k). With P the
projection onto that hyperplane within the box [0, 1],

    alpha   = min( |P(x_k) - x_k| / (|P(x_k) - x_k| + |P(x) - x|), 0.1 )
    x_{k+1} = clip( (1 - alpha) (x_k + 1.05 (P(x_k) - x_k)) + alpha (x + 1.05 (P(x) - x)) )

and a misclassified x_{k+1} is drawn back towards x by a tenth. No random numbers: the first iterate is x.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.checks import check_at_least, check_batch, check_classes
from attacks.frozen import frozen, predict
from attacks.geometry import NORMS, TINY, choose, norm_of, per_example, radii
from attacks.polish import duration, greedily
from attacks.standing import Standing
from losses.margin import logit_margin, misclassified, ranked_targets

ALPHA_MAX = 0.1         # largest pull towards the hyperplane's point nearest to x
OVERSHOOT = 1.05        # eta: how far beyond the hyperplane a step goes
BACKWARD = 0.9          # beta: what is left of the perturbation after a misclassified iterate
SEARCH_STEPS = 3        # of the final search on the segment to x
SHORT = 0.99            # share of the way to the crossing that a step goes: on it, rounding would decide
COMPACT_EVERY = 5       # steps between two removals of the examples that are done
NEWTON_ON = ("cpu",)     # where Newton's method takes a small part of a sort's time; elsewhere each of its
                        # looks at whether it is at the root would be a wait for the device


def fab_targeted(model: nn.Module, x: Tensor, y: Tensor, *, norm: str = "linf", num_steps: int = 100,
                 num_targets: int = 9, epsilon: float | Tensor | None = None,
                 keys: Tensor | None = None) -> Tensor:
    """The closest misclassified point found towards min(num_targets, K - 1) classes, those of largest logit.

    x: [B, ...] in [0, 1]; y: [B]; norm: "linf", "l2" or "l1". With `epsilon`, a number or one per example
    [B], an example is done with at its first misclassified point within epsilon. `keys` are accepted as by
    every attack of an ensemble; nothing here is random.

    Returns x_adv, shaped as x, in [0, 1], without a graph: x itself where x is misclassified, and where
    nothing was found. A point found farther than epsilon is returned too: it is an upper bound on the
    distance. The model is in eval mode and as before afterwards. Raises ValueError for images outside [0, 1],
    a negative epsilon or num_steps, and an unknown norm.
    """
    check_batch(x, y, norm, NORMS, keys)
    check_at_least(0, num_steps=num_steps)
    check_at_least(1, num_targets=num_targets)
    x = x.detach()
    enough = torch.full(x.shape[:1], -1.0, dtype=x.dtype, device=x.device)  # -1: never
    if epsilon is not None:
        enough = radii(epsilon, x).flatten()
    with frozen(model) as bare:
        logits = predict(bare, x)
        check_classes(y, logits)
        margin = logit_margin(logits, y)
        standing = ~misclassified(logits, y)
        targets = ranked_targets(logits, y, num_targets)
        x_adv = x.clone()
        distance = torch.zeros_like(enough).masked_fill_(standing, torch.inf)
        for rank in range(targets.shape[1]):
            rows = (standing & (distance > enough)).nonzero().squeeze(1)
            if not len(rows):
                break
            found, reached = _walk_to(bare, x[rows], y[rows], targets[rows, rank], enough[rows], norm,
                                      num_steps)
            found, reached = _search(bare, x[rows], y[rows], found, reached, margin[rows], norm)
            nearer = reached < distance[rows]
            x_adv[rows] = choose(nearer, found, x_adv[rows])
            distance[rows] = reached.where(nearer, distance[rows])
        return x_adv


def project_box(x: Tensor, w: Tensor, c: Tensor, norm: str) -> Tensor:
    """The nearest point to x in [0, 1] on the hyperplane {x + d: <w, d> + c = 0}, batched.

    x, w: [B, D] with x in [0, 1]; c: [B]; returns [B, D]. Where the hyperplane misses the box: the box's
    point nearest to it in which every coordinate with w_i != 0 lies on its bound. Towards the hyperplane
    coordinate i has room m_i and contributes |w_i| per unit; the optimum moves it by min(m_i, lambda) in
    l_inf and min(m_i, lambda |w_i|) in l_2, and in l_1 fills the rooms by descending |w_i|.
    """
    sign = -torch.sign(c)[:, None] * w.sign()
    room = (sign.clamp_min(0.0) - x).abs_() * sign.abs()  # the way to 1 or to 0
    rate = w.abs()
    step = greedily(rate, room, c.abs()) if norm == "l1" else _fill_evenly(room, rate, c.abs(), norm)
    return (x + sign * step).clamp_(0.0, 1.0)


def _fill_evenly(room: Tensor, rate: Tensor, amount: Tensor, norm: str) -> Tensor:
    """min(room, lambda * g), g = 1 ("linf") or rate ("l2"), where sum(rate * min(room, lambda * g)) = amount.

    An amount beyond reach leads to lambda = inf, hence to room.
    """
    if room.device.type in NEWTON_ON:
        level = _by_newton(room, rate, amount, norm)
    else:
        level = duration(rate, torch.ones_like(rate) if norm == "linf" else rate, room, amount)
    level = level[:, None].clamp_max(torch.finfo(room.dtype).max)
    return torch.minimum(room, level if norm == "linf" else level * rate)


def _by_newton(room: Tensor, rate: Tensor, amount: Tensor, norm: str) -> Tensor:
    """The lambda of `_fill_evenly`, [B].

    The sum is concave and piecewise linear in lambda, so Newton's method from 0 approaches the root from
    below, and is there as soon as no further coordinate fills its room.
    """
    slope = rate if norm == "linf" else rate.square()
    knee = room if norm == "linf" else room / rate.clamp_min(TINY)
    gain, scale = rate * room, slope.sum(1)
    level = torch.zeros_like(amount)
    count = torch.full_like(amount, -1.0)
    full = torch.empty_like(knee)  # 0 or 1: arithmetic on a bool would cast it anew each time
    open_ = torch.empty_like(knee)
    while True:
        filled = torch.le(knee, level[:, None], out=full).sum(1)
        if torch.equal(filled, count):
            return level
        count = filled
        rest = torch.gt(knee, level[:, None], out=open_).mul_(slope).sum(1)
        missing = (amount - full.mul_(gain).sum(1)).clamp_min_(0.0)
        level = torch.maximum(level, torch.where(rest > TINY * scale, missing / rest, torch.inf))


@dataclass
class _Walk(Standing):
    """The examples still walking, one row each."""
    x: Tensor         # [B, C, H, W] clean image
    y: Tensor         # [B]
    target: Tensor    # [B] class
    enough: Tensor    # [B] distance at which an example is done
    x_adv: Tensor     # x_k
    found: Tensor     # nearest misclassified point so far
    distance: Tensor  # [B] its distance, infinite where there is none


def _walk_to(model, x: Tensor, y: Tensor, target: Tensor, enough: Tensor, norm: str,
             num_steps: int) -> tuple[Tensor, Tensor]:
    """The nearest misclassified point on a walk towards one class and its distance [B]; x, inf for none."""
    walk = _Walk(torch.arange(len(x), device=x.device), x, y, target, enough, x, x,
                 torch.full_like(enough, torch.inf))
    found, distance = x.clone(), walk.distance.clone()
    for k in range(num_steps):
        done = walk.distance <= walk.enough
        if k and k % COMPACT_EVERY == 0 and not walk.keep(~done, (found, walk.found),
                                                          (distance, walk.distance)):
            return found, distance
        _step(model, walk, norm)
    found[walk.row] = walk.found
    distance[walk.row] = walk.distance
    return found, distance


def _step(model, walk: _Walk, norm: str) -> None:
    x, x_k = walk.x.flatten(1), walk.x_adv.flatten(1)
    w, c = _linearise(model, walk.x_adv, walk.y, walk.target)
    w, at_x = w.flatten(1), c + (w.flatten(1) * (x - x_k)).sum(1)
    points = torch.cat([x_k, x])  # both projections at once
    d_k, d = (project_box(points, w.repeat(2, 1), torch.cat([c, at_x]), norm) - points).chunk(2)
    length_k, length = norm_of(d_k, norm), norm_of(d, norm)
    alpha = (length_k / (length_k + length).clamp_min(TINY)).clamp_max(ALPHA_MAX)[:, None]
    point = (1 - alpha) * (x_k + OVERSHOOT * d_k) + alpha * (x + OVERSHOOT * d)
    point = point.clamp_(0.0, 1.0).view_as(walk.x)
    hit = misclassified(predict(model, point), walk.y)
    reached = norm_of(point - walk.x, norm)
    nearer = hit & (reached < walk.distance) & ~(walk.distance <= walk.enough)
    walk.found = choose(nearer, point, walk.found)
    walk.distance = reached.where(nearer, walk.distance)
    walk.x_adv = choose(hit, torch.lerp(walk.x, point, BACKWARD), point)


def _search(model, x: Tensor, y: Tensor, found: Tensor, distance: Tensor, margin: Tensor,
            norm: str) -> tuple[Tensor, Tensor]:
    """Draw the points found nearer to x, whose margin is given, along the segment between the two.

    A few steps of the secant method on the margin, each a little short.
    """
    near, margin_near = x, margin
    margin_far = logit_margin(predict(model, found), y)
    for _ in range(SEARCH_STEPS):
        crossing = -margin_far / (margin_near - margin_far).clamp_min(TINY)
        share = SHORT * crossing.nan_to_num(0.0).clamp_(0.0, 1.0)
        point = torch.lerp(found, near, per_example(share, x))
        logits = predict(model, point)
        margin_point = logit_margin(logits, y)
        hit = distance.isfinite() & misclassified(logits, y)
        found = choose(hit, point, found)
        near = choose(hit, near, point)
        margin_far = margin_point.where(hit, margin_far)
        margin_near = margin_near.where(hit, margin_point)
    return found, norm_of(found - x, norm).where(distance.isfinite(), distance)


def _linearise(model, x_adv: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient w of z_t - z_y at x_adv, zero where it is not finite, and that difference c [B]."""
    with torch.enable_grad():
        point = x_adv.detach().requires_grad_()
        logits = model(point)
        difference = -logit_margin(logits, y, target)
        w, = torch.autograd.grad(difference.sum(), point)
    return w.nan_to_num(0.0, 0.0, 0.0), difference.detach()
