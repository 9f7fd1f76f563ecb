"""PGD that is done with an image at its first misclassified iterate: it says whether an image falls, not how far it can be pushed."""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from attacks.ball import check_batch, wrong
from attacks.frozen import frozen
from attacks.pgd import NORMS, cross_entropy, first_iterate


def pgd_until_broken(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, step_size: float, num_steps: int,
                     loss_fn: Callable[[Tensor, Tensor], Tensor] = cross_entropy, start: str = "uniform", norm: str = "linf",
                     keys: Tensor | None = None, batch_size: int | None = None) -> Tensor:
    """The iterates of `attacks.pgd.pgd`, per image up to the first misclassified one, which is returned; else the last, as there.

    x: [N, C, H, W] in [0, 1]; y: [N]; epsilon, step_size, num_steps >= 1, loss_fn(logits, y) -> [B], start (by name), norm and keys as in
    `pgd`, whose random start x_0 does not count, as it may lie outside [0, 1]. At most batch_size images (all by default) are attacked at
    once: the forward pass of each step shows which are misclassified, these leave before the next one, and images that wait take their
    places, so that the batch stays full as long as any wait. The step size being constant, images at different steps can share a batch,
    and batch_size changes no verdict but by the rounding of the forward pass. Model in eval mode, then as before.

    Raises ValueError for images outside [0, 1], labels or keys that do not fit, num_steps < 1, an unknown norm or start.
    """
    keys, x = check_batch(x, y, norm, tuple(NORMS), keys), x.detach()
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, not {num_steps}")
    direction, projection, _ = NORMS[norm]
    result, waiting = x.clone(), torch.arange(len(x), device=x.device)
    row, step, x_adv, changed = waiting[:0], waiting[:0], x[:0], True
    with frozen(model) as bare, torch.enable_grad():
        while len(row) or len(waiting):
            new, waiting = waiting.tensor_split([(batch_size or len(x)) - len(row)])
            if len(new):
                row, step = torch.cat([row, new]), torch.cat([step, torch.zeros_like(new)])
                x_adv = torch.cat([x_adv, first_iterate(x[new], epsilon, start, keys[new], norm).detach()])
            if changed:
                project = projection(x[row], epsilon)
            x_adv.requires_grad_()
            logits = bare(x_adv)
            losses = loss_fn(logits, y[row])  # [B]
            gradient, = torch.autograd.grad(losses, x_adv, torch.ones_like(losses))
            x_adv, fallen = x_adv.detach(), wrong(logits.detach(), y[row]) & (step > 0)
            moved = project(torch.add(x_adv, direction(gradient), alpha=step_size))
            x_adv, step = x_adv.where(fallen.view(-1, *[1] * (x.ndim - 1)), moved), step + 1
            done = fallen | (step == num_steps)
            if changed := bool(done.any()):  # only then is there room for others
                result[row[done]] = x_adv[done]
                row, step, x_adv = row[~done], step[~done], x_adv[~done]
    return result
