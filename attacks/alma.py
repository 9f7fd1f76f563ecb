"""ALMA (Rony et al., "Augmented Lagrangian Adversarial Attacks", ICCV 2021)."""
import torch
from torch import Tensor, nn

from attacks.checks import check_classes, check_start
from attacks.frozen import frozen
from attacks.geometry import dual_norm_of, norm_of, per_example
from attacks.minimal import Closest, check_arguments, descend
from attacks.polish import nearest_loss
from losses.margin import logit_margin, misclassified, ranked_targets

LAST_STEP = 0.01            # the last step's size over the first's
FIRST_DISTANCE = {"l2": 0.1, "l1": 0.5}  # how far the first step goes at most
MULTIPLIER = (1e-6, 1e12)   # range of the multiplier mu
CHECK_EVERY = 10            # steps between two looks at whether the constraint has come closer
SHRINKS = 0.95              # closer: its value falls below this share
AIMED = 0.2                 # of the steps from x lead to the class that seems nearest
GROWTH = 1.2                # of rho where it has not


def alma(model: nn.Module, x: Tensor, y: Tensor, *, norm: str = "l2", num_steps: int = 500,
         start: Tensor | None = None, target: Tensor | None = None, momentum: float = 0.9,
         mode: str | None = "eval") -> Tensor:
    """Descend an augmented Lagrangian of distance and constraint, with one penalty multiplier per example.

        x_{t+1} = clip( x_t - step * momentum of g / rms(||g||_2) )
        g = grad [ ||x_t - x||_p + P(c(x_t), rho, mu) ]
        c(x') = m(x') / |m(x)|
        P(c, rho, mu) = mu c + mu rho c^2 + rho^2 c^3 / 6 for c >= 0,   mu c / (1 - rho c) for c < 0   (P2)
        mu  <- 0.9 mu + 0.1 dP/dc
        rho <- 1.2 rho every 10 steps where no adversary was met and c did not fall by 5 %

    x: [B, C, H, W] in [0, 1]; y: [B]; m is the margin z_y - max_{k != y} z_k, or z_y - z_target with target
    [B]; start: the first iterate, x by default (an adversary helps where m is flat around x). The first step
    goes to a distance of 0.1 (l2) or 0.5 (l1), from x itself no farther than the boundary would be if m were
    linear, |m| / ||grad m||_q; the step falls to 1 % of that. num_steps gradients, from x itself up to nine
    more, and two forward passes an example. Returns the closest adversary found, x itself where none was,
    without a graph. Raises ValueError as `check_arguments` does; the norms are l_2 and l_1.

    Differs from the paper: the margin is divided by its value at x instead of by a difference of ranked
    logits, which needs three classes (both make the attack independent of the scale of the logits); the
    gradient is scaled by its length, not pixel by pixel; from x, a fifth of the steps leads to the class that
    would be nearest if the network were linear, since the one of the largest logit may be 1.5 times as far.
    """
    check_arguments(x, y, norm, num_steps, tuple(FIRST_DISTANCE))
    if start is not None:
        check_start(start, x)
    x = x.detach()
    closest = Closest(x, norm)
    x_adv = x if start is None else start.detach()
    penalty = _Penalty(closest.distance)
    velocity = torch.zeros_like(x)
    square = None
    step_size = None
    with frozen(model, mode) as bare, torch.enable_grad():
        with torch.no_grad():
            logits = bare(x)
            check_classes(y, logits)
            scale = logit_margin(logits, y, target).abs().clamp_(min=1e-12)
        told = start is not None or target is not None
        first = target if told else nearest_class(bare, x, y, logits, norm)
        for step in range(num_steps):
            aim = target if step >= AIMED * num_steps else first
            margin, wrong, gradient = descend(bare, x_adv, y, aim)
            constraint = margin / scale
            closest.offer(x_adv, wrong)
            penalty.follow(step, constraint, wrong)
            slope = per_example(penalty.slope(constraint) / scale, x)
            pull = _norm_gradient(x_adv - x, norm) + gradient * slope
            length = norm_of(pull, "l2").clamp_(min=1e-12)
            if step_size is None:
                distance = _first_distance(x, x_adv, margin, gradient, norm)
                step_size = _first_step(x, pull / per_example(length, x), norm, distance)
            decay = 0.9 + 0.09 * step / num_steps
            square = decay * square + (1 - decay) * length.square() if step else length.square()
            size = step_size * LAST_STEP ** (step / num_steps) / square.sqrt()
            velocity = momentum * velocity + pull * per_example(size, x)
            x_adv = (x_adv - velocity).clamp_(0, 1)
        with torch.no_grad():
            closest.offer(x_adv, misclassified(bare(x_adv), y))
    return closest.x_adv


def nearest_class(bare: nn.Module, x: Tensor, y: Tensor, logits: Tensor, norm: str) -> Tensor:
    """The class whose boundary would be nearest within the box if the network were linear, of nine: [B]."""
    targets = ranked_targets(logits, y, 9)
    ways = []
    for target in targets.unbind(1):
        margin, _, gradient = descend(bare, x, y, target)
        delta = nearest_loss(x, gradient, margin.clamp(min=0), norm)
        short = (gradient * delta).flatten(1).sum(dim=1) > -0.999 * margin  # the box ends before
        ways.append(norm_of(delta, norm).masked_fill(short, torch.inf))
    return targets.gather(1, torch.stack(ways, dim=1).argmin(1, keepdim=True)).squeeze(1)


def _norm_gradient(delta: Tensor, norm: str) -> Tensor:
    """A subgradient of ||delta||_p: 0 at 0.  [B, ...] -> [B, ...]."""
    if norm == "l1":
        return delta.sign()
    return delta / per_example(norm_of(delta, norm).clamp_(min=1e-12), delta)


class _Penalty:
    """P(c, rho, mu) of each example, and how rho and mu follow the constraint."""

    def __init__(self, like: Tensor):
        self.rho, self.mu = torch.ones_like(like), torch.ones_like(like)
        self.met = torch.zeros_like(like, dtype=torch.bool)  # an adversary, since the last look
        self.before = torch.full_like(like, torch.inf)       # the constraint at the last look

    def follow(self, step: int, constraint: Tensor, wrong: Tensor) -> None:
        """Set mu by this step's constraint [B], and rho where it is time to look; wrong: [B] bool."""
        self.met = self.met | wrong
        if step:
            self.mu = (0.9 * self.mu + 0.1 * self.slope(constraint)).clamp_(*MULTIPLIER)
        if step and step % CHECK_EVERY == 0:
            far = ~self.met & (constraint > SHRINKS * self.before)
            self.rho = torch.where(far, self.rho * GROWTH, self.rho)
            self.met, self.before = torch.zeros_like(self.met), constraint

    def slope(self, constraint: Tensor) -> Tensor:
        """dP/dc of the penalty P2 at c [B]: mu at c = 0, growing above, falling towards 0 below."""
        rho, mu = self.rho, self.mu
        above = mu + 2 * mu * rho * constraint + (rho * constraint).square() / 2
        return torch.where(constraint >= 0, above, mu / (1 - rho * constraint.clamp(max=0)).square())


def _first_distance(x: Tensor, x_adv: Tensor, margin: Tensor, gradient: Tensor, norm: str) -> Tensor:
    """How far the first step goes: from x no farther than the boundary of the linearised margin.  [B]

    One beyond it may end at another class's boundary, which is farther.
    """
    boundary = margin.abs() / dual_norm_of(gradient, norm).clamp_(min=1e-12)
    begun = (x_adv != x).flatten(1).any(1)  # at an adversary, which may lie on the boundary
    return torch.where(begun, FIRST_DISTANCE[norm], boundary.clamp_(max=FIRST_DISTANCE[norm]))


def _first_step(x: Tensor, direction: Tensor, norm: str, distance: Tensor) -> Tensor:
    """How far along -direction, within the box, the distance [B] is reached: [B, ...] twice -> [B]."""
    lower = torch.zeros(len(x), device=x.device, dtype=x.dtype)
    upper = torch.full((len(x),), 10.0, device=x.device, dtype=x.dtype)
    for _ in range(20):
        middle = (lower + upper) / 2
        far = norm_of((x - direction * per_example(middle, x)).clamp_(0, 1) - x, norm) > distance
        lower = torch.where(far, lower, middle)
        upper = torch.where(far, middle, upper)
    return upper
