"""The Square attack: random search with square windows, on scores alone (Andriushchenko et al., "Square
Attack: a query-efficient black-box adversarial attack via random search", ECCV 2020, Alg. 1 to 3).

Every proposal changes one window of the best point so far, and is kept if it lowers the margin z_y - max_{k
!= y} z_k. The window covers a share p of the image, which halves on a fixed schedule. Every random number of
an image comes from its key.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.checks import check_at_least, check_batch, check_classes, check_pictures
from attacks.frozen import frozen
from attacks.geometry import TINY, choose, norm_of, per_example, radii
from attacks.noise import example_keys, keyed_uniform
from attacks.standing import Standing
from losses.margin import logit_margin, misclassified

# queries after which the share halves (Sec. 4.2 there), not rescaled
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
BLOCK = 50  # queries between two removals of the images that are fooled, and per draw of random numbers
L2_TILES = 5       # tiles along a side of the first l_2 point
NORMS = ("linf", "l2")


def square(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float | Tensor, norm: str = "linf",
           num_queries: int = 5000, p_init: float = 0.8, keys: Tensor | None = None) -> Tensor:
    """Lower the margin over the epsilon ball around x within [0, 1], from logits alone.

    x: [B, C, H, W] in [0, 1]; y: [B]; epsilon: a number, or one per example as a tensor [B]; num_queries:
    forward passes an image, the one at x not counted; p_init: the first share of the image that a window
    covers; keys: [B] int64 from `attacks.noise.example_keys`, which alone determine what is proposed for an
    image (its position without them).

    Returns x_adv, shaped as x: x itself where x is misclassified, else the first misclassified point, else
    the point of lowest margin. The model is in eval mode during the attack and as before after it. Raises
    ValueError for images outside [0, 1], a negative epsilon or num_queries, p_init outside (0, 1], and an
    unknown norm.
    """
    keys = check_batch(x, y, norm, NORMS, keys)
    check_pictures(x)
    radius = radii(epsilon, x)
    x = x.detach()
    check_at_least(0, num_queries=num_queries)
    if not 0.0 < p_init <= 1.0:
        raise ValueError(f"p_init is a share in (0, 1], not {p_init}")
    propose = _propose_linf if norm == "linf" else _propose_l2
    with frozen(model) as bare, torch.no_grad():
        result = x.clone()
        rows = torch.arange(len(x), device=x.device)
        logits = bare(x)
        check_classes(y, logits)
        search = _Search(rows, x, y, keys, radius, x, logit_margin(logits, y), misclassified(logits, y))
        for query in range(num_queries):
            if query % BLOCK == 0:
                if not search.keep(~search.fooled, (result, search.x_adv)):
                    return result
                draws = keyed_uniform(example_keys(search.keys, query // BLOCK + 1), (BLOCK, 5 + x.shape[1]))
            if query == 0:
                point = (_stripes if norm == "linf" else _tiles)(search.x, search.radius, search.keys)
                search.accept(point, bare(point), always=True)
            else:
                point = propose(search, draws[:, query % BLOCK], share_of_window(p_init, query))
                search.accept(point, bare(point))
        result[search.row] = search.x_adv
        return result


def share_of_window(p_init: float, query: int) -> float:
    """The share p of the image that this query's window covers: p_init, halved at each of HALVINGS."""
    return p_init / 2 ** sum(query > halving for halving in HALVINGS)


@dataclass
class _Search(Standing):
    """The images still searched, one row each."""
    x: Tensor       # [B, C, H, W] clean image
    y: Tensor       # [B]
    keys: Tensor    # [B]
    radius: Tensor  # [B, 1, 1, 1]
    x_adv: Tensor   # best point
    margin: Tensor  # [B] z_y - max_{k != y} z_k there
    fooled: Tensor  # [B] whether it is misclassified

    def accept(self, point: Tensor, logits: Tensor, always: bool = False) -> None:
        """Go on from `point` where its margin is lower, or always, as from the first one, a corner."""
        margin = logit_margin(logits, self.y)
        fooled = misclassified(logits, self.y)
        better = ((margin < self.margin) | fooled) & ~self.fooled | always
        self.x_adv = choose(better, point, self.x_adv)
        self.margin = margin.where(better, self.margin)
        self.fooled = fooled.where(better, self.fooled)


def _stripes(x: Tensor, radius: Tensor, keys: Tensor) -> Tensor:
    """The first l_inf point: vertical stripes of x +- epsilon, one sign a column and channel."""
    sign = _signs(keyed_uniform(keys, (x.shape[1], 1, x.shape[3])).to(x.dtype))
    return (x + radius * sign).clamp_(0.0, 1.0)


def _propose_linf(search: _Search, draws: Tensor, share: float) -> Tensor:
    """x +- epsilon in one window, one sign a channel; the other signs where these would change nothing."""
    channels, height, width = search.x.shape[1:]
    side = min(max(round(math.sqrt(share * height * width)), 1), height, width)
    top, left = _corner(draws[:, :2], side, height, width)
    pixels = _pixels(top, left, side, width)[:, None].expand(-1, channels, -1)
    x = search.x.flatten(2).gather(2, pixels)  # [B, C, side * side]
    x_adv = search.x_adv.flatten(2).gather(2, pixels)
    step = search.radius.flatten(2) * _signs(draws[:, 5:5 + channels]).to(x.dtype)[:, :, None]
    point = (x + step).clamp_(0.0, 1.0)
    still = (point == x_adv).flatten(1).all(1)
    point = choose(still, (x - step).clamp_(0.0, 1.0), point)
    return search.x_adv.flatten(2).scatter(2, pixels, point).view_as(search.x)


def _tiles(x: Tensor, radius: Tensor, keys: Tensor) -> Tensor:
    """The first l_2 point: a grid of `_pattern` tiles with a random sign each and channel, norm epsilon."""
    channels, height, width = x.shape[1:]
    side = max(min(height, width) // L2_TILES, 1)
    rows, columns = -(-height // side), -(-width // side)
    sign = _signs(keyed_uniform(keys, (channels, rows, columns)).to(x.dtype))
    sign = sign.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :height, :width]
    delta = sign * _pattern(side, x).repeat(rows, columns)[:height, :width]
    return _onto_sphere(delta, x, radius)


def _propose_l2(search: _Search, draws: Tensor, share: float) -> Tensor:
    """Move the budget of one window, and what is unused, into another along a random pattern (Alg. 3)."""
    channels, height, width = search.x.shape[1:]
    side = min(max(round(math.sqrt(share * height * width)), 3), height, width)
    delta = search.x_adv - search.x
    to = _window(draws[:, :2], side, height, width)
    source = _window(draws[:, 2:4], side, height, width)
    pattern = _placed_pattern(draws[:, :2], draws[:, 4] < 0.5, side, search.x)
    sign = _per_channel(_signs(draws[:, 5:5 + channels]).to(delta.dtype))
    unused = (search.radius.square() - per_example(norm_of(delta, "l2"), delta).square()).clamp_min_(0.0)
    local = delta * to
    new = sign * pattern * to + local / _channel_norm(local).clamp_min(TINY)
    budget = (_channel_norm(delta * (to | source)).square() + unused / channels).sqrt()
    new = new / _channel_norm(new).clamp_min(TINY) * budget
    moved = torch.where(to, new, delta.masked_fill(source, 0.0))
    return _onto_sphere(moved, search.x, search.radius)


def _onto_sphere(delta: Tensor, x: Tensor, radius: Tensor) -> Tensor:
    return (x + delta * (radius / per_example(norm_of(delta, "l2"), x).clamp_min(TINY))).clamp_(0.0, 1.0)


def _corner(place: Tensor, side: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """First row and column [B] of a square of `side` pixels.

    place [B, 2], uniform in [0, 1), makes every position of the square in the image equally likely, the last
    row and column included.
    """
    top, left = place.unbind(1)
    return (top * (height - side + 1)).long(), (left * (width - side + 1)).long()


def _pixels(top: Tensor, left: Tensor, side: int, width: int) -> Tensor:
    """The pixels, numbered row by row, of the square of `side` at (top, left) [B].  [B, side * side]"""
    within = torch.arange(side, device=top.device)
    corner = (top * width + left)[:, None, None]
    return (corner + within[:, None] * width + within).flatten(1)


def _offsets(place: Tensor, side: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Row [B, H, 1] and column [B, 1, W] of every pixel from the corner of a square at a place [B, 2]."""
    top, left = _corner(place, side, height, width)
    row, column = (torch.arange(n, device=place.device) for n in (height, width))
    return (row - top[:, None])[:, :, None], (column - left[:, None])[:, None, :]


def _window(place: Tensor, side: int, height: int, width: int) -> Tensor:
    """Which pixels lie in the square of `side` pixels at a place [B, 2].  [B, 1, H, W] bool."""
    row, column = _offsets(place, side, height, width)
    return (((row >= 0) & (row < side)) & ((column >= 0) & (column < side)))[:, None]


def _placed_pattern(place: Tensor, turned: Tensor, side: int, x: Tensor) -> Tensor:
    """The pattern of unit norm at a place [B, 2], on its side where turned [B].  [B, 1, H, W]"""
    row, column = (offset.clamp(0, side - 1) for offset in _offsets(place, side, *x.shape[2:]))
    pattern = _pattern(side, x)
    return torch.where(turned[:, None, None], pattern[column, row], pattern[row, column])[:, None]


def _pattern(side: int, x: Tensor) -> Tensor:
    """Two bumps of opposite sign side by side, unit norm (Eq. 2 and 3 there).  [side, side]"""
    half = side // 2
    pattern = _bump(side, side, x)
    if half:
        pattern = torch.cat([_bump(half, side, x), -_bump(side - half, side, x)])
    return pattern / pattern.norm()


def _bump(height: int, width: int, x: Tensor) -> Tensor:
    """sum_{k=0}^{M(r,s)} (n + 1 - k)^-2, n = max(h, w) // 2, M(r,s) = n - max(|r - h // 2|, |s - w // 2|)."""
    reach = max(height, width) // 2
    numbers = torch.arange(reach + 1, 0, -1, dtype=torch.float32, device=x.device)
    sums = numbers.square().reciprocal().cumsum(0).to(x.dtype)
    row, column = (torch.arange(n, device=x.device) for n in (height, width))
    distance = torch.maximum((row - height // 2).abs()[:, None], (column - width // 2).abs()[None, :])
    return sums[reach - distance]


def _channel_norm(delta: Tensor) -> Tensor:
    return delta.flatten(2).norm(dim=2)[:, :, None, None]


def _signs(uniform: Tensor) -> Tensor:
    return torch.where(uniform < 0.5, -1.0, 1.0).to(uniform.dtype)


def _per_channel(values: Tensor) -> Tensor:
    return values[:, :, None, None]
