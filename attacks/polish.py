"""Bringing an adversary closer: the nearest point of the box behind the decision boundary as it is linear
around the adversary.

The step is the projection of FAB (Croce & Hein, "Minimally distorted Adversarial Examples with a Fast
Adaptive Boundary Attack", ICML 2020, Eq. 4-7), taken from the clean image and kept only while it stays
adversarial, so that no step makes anything worse.
"""
import torch
from torch import Tensor, nn

from attacks.checks import check_classes
from attacks.frozen import frozen
from attacks.geometry import choose, norm_of
from attacks.minimal import check_arguments, descend
from losses.margin import misclassified, ranked_targets

OVERSHOOT = 1e-4  # how far behind the boundary to aim, as a share of the linearised margin at the clean image
HALVINGS = 6       # trials on the way back to the adversary, each half as far as the one before
STALLED = 1e-4     # an example is left alone after a step that gains less than this share of the distance


def polish(model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, *, norm: str, num_steps: int = 20,
           mode: str | None = "eval") -> Tensor:
    """Move each misclassified `x_adv`, of class t, towards the nearest point of linearised z_y - z_t <= 0.

        delta = argmin { ||delta||_p : m(x_adv) + grad m . (x + delta - x_adv) <= 0, x + delta in [0, 1] }

    by `nearest_loss`, and then x_adv <- x_adv + s (x + delta - x_adv) with the first s = 1, 1/2, 1/4, ...
    that is misclassified. Between two points of a ball everything is inside it, so the distance never grows.
    For a network of ReLUs m is linear as long as no unit switches.

    x, x_adv: [B, C, H, W] in [0, 1]; y: [B]. At most num_steps gradients and 6 num_steps forward passes;
    examples that gain nothing more drop out. Returns the adversaries, those not misclassified as they were
    given. Raises ValueError as `check_arguments`.
    """
    check_arguments(x, y, norm, num_steps)
    x, result = x.detach(), x_adv.detach().clone()
    with frozen(model, mode) as bare:
        with torch.no_grad():
            logits = bare(result)
            check_classes(y, logits)
            active = misclassified(logits, y)
        for _ in range(num_steps):
            rows = active.nonzero().squeeze(1)  # the one wait for the device
            if not len(rows):
                break
            here, clean, label = result[rows], x[rows], y[rows]
            before = norm_of(here - clean, norm)
            moved = _line_search(bare, here, _behind_boundary(bare, clean, label, here, norm), label)
            after = norm_of(moved - clean, norm)
            result[rows] = choose(after < before, moved, here)
            active[rows] = after < before * (1 - STALLED)
    return result


def _behind_boundary(bare: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, norm: str) -> Tensor:
    """The nearest point to x that the linearisation at `x_adv` loses."""
    with torch.no_grad():
        target = ranked_targets(bare(x_adv), y, 1).squeeze(1)
    with torch.enable_grad():
        margin, _, gradient = descend(bare, x_adv, y, target)
    at_clean = margin + (gradient * (x - x_adv)).flatten(1).sum(dim=1)
    return x + nearest_loss(x, gradient, at_clean.clamp(min=0) * (1 + OVERSHOOT), norm)


@torch.no_grad()
def _line_search(bare: nn.Module, x_adv: Tensor, goal: Tensor, y: Tensor) -> Tensor:
    """The first of goal, (goal + x_adv) / 2, ... that is misclassified, x_adv where none of them is."""
    result, pending = x_adv, torch.ones_like(y, dtype=torch.bool)
    for number in range(HALVINGS):
        trial = (x_adv + 0.5**number * (goal - x_adv)).clamp_(0, 1)
        found = pending & misclassified(bare(trial), y)
        result, pending = choose(found, trial, result), pending & ~found
    return result


def nearest_loss(x: Tensor, gradient: Tensor, level: Tensor, norm: str) -> Tensor:
    """argmin { ||delta||_p : gradient . delta <= -level, x + delta in [0, 1] }, in closed form after a sort.

    Every pixel moves against its gradient. In l_inf and l_2 all move at a speed (1; |gradient|) until they
    meet the box; in l_1 those of largest |gradient| go all the way to the box, one after the other. Where the
    box is too small for the level, delta goes as far as it can.  x, gradient: [B, ...]; level: [B] >= 0 ->
    [B, ...].
    """
    weight = gradient.flatten(1).abs()  # [B, D]
    room = torch.where(gradient > 0, x, 1 - x).flatten(1)
    if norm == "l1":
        moved = greedily(weight, room, level)
    else:
        speed = torch.ones_like(weight) if norm == "linf" else weight
        moved = torch.minimum(speed * duration(weight, speed, room, level)[:, None], room)
    return -gradient.sign() * moved.view_as(x)


def greedily(weight: Tensor, room: Tensor, level: Tensor) -> Tensor:
    """How far each pixel goes, the most effective first, until sum weight * moved = level.  -> [B, D]."""
    ranked, order = weight.sort(dim=1, descending=True, stable=True)
    gain = ranked * room.gather(1, order)
    missing = level[:, None] - (gain.cumsum(dim=1) - gain)
    moved = torch.where(ranked > 0, (missing / ranked).clamp(min=0), torch.zeros_like(ranked))
    return torch.zeros_like(weight).scatter_(1, order, torch.minimum(moved, room.gather(1, order)))


def duration(weight: Tensor, speed: Tensor, room: Tensor, level: Tensor) -> Tensor:
    """The least s with sum weight * min(speed * s, room) >= level, inf where there is none.  -> [B]."""
    ends, order = torch.where(weight > 0, room / speed.clamp(min=1e-30),
                              torch.full_like(room, torch.inf)).sort(dim=1)
    slope = (weight * speed).gather(1, order)
    gain = (weight * room).gather(1, order)
    gained = gain.cumsum(dim=1) - gain  # by those that ended before this one
    running = slope.flip(1).cumsum(dim=1).flip(1)                            # of those that have not
    times = (level[:, None] - gained) / running.clamp(min=1e-30)
    times[:, 1:] = torch.maximum(times[:, 1:], ends[:, :-1])  # not before its stretch begins, by rounding
    reached = times <= ends  # from the stretch on in which the level is met
    first = times.gather(1, reached.int().argmax(dim=1, keepdim=True)).squeeze(1)
    return torch.where(reached.any(dim=1), first, torch.full_like(first, torch.inf))
