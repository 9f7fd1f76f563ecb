"""Projected gradient descent (Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018).

    x_0 = x + noise;    x_{t+1} = Pi( x_t + step_size * direction( grad_x loss(f(x_t), target) ) )

direction is the steepest ascent in the norm of the ball: the sign in l_inf, the gradient over its length in l_2. Pi projects onto the
ball of radius epsilon around x and then onto the box [0, 1].
"""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.frozen import frozen
from attacks.noise import example_keys, keyed_normal, keyed_uniform

GAUSSIAN_SCALE = 0.001  # standard deviation of the Gaussian start (TRADES; Zeng et al., Alg. 1; VIR, Alg. 1)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy per example, in float32 or wider: logits [B, K] and y [B] -> [B]."""
    return F.cross_entropy(logits if logits.itemsize >= 4 else logits.float(), y, reduction="none")


def linf_direction(gradient: Tensor) -> Tensor:
    """Steepest ascent in the l_inf norm: sign(gradient), where sign(0) = 0."""
    return gradient.sign()


def linf_projection(x: Tensor, epsilon: float | Tensor) -> Callable[[Tensor], Tensor]:
    """The projection onto the l_inf ball of radius epsilon around x and then onto [0, 1], in place: for x in [0, 1] one clamp does both."""
    lower, upper = (x - epsilon).clamp_(min=0.0), (x + epsilon).clamp_(max=1.0)
    return lambda x_adv: x_adv.clamp_(lower, upper)


def linf_noise(uniform: Tensor) -> Tensor:
    """Numbers uniform in [0, 1), [B, C, H, W], as a point uniform in the l_inf unit ball: 2 u - 1."""
    return 2.0 * uniform - 1.0


def length(vectors: Tensor) -> Tensor:
    """The l_2 norm of each example, shaped to broadcast over it: [B, C, H, W] -> [B, 1, 1, 1]."""
    return torch.linalg.vector_norm(vectors.flatten(1), dim=1).view(-1, *(1,) * (vectors.ndim - 1))


def l2_direction(gradient: Tensor) -> Tensor:
    """Steepest ascent in the l_2 norm: gradient / ||gradient||_2, and 0 where the gradient is 0."""
    largest = gradient.flatten(1).abs().amax(dim=1).view(-1, *(1,) * (gradient.ndim - 1))  # so that no square underflows
    scaled = gradient / torch.where(largest > 0, largest, 1.0)
    return scaled / torch.where(largest > 0, length(scaled), 1.0)


def l2_projection(x: Tensor, epsilon: float | Tensor) -> Callable[[Tensor], Tensor]:
    """The projection onto the l_2 ball of radius epsilon around x, then a clamp to [0, 1], which takes no point farther from x."""

    def project(x_adv: Tensor) -> Tensor:
        delta = x_adv - x
        return (x + delta * (epsilon / length(delta).clamp_min(1e-30)).clamp_(max=1.0)).clamp_(0.0, 1.0)

    return project


def l2_noise(uniform: Tensor) -> Tensor:
    """Numbers uniform in [0, 1), [B, C, H, W], as a direction of l_2 length 1, the same for every sign pattern: (2 u - 1) / ||2 u - 1||_2.

    In many dimensions a point uniform in the ball lies next to the sphere too.
    """
    return l2_direction(2.0 * uniform - 1.0)


NORMS = {"linf": (linf_direction, linf_projection, linf_noise), "l2": (l2_direction, l2_projection, l2_noise)}
STARTS = ("uniform", "clipped", "gaussian", "clean")


def pgd(model: nn.Module, x: Tensor, target: object, *, epsilon: float | Tensor, step_size: float | Tensor, num_steps: int,
        loss_fn: Callable[[Tensor, object], Tensor] = cross_entropy, start: str | Tensor = "uniform", norm: str = "linf",
        mode: str | None = "eval", keys: Tensor | None = None, watch: Callable[[Tensor], object] | None = None) -> Tensor:
    """Maximise loss_fn(model(x_adv), target) over the epsilon ball around x within [0, 1].

    x: [B, C, H, W] in [0, 1]; target: whatever loss_fn(logits_adv, target) -> [B] takes, labels [B] by default; epsilon and
    step_size in pixel units, one number or one each for every example, [B]. Returns x_adv, shaped as x, without a graph. The last iterate
    is returned, not the best.

    norm   of the ball, of epsilon and of step_size: "linf" or "l2".
    start  "uniform": x + U(-epsilon, epsilon), in l_2 a random direction of length epsilon; "clipped": the same, clamped to [0, 1]
           (GAIRAT's released code); "gaussian": x + 0.001 N(0, 1), which a KL loss needs, its gradient at x being zero; "clean": x;
           or the first iterate as a tensor. Unless clipped it is not projected before the first step, as in the released code of
           Zeng et al., TRADES and MART; every later one is, and so is the result.
    mode   of the model during the attack: "eval", "train", or None for as it is (see `frozen`).
    keys   [B] int64 from `attacks.noise.example_keys`: the noise of an example then depends on its key alone. Without keys it comes
           from torch's global generator.
    watch  called with the logits [B, K] of every iterate that a step starts from, without a graph.

    A model with a method `pgd_step` takes the steps itself: pgd_step(steps, whole_step, x_adv, settings) returns what
    steps(model, **settings) would, two forms of the same step being at its choice.

    Raises ValueError for images outside [0, 1], a negative epsilon, step_size or num_steps, and an unknown start or norm.
    """
    check_images(x)
    epsilon, step_size = _checked("epsilon", epsilon, x), _checked("step_size", step_size, x)
    num_steps = _checked("num_steps", num_steps, x)
    if keys is not None and keys.shape != x.shape[:1]:
        raise ValueError(f"keys of shape {tuple(keys.shape)} do not fit {len(x)} images")
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}: choose one of {', '.join(NORMS)}")
    x = x.detach()
    settings = {"x": x, "target": target, "epsilon": epsilon, "step_size": step_size, "loss_fn": loss_fn, "norm": norm}
    x_adv = first_iterate(x, epsilon, start, keys, norm).detach()
    with frozen(model, mode) as bare, torch.enable_grad():
        own = hasattr(bare, "pgd_step") and num_steps
        advance = bare.pgd_step(steps, whole_step, x_adv, settings) if own else steps(bare, **settings)
        for _ in range(num_steps):
            x_adv, logits_adv = advance(x_adv)
            if watch is not None:
                watch(logits_adv)
    return x_adv if num_steps else NORMS[norm][1](x, epsilon)(x_adv.clone())


def steps(model: nn.Module, *, x: Tensor, target: object, epsilon: float | Tensor, step_size: float | Tensor,
          loss_fn: Callable[[Tensor, object], Tensor], norm: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The step of `pgd` as a function: x_adv -> the next x_adv, and the logits [B, K] of this one, both without a graph."""
    direction, projection, _ = NORMS[norm]
    project = projection(x, epsilon)  # with bounds that are the same for every step

    def advance(x_adv: Tensor) -> tuple[Tensor, Tensor]:
        x_adv.requires_grad_()
        logits_adv = model(x_adv)
        losses = loss_fn(logits_adv, target)  # [B]
        gradient, = torch.autograd.grad(losses, x_adv, torch.ones_like(losses))  # of their sum: a mean only underflows earlier
        return project(_move(x_adv.detach(), direction(gradient), step_size)), logits_adv.detach()

    return advance


def whole_step(model: nn.Module, x_adv: Tensor, *, x: Tensor, target: object, epsilon: Tensor, step_size: Tensor,
               loss_fn: Callable[[Tensor, object], Tensor], norm: str) -> tuple[Tensor, Tensor]:
    """The step of `steps` in one call and in the terms of torch.func, for torch.compile, which so makes one graph of all of it.

    epsilon and step_size are tensors, of one value or [B, 1, 1, 1]: a number would be a constant of the graph, and a ramp a graph a batch.
    """
    direction, projection, _ = NORMS[norm]

    def total(point):  # without annotations, at which torch 2.6 ends the graph
        logits_adv = model(point)
        return loss_fn(logits_adv, target).sum(), logits_adv

    gradient, logits_adv = torch.func.grad(total, has_aux=True)(x_adv)
    return projection(x, epsilon)(x_adv + step_size * direction(gradient)), logits_adv


def _checked(name: str, value: float | Tensor, x: Tensor) -> float | Tensor:
    """The number as it is; one value per example, [B], as [B, 1, 1, 1]."""
    if not (isinstance(value, Tensor) and value.ndim):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number >= 0, not {value}")
        return value
    if value.shape != x.shape[:1]:
        raise ValueError(f"{name} of shape {tuple(value.shape)} does not fit {len(x)} images")
    require((value >= 0) & value.isfinite(), f"every {name} must be a finite number >= 0")
    return value.view(-1, *[1] * (x.ndim - 1))


def _move(x_adv: Tensor, direction: Tensor, step_size: float | Tensor) -> Tensor:
    """x_adv + step_size * direction in one pass over the images, in the memory of `direction`."""
    if isinstance(step_size, Tensor):
        return torch.addcmul(x_adv, direction, step_size, out=direction)
    return torch.add(x_adv, direction, alpha=step_size, out=direction)


def pgd_by_index(model: nn.Module, x: Tensor, target: object, index: Tensor, restart: int, loss_fn: Callable[[Tensor, object], Tensor],
                 *, seed: int, **options: object) -> Tensor:
    """`pgd` from the random start that belongs to (index in the data set, seed, restart), whatever batch the example stands in."""
    return pgd(model, x, target, loss_fn=loss_fn, keys=example_keys(index, seed, restart), **options)


def first_iterate(x: Tensor, epsilon: float | Tensor, start: str | Tensor, keys: Tensor | None = None, norm: str = "linf") -> Tensor:
    """The point x_0 from which an attack begins; `start`, `keys` and `norm` as in `pgd`, epsilon a number or broadcastable to x."""
    if isinstance(start, Tensor):
        if start.shape != x.shape:
            raise ValueError(f"a start of shape {tuple(start.shape)} does not fit images of shape {tuple(x.shape)}")
        return start
    if start == "clean":
        return x
    if start == "clipped":
        return first_iterate(x, epsilon, "uniform", keys, norm).clamp_(0.0, 1.0)
    if start == "uniform":
        noise = torch.rand_like(x) if keys is None else keyed_uniform(keys, x.shape[1:]).to(x.dtype)
        return x + epsilon * NORMS[norm][2](noise)
    if start == "gaussian":
        noise = torch.randn_like(x) if keys is None else keyed_normal(keys, x.shape[1:]).to(x.dtype)
        return x + GAUSSIAN_SCALE * noise
    raise ValueError(f"unknown start {start!r}: choose one of {', '.join(STARTS)}, or give the first iterate as a tensor")


def check_images(x: Tensor) -> None:
    """Raise ValueError unless x is a floating-point tensor with every value in [0, 1]; how on a GPU, see `require`."""
    if not x.is_floating_point():
        raise ValueError(f"images must be floating point in [0, 1], not {x.dtype}: divide 8-bit images by 255")
    require((x >= 0) & (x <= 1), "images must lie in [0, 1]: keep pixels in [0, 1] and make normalisation the model's first layer "
                                 "(models.normalize)")


def require(holds: Tensor, message: str) -> None:
    """Raise ValueError(message) unless all of `holds` is true.

    On a GPU the host does not wait for the answer, which would cost an idle gap in every batch: there a failure ends the program at
    the next synchronisation, with the message among the device's assertions.
    """
    if holds.is_cuda:
        torch._assert_async(holds.all(), message)
    elif not bool(holds.all()):
        raise ValueError(message)
