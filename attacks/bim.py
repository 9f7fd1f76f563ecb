"""Minimal l_inf perturbations from the basic iterative method (Kurakin et al., ICLR 2017) with a bisection of
its radius: how the robustness curves of Risse et al. (ICANN 2021) were computed.

For comparison only: one loss, no random start and a step tied to the radius leave its distances 17 % too far
on the network that they were published for. attacks.pool is what curves are drawn from.
"""
import torch
from torch import Tensor, nn

from attacks.checks import check_batch, check_classes
from attacks.frozen import frozen
from attacks.geometry import choose, norm_of, per_example, projection
from attacks.pgd import cross_entropy
from losses.margin import misclassified


def bim_bisection(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float = 0.3, num_steps: int = 40,
                  steps_per_radius: float = 30.0, growth: float = 1.5, num_growths: int = 20,
                  num_bisections: int = 20) -> tuple[Tensor, Tensor]:
    """The smallest adversarial perturbation that BIM on the cross-entropy finds, one radius per example.

    x: [B, ...] in [0, 1]; y: [B]. The radius begins at `epsilon`, grows by the factor `growth` until BIM
    succeeds, at most `num_growths` times, and is then bisected between the largest failure and the smallest
    success. BIM starts at the clean image, takes `num_steps` steps of radius / steps_per_radius and stops at
    the first success.

    Returns x_adv [B, ...], x itself where nothing was found, and its l_inf distance [B], inf there. An
    example that is misclassified to begin with is its own adversary at distance 0.
    """
    check_batch(x, y, "linf", ("linf",))
    x = x.detach()
    failed = torch.zeros(len(x), device=x.device, dtype=x.dtype)     # the largest radius without success
    reached = torch.full_like(failed, torch.inf)                     # the smallest distance of a success
    radius, best = torch.full_like(failed, epsilon), x.clone()
    with frozen(model) as bare:
        logits = bare(x).detach()
        check_classes(y, logits)
        already = misclassified(logits, y)
        reached = reached.masked_fill(already, 0.0)
        for turn in range(num_growths + num_bisections + 1):
            active = ~already & (reached.isfinite() | torch.full_like(already, turn <= num_growths))
            rows = active.nonzero().squeeze(1)
            if not len(rows):
                break
            x_adv, found = _bim(bare, x[rows], y[rows], radius[rows], num_steps, steps_per_radius)
            distance = norm_of(x_adv - x[rows], "linf")
            better = found & (distance < reached[rows])
            best[rows] = choose(better, x_adv, best[rows])
            reached[rows] = distance.where(better, reached[rows])
            failed[rows] = failed[rows].where(found, torch.maximum(failed[rows], radius[rows]))
            radius = torch.where(reached.isfinite(), (failed + reached) / 2, radius * growth)
    return best, reached


def _bim(bare: nn.Module, x: Tensor, y: Tensor, radius: Tensor, num_steps: int,
         steps_per_radius: float) -> tuple[Tensor, Tensor]:
    """The first misclassified iterate of each example, else its last, and whether there is one [B]."""
    bound = per_example(radius, x)
    project = projection(x, bound, "linf")
    x_adv = x.clone()
    found = torch.zeros_like(y, dtype=torch.bool)
    for step in range(num_steps):
        if step and bool(found.all()):
            break
        x_adv.requires_grad_()
        with torch.enable_grad():
            gradient, = torch.autograd.grad(cross_entropy(bare(x_adv), y).sum(), x_adv)
        x_adv = x_adv.detach()
        moved = project(torch.addcmul(x_adv, bound / steps_per_radius, gradient.sign()))
        x_adv = choose(found, x_adv, moved)
        with torch.no_grad():
            found = misclassified(bare(x_adv), y)
    return x_adv, found
