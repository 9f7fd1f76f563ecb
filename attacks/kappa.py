"""PGD that also counts kappa, how many of its iterates each example withstands (GAIRAT, Zhang et al., ICLR
2021)."""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from attacks.pgd import cross_entropy, pgd

KAPPAS = ("count", "first")


def pgd_kappa(model: nn.Module, x: Tensor, y: Tensor, target: object | None = None, *, kappa: str = "count",
              loss_fn: Callable[[Tensor, object], Tensor] = cross_entropy,
              **options: object) -> tuple[Tensor, Tensor]:
    """The result of `pgd`, with its arguments (`target` is y by default), and kappa [B] int64 in 0..num_steps.

    kappa  "count": at how many of the iterates x_0 .. x_{K-1}, each before its step, the prediction is y: the
           released code's kappa, in which an example that is lost and regained keeps counting; "first": the
           number of iterates before the first that is misclassified, as the paper words it.
    Counted on the logits that the attack computes anyway: no further forward pass, no wait for the device.
    """
    count = torch.zeros_like(y)
    standing = torch.ones_like(y, dtype=torch.bool)

    def count_correct(logits_adv: Tensor) -> None:
        nonlocal count, standing
        correct = logits_adv.argmax(dim=1) == y
        standing = standing & correct
        count = count + (correct if kappa == "count" else standing)

    x_adv = pgd(model, x, y if target is None else target, loss_fn=loss_fn, on_logits=count_correct,
                **options)
    return x_adv, count
