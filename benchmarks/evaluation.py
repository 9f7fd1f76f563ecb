"""Time the attacks of an evaluation with and without leaving out the images that are already broken; the verdicts must be the same.

    compacted    as eval_*.py runs them: an image that is misclassified, without a perturbation or by a member before, is not attacked;
                 one that falls leaves the batch, which is filled again from those that wait
    whole        every image goes through every step of every member towards every target; its first success counts

The two take turns in one process, on the same images with the same random numbers; every figure is a median.

    ratio        seconds of whole over seconds of compacted
    bound        1 / R, where the share R of the images is robust in the end: those go through every step of either
    passes       images times forward passes; the ratio of these does not depend on the machine

    python benchmarks/evaluation.py --checkpoint runs/train_at_mnist/TIME/last.pt --epsilon 0.36 --attacks pgd100 cw
    python benchmarks/evaluation.py --checkpoint runs/train_at_mnist/TIME/last.pt --epsilon 0.34 --attacks autoattack --repeats 1
"""
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path, the repository's root is not

import torch
from torch import Tensor, nn

from attacks import apgd, fab, square
from attacks.autoattack import STANDARD, STANDING, confirmed, run_ensemble
from attacks.frozen import frozen, predict
from attacks.geometry import radii, random_point
from attacks.noise import example_keys
from attacks.pgd import cross_entropy, pgd
from attacks.until_broken import pgd_until_broken
from harness.config import run_script
from harness.datasets.batches import first_examples, to_unit
from harness.device import choose_device, command_line, environment
from harness.errors import UserError
from harness.evaluation.predictions import BatchInvariant
from harness.evaluation.report import output_path
from harness.evaluation.subject import Protocol, open_subject, radius_of
from harness.folder import write_text
from harness.training.precision import to_device
from losses.margin import cw_loss, logit_margin, misclassified, ranked_targets
from models import build_model

PROTOCOL = Protocol(dataset="mnist", channels=1, epsilon=0.3, step_ratio=30)
STEPPING = {"pgd100": (100, cross_entropy), "cw": (20, cw_loss)}  # steps of epsilon / 8, and what they maximise


@dataclass(frozen=True)
class Config:
    checkpoint: str = ""                         # file of a trained network
    arch: str | None = None                      # network of a foreign checkpoint: a model's name, or file.py:callable
    dataset: str | None = None                   # data set or image folder; default: the checkpoint's
    epsilon: float | None = None                 # radius, pixels in [0, 1]; default: the checkpoint's
    norm: Literal["linf", "l2"] = "linf"         # of the radius
    num_examples: int | None = 256               # the first so many test images
    attacks: tuple[Literal["pgd100", "cw", "autoattack"], ...] = ("pgd100", "cw", "autoattack")  # in this order
    repeats: int = 3                             # timed runs of each side
    batch_size: int = 128                        # images at a time
    seed: int = 0                                # of the random numbers
    data_dir: str | None = None                  # folder of the data sets; default: the checkpoint's, or data
    out: str | None = None                       # JSON file to write, never over another
    device: str = "auto"                         # auto, cpu, or an accelerator by its name in torch


class Counted(nn.Module):
    """The network as attacks see it; `passes` counts images times forward passes."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.passes = BatchInvariant(network), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += len(x)
        return self.network(x)


# ---- compacted: which images are robust, [N] bool ----------------------------------------------------------------------------------

def compacted_steps(num_steps: int, loss_fn: Callable, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, batch_size: int,
                    **task: object) -> Tensor:
    """PGD of the correctly classified images, in one batch that is filled again."""
    rows = (~whole_wrong(model, x, y, batch_size)).nonzero().squeeze(1)
    x_adv = pgd_until_broken(model, x[rows], y[rows], **task, num_steps=num_steps, step_size=task["epsilon"] / 8, loss_fn=loss_fn,
                             keys=keys[rows], batch_size=batch_size)
    robust = torch.zeros_like(y, dtype=torch.bool)
    robust[rows] = ~whole_wrong(model, x_adv, y[rows], batch_size)
    return robust


def compacted_ensemble(model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, batch_size: int, **task: object) -> Tensor:
    """Our AutoAttack as it is."""
    return run_ensemble(model, x, y, STANDARD, keys=keys, batch_size=batch_size, **task)[1] == STANDING


def whole_wrong(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    """Which images are misclassified, [N] bool, `batch_size` at a time."""
    parts = [misclassified(predict(model, part), labels) for part, labels in zip(x.split(batch_size), y.split(batch_size)) if len(part)]
    return torch.cat(parts) if parts else torch.zeros_like(y, dtype=torch.bool)


# ---- whole ---------------------------------------------------------------------------------------------------------------------

def whole_steps(num_steps: int, loss_fn: Callable, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, batch_size: int,
                **task: object) -> Tensor:
    """PGD of all images to the last step; one is robust if it and all its iterates but the random start are classified correctly."""
    robust = ~whole_wrong(model, x, y, batch_size)
    for rows in torch.arange(len(x), device=x.device).split(batch_size):
        seen = []

        def watched(logits: Tensor, target: Tensor, seen: list = seen) -> Tensor:
            seen.append(misclassified(logits.detach(), target))
            return loss_fn(logits, target)

        x_adv = pgd(model, x[rows], y[rows], **task, num_steps=num_steps, step_size=task["epsilon"] / 8, loss_fn=watched, keys=keys[rows])
        seen.append(misclassified(predict(model, x_adv), y[rows]))
        robust[rows] &= ~torch.stack(seen[1:]).any(0)
    return robust


def whole_ensemble(model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, batch_size: int, **task: object) -> Tensor:
    """Every member of AutoAttack on every image, towards every target."""
    robust = ~whole_wrong(model, x, y, batch_size)
    members = {"apgd-ce": apgd_of_all, "apgd-t": every_apgd_target, "fab-t": every_fab_target}
    with nobody_leaves():
        for number, (name, attack) in enumerate(STANDARD):
            for rows in torch.arange(len(x), device=x.device).split(batch_size):
                found = members.get(name, attack)(model, x[rows], y[rows], keys=example_keys(keys[rows], number), **task)
                robust[rows] &= ~confirmed(model, found, x[rows], y[rows], **task)
    return robust


@contextmanager
def nobody_leaves() -> Iterator[None]:
    """Within it the searches of APGD, FAB and Square keep the images that they are done with, at the points that count."""
    searches = [(search, search.keep) for search in (apgd._Walk, fab._Walk, square._Search)]
    try:
        for search, _ in searches:
            search.keep = lambda self, rows: None
        yield
    finally:
        for search, keep in searches:
            search.keep = keep


def apgd_of_all(model: nn.Module, x: Tensor, y: Tensor, *, keys: Tensor, epsilon: float, norm: str, num_steps: int = 100) -> Tensor:
    """`attacks.apgd.apgd`, of the images too that are misclassified without a perturbation."""
    radius = radii(epsilon, x)
    with frozen(model) as bare:
        return apgd._ascend(bare, x, y, y, radius, norm, num_steps, random_point(x, radius, norm, keys), apgd._loss_function("ce"))


def every_apgd_target(model: nn.Module, x: Tensor, y: Tensor, *, keys: Tensor, epsilon: float, norm: str, num_steps: int = 100,
                      num_targets: int = 9) -> Tensor:
    """`attacks.apgd.apgd_targeted`, going on with the images that a target has fooled."""
    with frozen(model) as bare:
        logits = bare(x)
        targets, x_adv, standing = ranked_targets(logits, y, num_targets), x.clone(), ~misclassified(logits, y)
        for rank in range(targets.shape[1]):
            found = apgd._attack_towards(bare, x, y, targets[:, rank], radii(epsilon, x), norm, num_steps, example_keys(keys, rank))
            x_adv[standing] = found[standing]
            standing &= ~misclassified(predict(bare, found), y)
    return x_adv


def every_fab_target(model: nn.Module, x: Tensor, y: Tensor, *, keys: Tensor, epsilon: float, norm: str, num_steps: int = 100,
                     num_targets: int = 9) -> Tensor:
    """`attacks.fab.fab_targeted`, going on with the images for which a target has led to a point within epsilon."""
    enough = radii(epsilon, x).flatten()
    with frozen(model) as bare:
        logits = predict(bare, x)
        margin, targets = logit_margin(logits, y), ranked_targets(logits, y, num_targets)
        x_adv, distance = x.clone(), torch.full_like(enough, torch.inf)
        for rank in range(targets.shape[1]):
            found, reached = fab._walk_to(bare, x, y, targets[:, rank], enough, norm, num_steps)
            found, reached = fab._search(bare, x, y, found, reached, margin, norm)
            nearer = (distance > enough) & (reached < distance)
            x_adv[nearer], distance[nearer] = found[nearer], reached[nearer]
    return x_adv


# ---- the comparison ----------------------------------------------------------------------------------------------------------------

SIDES: dict[str, dict[str, Callable]] = {
    name: {"compacted": partial(compacted_steps, *setting), "whole": partial(whole_steps, *setting)} for name, setting in STEPPING.items()}
SIDES["autoattack"] = {"compacted": compacted_ensemble, "whole": whole_ensemble}


def clock(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def compare(name: str, model: nn.Module, x: Tensor, y: Tensor, cfg: Config, epsilon: float) -> dict:
    """Both sides of one attack in turns, and whether their verdicts are the same."""
    counted, keys = Counted(model), example_keys(torch.arange(len(x), device=x.device), cfg.seed)
    seconds, passes, robust = {"compacted": [], "whole": []}, {}, {}
    for _ in range(cfg.repeats):
        for side, attack in SIDES[name].items():
            counted.passes, started = 0, clock(x.device)
            found = attack(counted, x, y, keys, cfg.batch_size, epsilon=epsilon, norm=cfg.norm)
            seconds[side].append(clock(x.device) - started)
            passes[side] = counted.passes
            robust.setdefault(side, found)
            if not torch.equal(robust[side], found):
                raise UserError(f"{name}, {side}: two runs on the same images have different verdicts")
    share = float(robust["compacted"].double().mean())
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {"attack": name, "epsilon": epsilon, "norm": cfg.norm, "num_examples": len(x), "robust_percent": 100 * share,
            "verdicts_equal": torch.equal(robust["compacted"], robust["whole"]),
            "verdicts_different": int((robust["compacted"] != robust["whole"]).sum()),
            "compacted_seconds": medians["compacted"], "whole_seconds": medians["whole"], "ratio": medians["whole"] / medians["compacted"],
            "bound": 1 / share if share else None, "passes": passes, "passes_ratio": passes["whole"] / passes["compacted"],
            "seconds": seconds}


HEADER = f"{'attack':<12}{'epsilon':>9}{'robust %':>10}{'compacted s':>13}{'whole s':>10}{'ratio':>8}{'bound':>8}{'passes':>8}  verdicts"


def line(row: dict) -> str:
    """One line of the table."""
    bound = f"{row['bound']:.2f}" if row["bound"] else "-"
    verdicts = "the same" if row["verdicts_equal"] else f"{row['verdicts_different']} DIFFERENT"
    return (f"{row['attack']:<12}{row['epsilon']:>9.4g}{row['robust_percent']:>10.2f}{row['compacted_seconds']:>13.2f}"
            f"{row['whole_seconds']:>10.2f}{row['ratio']:>8.2f}{bound:>8}{row['passes_ratio']:>8.2f}  {verdicts}")


def main(cfg: Config) -> None:
    if not cfg.checkpoint:
        raise UserError("name a --checkpoint")
    if cfg.repeats < 1:
        raise UserError("--repeats needs at least 1")
    out = output_path(cfg.out, Path(cfg.out), whole_run=False) if cfg.out else None
    device, path = choose_device(cfg.device), Path(cfg.checkpoint)
    subject = open_subject(path.stem, path, build_model, arch=cfg.arch, dataset=cfg.dataset, data_dir=cfg.data_dir,
                           default=PROTOCOL.dataset)
    epsilon = radius_of(subject, PROTOCOL, cfg.epsilon)
    rows = []
    model = to_device(subject.model, device)
    test = first_examples(subject.split, cfg.num_examples).to(device)
    x, y = to_unit(test.images), test.labels
    print(f"{path}: {len(x):,} test images of {subject.dataset}, {cfg.norm} {epsilon:g}\n{HEADER}", flush=True)
    for name in cfg.attacks:
        rows.append(compare(name, model, x, y, cfg, epsilon))
        print(line(rows[-1]), flush=True)
        if out:
            write_text(out, json.dumps({
                "rows": rows, "checkpoint": str(path), "dataset": subject.dataset, "batch_size": cfg.batch_size, "repeats": cfg.repeats,
                "seed": cfg.seed, "command": command_line(), "date": time.strftime("%Y-%m-%d"), "environment": environment(device)},
                indent=2) + "\n")


if __name__ == "__main__":
    run_script(main, Config)
