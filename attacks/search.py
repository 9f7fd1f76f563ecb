"""Searching for adversaries on a faster view of a network, where every verdict stays with the network itself.

The view computes the same function in a lower precision. What an attack finds on it is classified once more by the network; where that
leaves a doubt, the attack is run again on the network, from the same random numbers: an example then ends exactly as it would have
without the view. With m the network's margin z_y - max_{k != y} z_k and x' the point found, brought into the ball, an example is settled if
x' is misclassified, or else if

    m(x') >= NEAR * m(x) > 0   and   |m_view - m| <= NEAR * m(x) at x and at x'

that is, if x' is far from the boundary and the view is right about both points. A success that the view claims and the network denies
is never settled: it breaks one of the two. That an attack searches as well on the view as on the network does not follow: right values and
wrong gradients would not show. It is measured, attack by attack (`benchmarks/attacks.py --sides ours searched`).
"""
from collections.abc import Callable

from torch import Tensor, nn

from attacks.ball import inside, project, radii, wrong
from attacks.fab import gap_to_rival
from attacks.frozen import predict

NEAR = 0.2  # of the clean margin
ON_VIEW = ("apgd-ce", "apgd-t", "square")  # not FAB: in bfloat16 its walk along the boundary is another one, and finds less


def searched(attack: Callable[..., Tensor], model: nn.Module, x: Tensor, y: Tensor, *, view: nn.Module, epsilon: float | Tensor, norm: str,
             keys: Tensor) -> Tensor:
    """x_adv of attack(network, x, y, epsilon=, norm=, keys=) on `view`, of the same attack on `model` where that is not settled.

    Arguments and errors as those of the attack. Where `view` is `model`, the result is that of the attack alone, bit for bit.
    """
    x_adv = attack(view, x, y, epsilon=epsilon, norm=norm, keys=keys)
    radius = radii(epsilon, x).flatten()
    doubtful = (~settled(model, view, x_adv, x, y, radius, norm)).nonzero().squeeze(1)
    if len(doubtful):
        again = attack(model, x[doubtful], y[doubtful], epsilon=radius[doubtful], norm=norm, keys=keys[doubtful])
        x_adv = x_adv.index_copy(0, doubtful, again)
    return x_adv


def settled(model: nn.Module, view: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor, radius: Tensor, norm: str) -> Tensor:
    """Whether each example [B] is settled by x_adv as defined above; False for anything that is not finite.  radius: [B]."""
    wide = radii(radius, x)
    near = project(x_adv, x, wide, norm)
    clean, found = (-gap_to_rival(predict(model, point), y) for point in (x, near))
    off = [(-gap_to_rival(predict(view, point), y) - margin).abs() for point, margin in ((x, clean), (near, found))]
    far = (found >= NEAR * clean) & (clean > 0) & (off[0] <= NEAR * clean) & (off[1] <= NEAR * clean)
    return far | (wrong(predict(model, x_adv), y) & inside(x_adv, x, wide, norm))
