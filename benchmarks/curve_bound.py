"""Hold robustness curves against AutoAttack: how many points does it break nearer than their distance says?

At every radius t it attacks, within t, those of the first points whose stored distance is larger than t. Its
random numbers are others than those of the check that `generate_robustness_curves.py compute` makes.

    python benchmarks/curve_bound.py --results runs/curves --out runs/curve_bound.json
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: a script finds its own folder

import numpy as np
import torch
from tqdm import tqdm

from attacks.autoattack import STANDARD, STANDING, run_ensemble
from attacks.noise import example_keys
from benchmarks import common
from curves import store
from curves.models import reopen
from curves.points import pick
from harness.config import run_script
from harness.datasets.batches import to_unit
from harness.device import choose_device
from harness.evaluation.predictions import BatchInvariant
from harness.evaluation.subject import Subject
from models import build_model

ROUNDING = 1e-6  # of a distance beyond the radius
STREAM = 2       # of random numbers
COLUMNS = (("model", "model", "<22"), ("norm", "norm", "<6"), ("radius", "radius", ">8.3f"),
           ("R, %", "curve", ">8.1f"), ("attacked", "attacked", ">10"), ("nearer", "nearer", ">8"),
           ("seconds", "seconds", ">9.1f"))


@dataclass(frozen=True)
class Config:
    results: tuple[str, ...] = ()         # folders that generate_robustness_curves.py compute wrote
    radii_linf: tuple[float, ...] = (0.25, 0.3, 0.31, 0.32, 0.34, 0.36)  # pixels in [0, 1]
    radii_l2: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)  # pixels in [0, 1]
    num_points: int = 100                 # the first so many points
    seed: int = 0                         # of the attack
    out: str | None = None                # JSON file to write, never over another
    device: str = "auto"                  # auto, cpu, or an accelerator by its name in torch


def broken_within(results: store.Results, subject: Subject, norm: str, radius: float, num_points: int,
                  seed: int, device: torch.device) -> tuple[int, int]:
    """Of the first points: how many lie farther than the radius, and how many of these AutoAttack breaks."""
    rows = np.flatnonzero(results.upper(norm)[:num_points] > radius * (1 + ROUNDING))
    if not len(rows):
        return 0, 0
    points = pick(subject.split, results.columns["index"][rows]).to(device)
    x, keys = to_unit(points.images), example_keys(points.index, seed, STREAM)
    _, broken_by = run_ensemble(BatchInvariant(subject.model), x, points.labels, STANDARD, epsilon=radius,
                                norm=norm, keys=keys)
    return len(rows), int((broken_by != STANDING).sum())


def main(cfg: Config) -> None:
    out, several, device = common.out_file(cfg.out), store.find(cfg.results), choose_device(cfg.device)
    radii, rows = {"linf": cfg.radii_linf, "l2": cfg.radii_l2}, []
    tasks = [(results, norm, radius) for results in several for norm in results.norms
             for radius in radii.get(norm, ())]
    subjects = {results.name: reopen(results.about, build_model) for results in several}
    print(common.head(COLUMNS))
    for results, norm, radius in tqdm(tasks, unit="radius", disable=None, leave=False):
        subject, started = subjects[results.name], time.monotonic()
        subject.model.to(device)
        attacked, nearer = broken_within(results, subject, norm, radius, cfg.num_points, cfg.seed, device)
        first = results.upper(norm)[:cfg.num_points]
        rows.append({"model": results.name, "norm": norm, "radius": radius, "points": len(first),
                     "curve": 100 * float((first <= radius).mean()), "attacked": attacked, "nearer": nearer,
                     "seconds": time.monotonic() - started})
        tqdm.write(common.line(COLUMNS, rows[-1]))
        common.write_json(out, {"rows": rows, "seed": cfg.seed, **common.facts(device)})


if __name__ == "__main__":
    run_script(main, Config)
