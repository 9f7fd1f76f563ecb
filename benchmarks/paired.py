"""Every defense beside its base, on the same seeds and test images: what results/paired.json holds.

The base of a weighting is its method without weights, that of Free AT, YOPO and IAAT is AT. For each defense
that has runs in OUT/ROW/seedN (benchmarks/campaign.py), and each measure, the difference to its base seed by
seed, in points; and `images`, half the 95 % interval that the test images leave to their mean
(`paired_half_width`). The measures are taken from margins.npz, all images under A_rob's attack, and from
margins_worst.npz, the first 1,000 in the worst case of the strong attacks.

    python benchmarks/paired.py
"""
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: a script finds its own folder

from harness.config import run_script
from harness.errors import UserError
from harness.evaluation.budget import accuracy_at_budget
from harness.evaluation.metrics import paired_half_width, weighted_accuracy
from harness.folder import write_text

BASES = {f"mnist/{network}-{name}": f"mnist/{network}-{name.partition('-')[0]}"  # defense -> its base
         for network in ("lenet", "small_cnn") for name in ("at-alpha0.5", "trades-alpha2")}
BASES |= {f"{group}/{name}": f"{group}/{trades if 'trades' in name else 'at'}"  # of the same 1/lambda
          for group, trades, own in (("vir", "trades-5", ()),
                                     ("cifar10-w16", "trades", ("at-alpha0.1", "trades-alpha2")))
          for name in (*own, "mart", "gairat", "mail-at", "mail-trades", "vir-at", "vir-trades")}
BASES |= {f"vir/{name}-mean1": BASES[f"vir/{name}"]
          for name in ("mail-at", "mail-trades", "vir-at", "vir-trades")}
BASES |= {f"fast/{name}": "mnist/lenet-at" for name in ("free", "yopo", "iaat")}
UNIFORM, WITHIN = partial(weighted_accuracy, alpha=0.0), partial(accuracy_at_budget, budget=0.2)
MEASURES = {"A_rob": ("margins.npz", UNIFORM),
            "A_sa 2": ("margins.npz", partial(weighted_accuracy, alpha=2.0)),
            "A_sa, 0.2 nats": ("margins.npz", WITHIN),
            "worst case": ("margins_worst.npz", UNIFORM),
            "worst case, 0.2 nats": ("margins_worst.npz", WITHIN)}


@dataclass(frozen=True)
class Config:
    out: str = "results"  # folder of the rows


def examples(file: Path) -> dict[str, torch.Tensor]:
    """`correct` [N] bool and `margin` [N] of one run."""
    with np.load(file) as kept:
        return {"correct": torch.from_numpy(kept["correct"]), "margin": torch.from_numpy(kept["margin_adv"])}


def compare(defense: Path, base: Path) -> dict[str, dict]:
    """Measure -> the seeds that both have, the difference of each, and half the interval of their mean."""
    found = {}
    for name, (file, measure) in MEASURES.items():
        seeds = sorted(path.parent.name for path in defense.glob(f"seed*/{file}"))
        seeds = [seed for seed in seeds if (base / seed / file).exists()]
        pairs = [[measure(**examples(row / seed / file)) for row in (defense, base)] for seed in seeds]
        points = [100 * (ours["accuracy"] - theirs["accuracy"]) for ours, theirs in pairs]
        found[name] = {
            "seeds": [int(seed.removeprefix("seed")) for seed in seeds],
            "differences": [round(difference, 4) for difference in points],
            "images": round(100 * paired_half_width(*pairs), 4) if pairs else None}
    return found


def main(cfg: Config) -> None:
    out = Path(cfg.out)
    if not out.is_dir():
        raise UserError(f"--out: there is no folder {out}")
    rows = [{"row": row, "base": base, **compare(out / row, out / base)}
            for row, base in BASES.items() if (out / row).is_dir()]
    lines = ",\n".join(json.dumps(row) for row in rows if row["A_rob"]["seeds"])
    write_text(out / "paired.json", f'{{"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    run_script(main, Config)
