"""SPSA: gradient-free optimisation by random finite differences (Uesato et al., "Adversarial Risk and the
Dangers of Evaluating Against Weak Attacks", ICML 2018).

    g = 1/S sum_s (L(x' + delta v_s) - L(x' - delta v_s)) / (2 delta) * v_s,    v_s uniform in {-1, 1}^(CHW)

estimates the gradient of the CW loss L = max_{k != y} z_k - z_y, which Adam ascends; after each step x' is
projected onto the l_inf ball of radius epsilon and onto [0, 1]. 2 S forward passes an image and step, no
gradient of the network.

Differs from the released codes: every example has directions of its own, which depend on its key alone;
probes stay in [0, 1], as their centre is kept delta away from its faces; an example leaves once an iterate is
misclassified.
"""
import torch
from torch import Tensor, nn

from attacks.checks import check_batch, check_classes
from attacks.frozen import frozen
from attacks.geometry import projection
from attacks.memory import out_of_memory
from attacks.noise import example_keys, keyed_uniform
from losses.margin import cw_loss, misclassified

BETAS, TINY = (0.9, 0.999), 1e-8   # of Adam
SAMPLES_AT_A_TIME = 32  # directions drawn at once: fixed, since the order of a sum shows in its last bits
BITS = 24                          # random bits in one of keyed_uniform's numbers


def spsa(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, num_steps: int = 100,
         num_samples: int = 256, delta: float = 0.001, lr: float = 0.01, max_probes: int = 4096,
         keys: Tensor | None = None) -> Tensor:
    """Ascend the CW loss within the l_inf ball by estimated gradients, from x.

    x: [B, C, H, W] in [0, 1]; y: [B]; keys: [B] int64 from `attacks.noise.example_keys`, those of the
    positions by default; max_probes: images in one forward pass, at least 64, halved while an accelerator's
    memory is too small; it changes no direction. Needs float32: in bfloat16 the differences of
    the logits drown in rounding. Returns x_adv: misclassified where an iterate was, else the last one. Raises
    ValueError for images outside [0, 1], labels or keys that do not fit, and num_samples that is not a
    positive multiple of 32.
    """
    keys = check_batch(x, y, "linf", ("linf",), keys)
    if num_samples < 1 or num_samples % SAMPLES_AT_A_TIME:
        raise ValueError(f"num_samples must be a positive multiple of {SAMPLES_AT_A_TIME}, not {num_samples}")
    result = x.detach().clone()
    size = max(1, max_probes // (2 * SAMPLES_AT_A_TIME))
    with frozen(model) as bare, torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        done = 0
        while done < len(x):
            rows = slice(done, done + size)
            try:
                result[rows] = _ascend(bare, x[rows].detach(), y[rows], keys[rows], epsilon, num_steps,
                                       num_samples, delta, lr)
                done += size
            except RuntimeError as error:
                if not out_of_memory(error) or size == 1:
                    raise
                size //= 2
    return result


def _ascend(bare: nn.Module, x: Tensor, y: Tensor, keys: Tensor, epsilon: float, num_steps: int,
            num_samples: int, delta: float, lr: float) -> Tensor:
    """Adam on the examples that are standing; the others keep their adversary."""
    found = x.clone()
    rows = torch.arange(len(x), device=x.device)
    x_adv = x
    mean = torch.zeros_like(x)
    square = torch.zeros_like(x)
    for step in range(num_steps + 1):
        logits = bare(x_adv)
        if step == 0:
            check_classes(y, logits)
        standing = (~misclassified(logits, y[rows])).nonzero().squeeze(1)  # the one wait for the device
        found[rows] = x_adv
        rows = rows[standing]
        x_adv = x_adv[standing]
        mean = mean[standing]
        square = square[standing]
        if not len(rows) or step == num_steps:
            break
        gradient = estimate(bare, x_adv, y[rows], example_keys(keys[rows], step), num_samples, delta)
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        square = BETAS[1] * square + (1 - BETAS[1]) * gradient**2
        corrected = (square / (1 - BETAS[1] ** (step + 1))).sqrt_().add_(TINY)
        moved = x_adv + lr * mean / (1 - BETAS[0] ** (step + 1)) / corrected
        x_adv = projection(x[rows], epsilon, "linf")(moved)
    return found


def estimate(model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, num_samples: int, delta: float) -> Tensor:
    """The gradient of the CW loss at x, kept `delta` inside [0, 1], estimated from num_samples directions."""
    centre = x.clamp(delta, 1 - delta)
    shape = (SAMPLES_AT_A_TIME, *x.shape[1:])
    total = torch.zeros_like(x)
    labels = y.repeat_interleave(2 * SAMPLES_AT_A_TIME)
    for number in range(num_samples // SAMPLES_AT_A_TIME):
        directions = keyed_signs(example_keys(keys, number), shape).to(x.dtype)  # [B, S, C, H, W]
        # [B, S, 2, C, H, W]
        probes = centre[:, None, None] + delta * torch.stack([directions, -directions], dim=2)
        losses = cw_loss(model(probes.flatten(0, 2)), labels).view(len(x), SAMPLES_AT_A_TIME, 2)
        slopes = (losses[..., 0] - losses[..., 1]) / (2 * delta)  # [B, S]
        total += torch.einsum("bs,bs...->b...", slopes, directions)
    return total / num_samples


def keyed_signs(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """-1 or 1 with equal probability, float32, of shape [B, *shape], row i determined by keys[i] alone."""
    count = int(torch.Size(shape).numel())
    words = (keyed_uniform(keys, (-(-count // BITS),)) * 2**BITS).to(torch.int32)  # [B, W]
    bits = (words[:, :, None] >> torch.arange(BITS, dtype=torch.int32, device=keys.device)) & 1
    return bits.flatten(1)[:, :count].float().mul_(2).sub_(1).view(len(keys), *shape)
