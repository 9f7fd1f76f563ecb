"""Time one training step of every recipe of train_vir.py beside that of plain adversarial training, in turns, in one process.

Each step is train_vir.py's own `train_one_epoch` with the recipe's weights switched on (no burn-in), on synthetic images, after a warm-up;
figures are medians of `repeats` rounds of `batches` steps, the spread is half the interquartile range over the rounds.

    forward           one forward pass of a batch in train mode without a graph
    training pass     forward and backward pass of a batch with the gradients of the weights
    expected          what the method needs beyond plain AT: VIR over AT one forward; TRADES a forward for its attack and a training pass
                      more; MART a training pass more; GAIRAT, MAIL and margin weights nothing
    beyond            seconds per step minus (AT + expected), as a share of AT

    python benchmarks/recipes.py                                   # LeNet on 1x28x28 images
    python benchmarks/recipes.py --setting cifar10 --model resnet18 --out results/speed/recipes_resnet18.json
"""
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.optim import SGD
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_vir
from attacks.frozen import predict
from benchmarks.train_step import clock, synthetic
from harness.config import run_script
from harness.device import choose_device, command_line, environment
from harness.evaluation.report import output_path
from harness.folder import write_text
from harness.training.run import Run
from models import build_model

SETTINGS = {"mnist": ("-mnist", (1, 28, 28)), "cifar10": ("", (3, 32, 32))}
NEEDS = {"trades": (1, 1), "mart": (0, 1), "mail-trades": (1, 1), "vir-at": (1, 0), "vir-trades": (1, 1)}  # forwards, training passes


@dataclass(frozen=True)
class Config:
    setting: Literal["mnist", "cifar10"] = "mnist"        # images and attack: 1x28x28, or 3x32x32
    model: str | None = None                              # network; none is the setting's own, lenet or resnet18
    batch_size: int = 128                                 # images a step
    batches: int = 4                                      # steps of a recipe before the next one's turn
    repeats: int = 9                                      # rounds that are timed
    seed: int = 0                                         # of images, weights, starts and dropout
    device: str = "auto"                                  # auto, cpu, or an accelerator by its name in torch
    precision: Literal["auto", "bf16", "float32"] = "auto"  # of the steps; auto is bf16 where it is faster (harness/device.py)
    out: str | None = None                                # JSON file to write, never over another


class Quiet(Run):
    """A run that says nothing: the standard output is for the result."""

    def say(self, text: str) -> None:
        """Nothing."""


def stepper(recipe: str, cfg: Config, folder: str) -> tuple[partial, nn.Module, Run]:
    """A function of the epoch that trains for `batches` steps by the recipe, its model and its run."""
    suffix, shape = SETTINGS[cfg.setting]
    settings = train_vir.RECIPES[recipe + suffix]
    settings = replace(settings, model=cfg.model or settings.model, batch_size=cfg.batch_size, seed=cfg.seed, device=cfg.device, val_size=0,
                       precision=cfg.precision, burn_in_epochs=0, epsilon_warmup_epochs=0, out_dir=f"{folder}/{recipe}")
    run = Quiet(settings, synthetic(shape, cfg.batch_size * cfg.batches, cfg.seed))
    model = run.build(build_model)
    optimizer = SGD(model.parameters(), lr=1e-4, momentum=settings.momentum, weight_decay=settings.weight_decay)
    next(run.epochs(model, optimizer, scheduler=None))
    return partial(train_vir.train_one_epoch, model, optimizer, run, cfg=settings), model, run


def passes(model: nn.Module, run: Run, count: int) -> dict[str, partial]:
    """`count` bare forward passes, and `count` training passes, of a batch."""
    x = run.train.images[:run.cfg.batch_size].float() / 255

    def forwards() -> None:
        for _ in range(count):
            predict(model, x, "train")

    def training_passes() -> None:
        for _ in range(count):
            model(x).sum().backward()
        model.zero_grad()

    return {"forward": forwards, "training pass": training_passes}


def main(cfg: Config) -> None:
    out = output_path(cfg.out, Path(cfg.out), whole_run=False) if cfg.out else None
    device, times = choose_device(cfg.device), defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        made = {recipe: stepper(recipe, cfg, folder) for recipe in train_vir.METHODS}
        bare = passes(*made["at"][1:], cfg.batches)
        for turn in tqdm(range(1, 2 + cfg.repeats), desc="rounds", leave=False, disable=None):
            for name, step in {**{recipe: partial(step, turn) for recipe, (step, _, _) in made.items()}, **bare}.items():
                started = clock(device)
                step()
                times[name].append((clock(device) - started) / cfg.batches)
    seconds = {name: statistics.median(values[1:]) for name, values in times.items()}
    quartiles = {name: statistics.quantiles(values[1:], n=4) for name, values in times.items()}
    rows = []
    print(f"{'recipe':<14}{'s per step':>12}{'spread':>10}{'over AT':>9}{'expected':>10}{'beyond':>9}")
    for name in train_vir.METHODS:
        forwards, trained = NEEDS.get(name, (0, 0))
        expected = forwards * seconds["forward"] + trained * seconds["training pass"]
        rows.append({"recipe": name, "seconds": seconds[name], "spread": (quartiles[name][2] - quartiles[name][0]) / 2,
                     "ratio": seconds[name] / seconds["at"], "expected_ratio": 1 + expected / seconds["at"],
                     "beyond_percent": 100 * (seconds[name] - seconds["at"] - expected) / seconds["at"], "rounds": times[name][1:]})
        row = rows[-1]
        print(f"{name:<14}{row['seconds']:>12.4f}{row['spread']:>10.4f}{row['ratio']:>9.3f}{row['expected_ratio']:>10.3f}"
              f"{row['beyond_percent']:>8.1f}%")
    run = made["at"][2]
    facts = {"rows": rows, "forward_seconds": seconds["forward"], "training_pass_seconds": seconds["training pass"], "model": run.cfg.model,
             "batch_size": cfg.batch_size, "num_steps": run.cfg.num_steps, "precision": str(run.dtype).removeprefix("torch."),
             "repeats": cfg.repeats, "batches": cfg.batches, "seed": cfg.seed, "command": command_line(), "date": time.strftime("%Y-%m-%d"),
             "environment": environment(device)}
    print(f"forward {seconds['forward']:.4f} s, training pass {seconds['training pass']:.4f} s; {facts['model']}, batch {cfg.batch_size}, "
          f"{facts['num_steps']} attack steps, {facts['precision']}, {torch.get_num_threads()} threads")
    if out:
        write_text(out, json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main, Config)
