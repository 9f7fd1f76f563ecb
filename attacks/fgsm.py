"""The fast gradient sign method (Goodfellow et al., "Explaining and Harnessing Adversarial Examples", ICLR
2015)."""
from collections.abc import Callable

from torch import Tensor, nn

from attacks.pgd import cross_entropy, pgd


def fgsm(model: nn.Module, x: Tensor, target: object, *, epsilon: float,
         loss_fn: Callable[[Tensor, object], Tensor] = cross_entropy, mode: str | None = "eval") -> Tensor:
    """x + epsilon * sign(grad_x loss(f(x), target)), clipped to [0, 1]: one PGD step of size epsilon from x.

    Arguments and errors as in `attacks.pgd.pgd`. Returns x_adv, shaped as x, without a graph.
    """
    return pgd(model, x, target, epsilon=epsilon, step_size=epsilon, num_steps=1, loss_fn=loss_fn,
               start="clean", mode=mode)
