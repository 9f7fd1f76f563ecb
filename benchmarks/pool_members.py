"""What each attack of the pool gains, and what it costs: by network, norm and member.

It attacks the first correctly classified points of robustness curves. `gain` is by how much, in percent, a
member lowers the mean distance when its turn comes, after all that stand above it; `nearer` is on how many
points it comes nearer than these by 0.1 %.

    python benchmarks/pool_members.py --results runs/curves/at runs/curves/plain --out runs/members.json
"""
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: a script finds its own folder

import numpy as np
import torch
from tqdm import tqdm

from attacks.noise import example_keys
from attacks.pool import MinimalDistances, minimal_distances
from benchmarks import common
from curves import store
from curves.models import reopen
from curves.points import pick
from harness.config import run_script
from harness.datasets.batches import to_unit
from harness.device import choose_device
from models import build_model

NEARER = 0.999  # of the distance before: what counts as nearer
COLUMNS = (("model", "model", "<16"), ("norm", "norm", "<5"), ("member", "member", "<26"),
           ("s a point", "seconds", ">10.4f"), ("gradients", "gradients", ">10"), ("nearer", "nearer", ">7"),
           ("gain, %", "gain", ">8.3f"))


@dataclass(frozen=True)
class Config:
    results: tuple[str, ...] = ()     # folders that generate_robustness_curves.py compute wrote
    budget: Literal["fast", "standard", "strong"] = "standard"
    num_points: int = 100             # the first so many correctly classified points
    seed: int = 0                     # of the attacks
    out: str | None = None            # JSON file to write, never over another
    device: str = "auto"              # auto, cpu, or an accelerator by its name in torch


def members(found: MinimalDistances) -> Iterator[dict]:
    """One row for each norm and attack, in the order in which they ran.

    gain: None until some attack has fooled the network at every point that any of them does.
    """
    for norm in found.norms:
        fooled = found.distance[norm].isfinite() & ~found.misclassified
        best = torch.full_like(found.distance[norm], torch.inf)[fooled]
        for name in found.attacks:
            after = torch.minimum(best, found.single[norm][name][fooled])
            known = bool(best.isfinite().all())
            yield {"norm": norm, "member": name, "seconds": found.seconds[name] / len(found.misclassified),
                   "gradients": found.gradients[name], "nearer": int((after < NEARER * best).sum()),
                   "gain": float(100 * (1 - after.mean() / best.mean())) if known else None,
                   "mean": float(after.mean()) if after.isfinite().all() else None}
            best = after


def main(cfg: Config) -> None:
    out, several = common.out_file(cfg.out), store.find(cfg.results)
    device = choose_device(cfg.device, wide=True)
    rows: list[dict] = []
    print(common.head(COLUMNS))
    for results in tqdm(several, unit="network", disable=None, leave=False):
        subject = reopen(results.about, build_model)
        right = np.flatnonzero(results.columns["status"] != store.MISCLASSIFIED)[:cfg.num_points]
        points = pick(subject.split, results.columns["index"][right]).to(device)
        found = minimal_distances(subject.model.to(device), to_unit(points.images), points.labels,
                                  norms=results.norms, budget=cfg.budget,
                                  keys=example_keys(points.index, cfg.seed))
        for row in members(found):
            rows.append({"model": results.name, **row})
            if row["nearer"]:
                tqdm.write(common.line(COLUMNS, rows[-1]))
        common.write_json(out, {"budget": cfg.budget, "seed": cfg.seed, "rows": rows, **common.facts(device)})


if __name__ == "__main__":
    run_script(main, Config)
