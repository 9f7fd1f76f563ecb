"""AutoAttack's standard ensemble (Croce & Hein, "Reliable Evaluation of Adversarial Robustness with an
Ensemble of Diverse Parameter-free Attacks", ICML 2020): APGD on the cross-entropy, APGD on the targeted DLR
loss, FAB-T, Square, each on what the ones before it left.

This is our own implementation, on the project's own attacks. Differs from the released code: an example
leaves an attack as soon as it is fooled; its random numbers depend on its key alone, not on its batch;
nothing counts before a plain forward pass has confirmed it. `attacks.reference` runs the released code.
"""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from attacks.apgd import apgd, apgd_targeted
from attacks.checks import check_batch, check_classes
from attacks.fab import fab_targeted
from attacks.frozen import predict
from attacks.geometry import inside, radii
from attacks.noise import example_keys
from attacks.square import square
from losses.margin import misclassified

Member = tuple[str, Callable[..., Tensor]]  # name, attack(model, x, y, *, epsilon, norm, keys) -> x_adv
STANDARD: tuple[Member, ...] = (("apgd-ce", apgd), ("apgd-t", apgd_targeted), ("fab-t", fab_targeted),
                                ("square", square))
NORMS = ("linf", "l2")  # those of every member
# In place of the member that broke an example:
STANDING = -1       # none did
MISCLASSIFIED = -2  # it is misclassified without a perturbation


def autoattack(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float | Tensor, norm: str = "linf",
               keys: Tensor | None = None, batch_size: int = 250) -> Tensor:
    """x_adv of the standard ensemble: misclassified within epsilon where any member succeeded, else x itself.

    Arguments as in `attacks.apgd.apgd`; norm: "linf" or "l2"; batch_size: images at a time, which changes no
    verdict but by the rounding of the forward pass. Errors as there.
    """
    return run_ensemble(model, x, y, STANDARD, epsilon=epsilon, norm=norm, keys=keys,
                        batch_size=batch_size)[0]


def run_ensemble(model: nn.Module, x: Tensor, y: Tensor, members: Sequence[Member], *,
                 epsilon: float | Tensor, norm: str = "linf", keys: Tensor | None = None,
                 batch_size: int = 250) -> tuple[Tensor, Tensor]:
    """Run the members in turn, each on the examples that are still classified correctly.

    Returns x_adv, and broken_by [B] int64: the number of the member that broke the example, STANDING or
    MISCLASSIFIED. A success counts once `confirmed`; whatever else a member returns is dropped.
    """
    keys = check_batch(x, y, norm, NORMS, keys)
    radius = radii(epsilon, x).flatten()
    x_adv = x.detach().clone()
    broken_by = torch.full_like(y, STANDING)
    for rows in torch.arange(len(x), device=x.device).split(batch_size):
        logits = predict(model, x[rows])
        check_classes(y[rows], logits)
        broken_by[rows[misclassified(logits, y[rows])]] = MISCLASSIFIED
    for number, (_, attack) in enumerate(members):
        for rows in (broken_by == STANDING).nonzero().squeeze(1).split(batch_size):
            if not len(rows):
                break
            task = {"epsilon": radius[rows], "norm": norm}
            found = attack(model, x[rows], y[rows], keys=example_keys(keys[rows], number), **task)
            broken = confirmed(model, found, x[rows], y[rows], **task)
            x_adv[rows[broken]] = found[broken]
            broken_by[rows[broken]] = number
    return x_adv, broken_by


def confirmed(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor, *, epsilon: float | Tensor,
              norm: str = "linf") -> Tensor:
    """Whether a float32 pass misclassifies each x_adv, and it lies in its ball and in [0, 1]: [B] bool."""
    with torch.autocast(x.device.type, enabled=False):
        logits = predict(model, x_adv)
    return misclassified(logits, y) & inside(x_adv, x, radii(epsilon, x), norm)
