"""Minimal distances as the minimum over a pool of attacks: no single one is close to the truth on every
network.

Every attack below gives an upper bound of the distance to the nearest adversary; so does their minimum. Where
gradients mislead, it rests on the walk, which asks for none, and on what gradients make of where it ends.
"""
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from attacks.alma import alma
from attacks.apgd import NORMS as APGD_NORMS
from attacks.bisection import apgd_bisection, pgd_bisection
from attacks.checks import check_classes, check_keys
from attacks.ddn import ddn
from attacks.fab import fab_targeted
from attacks.fmn import fmn
from attacks.frozen import frozen, predict
from attacks.geometry import NORMS, choose, norm_of
from attacks.minimal import check_arguments
from attacks.noise import example_keys
from attacks.pdpgd import pdpgd
from attacks.polish import polish
from attacks.walk import walk
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
    num_queries: int      # of the walk in l_inf; a fifth of them in l_2 and l_1
    num_walks: int        # of as many queries in l_inf that begin at the image
    thorough: bool = False  # FAB in every norm, targeted attacks in l_2 and bisection by targeted APGD too


BUDGETS = {
    "fast": Budget(num_steps=100, target_steps=50, num_targets=2, num_rounds=6, round_steps=20,
                   polish_steps=20, num_queries=500, num_walks=0),
    "standard": Budget(num_steps=200, target_steps=100, num_targets=4, num_rounds=8, round_steps=40,
                       polish_steps=40, num_queries=2000, num_walks=3),
    "strong": Budget(num_steps=1000, target_steps=300, num_targets=9, num_rounds=10, round_steps=100,
                     polish_steps=100, num_queries=10000, num_walks=5,
                     thorough=True),
}

# Each norm's attacks begin at the closest adversary in another norm: those met there lie in other basins, and
# in l_2 and l_1 the ones of l_inf are the best there are where gradients mislead.
FROM = {"linf": "l2", "l2": "linf", "l1": "l2"}
BEGIN = {"linf": (pdpgd,), "l2": (alma,), "l1": (pdpgd, alma)}
TARGETED = {"linf": pdpgd, "l2": alma, "l1": pdpgd}
TARGETED_ALWAYS = ("linf", "l1")
# A second chain begins where FAB in l_2 ends, and goes from end to end: it comes to other basins.
SECOND = {"l2": (alma,), "l1": (alma, pdpgd)}
# Then a walk goes on from the closest in the norm itself, and these from where it ends.
SMALL_STEPS = partial(pdpgd, step_size=0.02), partial(pdpgd, step_size=0.01)
REFINE = {"linf": SMALL_STEPS, "l2": (alma,), "l1": (alma, pdpgd)}
BACK = {"l2": "l1", "linf": "l2"}  # once more, from the norm that came later


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
                      starts: Sequence[Tensor] = (), candidates: dict[str, Tensor] | None = None,
                      extra: dict[str, tuple[Callable, int]] | None = None) -> MinimalDistances:
    """Attack every correctly classified example in every norm and keep its closest adversary.

    First DDN in l_2. Then norm by norm, l_inf, l_2, l_1, up to the last that is asked for: PGD with bisection
    in l_inf; PDPGD or ALMA from the closest adversary in another norm, in l_2 and l_1 also from where FAB
    ends; FMN from `starts`; the attacks on `num_targets` classes; the walk, which needs no gradient, and
    PDPGD or ALMA again from where it ends; in l_inf the same from the image itself, `num_walks` times. At
    last the norms are gone through backwards, and the best of each is polished. Before a candidate counts it
    is clamped to [0, 1] and classified once more, in eval mode and the precision of x; only misclassified
    ones count. Each is measured in all `norms` in float64, so d_linf <= d_l2 <= d_l1 holds of the results.

    x: [B, C, H, W] in [0, 1]; y: [B]; budget: a name in BUDGETS or a Budget; keys: [B] of
    `attacks.noise.example_keys` for the random start of PGD, which else begins at x, and for the walk;
    starts: images of other classes [B, C, H, W], which are candidates, and from which FMN begins; candidates:
    name -> what another attack found, [B, C, H, W], x where it found nothing; extra: name -> (attack (model,
    x, y, *, norm) -> x_adv, gradients an example), run in every norm. Nothing is random but by the keys: an
    example's result does not depend on the batch beyond rounding. Raises ValueError for an unknown budget or
    norm, and as `check_arguments` does.
    """
    if isinstance(budget, str) and budget not in BUDGETS:
        raise ValueError(f"unknown budget {budget!r}: choose one of {', '.join(BUDGETS)}")
    budget = BUDGETS[budget] if isinstance(budget, str) else budget
    for norm in norms:
        check_arguments(x, y, norm, budget.num_steps)
    logits = predict(model, x)
    check_classes(y, logits)
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
        pool.run([start.detach().clamp(0, 1)[rows] for start in starts],
                 {name: one[rows] for name, one in (candidates or {}).items()},
                 None if keys is None else keys[rows], extra or {})
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
        self.targets = self.aimed = None
        self.second = self.x  # where the second chain has come to
        if budget.num_targets:
            self.targets = ranked_targets(predict(model, self.x), self.y, budget.num_targets)  # [B, T]

    def run(self, starts: list[Tensor], candidates: dict[str, Tensor], keys: Tensor | None,
            extra: dict[str, tuple[Callable, int]]) -> None:
        """Every attack of the budget, `extra` after those of each norm, and the polish."""
        steps = self.budget.num_steps
        known = {f"start {number}": image for number, image in enumerate(starts)} | candidates
        for name, image in known.items():
            self.attack(name, 0, lambda *_, image=image: image)
        self.attack("ddn", steps, ddn, num_steps=steps)
        self.aimed = self.attack_targets("ddn targeted", ddn) if self.budget.num_targets else None
        chain = NORMS[:1 + max(map(NORMS.index, self.result.norms))]
        for norm in chain:
            self.attack_in(norm, starts, keys)
            for name, (attack, gradients) in extra.items():
                self.attack(f"{name} {norm}", gradients, attack, norm=norm)
        for norm, before in BACK.items():
            if before in chain:
                self.descend(norm, BEGIN[norm], before, f"from {before} again")
        for norm in self.result.norms:
            self.attack(f"polish {norm}", self.budget.polish_steps, polish, norm=norm,
                        num_steps=self.budget.polish_steps, x_adv=self.nearest[norm])

    def attack_in(self, norm: str, starts: list[Tensor], keys: Tensor | None) -> None:
        """The attacks of one norm, from the closest adversaries of all that ran before."""
        budget = self.budget
        if norm == "linf":
            self.attack("bisection linf", budget.num_rounds * budget.round_steps, pgd_bisection,
                        num_steps=budget.round_steps, num_rounds=budget.num_rounds, keys=keys)
        self.descend(norm, BEGIN[norm], FROM[norm], f"from {FROM[norm]}")
        self.go_on_with_second_chain(norm)
        for number, start in enumerate(starts):
            self.attack(f"fmn {norm} from start {number}", budget.num_steps, fmn, norm=norm,
                        num_steps=budget.num_steps, start=start)
        if budget.thorough:
            self.attack_thoroughly(norm, keys)
        if budget.num_targets and (budget.thorough or norm in TARGETED_ALWAYS):
            self.attack_targets(f"{TARGETED[norm].__name__} {norm} targeted", TARGETED[norm], norm=norm,
                                start=self.aimed)
        self.attack(f"walk {norm}", 0, walk, norm=norm, keys=keys, start=self.nearest[norm],
                    num_queries=budget.num_queries // (1 if norm == "linf" else 5))
        self.descend(norm, REFINE[norm], norm, "from the walk")
        if norm == "linf":
            self.walk_from_the_image(keys)

    def descend(self, norm: str, attacks: tuple[Callable, ...], source: str, note: str) -> None:
        """Each of the attacks in `norm`, from the closest adversary in the norm `source`."""
        for attack in attacks:
            self.go_on(norm, (attack,), self.nearest[source], note)

    def go_on(self, norm: str, attacks: tuple[Callable, ...], start: Tensor, note: str) -> Tensor:
        """The attacks in `norm`, the first from `start`, each other from where the one before ends."""
        for attack in attacks:
            name = getattr(attack, "func", attack).__name__
            start = self.attack(f"{name} {norm} {note}", self.budget.num_steps, attack, norm=norm,
                                num_steps=self.budget.num_steps, start=start)
        return start

    def go_on_with_second_chain(self, norm: str) -> None:
        """FAB in l_2; then from its end the attacks of SECOND, each from the end of the one before."""
        budget = self.budget
        if norm == "l2":
            targets = max(1, budget.num_targets)
            self.second = self.attack("fab l2", budget.round_steps * targets, fab_targeted, norm=norm,
                                      num_steps=budget.round_steps, num_targets=targets)
        self.second = self.go_on(norm, SECOND.get(norm, ()), self.second, "from fab")

    def walk_from_the_image(self, keys: Tensor | None) -> None:
        """Walks in l_inf from the image itself, each to another basin, and PDPGD from where each ends."""
        budget, keys = self.budget, check_keys(keys, self.x)
        for number in range(1, 1 + budget.num_walks):
            end = self.attack("walk linf from the image", 0, walk, start=self.x,
                              keys=example_keys(keys, number), num_queries=budget.num_queries)
            self.go_on("linf", REFINE["linf"], end, "from that walk")

    def attack_thoroughly(self, norm: str, keys: Tensor | None) -> None:
        """What gains little for its time: FAB in the other norms too, and bisection by targeted APGD."""
        budget, targets = self.budget, self.budget.num_targets
        if norm != "l2":
            self.attack(f"fab {norm}", budget.round_steps * targets, fab_targeted, norm=norm,
                        num_steps=budget.round_steps, num_targets=targets)
        if norm in APGD_NORMS:
            gradients = budget.num_rounds * targets * (budget.round_steps + 1)
            self.attack(f"apgd-t bisection {norm}", gradients, apgd_bisection, norm=norm,
                        num_steps=budget.round_steps, num_rounds=budget.num_rounds, num_targets=targets,
                        upper=self.distance[norm], keys=keys)

    def attack(self, name: str, gradients: int, attack: Callable, **options: object) -> Tensor:
        """Run one attack on every example, offer what it finds, and return that."""
        started = time.monotonic()
        x_adv = attack(self.model, self.x, self.y, **options)
        self.offer(name, x_adv)
        self._count(name, gradients, started)
        return x_adv

    def attack_targets(self, name: str, attack: Callable, **options: object) -> Tensor:
        """Run one attack on every example and target, offer what it finds, and return that: [B * T, ...]."""
        started, count = time.monotonic(), self.targets.shape[1]
        x = self.x.repeat_interleave(count, dim=0)
        y = self.y.repeat_interleave(count)
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
                number = result.attacks.index(name)
                result.winner[norm][self.rows] = torch.where(better, number, result.winner[norm][self.rows])
                result.distance[norm][self.rows] = self.distance[norm]
                result.x_adv[norm][self.rows] = self.nearest[norm]

    def _count(self, name: str, gradients: int, started: float) -> None:
        self.result.gradients[name] = self.result.gradients.get(name, 0) + gradients
        self.result.seconds[name] = self.result.seconds.get(name, 0.0) + time.monotonic() - started
