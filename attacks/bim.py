"""Minimal l_inf perturbations from the basic iterative method (Kurakin et al., ICLR 2017) with a bisection of its radius: how the
robustness curves of Risse et al. (ICANN 2021) were computed.

For comparison only: one loss, no random start and a step tied to the radius leave its distances 17 % too far on the network that
they were published for. attacks.pool is what curves are drawn from.
"""
import torch
from torch import Tensor, nn

from attacks.frozen import frozen
from attacks.pgd import check_images, cross_entropy


def bim_bisection(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float = 0.3, num_steps: int = 40, steps_per_radius: float = 30.0,
                  growth: float = 1.5, num_growths: int = 20, num_bisections: int = 20) -> tuple[Tensor, Tensor]:
    """The smallest adversarial perturbation found by BIM on the cross-entropy, the radius searched for each example on its own.

    x: [B, ...] in [0, 1]; y: [B]. The radius begins at `epsilon`, grows by the factor `growth` until BIM succeeds, at most
    `num_growths` times, and is then bisected between the largest failure and the smallest success. BIM starts at the clean image,
    takes `num_steps` steps of radius / steps_per_radius and stops at the first success.

    Returns x_adv [B, ...], x itself where nothing was found, and its l_inf distance [B], inf there. An example that is misclassified
    to begin with is its own adversary at distance 0.
    """
    check_images(x)
    x = x.detach()
    failed = torch.zeros(len(x), device=x.device, dtype=x.dtype)     # the largest radius without success
    reached = torch.full_like(failed, torch.inf)                     # the smallest distance of a success
    radius, best = torch.full_like(failed, epsilon), x.clone()
    with frozen(model) as bare:
        already = _wrong(bare(x).detach(), y)
        reached[already] = 0.0
        for turn in range(num_growths + num_bisections + 1):
            active = ~already & (reached.isfinite() | torch.full_like(already, turn <= num_growths))
            rows = active.nonzero().squeeze(1)
            if not len(rows):
                break
            x_adv, found = _bim(bare, x[rows], y[rows], radius[rows], num_steps, steps_per_radius)
            distance = (x_adv - x[rows]).flatten(1).abs().amax(dim=1)
            better = found & (distance < reached[rows])
            best[rows[better]], reached[rows[better]] = x_adv[better], distance[better]
            failed[rows[~found]] = torch.maximum(failed[rows[~found]], radius[rows[~found]])
            radius = torch.where(reached.isfinite(), (failed + reached) / 2, radius * growth)
    return best, reached


def _bim(bare: nn.Module, x: Tensor, y: Tensor, radius: Tensor, num_steps: int, steps_per_radius: float) -> tuple[Tensor, Tensor]:
    """The first misclassified iterate of each example, the last one where there is none, and whether there is one [B]."""
    bound = radius.view(-1, *[1] * (x.dim() - 1))
    lower, upper = (x - bound).clamp_(min=0.0), (x + bound).clamp_(max=1.0)
    x_adv, found = x.clone(), torch.zeros_like(y, dtype=torch.bool)
    for _ in range(num_steps):
        x_adv.requires_grad_()
        with torch.enable_grad():
            gradient, = torch.autograd.grad(cross_entropy(bare(x_adv), y).sum(), x_adv)
        moved = torch.clamp(torch.addcmul(x_adv.detach(), bound / steps_per_radius, gradient.sign()), lower, upper)
        x_adv = torch.where(found.view(bound.shape), x_adv.detach(), moved)
        with torch.no_grad():
            found = _wrong(bare(x_adv), y)
        if bool(found.all()):
            break
    return x_adv, found


def _wrong(logits: Tensor, y: Tensor) -> Tensor:
    """Whether another class strictly beats y, in logits that are finite: [B]."""
    true = logits.gather(1, y[:, None]).squeeze(1)
    other = logits.scatter(1, y[:, None], -torch.inf).amax(dim=1)
    return (other > true) & logits.isfinite().all(dim=1)
