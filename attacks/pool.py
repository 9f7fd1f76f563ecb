"""Minimal distances as the minimum over a pool of attacks: no single one is close to the truth on every
network.

Every attack below gives an upper bound of the distance to the nearest adversary; so does their minimum.
"""
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attacks.alma import alma
from attacks.bisection import apgd_bisection, pgd_bisection
from attacks.ddn import ddn
from attacks.fab import fab_targeted
from attacks.fmn import fmn
from attacks.frozen import frozen, predict
from attacks.geometry import NORMS, choose, norm_of
from attacks.minimal import check_arguments
from attacks.pdpgd import pdpgd
from attacks.polish import polish
from losses.margin import misclassified, ranked_targets


@dataclass(frozen=True)
class Budget:
    """How much is spent on each example."""

    num_steps: int        # of every attack on the nearest boundary
    target_steps: int     # of every attack on one class
    num_targets: int      # classes aimed at, those of the largest logits
    num_rounds: int       # of the bisection in l_inf
    round_steps: int      # of each of them
    polish_steps: int
    fab_steps: int        # of FAB on each of fab_targets classes
    fab_targets: int
    thorough: bool = False  # every attack in every norm, FMN included


BUDGETS = {
    "fast": Budget(num_steps=100, target_steps=0, num_targets=0, num_rounds=6, round_steps=20, polish_steps=20,
                   fab_steps=20, fab_targets=3),
    "standard": Budget(num_steps=200, target_steps=100, num_targets=4, num_rounds=8, round_steps=40,
                       polish_steps=40, fab_steps=50, fab_targets=9),
    "strong": Budget(num_steps=1000, target_steps=300, num_targets=9, num_rounds=10, round_steps=100,
                     polish_steps=100, fab_steps=100, fab_targets=9, thorough=True),
}

# The attacks of each norm, which begin at the closest adversary there is, those of the thorough budget, and the one
# aimed at classes. l_2 comes first: what is found there is a good start in the other norms.
PLAN = {"l2": (alma,), "linf": (pdpgd,), "l1": (pdpgd, alma)}
THOROUGH = {"l2": (pdpgd, fmn), "linf": (fmn,), "l1": (fmn,)}
TARGETED = {"l2": alma, "linf": pdpgd, "l1": pdpgd}
TARGETED_ALWAYS = ("linf", "l1")  # in l_2 FAB, aimed at every class, leaves it little to find


@dataclass
class MinimalDistances:
    """The smallest distances found, per norm, with the images that prove them.

    distance[norm]: [B] float64, 0 where x itself is misclassified, inf where nothing was found (censored);
    x_adv[norm]: [B, C, H, W], x where the distance is 0 or inf; winner[norm]: [B] int64, the index in
    `attacks` of the attack that found it, -1 where there is none; misclassified: [B] bool;
    single[norm][attack]: [B] float64, what that attack found alone; gradients, seconds: of each attack, the
    number of gradients an example at most and the wall time of the batch.
    """

    norms: tuple[str, ...]
    misclassified: Tensor
    distance: dict[str, Tensor]
    x_adv: dict[str, Tensor]
    winner: dict[str, Tensor]
    attacks: list[str] = field(default_factory=list)
    single: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    gradients: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def minimal_distances(model: nn.Module, x: Tensor, y: Tensor, *, norms: Sequence[str] = NORMS,
                      budget: str | Budget = "standard", keys: Tensor | None = None,
                      starts: Sequence[Tensor] = (),
                      extra: dict[str, tuple[Callable, int]] | None = None) -> MinimalDistances:
    """Attack every correctly classified example in every norm and keep its closest adversary.

    First DDN and targeted FAB in l_2 find adversaries everywhere; they are where the attacks of each norm
    begin (ALMA in l_2; PDPGD in l_inf, beside PGD with bisection; PDPGD and ALMA in l_1; PDPGD also aimed at
    `num_targets` classes), and the best of each norm is polished. Before a candidate counts it is clamped to
    [0, 1] and classified once more, in eval mode and the precision of x; only misclassified ones count. Each
    is measured in all `norms` in float64, so d_linf <= d_l2 <= d_l1 holds of the results.

    x: [B, C, H, W] in [0, 1]; y: [B]; budget: a name in BUDGETS or a Budget; keys: [B] of
    `attacks.noise.example_keys` for the random start of PGD, which else begins at x; starts: candidates [B,
    C, H, W] from elsewhere (adversaries of another attack, images of other classes), from which FMN begins
    too; extra: name -> (attack (model, x, y, *, norm) -> x_adv, gradients an example), run in every norm.
    Nothing is random but the keyed start: an example's result does not depend on the batch beyond rounding.
    Raises ValueError for an unknown budget or norm, and as `check_arguments` does.
    """
    if isinstance(budget, str) and budget not in BUDGETS:
        raise ValueError(f"unknown budget {budget!r}: choose one of {', '.join(BUDGETS)}")
    budget = BUDGETS[budget] if isinstance(budget, str) else budget
    for norm in norms:
        check_arguments(x, y, norm, budget.num_steps)
    logits = predict(model, x)
    wrong = misclassified(logits, y)
    result = MinimalDistances(tuple(norms), wrong, {}, {}, {})
    for norm in norms:
        result.distance[norm] = torch.where(wrong, 0.0, torch.inf).to(torch.float64)
        result.x_adv[norm] = x.detach().clone()
        result.winner[norm] = torch.full_like(y, -1)
        result.single[norm] = {}
    rows = (~wrong).nonzero().squeeze(1)
    if len(rows):
        pool = _Pool(model, x.detach(), y, rows, result, budget)
        pool.run([start.detach().clamp(0, 1)[rows] for start in starts], None if keys is None else keys[rows],
                 extra or {})
    return result


class _Pool:
    """One run of the pool over the correctly classified examples, `rows` of the batch."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, rows: Tensor, result: MinimalDistances,
                 budget: Budget):
        self.model = model
        self.x = x[rows]
        self.y = y[rows]
        self.rows = rows
        self.result = result
        self.budget = budget
        nothing = torch.full(rows.shape, torch.inf, dtype=torch.float64, device=x.device)
        self.distance = {norm: nothing.clone() for norm in NORMS}
        # in every norm, asked for or not: where the attacks begin
        self.nearest = dict.fromkeys(NORMS, self.x)
        self.targets = None
        if budget.num_targets:
            self.targets = ranked_targets(predict(model, self.x), self.y, budget.num_targets)  # [B, T]

    def run(self, starts: list[Tensor], keys: Tensor | None, extra: dict[str, tuple[Callable, int]]) -> None:
        """Every attack of the budget, from `starts` where it takes one, then `extra`, then the polish."""
        budget = self.budget
        for number, start in enumerate(starts):
            self.attack(f"start {number}", 0, lambda *_, start=start, **options: start)
        self.attack("ddn", budget.num_steps, ddn, num_steps=budget.num_steps)
        aimed = self.attack_targets("ddn targeted", ddn, None) if budget.num_targets else None
        self.attack_fab("l2")
        for norm in [norm for norm in PLAN if norm in self.result.norms]:
            if norm == "linf":
                self.attack("bisection linf", budget.num_rounds * budget.round_steps, pgd_bisection,
                            num_steps=budget.round_steps, num_rounds=budget.num_rounds, keys=keys)
            for number, attack in enumerate(PLAN[norm] + (THOROUGH[norm] if budget.thorough else ())):
                self.attack(f"{attack.__name__} {norm}", budget.num_steps, attack, norm=norm,
                            num_steps=budget.num_steps, start=self.nearest[norm if number else "l2"])
            for number, start in enumerate(starts):
                self.attack(f"fmn {norm} from start {number}", budget.num_steps, fmn, norm=norm,
                            num_steps=budget.num_steps, start=start)
            if budget.thorough and norm != "l2":
                self.attack_fab(norm)
            if budget.thorough and norm != "l1":
                rounds = budget.num_rounds
                targets = budget.num_targets
                steps = budget.round_steps
                self.attack(f"apgd-t bisection {norm}", rounds * targets * (steps + 1), apgd_bisection,
                            norm=norm, num_steps=steps, num_rounds=rounds, num_targets=targets,
                            upper=self.distance[norm], keys=keys)
            if budget.num_targets and (budget.thorough or norm in TARGETED_ALWAYS):
                self.attack_targets(f"{TARGETED[norm].__name__} {norm} targeted", TARGETED[norm], aimed,
                                    norm=norm)
            for name, (attack, gradients) in extra.items():
                self.attack(f"{name} {norm}", gradients, attack, norm=norm)
        for norm in self.result.norms:
            self.attack(f"polish {norm}", budget.polish_steps, polish, norm=norm,
                        num_steps=budget.polish_steps, x_adv=self.nearest[norm])

    def attack(self, name: str, gradients: int, attack: Callable, **options: object) -> None:
        """Run one attack on every example and offer what it finds."""
        started = time.monotonic()
        self.offer(name, attack(self.model, self.x, self.y, **options))
        self._count(name, gradients, started)

    def attack_fab(self, norm: str) -> None:
        steps = self.budget.fab_steps
        targets = self.budget.fab_targets
        self.attack(f"fab {norm}", steps * targets, fab_targeted, norm=norm, num_steps=steps,
                    num_targets=targets)

    def attack_targets(self, name: str, attack: Callable, starts: Tensor | None, **options: object) -> Tensor:
        """Run one attack on every example and each of its targets, offer what it finds, and return that: [B * T, ...]."""
        started, count = time.monotonic(), self.targets.shape[1]
        x = self.x.repeat_interleave(count, dim=0)
        y = self.y.repeat_interleave(count)
        options |= {} if starts is None else {"start": starts}
        x_adv = attack(self.model, x, y, target=self.targets.flatten(), num_steps=self.budget.target_steps,
                       **options)
        if "norm" in options:
            x_adv = polish(self.model, x, y, x_adv, norm=options["norm"], num_steps=self.budget.polish_steps)
        for one in x_adv.unflatten(0, (-1, count)).unbind(dim=1):
            self.offer(name, one)
        self._count(name, count * (self.budget.target_steps + self.budget.polish_steps * ("norm" in options)),
                    started)
        return x_adv

    @torch.no_grad()
    def offer(self, name: str, x_adv: Tensor) -> None:
        """Check candidates once more, measure them in every norm, and keep those closer than before."""
        x_adv = x_adv.detach().to(self.x.dtype).clamp(0, 1)
        result = self.result
        if name not in result.attacks:
            result.attacks.append(name)
        with frozen(self.model) as bare:
            wrong = misclassified(bare(x_adv), self.y)
        for norm in NORMS:
            distance = torch.where(wrong, norm_of(x_adv.double() - self.x.double(), norm), torch.inf)
            better = distance < self.distance[norm]
            self.distance[norm] = torch.where(better, distance, self.distance[norm])
            self.nearest[norm] = choose(better, x_adv, self.nearest[norm])
            if norm in result.norms:
                nothing = torch.where(result.misclassified, 0.0, torch.inf).double()
                single = result.single[norm].setdefault(name, nothing)
                single[self.rows] = torch.minimum(single[self.rows], distance)
                result.winner[norm][self.rows[better]] = result.attacks.index(name)
                result.distance[norm][self.rows] = self.distance[norm]
                result.x_adv[norm][self.rows] = self.nearest[norm]

    def _count(self, name: str, gradients: int, started: float) -> None:
        self.result.gradients[name] = gradients
        self.result.seconds[name] = time.monotonic() - started
