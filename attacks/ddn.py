"""DDN (Rony et al., "Decoupling Direction and Norm for Efficient Gradient-Based L2 Adversarial Attacks and
Defenses", CVPR 2019)."""
import torch
from torch import Tensor, nn

from attacks.checks import check_classes
from attacks.frozen import frozen
from attacks.geometry import norm_of, per_example
from attacks.minimal import Closest, check_arguments, cosine
from losses.margin import misclassified, soft_margin

LAST_STEP = 0.01  # the last step's size


def ddn(model: nn.Module, x: Tensor, y: Tensor, *, norm: str = "l2", num_steps: int = 200,
        target: Tensor | None = None, gamma: float = 0.05, radius: float = 1.0,
        mode: str | None = "eval") -> Tensor:
    """Step along the normalised gradient of the cross-entropy, at an l_2 distance that shrinks or grows.

        delta  <- delta + step * g / ||g||_2,    g = grad CE(f(x + delta), y), step from 1 to 0.01 by a cosine
        radius <- radius * (1 - gamma) where x + delta is adversarial, radius * (1 + gamma) elsewhere
        delta  <- clip( radius * delta / ||delta||_2 )        (Algorithm 1)

    x: [B, C, H, W] in [0, 1]; y: [B]; target: [B] classes whose cross-entropy is minimised instead (any
    misclassification counts). num_steps gradients an example and one forward pass more. Returns the closest
    adversary found, x itself where none was, without a graph. Raises ValueError as `check_arguments` does;
    the only norm is l_2.

    The gradient is that of z_y - log sum_{k != y} exp z_k, which is a multiple of that of -CE but does not
    underflow. Differs from the released code: no rounding to 256 grey levels, and the last iterate is looked
    at too.
    """
    check_arguments(x, y, norm, num_steps, ("l2",))
    x = x.detach()
    aim = y if target is None else target
    sign = -1.0 if target is None else 1.0
    closest, x_adv = Closest(x, norm), x
    radii = torch.full_like(closest.distance, radius)
    with frozen(model, mode) as bare, torch.enable_grad():
        for step in range(num_steps):
            x_adv = x_adv.detach().requires_grad_()
            logits = bare(x_adv)
            check_classes(y, logits)
            gradient, = torch.autograd.grad(soft_margin(logits, aim).sum(), x_adv)
            x_adv = x_adv.detach()
            wrong = misclassified(logits.detach(), y)
            closest.offer(x_adv, wrong)
            length = cosine(1.0, LAST_STEP, step, num_steps) / norm_of(gradient, norm).clamp_(min=1e-30)
            delta = x_adv - x + sign * gradient * per_example(length, x)
            radii = torch.where(wrong, radii * (1 - gamma), radii * (1 + gamma))
            x_adv = (x + delta * per_example(radii / norm_of(delta, norm).clamp_(min=1e-12), x)).clamp_(0, 1)
        with torch.no_grad():
            closest.offer(x_adv.detach(), misclassified(bare(x_adv), y))
    return closest.x_adv
