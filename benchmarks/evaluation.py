"""Time the attacks of an evaluation with and without leaving out the images that are already broken.

    compacted    as eval_*.py runs them: an image that is misclassified, without a perturbation or by a member
                 before, is not attacked; one that falls leaves the batch, which is filled again
    whole        every image goes through every step of every member towards every target; its first success
                 counts

The two take turns in one process, on the same images with the same random numbers; every figure is a median.
The verdicts must be the same.

    ratio        seconds of whole over seconds of compacted
    bound        1 / R, where the share R of the images is robust in the end: they take every step of either
    passes       images times forward passes; the ratio of these does not depend on the machine

    python benchmarks/evaluation.py --checkpoint last.pt --epsilon 0.36 --attacks pgd100 cw
    python benchmarks/evaluation.py --checkpoint last.pt --epsilon 0.34 --attacks autoattack --repeats 1
"""
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: a script finds its own folder

import torch
from torch import Tensor, nn

from attacks import apgd, fab
from attacks.autoattack import STANDARD, STANDING, confirmed, run_ensemble
from attacks.frozen import frozen, predict
from attacks.geometry import radii, random_point
from attacks.noise import example_keys
from attacks.pgd import cross_entropy, pgd
from attacks.standing import Standing
from attacks.until_broken import pgd_until_broken
from benchmarks import common
from harness.config import run_script
from harness.errors import UserError
from harness.evaluation.predictions import BatchInvariant
from losses.margin import cw_loss, logit_margin, misclassified, ranked_targets

STEPPING = {"pgd100": (100, cross_entropy), "cw": (20, cw_loss)}  # steps of epsilon / 8; what they maximise
NUM_TARGETS = 9
COLUMNS = (("attack", "attack", "<12"), ("epsilon", "epsilon", ">9.4g"),
           ("robust %", "robust_percent", ">10.2f"), ("compacted s", "compacted_seconds", ">13.2f"),
           ("whole s", "whole_seconds", ">10.2f"), ("ratio", "ratio", ">8.2f"), ("bound", "bound", ">8.2f"),
           ("passes", "passes_ratio", ">8.2f"))


@dataclass(frozen=True)
class Config(common.AttackOptions):
    checkpoint: str = ""                  # file of a trained network
    attacks: tuple[Literal["pgd100", "cw", "autoattack"], ...] = ("pgd100", "cw", "autoattack")  # which ones
    num_examples: int | None = 256        # the first so many test images
    batch_size: int = 128                 # images at a time
    repeats: int = 3                      # timed runs of each side
    seed: int = 0                         # of the random numbers


class Counted(nn.Module):
    """The network as attacks see it; `passes` counts images times forward passes."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.passes = BatchInvariant(network), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += len(x)
        return self.network(x)


# ---- compacted: which images are robust, [N] bool ----------------------------------------------------------

def compacted_steps(num_steps: int, loss_fn: Callable, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor,
                    batch_size: int, *, epsilon: float, norm: str) -> Tensor:
    """PGD of the correctly classified images, in one batch that is filled again."""
    robust = classified(model, x, y, batch_size)
    rows = robust.nonzero().squeeze(1)
    x_adv = pgd_until_broken(model, x[rows], y[rows], epsilon=epsilon, norm=norm, num_steps=num_steps,
                             step_size=epsilon / 8, loss_fn=loss_fn, keys=keys[rows], batch_size=batch_size)
    robust[rows] = classified(model, x_adv, y[rows], batch_size)
    return robust


def compacted_ensemble(model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, batch_size: int, *,
                       epsilon: float, norm: str) -> Tensor:
    """Our AutoAttack as it is."""
    _, standing = run_ensemble(model, x, y, STANDARD, keys=keys, batch_size=batch_size, epsilon=epsilon,
                               norm=norm)
    return standing == STANDING


def classified(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    """Which images are classified correctly, [N] bool, `batch_size` at a time."""
    right = torch.ones_like(y, dtype=torch.bool)
    for rows in torch.arange(len(x), device=x.device).split(batch_size) if len(x) else ():
        right[rows] = ~misclassified(predict(model, x[rows]), y[rows])
    return right


# ---- whole -------------------------------------------------------------------------------------------------

def whole_steps(num_steps: int, loss_fn: Callable, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor,
                batch_size: int, *, epsilon: float, norm: str) -> Tensor:
    """PGD of all images to the last step; all iterates of a robust one but the random start are right."""
    robust = classified(model, x, y, batch_size)
    for rows in torch.arange(len(x), device=x.device).split(batch_size):
        seen: list[Tensor] = []

        def watched(logits: Tensor, target: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(misclassified(logits.detach(), target))
            return loss_fn(logits, target)

        x_adv = pgd(model, x[rows], y[rows], epsilon=epsilon, norm=norm, num_steps=num_steps,
                    step_size=epsilon / 8, loss_fn=watched, keys=keys[rows])
        seen.append(misclassified(predict(model, x_adv), y[rows]))
        robust[rows] &= ~torch.stack(seen[1:]).any(0)
    return robust


def whole_ensemble(model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, batch_size: int, *,
                   epsilon: float, norm: str) -> Tensor:
    """Every member of AutoAttack on every image, towards every target."""
    robust = classified(model, x, y, batch_size)
    members = {"apgd-ce": apgd_of_all, "apgd-t": every_apgd_target, "fab-t": every_fab_target}
    with nobody_leaves():
        for number, (name, attack) in enumerate(STANDARD):
            for rows in torch.arange(len(x), device=x.device).split(batch_size):
                found = members.get(name, attack)(model, x[rows], y[rows], epsilon=epsilon, norm=norm,
                                                  keys=example_keys(keys[rows], number))
                robust[rows] &= ~confirmed(model, found, x[rows], y[rows], epsilon=epsilon, norm=norm)
    return robust


@contextmanager
def nobody_leaves() -> Iterator[None]:
    """Within it the searches of APGD, FAB and Square keep the images that they are done with."""
    keep = Standing.keep

    def keep_all(self: Standing, standing: Tensor, *results: tuple[Tensor, Tensor]) -> bool:
        for whole, values in results:
            whole[self.row] = values
        return bool(standing.any())

    Standing.keep = keep_all
    try:
        yield
    finally:
        Standing.keep = keep


def apgd_of_all(model: nn.Module, x: Tensor, y: Tensor, *, keys: Tensor, epsilon: float, norm: str,
                num_steps: int = 100) -> Tensor:
    """`attacks.apgd.apgd`, of the images too that are misclassified without a perturbation."""
    radius = radii(epsilon, x)
    start = random_point(x, radius, norm, keys)
    with frozen(model) as bare:
        return apgd._ascend(bare, x, y, y, radius, norm, num_steps, start, apgd.checked_loss("ce"))


def every_apgd_target(model: nn.Module, x: Tensor, y: Tensor, *, keys: Tensor, epsilon: float, norm: str,
                      num_steps: int = 100) -> Tensor:
    """`attacks.apgd.apgd_targeted`, going on with the images that a target has fooled."""
    with frozen(model) as bare:
        logits = bare(x)
        x_adv, standing = x.clone(), ~misclassified(logits, y)
        for rank, target in enumerate(ranked_targets(logits, y, NUM_TARGETS).T):
            found = apgd._attack_towards(bare, x, y, target, radii(epsilon, x), norm, num_steps,
                                         example_keys(keys, rank))
            x_adv[standing] = found[standing]
            standing &= ~misclassified(predict(bare, found), y)
    return x_adv


def every_fab_target(model: nn.Module, x: Tensor, y: Tensor, *, keys: Tensor, epsilon: float, norm: str,
                     num_steps: int = 100) -> Tensor:
    """`attacks.fab.fab_targeted`, going on with the images for which a point within epsilon was found."""
    enough = radii(epsilon, x).flatten()
    with frozen(model) as bare:
        logits = predict(bare, x)
        margin = logit_margin(logits, y)
        x_adv, distance = x.clone(), torch.full_like(enough, torch.inf)
        for target in ranked_targets(logits, y, NUM_TARGETS).T:
            found, reached = fab._walk_to(bare, x, y, target, enough, norm, num_steps)
            found, reached = fab._search(bare, x, y, found, reached, margin, norm)
            nearer = (distance > enough) & (reached < distance)
            x_adv[nearer], distance[nearer] = found[nearer], reached[nearer]
    return x_adv


# ---- the comparison ----------------------------------------------------------------------------------------

SIDES: dict[str, dict[str, Callable[..., Tensor]]] = {
    name: {"compacted": partial(compacted_steps, *setting), "whole": partial(whole_steps, *setting)}
    for name, setting in STEPPING.items()}
SIDES["autoattack"] = {"compacted": compacted_ensemble, "whole": whole_ensemble}


def compare(name: str, model: nn.Module, x: Tensor, y: Tensor, cfg: Config, epsilon: float) -> dict[str, Any]:
    """Both sides of one attack in turns, and whether their verdicts are the same."""
    counted, keys = Counted(model), example_keys(torch.arange(len(x), device=x.device), cfg.seed)
    seconds, passes, robust = {"compacted": [], "whole": []}, {}, {}
    for _ in range(cfg.repeats):
        for side, attack in SIDES[name].items():
            counted.passes, started = 0, common.clock(x.device)
            found = attack(counted, x, y, keys, cfg.batch_size, epsilon=epsilon, norm=cfg.norm)
            seconds[side].append(common.clock(x.device) - started)
            passes[side] = counted.passes
            if not torch.equal(robust.setdefault(side, found), found):
                raise UserError(f"{name}, {side}: two runs on the same images have different verdicts")
    share = float(robust["compacted"].double().mean())
    different = int((robust["compacted"] != robust["whole"]).sum())
    compacted, whole = (statistics.median(seconds[side]) for side in ("compacted", "whole"))
    return {"attack": name, "epsilon": epsilon, "norm": cfg.norm, "num_examples": len(x),
            "robust_percent": 100 * share, "verdicts_equal": not different, "verdicts_different": different,
            "compacted_seconds": compacted, "whole_seconds": whole, "ratio": whole / compacted,
            "bound": 1 / share if share else None, "passes": passes,
            "passes_ratio": passes["whole"] / passes["compacted"], "seconds": seconds}


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    verdicts = "the same" if row["verdicts_equal"] else f"{row['verdicts_different']} DIFFERENT"
    return f"{common.line(COLUMNS, row)}  {verdicts}"


def main(cfg: Config) -> None:
    if not cfg.checkpoint:
        raise UserError("name a --checkpoint")
    if cfg.repeats < 1:
        raise UserError("--repeats needs at least 1")
    out, task = common.out_file(cfg.out), common.open_task(Path(cfg.checkpoint), cfg)
    print(f"{common.head(COLUMNS)}  verdicts", flush=True)
    rows: list[dict[str, Any]] = []
    for name in cfg.attacks:
        rows.append(compare(name, task.model, task.x, task.y, cfg, task.epsilon))
        print(line(rows[-1]), flush=True)
        common.write_json(out, {
            "rows": rows, "checkpoint": str(Path(cfg.checkpoint)), "dataset": task.dataset,
            "batch_size": cfg.batch_size, "repeats": cfg.repeats, "seed": cfg.seed,
            **common.facts(task.x.device)})


if __name__ == "__main__":
    run_script(main, Config)
