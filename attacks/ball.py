"""Balls around each example of a batch: radii, norms, steepest directions, projections and random points, in l_inf and l_2."""
import torch
from torch import Tensor

from attacks.noise import example_keys, keyed_normal, keyed_uniform
from attacks.pgd import check_images

TINY = 1e-12  # keeps a zero vector's direction at zero


def check_batch(x: Tensor, y: Tensor, norm: str, norms: tuple[str, ...], keys: Tensor | None) -> Tensor:
    """The keys [B] of the batch, those of the positions 0 .. B-1 where none are given.

    Raises ValueError for images outside [0, 1], labels or keys of another length, and a norm that is not among `norms`.
    """
    check_images(x)
    if norm not in norms:
        raise ValueError(f"unknown norm {norm!r}: choose one of {', '.join(norms)}")
    for name, tensor in {"labels": y, "keys": keys}.items():
        if tensor is not None and tensor.shape != x.shape[:1]:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} do not fit {len(x)} images")
    return example_keys(torch.arange(len(x), device=x.device)) if keys is None else keys


def check_steps(num_steps: int, num_targets: int = 1) -> None:
    """Raise ValueError for a negative number of steps or queries, or less than one target."""
    if num_steps < 0 or num_targets < 1:
        raise ValueError(f"{num_steps} steps towards {num_targets} targets: at least 0 and at least 1 are needed")


def radii(epsilon: float | Tensor, x: Tensor) -> Tensor:
    """One radius per example, [B, 1, 1, 1], from a number or a tensor [B]; ValueError unless all are finite and >= 0."""
    radius = torch.as_tensor(epsilon, dtype=x.dtype, device=x.device)
    if radius.dim() and radius.shape != x.shape[:1]:
        raise ValueError(f"epsilon of shape {tuple(radius.shape)} does not fit {len(x)} images")
    if not bool(((radius >= 0) & radius.isfinite()).all()):
        raise ValueError("epsilon must be finite and >= 0")
    return per_example(radius.expand(len(x)), x)


def per_example(values: Tensor, x: Tensor) -> Tensor:
    """values [B] shaped to broadcast over images x: [B, 1, 1, 1]."""
    return values.reshape(-1, *[1] * (x.dim() - 1))


def choose(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The rows of `new` where mask [B], of `old` elsewhere; both [B, ...].

    On a CPU by copying rows, which takes a tenth of the time of asking for every pixel; elsewhere without waiting for the mask.
    """
    if old.device.type != "cpu":
        return new.where(per_example(mask, old), old)
    rows, result = mask.nonzero().squeeze(1), old.clone()
    result[rows] = new[rows]
    return result


def norm_of(delta: Tensor, norm: str) -> Tensor:
    """The norm "linf", "l2" or "l1" of each row.  delta: [B, ...] -> [B]."""
    flat = delta.flatten(1)
    return {"linf": lambda: flat.abs().amax(1), "l2": lambda: flat.norm(dim=1), "l1": lambda: flat.abs().sum(1)}[norm]()


def direction(gradient: Tensor, norm: str) -> Tensor:
    """Steepest ascent of unit norm: sign(gradient) for "linf", gradient / |gradient| for "l2"; zero where the gradient is zero."""
    return gradient.sign() if norm == "linf" else gradient / per_example(norm_of(gradient, "l2"), gradient).clamp_min(TINY)


def project(x_adv: Tensor, x: Tensor, radius: Tensor, norm: str) -> Tensor:
    """x_adv brought into the ball of radius [B, 1, 1, 1] around x, then into [0, 1], which keeps it in the ball since x is in [0, 1]."""
    if norm == "linf":
        return torch.clamp(x_adv, (x - radius).clamp_(min=0.0), (x + radius).clamp_(max=1.0))
    delta = x_adv - x
    scale = (radius / per_example(norm_of(delta, "l2"), x).clamp_min(TINY)).clamp_(max=1.0)
    return delta.mul_(scale).add_(x).clamp_(0.0, 1.0)


def random_point(x: Tensor, radius: Tensor, norm: str, keys: Tensor) -> Tensor:
    """A point of the ball around x, each determined by its key alone: uniform for "linf", uniform on the sphere for "l2"; within [0, 1]."""
    if norm == "linf":
        noise = 2.0 * keyed_uniform(keys, x.shape[1:]).to(x.dtype) - 1.0
    else:
        noise = direction(keyed_normal(keys, x.shape[1:]).to(x.dtype), "l2")
    return (x + radius * noise).clamp_(0.0, 1.0)


def inside(x_adv: Tensor, x: Tensor, radius: Tensor, norm: str, tolerance: float = 1e-6) -> Tensor:
    """Whether each x_adv lies in its ball (up to rounding) and in [0, 1].  -> [B] bool; False for anything non-finite."""
    box = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
    return box & (norm_of(x_adv - x, norm) <= radius.flatten() * (1 + tolerance) + tolerance)


def wrong(logits: Tensor, y: Tensor) -> Tensor:
    """Whether each example is misclassified.  logits [B, K], y [B] -> [B] bool."""
    return logits.argmax(dim=1) != y


def ranked_targets(logits: Tensor, y: Tensor, num_targets: int) -> Tensor:
    """The min(num_targets, K - 1) classes other than y of largest logit, by descending logit.  -> [B, T]."""
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.argsort(dim=1, descending=True, stable=True)[:, :min(num_targets, logits.shape[1] - 1)]
