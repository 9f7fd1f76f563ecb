"""AutoAttack's standard ensemble (Croce & Hein, "Reliable Evaluation of Adversarial Robustness with an
Ensemble of Diverse Parameter-free Attacks", ICML 2020): APGD on the cross-entropy, APGD on the targeted DLR
loss, FAB-T, Square, each on what the ones before it left.

In l_1: APGD of "Mind the box" (ICML 2021) on both losses, and FAB with ALMA and PDPGD from its end.
This is our own implementation, on the project's own attacks. Differs from the released code: an example
leaves an attack as soon as it is fooled; its random numbers depend on its key alone, not on its batch;
nothing counts before a plain forward pass has confirmed it. `attacks.reference` runs the released code.
"""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from attacks.alma import alma
from attacks.apgd import apgd, apgd_targeted
from attacks.apgd_l1 import apgd_l1, apgd_l1_targeted
from attacks.checks import check_batch, check_classes
from attacks.fab import fab_targeted
from attacks.frozen import predict
from attacks.geometry import choose, inside, radii
from attacks.noise import example_keys
from attacks.pdpgd import pdpgd
from attacks.square import square
from losses.margin import misclassified


def descents(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: Tensor, norm: str, keys: Tensor) -> Tensor:
    """FAB, and from its end ALMA and PDPGD: in l_1 FAB alone ends far from the boundary's nearest point."""
    x_adv = fab_targeted(model, x, y, norm=norm, num_steps=30, epsilon=epsilon, keys=keys)
    for attack in (alma, pdpgd):
        x_adv = attack(model, x, y, norm=norm, num_steps=300, start=x_adv)
    return x_adv


Member = tuple[str, Callable[..., Tensor]]  # name, attack(model, x, y, *, epsilon, norm, keys) -> x_adv
STANDARD: tuple[Member, ...] = (("apgd-ce", apgd), ("apgd-t", apgd_targeted), ("fab-t", fab_targeted),
                                ("square", square))
# Auto-PGD in l_1 finds what descents do not where gradients are good, and little where they mislead.
IN_L1: tuple[Member, ...] = (("apgd-ce", apgd_l1), ("descents", descents), ("apgd-t", apgd_l1_targeted))
NORMS = ("linf", "l2", "l1")
# In place of the member that broke an example:
STANDING = -1       # none did
MISCLASSIFIED = -2  # it is misclassified without a perturbation


def autoattack(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float | Tensor, norm: str = "linf",
               keys: Tensor | None = None, batch_size: int = 250) -> Tensor:
    """x_adv of the standard ensemble: misclassified within epsilon where any member succeeded, else x itself.

    Arguments as in `attacks.apgd.apgd`; norm: "linf", "l2" or "l1"; batch_size: images at a time, which
    changes no verdict but by the rounding of the forward pass. Errors as there.
    """
    members = IN_L1 if norm == "l1" else STANDARD
    return run_ensemble(model, x, y, members, epsilon=epsilon, norm=norm, keys=keys, batch_size=batch_size)[0]


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
        broken_by[rows] = torch.where(misclassified(logits, y[rows]), MISCLASSIFIED, STANDING)
    for number, (_, attack) in enumerate(members):
        for rows in (broken_by == STANDING).nonzero().squeeze(1).split(batch_size):
            if not len(rows):
                break
            task = {"epsilon": radius[rows], "norm": norm}
            found = attack(model, x[rows], y[rows], keys=example_keys(keys[rows], number), **task)
            broken = confirmed(model, found, x[rows], y[rows], **task)
            x_adv[rows] = choose(broken, found, x_adv[rows])
            broken_by[rows] = torch.where(broken, number, broken_by[rows])
    return x_adv, broken_by


def confirmed(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor, *, epsilon: float | Tensor,
              norm: str = "linf") -> Tensor:
    """Whether a float32 pass misclassifies each x_adv, and it lies in its ball and in [0, 1]: [B] bool."""
    with torch.autocast(x.device.type, enabled=False):
        logits = predict(model, x_adv)
    return misclassified(logits, y) & inside(x_adv, x, radii(epsilon, x), norm)
