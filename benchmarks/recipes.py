"""Time one training step of every recipe of train_vir.py beside that of plain AT, in turns, in one process.

Each step is train_vir.py's own `train_one_epoch` with the recipe's weights switched on (no burn-in), on
noise, after a warm-up; figures are medians of `repeats` rounds of `batches` steps, the spread is half the
interquartile range over the rounds.

    forward           one forward pass of a batch in train mode without a graph
    training pass     forward and backward pass of a batch with the gradients of the weights
    expected          what the method needs beyond plain AT: VIR over AT one forward; TRADES a forward for its
                      attack and a training pass more; MART a training pass more; the other weights nothing
    beyond            seconds per step minus (AT + expected), as a share of AT

    python benchmarks/recipes.py                                   # LeNet on 1x28x28 images
    python benchmarks/recipes.py --setting cifar10 --model resnet18 --out results/speed/recipes_resnet18.json
"""
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: a script finds its own folder

import train_vir
from attacks.frozen import predict
from benchmarks import common
from harness.config import run_script
from harness.datasets.batches import to_unit
from harness.device import choose_device
from harness.training.run import Run
from models import build_model

SETTINGS = {"mnist": ("-mnist", common.MNIST), "cifar10": ("", common.CIFAR)}  # suffix of recipes, images
NEEDS = {"trades": (1, 1), "mart": (0, 1), "mail-trades": (1, 1),  # forwards, training passes
         "vir-at": (1, 0), "vir-trades": (1, 1)}
COLUMNS = (("recipe", "recipe", "<14"), ("s per step", "seconds", ">12.4f"), ("spread", "spread", ">10.4f"),
           ("over AT", "ratio", ">9.3f"), ("expected", "expected_ratio", ">10.3f"),
           ("beyond", "beyond", ">9.1%"))


@dataclass(frozen=True)
class Config:
    setting: Literal["mnist", "cifar10"] = "mnist"  # images and attack: 1x28x28, or 3x32x32
    model: str | None = None   # network; none is the setting's own, lenet or resnet18
    batch_size: int = 128      # images a step
    batches: int = 4           # steps of a recipe before the next one's turn
    repeats: int = 9           # rounds that are timed
    seed: int = 0              # of images, weights, starts and dropout
    device: str = "auto"       # auto, cpu, or an accelerator by its name in torch
    precision: Literal["auto", "bf16", "float32"] = "auto"  # of the steps; auto is bf16 where it is faster
    out: str | None = None     # JSON file to write, never over another


def stepper(recipe: str, cfg: Config, folder: str) -> tuple[Callable[[int], object], nn.Module, Run]:
    """A function of the epoch that trains for `batches` steps by the recipe, its model and its run."""
    suffix, shape = SETTINGS[cfg.setting]
    settings = train_vir.RECIPES[recipe + suffix]
    settings = replace(settings, model=cfg.model or settings.model, batch_size=cfg.batch_size, seed=cfg.seed,
                       device=cfg.device, precision=cfg.precision, val_size=0, burn_in_epochs=0,
                       epsilon_warmup_epochs=0, lr=1e-4, out_dir=f"{folder}/{recipe}")
    run = common.SilentRun(settings, common.synthetic(shape, cfg.batch_size * cfg.batches, cfg.seed))
    model = run.build(build_model)
    optimizer = common.sgd(model, settings)
    next(run.epochs(model, optimizer, scheduler=None))
    return partial(train_vir.train_one_epoch, model, optimizer, run, cfg=settings), model, run


def passes(model: nn.Module, run: Run, count: int) -> dict[str, Callable[[int], object]]:
    """`count` bare forward passes, and `count` training passes, of a batch, in any epoch."""
    x = to_unit(run.train.images[:run.cfg.batch_size])

    def forwards(epoch: int) -> None:
        for _ in range(count):
            predict(model, x, "train")

    def training_passes(epoch: int) -> None:
        for _ in range(count):
            model(x).sum().backward()
        model.zero_grad()

    return {"forward": forwards, "training pass": training_passes}


def row_of(name: str, times: dict[str, list[float]], seconds: dict[str, float]) -> dict[str, Any]:
    """What is said of a recipe; times: of each round, seconds: their medians."""
    forwards, trained = NEEDS.get(name, (0, 0))
    at, expected = seconds["at"], forwards * seconds["forward"] + trained * seconds["training pass"]
    low, _, high = statistics.quantiles(times[name], n=4)
    return {"recipe": name, "seconds": seconds[name], "spread": (high - low) / 2, "ratio": seconds[name] / at,
            "expected_ratio": 1 + expected / at, "beyond_percent": 100 * (seconds[name] - at - expected) / at,
            "rounds": times[name]}


def main(cfg: Config) -> None:
    out, device, times = common.out_file(cfg.out), choose_device(cfg.device), defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        made = {recipe: stepper(recipe, cfg, folder) for recipe in train_vir.METHODS}
        _, model, run = made["at"]
        steps = {recipe: step for recipe, (step, _, _) in made.items()} | passes(model, run, cfg.batches)
        for epoch in tqdm(range(1, 2 + cfg.repeats), desc="rounds", leave=False, disable=None):
            for name, step in steps.items():
                taken = common.seconds_of(partial(step, epoch), device)
                times[name] += [taken / cfg.batches] if epoch > 1 else []  # the first round does not count
    seconds = {name: statistics.median(values) for name, values in times.items()}
    rows = [row_of(name, times, seconds) for name in train_vir.METHODS]
    print(common.head(COLUMNS))
    for row in rows:
        print(common.line(COLUMNS, row | {"beyond": row["beyond_percent"] / 100}))
    forward, trained = seconds["forward"], seconds["training pass"]
    facts = {"rows": rows, "forward_seconds": forward, "training_pass_seconds": trained,
             "model": run.cfg.model, "batch_size": cfg.batch_size, "num_steps": run.cfg.num_steps,
             "precision": str(run.dtype).removeprefix("torch."), "repeats": cfg.repeats,
             "batches": cfg.batches, "seed": cfg.seed}
    print(f"forward {forward:.4f} s, training pass {trained:.4f} s; {facts['model']}, batch "
          f"{cfg.batch_size}, {facts['num_steps']} attack steps, {facts['precision']}, "
          f"{torch.get_num_threads()} threads")
    common.write_json(out, facts | common.facts(device))


if __name__ == "__main__":
    run_script(main, Config)
