"""Fast minimum-norm attacks (Pintor et al., "Fast Minimum-norm Adversarial Attacks through Adaptive Norm
Constraints", NeurIPS 2021)."""
import torch
from torch import Tensor, nn

from attacks.checks import check_start
from attacks.frozen import frozen
from attacks.geometry import dual_norm_of, norm_of, per_example, project_ball
from attacks.minimal import Closest, check_arguments, cosine, descend
from losses.margin import misclassified

# of the first step, an l_2 length; 1 in l_inf, as others have it, finds less
STEP_SIZES = {"linf": 10.0, "l2": 1.0, "l1": 1.0}
LAST_STEP = 0.01      # the last step's size over the first's
LAST_GAMMA = 0.001    # the last relative change of the radius
BISECTIONS = 10       # halvings between the clean image and a start of another class


def fmn(model: nn.Module, x: Tensor, y: Tensor, *, norm: str = "linf", num_steps: int = 100,
        start: Tensor | None = None, target: Tensor | None = None, gamma: float = 0.05,
        step_size: float | None = None, mode: str | None = "eval") -> Tensor:
    """Step down the margin m = z_y - max_{k != y} z_k, then project onto a ball whose radius adapts.

        radius    until an adversary is found max(||delta||_p + m / ||grad m||_q, radius) * (1 + gamma): the
                  distance to the boundary of the linearised margin; then radius * (1 + gamma) where the
                  iterate is correct, min(radius * (1 - gamma), best) elsewhere
        iterate   delta <- clip( Pi_radius( delta - step_size * grad m / ||grad m||_2 ) )    (Algorithm 1)

    x: [B, C, H, W] in [0, 1]; y: [B]; start: images [B, C, H, W] of other classes: those that are
    misclassified are first brought to the boundary by bisection of the radius that they are projected onto,
    for the others the attack begins at x; target: [B] classes whose margin z_y - z_target is followed instead
    (any misclassification still counts). gamma and step_size fall along a cosine; step_size is an l_2 length,
    by default that of STEP_SIZES. num_steps gradients an example, plus one forward pass, plus 10 forward
    passes with a start. Returns the closest adversary found, x itself where none was, without a graph. Raises
    ValueError as `check_arguments` does.

    Differs from the paper: before the first adversary the radius is at least (1 + gamma) times the last,
    where the estimate alone can stand still for good, at a tie or at the faces of the box (78 of 100 points
    of a small network in l_2); the last iterate is looked at too.
    """
    check_arguments(x, y, norm, num_steps)
    if start is not None:
        check_start(start, x)
    step_size = STEP_SIZES[norm] if step_size is None else step_size
    x = x.detach()
    closest = Closest(x, norm)
    with frozen(model, mode) as bare, torch.enable_grad():
        x_adv = x if start is None else _boundary(bare, x, y, start.detach(), closest)
        radius = torch.where(closest.distance.isfinite(), closest.distance,
                             torch.zeros_like(closest.distance))
        for step in range(num_steps):
            margin, wrong, gradient = descend(bare, x_adv, y, target)
            closest.offer(x_adv, wrong)
            delta = x_adv - x
            change = cosine(gamma, LAST_GAMMA, step, num_steps)
            to_boundary = norm_of(delta, norm) + margin / dual_norm_of(gradient, norm).clamp_(min=1e-12)
            outwards = torch.where(closest.distance.isinf(), torch.maximum(to_boundary, radius),
                                   radius) * (1 + change)
            radius = torch.where(wrong, torch.minimum(radius * (1 - change), closest.distance), outwards)
            length = cosine(step_size, step_size * LAST_STEP, step, num_steps)
            delta = delta - gradient * per_example(length / norm_of(gradient, "l2").clamp_(min=1e-12), delta)
            x_adv = (x + project_ball(delta, per_example(radius, x), norm)).clamp_(0, 1)
        with torch.no_grad():
            closest.offer(x_adv, misclassified(bare(x_adv), y))
    return closest.x_adv


@torch.no_grad()
def _boundary(bare: nn.Module, x: Tensor, y: Tensor, start: Tensor, closest: Closest) -> Tensor:
    """The closest misclassified projection of each start onto a ball around x; x for correct starts."""
    closest.offer(start, misclassified(bare(start), y))
    usable = closest.distance.isfinite()
    lower = torch.zeros_like(closest.distance)
    upper = torch.where(usable, closest.distance, torch.zeros_like(closest.distance))
    for _ in range(BISECTIONS):
        middle = (lower + upper) / 2
        x_adv = (x + project_ball(start - x, per_example(middle, x), closest.norm)).clamp_(0, 1)
        wrong = misclassified(bare(x_adv), y) & usable
        closest.offer(x_adv, wrong)
        lower = torch.where(wrong, lower, middle)
        upper = torch.where(wrong, middle, upper)
    return closest.x_adv.clone()
