"""PGD that stops at an image's first misclassified iterate: it tells whether an image falls, not how far it
can be pushed."""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from attacks.checks import check_at_least, check_batch, check_classes
from attacks.frozen import frozen
from attacks.geometry import choose, projection, steepest
from attacks.pgd import NORMS, cross_entropy, first_iterate
from losses.margin import misclassified


def pgd_until_broken(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, step_size: float,
                     num_steps: int, loss_fn: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                     start: str = "uniform", norm: str = "linf", keys: Tensor | None = None,
                     batch_size: int | None = None) -> Tensor:
    """Each image's first misclassified iterate of `attacks.pgd.pgd`, its last one where there is none.

    x: [N, C, H, W] in [0, 1]; y: [N]; epsilon, step_size, num_steps >= 1, loss_fn(logits, y) -> [B], start
    (by name), norm and keys as in `pgd`. The random start x_0 does not count: it may lie outside [0, 1].

    At most batch_size images (all by default) are attacked at once. The forward pass of each step shows which
    of them are misclassified; those leave, and waiting images take their places, so that the batch stays full
    as long as any wait. The step size is constant, so images at different steps can share a batch, and
    batch_size changes no verdict but by the rounding of the forward pass. The model is in eval mode during
    the attack and as before after it.

    Raises ValueError for images outside [0, 1], labels or keys that do not fit, num_steps < 1, an unknown
    norm or start.
    """
    keys = check_batch(x, y, norm, NORMS, keys)
    check_at_least(1, num_steps=num_steps)
    x = x.detach()
    result = x.clone()
    waiting = torch.arange(len(x), device=x.device)
    row, step, x_adv = waiting[:0], waiting[:0], x[:0]
    changed = True
    with frozen(model) as bare, torch.enable_grad():
        while len(row) or len(waiting):
            new, waiting = waiting.tensor_split([(batch_size or len(x)) - len(row)])
            if len(new):
                row = torch.cat([row, new])
                step = torch.cat([step, torch.zeros_like(new)])
                x_adv = torch.cat([x_adv, first_iterate(x[new], epsilon, start, keys[new], norm).detach()])
            if changed:
                project = projection(x[row], epsilon, norm)
            x_adv.requires_grad_()
            logits = bare(x_adv)
            if changed:
                check_classes(y[row], logits)
            losses = loss_fn(logits, y[row])  # [B]
            gradient, = torch.autograd.grad(losses, x_adv, torch.ones_like(losses))
            x_adv = x_adv.detach()
            fallen = misclassified(logits.detach(), y[row]) & (step > 0)
            moved = project(torch.add(x_adv, steepest(gradient, norm), alpha=step_size))
            x_adv = choose(fallen, x_adv, moved)
            step = step + 1
            left = (~fallen & (step < num_steps)).nonzero().squeeze(1)  # the one wait for the device
            changed = len(left) < len(row)
            if changed:  # only then is there room for others
                result[row] = x_adv  # of those that stay it is not the last word
                row, step, x_adv = row[left], step[left], x_adv[left]
    return result
