"""The attacks of a report by name, with the settings of the papers' tables, and the ensembles made of them."""
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from attacks.apgd import apgd, apgd_targeted
from attacks.fab import fab_targeted
from attacks.fgsm import fgsm
from attacks.fmn import STEP_SIZES, fmn
from attacks.margin_decomposition import md, mdmt
from attacks.noise import example_keys
from attacks.pgd import cross_entropy, pgd
from attacks.reference import EXTRA, autoattack_reference, require_package
from attacks.spsa import spsa
from attacks.square import square
from attacks.until_broken import pgd_until_broken

# An ensemble breaks an example when a member does.
ENSEMBLES = {"autoattack": ("apgd-ce", "apgd-t", "fab-t", "square"),
             "mde": ("apgd-ce", "md", "mdmt", "fab-t")}
# The columns of the VIR tables.
VIR = ("fgsm", "pgd100", "cw", "fmn100", "autoattack", "mde", "square", "spsa")
REFERENCE = "autoattack-reference"  # the published package, an optional extra
SETS = {"zeng": (), "vir": VIR, "all": VIR}


@dataclass(frozen=True)
class Attack:
    """One attack as a report runs it."""

    run: Callable[[nn.Module, Tensor, Tensor, Tensor, int], Tensor]  # (model, x, y, index, restart) -> x_adv
    settings: dict = field(default_factory=dict)  # plain values for the reader of the result
    uses_gradients: bool = True
    minimal: bool = False      # looks for the closest adversary: one beyond epsilon is none, and no fault
    everyone: bool = False     # attacks what is misclassified without a perturbation too
    num_restarts: int = 1      # independent starts, of which the one of largest cross-entropy counts
    limit: int | None = None   # the first so many examples only
    refills: bool = False      # run takes batch_size too: how many it attacks at once, refilled as they fall
    whole: Callable | None = None  # run stops at the first success; this goes on to the attack's last step


def members_of(columns: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Column -> its attacks, for columns, ensembles and sets by name.  Raises ValueError for an unknown name."""
    names = dict.fromkeys(name for column in columns for name in SETS.get(column, (column,)))
    known = {**dict.fromkeys(_attacks(0.0, "linf", cross_entropy, None)), **ENSEMBLES}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown attack {unknown[0]!r}: choose from {', '.join([*known, *SETS])}")
    return {name: ENSEMBLES.get(name, (name,)) for name in names}


def strong_attacks(columns: dict[str, tuple[str, ...]], *, epsilon: float, norm: str, seed: int,
                   margin_loss: Callable, num_spsa_examples: int | None) -> dict[str, Attack]:
    """The attacks that the columns need, cheap ones first, each member once.

    margin_loss(logits, y) -> [B] is what the CW column maximises. Raises ValueError for an attack that is not
    defined in `norm`, and where the package of the published AutoAttack is wanted and missing.
    """
    wanted = {member for members in columns.values() for member in members}
    found = {}
    for name, (attack, traits) in _attacks(epsilon, norm, margin_loss, num_spsa_examples).items():
        if name in wanted:
            if norm not in traits.pop("norms", ("linf", "l2")):
                raise ValueError(f"the attack {name} is not defined in the norm {norm}")
            if name == REFERENCE:
                require_package()
            whole = _keyed(traits.pop("whole"), seed) if "whole" in traits else None
            found[name] = Attack(_keyed(attack, seed), whole=whole, **traits)
    return found


def weighted_attacks(attack: Callable, cross_entropy: Callable, weighted: Callable, alphas: tuple[float, ...],
                     num_restarts: int) -> dict[str, Attack]:
    """A_rob and A_tr_ALPHA on every example: attack(model, x, y, index, restart, loss_fn) on each one's objective."""
    losses = {"A_rob": cross_entropy}
    losses |= {f"A_tr_{alpha:g}": weighted(alpha) for alpha in dict.fromkeys(alphas)}
    return {name: Attack(lambda *args, loss_fn=loss_fn: attack(*args, loss_fn), everyone=True,
                         num_restarts=num_restarts) for name, loss_fn in losses.items()}


def probing_attack(seed: int) -> Callable:
    """`pgd` from random starts that belong to its `keys`, here the examples' indices in the data set."""
    return lambda *args, keys, **options: pgd(*args, keys=example_keys(keys, seed), **options)


def _keyed(attack: Callable, seed: int) -> Callable:
    def run(model: nn.Module, x: Tensor, y: Tensor, index: Tensor, restart: int, **options: object) -> Tensor:
        return attack(model, x, y, keys=example_keys(index, seed, restart), **options)

    return run


def _attacks(epsilon: float, norm: str, margin_loss: Callable, num_spsa_examples: int | None,
             ) -> dict[str, tuple[Callable, dict]]:
    """Name -> (attack(model, x, y, keys=) -> x_adv, traits), from cheap to dear."""
    ball = {"epsilon": epsilon, "norm": norm}

    def stepping(num_steps: int, loss_fn: Callable) -> tuple[Callable, dict]:
        steps = {"num_steps": num_steps, "step_size": epsilon / 8, "start": "uniform"}  # 1/255 at 8/255
        return partial(pgd_until_broken, **ball, **steps, loss_fn=loss_fn), {
            "settings": steps | {"counts": "the first misclassified iterate"}, "refills": True,
            "whole": partial(pgd, **ball, **steps, loss_fn=loss_fn)}

    return {
        "fgsm": (_without_keys(partial(fgsm, epsilon=epsilon)), {
            "settings": {"num_steps": 1, "start": "clean"}, "norms": ("linf",)}),
        "cw": stepping(20, margin_loss),
        "pgd100": stepping(100, cross_entropy),
        "fmn100": (_without_keys(partial(fmn, norm=norm)), {
            "settings": {"num_steps": 100, "step_size": STEP_SIZES[norm]}, "minimal": True}),
        "apgd-ce": (partial(apgd, **ball), {"settings": {"num_steps": 100}}),
        "apgd-t": (partial(apgd_targeted, **ball), {"settings": {"num_steps": 100}}),
        "md": (partial(md, **ball), {"settings": {"num_steps": 50}}),
        "mdmt": (partial(mdmt, **ball), {"settings": {"num_steps": 50}}),
        "fab-t": (partial(fab_targeted, **ball), {"settings": {"num_steps": 100}, "minimal": True}),
        "square": (partial(square, **ball), {"settings": {"num_queries": 5000}, "uses_gradients": False}),
        "spsa": (partial(spsa, epsilon=epsilon), {
            "settings": {"num_steps": 100, "num_samples": 256, "delta": 0.001, "lr": 0.01},
            "norms": ("linf",), "uses_gradients": False, "limit": num_spsa_examples}),
        REFERENCE: (_without_keys(partial(autoattack_reference, **ball)), {"settings": {"package": EXTRA}}),
    }


def _without_keys(attack: Callable) -> Callable:
    """An attack that uses no random numbers of ours."""
    return lambda model, x, y, keys: attack(model, x, y)
