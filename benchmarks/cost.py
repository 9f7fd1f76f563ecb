"""Robust accuracy against training time: what each result's training takes here, and what it reached.

A result is a folder with the config.json of a training run and its eval.json. Each is trained again from
its own settings for a few batches, by its own script, `repeats` times in turns. The medians of seconds per
batch before and after its burn-in, times its batches and epochs, give the time of the whole run. Evaluation
and the images held out are not counted.

    python benchmarks/cost.py                                      # LeNet's results on MNIST, see USUAL
    python benchmarks/cost.py --results runs/a runs/b --out results/speed/cost.json
"""
import contextlib
import csv
import importlib
import io
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: a script finds its own folder

from benchmarks import common, figures
from harness.config import run_script
from harness.datasets.batches import load_dataset
from harness.device import ROOT, choose_device
from harness.errors import UserError
from harness.reporting.results import defense
from harness.training.options import RunOptions

USUAL = ("results/mnist/lenet-*", "results/vir/*", "results/fast/*")  # of each the first seed
COLUMNS = (("defense", "defense", "<26"), ("s per epoch", "epoch_seconds", ">12.1f"),
           ("epochs", "epochs", ">8"), ("minutes", "minutes", ">9.2f"), ("A_rob, %", "A_rob", ">10.2f"))


@dataclass(frozen=True)
class Config:
    results: tuple[str, ...] = ()  # folders with config.json and eval.json; default: those of LeNet on MNIST
    batches: int = 40              # training batches of a result before the next one's turn
    repeats: int = 3               # rounds, after one that does not count
    data_dir: str = "data"         # folder of the data sets
    device: str = "auto"           # auto, cpu, or an accelerator by its name in torch
    out: str | None = None         # JSON file to write, never over another, with the figure beside it


def open_result(folder: Path) -> tuple[ModuleType, RunOptions, dict[str, Any]]:
    """(script, its Config, the result) of a folder.  Raises UserError for one that is not a result."""
    try:
        facts, result = (json.loads((folder / name).read_text(encoding="utf-8"))
                         for name in ("config.json", "eval.json"))
        script = importlib.import_module(facts["script"])
        known = [field.name for field in fields(script.Config) if field.name in facts]
        settings = {name: tuple(value) if isinstance(value := facts[name], list) else value for name in known}
        found = {"defense": defense(facts), "A_rob": result["A_rob"], "ci95": result["ci95"]["A_rob"]}
        return script, script.Config(**settings), found
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{folder} is not a result: it needs the config.json of a training run and its "
                        f"eval.json ({error})") from error


def seconds_per_batch(script: ModuleType, settings: RunOptions, cfg: Config) -> float:
    """One epoch of `batches` batches by the script itself."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        script.main(replace(settings, epochs=1, max_batches=cfg.batches, val_size=0, ema_decay=0.0, seeds=(),
                            resume=None, data_dir=cfg.data_dir, device=cfg.device, out_dir=f"{folder}/run"))
        row, = csv.DictReader(Path(folder, "run/log.csv").read_text(encoding="utf-8").splitlines())
        return float(row["seconds"]) / cfg.batches


def phases(settings: RunOptions) -> dict[str, tuple[RunOptions, int]]:
    """Phase -> (settings that are in it in their first epoch, its epochs): before and after the burn-in."""
    burn_in = min(getattr(settings, "burn_in_epochs", 0), settings.epochs)
    if not burn_in:
        return {"all": (settings, settings.epochs)}
    return {"burn-in": (replace(settings, burn_in_epochs=1), burn_in),
            "weighted": (replace(settings, burn_in_epochs=0), settings.epochs - burn_in)}


def main(cfg: Config) -> None:
    out, device, times = common.out_file(cfg.out), choose_device(cfg.device), defaultdict(list)
    usual = sorted(min(row.glob("seed*")) for pattern in USUAL for row in ROOT.glob(pattern))
    opened = {folder: open_result(folder) for folder in map(Path, cfg.results or usual)}
    turns = [(folder, phase) for folder, (_, settings, _) in opened.items() for phase in phases(settings)]
    rounds = list(product(range(1 + cfg.repeats), turns))
    for _, (folder, phase) in tqdm(rounds, desc="timing", leave=False, disable=None):
        script, settings, _ = opened[folder]
        times[folder, phase].append(seconds_per_batch(script, phases(settings)[phase][0], cfg))
    rows = []
    print(common.head(COLUMNS), "  result")
    for folder, (_, settings, result) in opened.items():
        images = len(load_dataset(settings.dataset, cfg.data_dir, settings.val_size).train)
        batches = -(-images // settings.batch_size)
        seconds = {phase: statistics.median(times[folder, phase][1:]) for phase in phases(settings)}
        total = sum(seconds[phase] * batches * epochs for phase, (_, epochs) in phases(settings).items())
        inside = folder.resolve().is_relative_to(ROOT)
        rows.append({**result, "result": str(folder.resolve().relative_to(ROOT) if inside else folder),
                     "seconds_per_batch": seconds, "epochs": settings.epochs, "seconds": total})
        times_shown = {"epoch_seconds": total / settings.epochs, "minutes": total / 60}
        print(common.line(COLUMNS, rows[-1] | times_shown), f"  {rows[-1]['result']}")
    if out:
        common.write_json(out, {"rows": rows, "batches": cfg.batches, "repeats": cfg.repeats,
                                **common.facts(device)})
        figures.cost(rows, out.with_suffix(".png"))


if __name__ == "__main__":
    run_script(main, Config)
