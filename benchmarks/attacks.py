"""Hold our attacks against others' implementations: robust accuracy and processor time, same images.

The others are the published AutoAttack (pyautoattack, an optional extra), torchattacks (FGSM, PGD, SPSA),
foolbox (FMN) and a clone of MDAttack (CW, MD, MDMT); what is missing is named with the command that
installs it. The union of apgd-ce, md, mdmt and fab-t is the ensemble MDE; `spsa-short` is SPSA with a tenth
of its passes.

Each attack alone attacks every image; `autoattack` is the standard ensemble, each member on what the ones
before it left; `union` counts an image as robust if no attack measured here, alone, broke it. Our members
have the same random numbers alone as in the ensemble, which must therefore leave the images that the union
leaves. One checker counts for all sides: float32, in the ball, in [0, 1], misclassified. cpu_seconds are of
the process, so that other programs disturb them little; compare them on an idle machine all the same.

Sides: `ours`; `reference`, the other implementation on the same network, which is channels last with fused
layers; `published`, that one on the network as a checkpoint is loaded elsewhere: contiguous, layer by layer.

    python benchmarks/attacks.py --checkpoint runs/train_at_mnist/TIME/last.pt --num_examples 1000
    python benchmarks/attacks.py --checkpoint a.pt b.pt --seeds 0 1 2 --attacks autoattack --out ab.json
    python benchmarks/attacks.py --checkpoint a.pt --attacks fgsm pgd100 apgd-dlr fmn100
    python benchmarks/attacks.py --checkpoint a.pt --attacks cw apgd-ce md mdmt fab-t --md_attack MDAttack
"""
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: a script finds its own folder

import torch
from torch import Tensor, nn

from attacks.apgd import apgd
from attacks.autoattack import STANDARD, autoattack, confirmed
from attacks.catalogue import members_of, strong_attacks
from attacks.frozen import frozen, predict
from attacks.noise import example_keys
from attacks.reference import autoattack_reference
from attacks.spsa import spsa
from benchmarks import common
from benchmarks.forms import published_model
from benchmarks.others import RELEASED, SHORT, others, require_released
from harness.config import run_script
from harness.errors import UserError
from harness.training.precision import TrainingPrecision
from losses.margin import cw_loss

Name = Literal["apgd-ce", "apgd-t", "fab-t", "square", "autoattack", "apgd-dlr", "fgsm", "pgd100", "cw", "md",
               "mdmt", "fmn100", "spsa", "spsa-short"]


@dataclass(frozen=True)
class Config(common.AttackOptions):
    checkpoint: tuple[str, ...] = ()      # files of trained networks
    seeds: tuple[int, ...] = (0,)         # of the random numbers of both sides, one run each
    attacks: tuple[Name, ...] = ("apgd-ce", "apgd-t", "fab-t", "square")  # in this order
    sides: tuple[Literal["ours", "reference", "published"], ...] = ("ours", "reference")  # whose attacks run
    batch_size: int = 250                 # images at a time
    md_attack: str | None = None          # folder of a clone of MDAttack, for cw, md and mdmt


def ours(name: str, seed: int, batch_size: int, model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float,
         norm: str) -> Tensor:
    """Our attack of that name on the images x [B, C, H, W], `batch_size` at a time."""
    index, task = torch.arange(len(x), device=x.device), {"epsilon": epsilon, "norm": norm}
    keys, members = example_keys(index, seed), dict(STANDARD)
    if name == "autoattack":
        return autoattack(model, x, y, keys=keys, batch_size=batch_size, **task)
    if name in members:
        attack, keys = members[name], example_keys(keys, list(members).index(name))  # as in the ensemble
    elif name == "apgd-dlr":
        attack = partial(apgd, loss="dlr")
    elif name == "spsa-short":
        attack, task = partial(spsa, **SHORT), {"epsilon": epsilon}
    else:
        found = strong_attacks(members_of((name,)), seed=seed, margin_loss=cw_loss, num_spsa_examples=None,
                               **task)[name]
        return torch.cat([found.run(model, x[rows], y[rows], rows, 0) for rows in index.split(batch_size)])
    return torch.cat([attack(model, x[rows], y[rows], keys=keys[rows], **task)
                      for rows in index.split(batch_size)])


def reference(known: dict[str, Callable[..., Tensor]], name: str, seed: int, batch_size: int,
              model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, norm: str) -> Tensor:
    """Another's attack of that name, one of `known` or of the published AutoAttack."""
    if name not in known:
        members = {} if name == "autoattack" else {"members": (name,)}
        try:
            return autoattack_reference(model, x, y, seed=seed, batch_size=batch_size, epsilon=epsilon,
                                        norm=norm, **members)
        except ValueError as error:  # the extra is not installed
            raise UserError(str(error)) from error
    with frozen(model) as bare, torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.cat([known[name](bare, images, labels, epsilon=epsilon, norm=norm)
                          for images, labels in zip(x.split(batch_size), y.split(batch_size))])


def counted(robust: Tensor, cpu_seconds: float) -> dict[str, Any]:
    """What is said of one side: how many images are robust, in percent too, and processor time."""
    return {"robust": int(robust.sum()), "accuracy": 100.0 * robust.float().mean().item(),
            "cpu_seconds": cpu_seconds}


def measure(attack: Callable[..., Tensor], task: common.Task, correct: Tensor,
            norm: str) -> tuple[dict[str, Any], Tensor]:
    """Robust accuracy in percent and seconds of one attack, and which images are robust, [B] bool."""
    start, began = time.process_time(), time.perf_counter()
    x_adv = attack(task.model, task.x, task.y, epsilon=task.epsilon, norm=norm)
    seconds, wall = time.process_time() - start, time.perf_counter() - began
    robust = correct & ~confirmed(task.model, x_adv, task.x, task.y, epsilon=task.epsilon, norm=norm)
    return counted(robust, seconds) | {"seconds": wall}, robust


def compare(task: common.Task, seed: int, cfg: Config) -> list[dict[str, Any]]:
    """One row an attack, and one for the union of those run alone, with the figures of each side."""
    theirs = partial(reference, others(cfg.md_attack))
    correct = predict(task.model, task.x).argmax(1) == task.y
    standing, spent = dict.fromkeys(cfg.sides, correct), dict.fromkeys(cfg.sides, 0.0)  # of those run alone
    left, rows = {}, []  # by the ensemble
    tasks = dict.fromkeys(cfg.sides, task)
    if "published" in tasks:
        tasks["published"] = replace(task, model=published_model(task.model))
    for name in cfg.attacks:
        row = {"attack": name, "seed": seed}
        for side in cfg.sides:
            attack = partial(ours if side == "ours" else theirs, name, seed, cfg.batch_size)
            row[side], robust = measure(attack, tasks[side], correct, cfg.norm)
            if len(cfg.sides) > 1:
                show(row, side)  # the next one may take an hour
            if name == "autoattack":
                left[side] = robust
            else:
                standing[side] = standing[side] & robust
                spent[side] += row[side]["cpu_seconds"]
        rows.append(row)
        show(row, *cfg.sides)
    if set(cfg.attacks) != {"autoattack"}:
        union = {side: counted(robust, spent[side]) for side, robust in standing.items()}
        for side in left:
            union[side]["same_as_autoattack"] = torch.equal(standing[side], left[side])
        rows.append({"attack": "union", "seed": seed} | union)
        show(rows[-1], *cfg.sides)
    return rows


def show(row: dict[str, Any], *sides: str) -> None:
    cells = [f"{side} {row[side]['accuracy']:6.2f} % {row[side]['cpu_seconds']:8.1f} s" for side in sides]
    print(f"seed {row['seed']}  {row['attack']:<11} {'   '.join(cells)}", flush=True)


def check(cfg: Config) -> None:
    """Raise UserError for what cannot be compared, before ours has run for an hour."""
    if not cfg.checkpoint:
        raise UserError("name at least one --checkpoint")
    if cfg.sides == ("ours",):
        return
    if cfg.norm != "linf" and (found := [name for name in cfg.attacks if name in others(None)]):
        raise UserError(f"{found[0]} is compared in l_inf alone")
    for name in cfg.attacks:
        if name in RELEASED:
            require_released(cfg.md_attack, RELEASED[name][0])


def main(cfg: Config) -> None:
    check(cfg)
    out, results = common.out_file(cfg.out), []
    for path in map(Path, cfg.checkpoint):
        task = common.open_task(path, cfg)
        task = replace(task, model=TrainingPrecision(task.model, torch.float32).eval())
        about = {"checkpoint": str(path), "epsilon": task.epsilon, "norm": cfg.norm,
                 "num_examples": len(task.x)}
        for seed in cfg.seeds:
            results.append(about | {"rows": compare(task, seed, cfg)})
            common.write_json(out, {"results": results, "batch_size": cfg.batch_size,
                                    **common.facts(task.x.device)})


if __name__ == "__main__":
    run_script(main, Config)
