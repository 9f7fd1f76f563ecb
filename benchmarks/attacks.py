"""Hold our attacks against others' implementations: robust accuracy and processor time, same images.

Those of AutoAttack against the published package (pyautoattack, an optional extra), FGSM, PGD and SPSA against torchattacks, FMN against
foolbox, CW, MD and MDMT against a clone of MDAttack (--md_attack FOLDER); what is missing is named with the command that installs it.
`spsa-short` is SPSA with a tenth of its passes; the union of apgd-ce, md, mdmt and fab-t is the ensemble MDE.

Each attack alone attacks every image; `autoattack` is the standard ensemble, each member on what the ones before it left; `union` counts an
image as robust if no attack measured here, alone, broke it. Our members have the same random numbers alone as in the ensemble, which must
therefore leave the very images that the union leaves; the seconds of the two show what leaving out broken images saves. One checker counts
for all sides: float32, in the ball, in [0, 1], misclassified. cpu_seconds are of the process, so that other programs disturb them little;
compare them on an idle machine all the same.

Sides: `ours`; `reference`, the other implementation on the same network, which is channels last with fused layers; `published`, that
one on the network as a checkpoint is loaded elsewhere: contiguous, layer by layer, the library's pooling.

    python benchmarks/attacks.py --checkpoint runs/train_at_mnist/TIME/last.pt --num_examples 1000
    python benchmarks/attacks.py --checkpoint a/last.pt b/last.pt --seeds 0 1 2 --attacks autoattack --out results/attacks.json
    python benchmarks/attacks.py --checkpoint a/last.pt --attacks fgsm pgd100 apgd-dlr fmn100
    python benchmarks/attacks.py --checkpoint a/last.pt --attacks cw apgd-ce md mdmt fab-t --md_attack MDAttack
"""
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path, the repository's root is not

import torch
from torch import Tensor, nn

from attacks.apgd import apgd
from attacks.autoattack import STANDARD, autoattack, confirmed
from attacks.catalogue import members_of, strong_attacks
from attacks.frozen import frozen, predict
from attacks.noise import example_keys
from attacks.reference import autoattack_reference
from attacks.spsa import spsa
from benchmarks.forms import published_model
from benchmarks.others import RELEASED, SHORT, others, require_released
from harness.config import run_script
from harness.datasets.batches import first_examples, to_unit
from harness.device import choose_device, command_line, environment
from harness.errors import UserError
from harness.evaluation.report import output_path
from harness.evaluation.subject import Protocol, open_subject, radius_of
from harness.folder import write_text
from harness.training.precision import TrainingPrecision, to_device
from losses.margin import cw_loss
from models import build_model

PROTOCOL = Protocol(dataset="mnist", channels=1, epsilon=0.3, step_ratio=30)
Name = Literal["apgd-ce", "apgd-t", "fab-t", "square", "autoattack", "apgd-dlr", "fgsm", "pgd100", "cw", "md", "mdmt", "fmn100", "spsa",
               "spsa-short"]


@dataclass(frozen=True)
class Config:
    checkpoint: tuple[str, ...] = ()             # files of trained networks
    arch: str | None = None                      # network of a foreign checkpoint: a model's name, or file.py:callable
    dataset: str | None = None                   # data set or image folder; default: the checkpoint's
    epsilon: float | None = None                 # radius, pixels in [0, 1]; default: the checkpoint's
    norm: Literal["linf", "l2"] = "linf"         # of the radius
    num_examples: int | None = 1000              # the first so many test images
    seeds: tuple[int, ...] = (0,)                # of the random numbers of both sides, one run each
    attacks: tuple[Name, ...] = ("apgd-ce", "apgd-t", "fab-t", "square")  # in this order
    sides: tuple[Literal["ours", "reference", "published"], ...] = ("ours", "reference")  # which implementations run
    batch_size: int = 250                        # images at a time
    md_attack: str | None = None                 # folder of a clone of MDAttack, beside which cw, md and mdmt are measured
    data_dir: str | None = None                  # folder of the data sets; default: the checkpoint's, or data
    out: str | None = None                       # JSON file to write, never over another
    device: str = "auto"                         # auto, cpu, or an accelerator by its name in torch


def ours(name: str, seed: int, batch_size: int, model: nn.Module, x: Tensor, y: Tensor, **task: object) -> Tensor:
    """Our attack of that name on the images x [B, C, H, W], `batch_size` at a time."""
    index = torch.arange(len(x), device=x.device)
    keys, members = example_keys(index, seed), [member for member, _ in STANDARD]
    if name == "autoattack":
        return autoattack(model, x, y, keys=keys, batch_size=batch_size, **task)
    if name in members:
        attack, keys = STANDARD[members.index(name)][1], example_keys(keys, members.index(name))  # as in the ensemble
    elif name == "apgd-dlr":
        attack = partial(apgd, loss="dlr")
    elif name == "spsa-short":
        attack, task = partial(spsa, **SHORT), {"epsilon": task["epsilon"]}
    else:
        found = strong_attacks(members_of((name,)), seed=seed, margin_loss=cw_loss, num_spsa_examples=None, **task)[name]
        return torch.cat([found.run(model, x[rows], y[rows], rows, 0) for rows in index.split(batch_size)])
    return torch.cat([attack(model, x[rows], y[rows], keys=keys[rows], **task) for rows in index.split(batch_size)])


def reference(known: dict[str, Callable], name: str, seed: int, batch_size: int, model: nn.Module, x: Tensor, y: Tensor,
              **task: object) -> Tensor:
    """Another's attack of that name, one of `known` or of the published AutoAttack."""
    if name in known:
        parts = zip(x.split(batch_size), y.split(batch_size))
        with frozen(model) as bare, torch.random.fork_rng():
            torch.manual_seed(seed)
            return torch.cat([known[name](bare, images, labels, **task) for images, labels in parts])
    members = {} if name == "autoattack" else {"members": (name,)}
    return autoattack_reference(model, x, y, seed=seed, batch_size=batch_size, **members, **task)


def network_of(side: str, model: nn.Module) -> nn.Module:
    """The network as a side sees it."""
    return published_model(model) if side == "published" else model


def measure(attack: Callable, model: nn.Module, x: Tensor, y: Tensor, correct: Tensor, **task: object) -> tuple[dict, Tensor]:
    """Robust accuracy in percent and seconds of one attack, and which images are robust, [B] bool."""
    start, began = time.process_time(), time.perf_counter()
    x_adv = attack(model, x, y, **task)
    seconds, wall = time.process_time() - start, time.perf_counter() - began
    robust = correct & ~confirmed(model, x_adv, x, y, **task)
    return {"robust": int(robust.sum()), "accuracy": 100.0 * robust.float().mean().item(), "cpu_seconds": seconds, "seconds": wall}, robust


def compare(model: nn.Module, x: Tensor, y: Tensor, seed: int, cfg: Config, epsilon: float) -> list[dict]:
    """One row an attack, and one for the union of those run alone, with the figures of each side."""
    correct = predict(model, x).argmax(dim=1) == y
    task, rows, standing = {"epsilon": epsilon, "norm": cfg.norm}, [], dict.fromkeys(cfg.sides, correct)
    theirs = partial(reference, others(cfg.md_attack))
    left, spent = {}, dict.fromkeys(cfg.sides, 0.0)  # by the ensemble; by the others together
    for name in cfg.attacks:
        row = {"attack": name, "seed": seed}
        for side in cfg.sides:
            attack = partial(ours if side == "ours" else theirs, name, seed, cfg.batch_size)
            row[side], robust = measure(attack, network_of(side, model), x, y, correct, **task)
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
        rows.append({"attack": "union", "seed": seed} | {
            side: {"robust": int(robust.sum()), "accuracy": 100.0 * robust.float().mean().item(), "cpu_seconds": spent[side]}
            | ({"same_as_autoattack": torch.equal(robust, left[side])} if side in left else {}) for side, robust in standing.items()})
        show(rows[-1], *cfg.sides)
    return rows


def show(row: dict, *sides: str) -> None:
    figures = "   ".join(f"{side} {row[side]['accuracy']:6.2f} % {row[side]['cpu_seconds']:8.1f} s" for side in sides)
    print(f"seed {row['seed']}  {row['attack']:<11} {figures}", flush=True)


def main(cfg: Config) -> None:
    if not cfg.checkpoint:
        raise UserError("name at least one --checkpoint")
    if cfg.norm != "linf" and cfg.sides != ("ours",) and (found := [name for name in cfg.attacks if name in others(None)]):
        raise UserError(f"{found[0]} is compared in l_inf alone")
    for name in cfg.attacks if cfg.sides != ("ours",) else ():
        if name in RELEASED:  # before ours has run for an hour
            try:
                require_released(cfg.md_attack, RELEASED[name][0])
            except ValueError as error:
                raise UserError(str(error)) from error
    out = output_path(cfg.out, Path(cfg.out), whole_run=False) if cfg.out else None
    device, results = choose_device(cfg.device), []
    for path in map(Path, cfg.checkpoint):
        subject = open_subject(path.stem, path, build_model, arch=cfg.arch, dataset=cfg.dataset, data_dir=cfg.data_dir,
                               default=PROTOCOL.dataset)
        epsilon = radius_of(subject, PROTOCOL, cfg.epsilon)
        model = TrainingPrecision(to_device(subject.model, device), torch.float32).eval()
        test = first_examples(subject.split, cfg.num_examples).to(device)
        x, y = to_unit(test.images), test.labels
        print(f"{path}: {len(x):,} test images of {subject.dataset}, {cfg.norm} {epsilon:g}", flush=True)
        for seed in cfg.seeds:
            try:
                rows = compare(model, x, y, seed, cfg, epsilon)
            except ValueError as error:  # the extra is not installed
                raise UserError(str(error)) from error
            results.append({"checkpoint": str(path), "epsilon": epsilon, "norm": cfg.norm, "num_examples": len(x), "rows": rows})
            if out:
                facts = {"command": command_line(), "date": time.strftime("%Y-%m-%d"), "batch_size": cfg.batch_size}
                write_text(out, json.dumps({"results": results, **facts, "environment": environment(device)}, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main, Config)
