"""Margin decomposition attacks MD and MDMT (Ma et al., "Imbalanced Gradients: A Subtle Cause of Overestimated
Adversarial Robustness").

The margin z_y - max_{k != y} z_k is a difference of two terms whose gradients may cancel, or differ in size
by orders of magnitude. The first stage follows one term alone, the second the whole margin:

    stage 1   ascend -z_y (first run) or z_o (second run), where step 0 ascends z_y, which leads away from
              the boundary and out of the flat region around x
    stage 2   ascend z_o - z_y, from step `change_step` on

with z_o = max_{k != y} z_k (MD) or the logit of one target class after the other (MDMT). Step k of a stage of
n has size epsilon * (1 + cos(pi * k / n)), n = num_steps - change_step, where k is step - 1 up to the change
and step - change_step - 1 after it.

Differs from the released code: the random start, which is tested like every iterate, is clamped to [0, 1]; an
example leaves once it is misclassified; MDMT takes the most probable other classes of any number of classes,
where the code numbers ten by their rank.
"""
import math

import torch
from torch import Tensor, nn

from attacks.checks import check_batch, check_classes
from attacks.frozen import frozen
from attacks.geometry import choose, projection, steepest
from attacks.noise import example_keys
from attacks.pgd import NORMS, first_iterate
from losses.margin import largest_other, logit_margin, misclassified, ranked_targets

RUNS = 2  # the first stage's terms, each from a start of its own


def md(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, norm: str = "linf", num_steps: int = 50,
       change_step: int = 20, keys: Tensor | None = None) -> Tensor:
    """The margin decomposition attack: two runs of num_steps steps.

    x: [B, C, H, W] in [0, 1]; y: [B]; keys: [B] int64 from `attacks.noise.example_keys`, those of the
    positions by default: an example's start depends on its key alone. Returns x_adv: misclassified where some
    iterate was, else the iterate of smallest margin. Raises ValueError for images outside [0, 1], labels or
    keys that do not fit, an unknown norm, and a change_step that is not in 0 .. num_steps - 1.
    """
    keys = _checked(x, y, keys, norm, num_steps, change_step)
    hunt = _Hunt(x.detach(), y)
    with frozen(model) as bare:
        for run in range(RUNS):
            _descend(bare, hunt, None, run, epsilon, norm, num_steps, change_step, example_keys(keys, run))
    return hunt.x_adv


def mdmt(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, norm: str = "linf", num_steps: int = 50,
         change_step: int = 20, num_targets: int = 9, keys: Tensor | None = None) -> Tensor:
    """Two runs towards each of min(num_targets, K - 1) other classes, by descending clean logit.

    Arguments, errors and result as in `md`; any misclassification counts.
    """
    keys = _checked(x, y, keys, norm, num_steps, change_step)
    hunt = _Hunt(x.detach(), y)
    with frozen(model) as bare:
        with torch.no_grad():
            logits = bare(hunt.x)
            check_classes(y, logits)
            targets = ranked_targets(logits, y, num_targets)  # [B, T]
        for number, target in enumerate(targets.unbind(1)):
            for run in range(RUNS):
                _descend(bare, hunt, target, run, epsilon, norm, num_steps, change_step,
                         example_keys(keys, number, run))
    return hunt.x_adv


class _Hunt:
    """The best point of each example so far, and which examples are still standing."""

    def __init__(self, x: Tensor, y: Tensor):
        self.x, self.y, self.x_adv = x, y, x.clone()
        self.margin = torch.full(y.shape, torch.inf, dtype=x.dtype, device=x.device)
        self.standing = torch.ones_like(y, dtype=torch.bool)

    def offer(self, rows: Tensor, x_adv: Tensor, logits: Tensor) -> Tensor:
        """Take the points x_adv of `rows`, which were standing, into account; returns which still do."""
        margin = logit_margin(logits, self.y[rows]).to(self.margin.dtype)
        wrong = misclassified(logits, self.y[rows])
        better = (margin < self.margin[rows]) | wrong
        self.x_adv[rows] = choose(better, x_adv, self.x_adv[rows])
        self.margin[rows] = margin.where(better, self.margin[rows])
        self.standing[rows] = ~wrong
        return ~wrong


def _descend(bare: nn.Module, hunt: _Hunt, target: Tensor | None, run: int, epsilon: float, norm: str,
             num_steps: int, change_step: int, keys: Tensor) -> None:
    """One run over both stages for the examples that stand, on the logit of `target` [B] if it is given."""
    rows = hunt.standing.nonzero().squeeze(1)
    x_adv = first_iterate(hunt.x, epsilon, "clipped", keys, norm)[rows]
    for step in range(num_steps + 1):
        if not len(rows):
            return
        with torch.enable_grad():
            x_adv.requires_grad_()
            logits = bare(x_adv)
            check_classes(hunt.y, logits)
            aim = None if target is None else target[rows]
            objective = _objective(logits, hunt.y[rows], aim, run, step, change_step)
            gradient, = torch.autograd.grad(objective.sum(), x_adv)
        x_adv = x_adv.detach()
        left = hunt.offer(rows, x_adv, logits.detach())
        if step < num_steps:
            left = left.nonzero().squeeze(1)  # the one wait for the device
            rows = rows[left]
            x_adv = x_adv[left]
            gradient = gradient[left]
            moved = x_adv + step_length(step, epsilon, num_steps, change_step) * steepest(gradient, norm)
            x_adv = projection(hunt.x[rows], epsilon, norm)(moved)


def _objective(logits: Tensor, y: Tensor, target: Tensor | None, run: int, step: int,
               change_step: int) -> Tensor:
    """What this step ascends, [B]; `target` [B] or None for the largest other logit."""
    if step >= change_step:
        return -logit_margin(logits, y, target)
    if run and step:
        return largest_other(logits, y) if target is None else logits.gather(1, target[:, None]).squeeze(1)
    true = logits.gather(1, y[:, None]).squeeze(1)
    return -true if step else true


def step_length(step: int, epsilon: float, num_steps: int, change_step: int) -> float:
    """epsilon * (1 + cos(pi * k / (num_steps - change_step))), k as at the top of this file."""
    k = step - 1 if step <= change_step else step - change_step - 1
    return epsilon * (1 + math.cos(math.pi * k / (num_steps - change_step)))


def _checked(x: Tensor, y: Tensor, keys: Tensor | None, norm: str, num_steps: int,
             change_step: int) -> Tensor:
    if not 0 <= change_step < num_steps:
        raise ValueError(f"change_step {change_step} is not in 0 .. {num_steps - 1}")
    return check_batch(x, y, norm, NORMS, keys)
