"""A walk along the decision boundary towards the image, on logits alone: it finds what no gradient shows.

From an adversary on, one random window after the other, as in the Square attack (Andriushchenko et al.,
"Square Attack: a query-efficient black-box adversarial attack via random search", ECCV 2020):

    l_inf      a misclassified point is projected onto a ball that is 0.5 % smaller; in any other the window
               becomes x +- radius, one sign a channel, which is kept where it lowers the margin
    l_2, l_1   the perturbation in the window is halved or removed, which is kept where the point stays
               misclassified, as in the boundary attack (Brendel et al., "Decision-Based Adversarial Attacks:
               Reliable Attacks Against Black-Box Machine Learning Models", ICLR 2018)

Every example has a radius of its own, and random numbers that depend on its key alone.
"""
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from attacks.checks import check_classes, check_keys, check_start
from attacks.frozen import frozen
from attacks.geometry import choose
from attacks.minimal import Closest, check_arguments
from attacks.noise import example_keys, keyed_uniform
from losses.margin import logit_margin, misclassified

SHRINK = 0.005  # what the radius loses at once: 200 queries to a third of it
# The share of the image that a window covers, at first and at last: an adversary needs no more than details.
SHARES = {"linf": (0.025, 0.0125), "l2": (0.3, 0.005), "l1": (0.3, 0.005)}
BLOCK = 50  # queries whose random numbers are drawn together


def walk(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, *, norm: str = "linf",
         num_queries: int = 1000, keys: Tensor | None = None) -> Tensor:
    """The closest adversary met on a walk of `num_queries` steps from `start`, one forward pass each.

    x, start: [B, C, H, W] in [0, 1], or [B, ...] as a signal in one channel; y: [B]; norm: "linf", "l2" or
    "l1"; keys: [B] int64 from `attacks.noise.example_keys` (those of the positions without them). Returns
    x_adv, shaped as x, without a graph, no farther than start. Where start is not misclassified the walk in
    l_inf looks for an adversary in all of the box, those in l_2 and l_1 return x, as each does where it finds
    none. The model is in eval mode during the attack and as before after it. Raises ValueError as
    `check_arguments` does, and for a start or keys that do not fit.
    """
    check_arguments(x, y, norm, num_queries)
    check_start(start, x)
    keys, x, start = check_keys(keys, x), x.detach(), start.detach()
    result = x.clone()
    with frozen(model) as bare, torch.no_grad():
        logits = bare(start)
        check_classes(y, logits)
        rows = (misclassified(logits, y) | (norm == "linf")).nonzero().squeeze(1)
        if len(rows):
            way = _Shrinking if norm == "linf" else _Restoring
            found = way(bare, x[rows], y[rows], start[rows], logits[rows], norm)
            for query in range(num_queries):
                if query % BLOCK == 0:
                    stream = example_keys(keys[rows], query // BLOCK)
                    draws = keyed_uniform(stream, (BLOCK, 3 + found.clean.shape[1])).to(x.dtype)
                first, last = SHARES[norm]
                found.step(draws[:, query % BLOCK], first * (last / first) ** (query / num_queries))
            result[rows] = found.closest.x_adv
    return result


class _Restoring:
    """A walk in l_2 or l_1: less and less of the perturbation is left."""

    def __init__(self, bare: nn.Module, x: Tensor, y: Tensor, start: Tensor, logits: Tensor, norm: str):
        self.bare, self.y = bare, y
        self.wrong = misclassified(logits, y)
        self.closest = Closest(x, norm)
        self.closest.offer(start, self.wrong)
        self.x_adv = start
        self.sizes = x.shape[-2:] if x.ndim == 4 else (1, x[0].numel())
        self.clean = x.flatten(2) if x.ndim == 4 else x.flatten(1)[:, None]  # [B, C, H * W]

    def step(self, draws: Tensor, share: float) -> None:
        """Keep half of the perturbation in a window, or nothing."""
        kept = torch.where(draws[:, 2] < 0.5, 0.0, 0.5).to(draws.dtype)[:, None, None]
        point = self.put(self.window(draws, share), lambda clean, now: clean + kept * (now - clean))
        better = self.closest.offer(point, misclassified(self.bare(point), self.y))
        self.x_adv = choose(better, point, self.x_adv)

    def window(self, draws: Tensor, share: float) -> Tensor:
        """The pixels of a window, a square where the image is high enough.  [B, C, pixels]"""
        height, width = self.sizes
        rows = min(max(round(math.sqrt(share * height * width)), 1), height)
        columns = min(max(round(share * height * width / rows), 1), width)
        top, left = (draws[:, 0] * (height - rows + 1)).long(), (draws[:, 1] * (width - columns + 1)).long()
        down, right = (torch.arange(n, device=draws.device) for n in (rows, columns))
        pixels = (top * width + left)[:, None, None] + down[:, None] * width + right
        return pixels.flatten(1)[:, None].expand(-1, self.clean.shape[1], -1)

    def put(self, pixels: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """x_adv with change(clean, now) in the window."""
        now = self.x_adv.view_as(self.clean)
        values = change(self.clean.gather(2, pixels), now.gather(2, pixels))
        return now.scatter(2, pixels, values).view_as(self.x_adv)


class _Shrinking(_Restoring):
    """A walk in l_inf: the ball shrinks as soon as its point is misclassified."""

    def __init__(self, bare: nn.Module, x: Tensor, y: Tensor, start: Tensor, logits: Tensor, norm: str):
        super().__init__(bare, x, y, start, logits, norm)
        self.radius = self.closest.distance.clamp(max=1.0)[:, None, None]
        self.margin = logit_margin(logits, y)

    def step(self, draws: Tensor, share: float) -> None:
        """Shrink the ball around a misclassified point, change one window of any other."""
        self.radius = torch.where(self.wrong[:, None, None], self.radius * (1 - SHRINK), self.radius)
        delta = (self.x_adv.view_as(self.clean) - self.clean).clamp(-self.radius, self.radius)
        inner = (self.clean + delta).clamp_(0.0, 1.0).view_as(self.x_adv)
        side = torch.where(draws[:, 3:] < 0.5, -self.radius[:, :, 0], self.radius[:, :, 0])[:, :, None]
        window = self.put(self.window(draws, share), lambda clean, now: _corner(clean, now, side))
        point = choose(self.wrong, inner, window)
        logits = self.bare(point)
        margin, hit = logit_margin(logits, self.y), misclassified(logits, self.y)
        better = self.wrong | hit | (margin < self.margin)  # in a smaller ball any point is the best so far
        self.x_adv = choose(better, point, self.x_adv)
        self.margin = torch.where(better, margin, self.margin)
        self.wrong = hit
        self.closest.offer(point, hit)


def _corner(clean: Tensor, now: Tensor, side: Tensor) -> Tensor:
    """clean + side, or clean - side where that is what is there; in [0, 1]."""
    new, other = ((clean + sign * side).clamp_(0.0, 1.0) for sign in (1, -1))
    return choose((new == now).flatten(1).all(1), other, new)
