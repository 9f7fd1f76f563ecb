"""Seconds per image against batch size and attack steps, by the measurements of `benchmarks/train_step.py`.

    training     one step of adversarial training in each form of `train_step`, divided by the images of its batch: batch sizes at
                 --steps attack steps, and attack steps at batches of --batch_size. `per_step` and `fixed` are the least squares line
                 seconds per image = fixed + per_step * steps
    evaluation   one attack step in float32 on the network in eval mode, against the size of the batch: where larger ones gain nothing

Medians of steps that take turns, on images of noise, in one process; run it on an idle machine.

    python benchmarks/sweep.py --out results/speed/sweep.json     # with the figure beside it
"""
import json
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path, the repository's root is not

from attacks.pgd import pgd
from benchmarks import figures, train_step
from harness.config import run_script
from harness.datasets.batches import to_unit
from harness.device import choose_device, command_line, environment
from harness.errors import UserError
from harness.evaluation.report import output_path
from harness.folder import write_text
from harness.training.precision import TrainingPrecision, to_device
from models import build_model

ATTACK_STEPS = 2  # of one timed attack of the evaluation


@dataclass(frozen=True)
class Config:
    model: tuple[str, ...] = ("lenet", "small_cnn")       # networks that are trained
    eval_model: tuple[str, ...] = ("lenet", "small_cnn", "resnet18")  # networks that are attacked as in an evaluation
    method: Literal["at", "trades", "vir"] = "at"         # adversarial training, TRADES, VIR-AT
    batch_sizes: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)  # images a training step
    eval_batch_sizes: tuple[int, ...] = (16, 32, 64, 128, 256, 512)  # images an attack step of the evaluation
    num_steps: tuple[int, ...] = (1, 5, 10, 20, 40)       # PGD steps a batch
    batch_size: int = 128                                 # images a step where the attack steps vary
    steps: int = 10                                       # PGD steps where the batch size varies
    repeats: int = 3                                      # timed steps of each form, after one that does not count
    seed: int = 0                                         # of images, weights, starts and dropout
    device: str = "auto"                                  # auto, cpu, or an accelerator by its name in torch
    precision: Literal["auto", "bf16", "float32"] = "auto"  # of our training step
    out: str | None = None                                # JSON file to write, never over another, with the figure beside it


def points(cfg: Config) -> list[tuple[int, int]]:
    """(batch size, attack steps) of every training step that is timed, each once."""
    return list(dict.fromkeys([*((size, cfg.steps) for size in cfg.batch_sizes), *((cfg.batch_size, steps) for steps in cfg.num_steps)]))


def train(name: str, batch_size: int, steps: int, cfg: Config) -> dict:
    """Seconds an image of one training step, in our form and in the published one."""
    setting = train_step.Config(batch_size=batch_size, num_steps=steps, repeats=cfg.repeats, seed=cfg.seed, device=cfg.device,
                                precision=cfg.precision, memory=False)
    row = train_step.measure(name, cfg.method, setting, peak_of=lambda _: 1.0)
    return {"model": name, "method": cfg.method, "batch_size": batch_size, "num_steps": steps, "precision": row["precision"],
            "ours": row["ours_seconds"] / batch_size, "published_form": row["published_form_seconds"] / batch_size}


def lines(rows: list[dict], cfg: Config) -> list[dict]:
    """Of each network and form, the line through the seconds an image at every number of attack steps."""
    found = []
    for name in cfg.model:
        mine = [row for row in rows if row["model"] == name and row["batch_size"] == cfg.batch_size]
        for form in ("ours", "published_form"):
            if len({row["num_steps"] for row in mine}) > 1:
                slope, fixed = np.polyfit([row["num_steps"] for row in mine], [row[form] for row in mine], 1)
                found.append({"model": name, "form": form, "fixed": float(fixed), "per_step": float(slope)})
    return found


def attack(name: str, cfg: Config, device: torch.device) -> list[dict]:
    """Seconds an image of one attack step as in an evaluation, at every batch size, in turns."""
    shape = train_step.image_shape_of(name)
    torch.manual_seed(cfg.seed)
    model = TrainingPrecision(to_device(build_model(name, train_step.NUM_CLASSES, shape[0]), device), torch.float32).eval()
    data, seconds = train_step.synthetic(shape, max(cfg.eval_batch_sizes), cfg.seed).train.to(device), defaultdict(list)
    for number in range(1 + cfg.repeats):
        for size in cfg.eval_batch_sizes:
            x, y, started = to_unit(data.images[:size]), data.labels[:size], train_step.clock(device)
            pgd(model, x, y, **train_step.THREATS[shape], num_steps=ATTACK_STEPS)
            if number:
                seconds[size].append((train_step.clock(device) - started) / size / ATTACK_STEPS)
    return [{"model": name, "batch_size": size, "seconds": statistics.median(values)} for size, values in seconds.items()]


def main(cfg: Config) -> None:
    train_step.check(train_step.Config(model=(*cfg.model, *cfg.eval_model), repeats=cfg.repeats))
    if not cfg.eval_batch_sizes or not points(cfg):
        raise UserError("name at least one of --batch_sizes and --num_steps, and one of --eval_batch_sizes")
    out = output_path(cfg.out, Path(cfg.out), whole_run=False) if cfg.out else None
    device, training, evaluation = choose_device(cfg.device), [], []
    print(f"{'model':<12}{'batch':>7}{'steps':>7}{'ours, ms an image':>19}{'published form':>16}", flush=True)
    for name, (batch_size, steps) in tqdm([(name, point) for name in cfg.model for point in points(cfg)], leave=False, disable=None):
        training.append(row := train(name, batch_size, steps, cfg))
        tqdm.write(f"{name:<12}{batch_size:>7}{steps:>7}{1e3 * row['ours']:>19.3f}{1e3 * row['published_form']:>16.3f}")
    print(f"\n{'evaluation':<12}{'batch':>7}{'ms an image and step':>22}", flush=True)
    for name in cfg.eval_model:
        evaluation += attack(name, cfg, device)
        for row in evaluation[-len(cfg.eval_batch_sizes):]:
            print(f"{name:<12}{row['batch_size']:>7}{1e3 * row['seconds']:>22.3f}", flush=True)
    result = {"training": training, "lines": lines(training, cfg), "evaluation": evaluation, "batch_size": cfg.batch_size,
              "steps": cfg.steps}
    if out:
        facts = {"repeats": cfg.repeats, "seed": cfg.seed, "command": command_line(), "date": time.strftime("%Y-%m-%d"),
                 "environment": environment(device)}
        write_text(out, json.dumps(result | facts, indent=2) + "\n")
        figures.sweep(result, out.with_suffix(".png"))


if __name__ == "__main__":
    run_script(main, Config)
