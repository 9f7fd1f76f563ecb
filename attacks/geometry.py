"""The l_inf, l_2 and l_1 balls around each image of a batch: norms, steepest directions, projections and
random points.

Images are [B, C, H, W] in [0, 1]; a radius is a number, or a tensor that broadcasts over the images, [B, 1,
1, 1].
"""
from collections.abc import Callable

import torch
from torch import Tensor

from attacks.checks import check_size
from attacks.noise import keyed_normal, keyed_uniform

NORMS = ("linf", "l2", "l1")
DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}
TINY = 1e-12      # where a length divides
SMALLEST = 1e-30  # the same for the length of a perturbation, which may itself be tiny


# ---- one value per example ---------------------------------------------------------------------------------

def per_example(values: Tensor, x: Tensor) -> Tensor:
    """values [B] shaped to broadcast over images x: [B, 1, 1, 1]."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def radii(epsilon: float | Tensor, x: Tensor) -> Tensor:
    """One radius per example, [B, 1, 1, 1], from a number or [B]; ValueError unless finite and >= 0."""
    size = check_size("epsilon", epsilon, x)
    radius = size.to(x) if isinstance(size, Tensor) else x.new_full((), size)
    return radius.expand(len(x), *[1] * (x.ndim - 1))


def choose(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The rows of `new` where mask [B], of `old` elsewhere; both [B, ...].

    On a CPU by copying rows, which takes a tenth of the time of asking for every pixel; elsewhere without
    waiting for the mask.
    """
    if old.device.type != "cpu":
        return new.where(per_example(mask, old), old)
    rows = mask.nonzero().squeeze(1)
    result = old.clone()
    result[rows] = new[rows]
    return result


# ---- norms and directions ----------------------------------------------------------------------------------

def norm_of(delta: Tensor, norm: str) -> Tensor:
    """The norm "linf", "l2" or "l1" of each row.  delta: [B, ...] -> [B]."""
    flat = delta.flatten(1)
    if norm == "linf":
        return flat.abs().amax(dim=1)
    return torch.linalg.vector_norm(flat, dim=1) if norm == "l2" else flat.abs().sum(dim=1)


def dual_norm_of(gradient: Tensor, norm: str) -> Tensor:
    """||gradient||_q, 1/p + 1/q = 1: the change of a linear function over a step of unit l_p norm, [B]."""
    return norm_of(gradient, DUAL[norm])


def steepest(gradient: Tensor, norm: str) -> Tensor:
    """Steepest ascent: sign(gradient) in "linf", gradient / ||gradient||_2 in "l2"; 0 for a zero gradient."""
    if norm == "linf":
        return gradient.sign()
    largest = per_example(norm_of(gradient, "linf"), gradient)
    scaled = gradient / torch.where(largest > 0, largest, 1.0)  # so that no square underflows
    return scaled / torch.where(largest > 0, per_example(norm_of(scaled, "l2"), gradient), 1.0)


# ---- projections -------------------------------------------------------------------------------------------

def projection(x: Tensor, radius: float | Tensor, norm: str) -> Callable[[Tensor], Tensor]:
    """The projection onto the ball of `radius` around x, then onto [0, 1]: a function that may work in place.

    For x in [0, 1] the second step takes no point farther from x, and in l_inf one clamp does both, with
    bounds computed here, once.
    """
    if norm == "linf":
        lower = (x - radius).clamp_(min=0.0)
        upper = (x + radius).clamp_(max=1.0)
        return lambda x_adv: x_adv.clamp_(lower, upper)
    return lambda x_adv: (x + project_ball(x_adv - x, radius, norm)).clamp_(0.0, 1.0)


def project_ball(delta: Tensor, radius: float | Tensor, norm: str) -> Tensor:
    """The point nearest to delta, in l_2, of the ball around 0; in l_1 radius is a tensor [B, 1, 1, 1]."""
    if norm == "linf":
        return torch.clamp(delta, -radius, radius)
    if norm == "l2":
        return delta * (radius / per_example(norm_of(delta, "l2"), delta).clamp_min(SMALLEST)).clamp_(max=1.0)
    return shrink(delta, per_example(_l1_threshold(delta.flatten(1).abs(), radius.flatten()), delta))


def project_l1_box(delta: Tensor, x: Tensor, radius: Tensor) -> Tensor:
    """The nearest point to delta, in l_2, of the l_1 ball around 0 for which x + delta is in [0, 1].

    It is sign(delta_i) min(max(|delta_i| - theta, 0), room_i) (Croce & Hein, ICML 2021, Prop. 2.1). Its l_1
    norm falls in theta, linearly between the values |delta_i|, below which coordinate i leaves 0, and
    |delta_i| - room_i, below which it stays at its bound. radius: [B, 1, 1, 1].
    """
    size, reach = delta.flatten(1).abs(), radius.flatten()
    room = torch.where(delta > 0, 1.0 - x, x).flatten(1)
    knees, order = torch.cat([size, size - room], dim=1).sort(dim=1, descending=True)  # [B, 2 D]
    sign = torch.where(order < size.shape[1], 1.0, -1.0).to(delta)
    slope, total = sign.cumsum(1), (sign * knees).cumsum(1)  # the norm at theta is total - slope * theta
    last = ((total - slope * knees <= reach[:, None]).sum(1, keepdim=True) - 1).clamp_min_(0)
    theta = ((total.gather(1, last) - reach[:, None]) / slope.gather(1, last).clamp_min(1.0)).clamp_min_(0.0)
    length = torch.minimum((size - theta).clamp_min_(0.0), room)
    length = length * (reach / length.sum(1).clamp_min(SMALLEST)).clamp_max_(1.0)[:, None]  # for rounding
    return delta.sign() * length.view_as(delta)


def shrink(delta: Tensor, threshold: Tensor) -> Tensor:
    """Soft thresholding, sign(delta) * max(|delta| - threshold, 0): the proximal operator of the l_1 norm."""
    return delta.sign() * (delta.abs() - threshold).clamp_(min=0)


def _l1_threshold(magnitude: Tensor, radius: Tensor) -> Tensor:
    """theta [B], sum_i max(magnitude_i - theta, 0) = radius, 0 inside the ball (Duchi et al., ICML 2008)."""
    ranked = magnitude.sort(dim=1, descending=True).values  # [B, D]
    count = torch.arange(1, ranked.shape[1] + 1, device=ranked.device, dtype=ranked.dtype)
    theta = (ranked.cumsum(dim=1) - radius[:, None]) / count  # [B, D]
    kept = (ranked > theta).sum(dim=1).clamp_(min=1)
    return theta.gather(1, kept[:, None] - 1).squeeze(1).clamp_(min=0)


def inside(x_adv: Tensor, x: Tensor, radius: Tensor, norm: str, tolerance: float = 1e-6) -> Tensor:
    """Whether each x_adv lies in its ball, up to rounding, and in [0, 1]: [B] bool, False if not finite."""
    box = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
    return box & (norm_of(x_adv - x, norm) <= radius.flatten() * (1 + tolerance) + tolerance)


# ---- random points -----------------------------------------------------------------------------------------

def unit_noise(x: Tensor, norm: str, keys: Tensor | None = None) -> Tensor:
    """A random point of the unit ball per image, shaped as x: uniform in l_inf; in l_2 uniform on the sphere.

    keys: [B] int64 of `attacks.noise.example_keys`, each determining its point; without them torch's global
    generator does. In many dimensions a point uniform in the l_2 ball lies next to the sphere too.
    """
    if norm == "linf":
        uniform = torch.rand_like(x) if keys is None else keyed_uniform(keys, x.shape[1:]).to(x.dtype)
        return 2.0 * uniform - 1.0
    normal = torch.randn_like(x) if keys is None else keyed_normal(keys, x.shape[1:]).to(x.dtype)
    return steepest(normal, "l2")


def random_point(x: Tensor, radius: float | Tensor, norm: str, keys: Tensor | None = None) -> Tensor:
    """x + radius * `unit_noise`, clamped to [0, 1]."""
    return (x + radius * unit_noise(x, norm, keys)).clamp_(0.0, 1.0)
