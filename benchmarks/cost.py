"""Robust accuracy against training time: time the training of every result in turns on this machine, beside what its evaluation found.

A result is a folder with the config.json of a training run and its eval.json. Each is trained again from its own settings for a few batches
of its own data, by its own script, `repeats` times in turns; the medians of seconds per batch before and after its burn-in, times its
batches and epochs, give the training time that the whole run takes here. Evaluation and the images held out are not counted.

    python benchmarks/cost.py                                      # results/mnist/lenet-*, results/vir/*/seed0, results/fast/*
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
import time
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import figures
from harness.config import run_script
from harness.datasets.batches import load_dataset
from harness.device import ROOT, choose_device, command_line, environment
from harness.errors import UserError
from harness.evaluation.report import output_path
from harness.folder import write_text
from harness.reporting.tables import defense


@dataclass(frozen=True)
class Config:
    results: tuple[str, ...] = ()                         # folders with config.json and eval.json; default: those of LeNet on MNIST
    batches: int = 40                                     # training batches of a result before the next one's turn
    repeats: int = 3                                      # rounds, after one that does not count
    data_dir: str = "data"                                # folder of the data sets
    device: str = "auto"                                  # auto, cpu, or an accelerator by its name in torch
    out: str | None = None                                # JSON file to write, never over another, with the figure beside it


def open_result(folder: Path) -> tuple[object, object, dict]:
    """(script, its Config, the result) of a folder.  Raises UserError for one that is not a result."""
    try:
        facts, result = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("config.json", "eval.json"))
        script = importlib.import_module(facts["script"])
        known = {field.name for field in fields(script.Config)}
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items() if name in known}
        return script, script.Config(**settings), {"defense": defense(facts), "A_rob": result["A_rob"], "ci95": result["ci95"]["A_rob"]}
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{folder} is not a result: it needs the config.json of a training run and its eval.json ({error})") from error


def seconds_per_batch(script: object, settings: object, cfg: Config) -> float:
    """One epoch of `batches` batches by the script itself."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        script.main(replace(settings, epochs=1, max_batches=cfg.batches, val_size=0, ema_decay=0.0, seeds=(), resume=None,
                            data_dir=cfg.data_dir, device=cfg.device, out_dir=f"{folder}/run"))
        row, = csv.DictReader(Path(folder, "run/log.csv").read_text(encoding="utf-8").splitlines())
        return float(row["seconds"]) / cfg.batches


def phases(settings: object) -> dict[str, tuple[object, int]]:
    """Phase -> (settings that are in it in their first epoch, its epochs): before and after the burn-in where there is one."""
    burn_in = min(getattr(settings, "burn_in_epochs", 0), settings.epochs)
    if not burn_in:
        return {"all": (settings, settings.epochs)}
    return {"burn-in": (replace(settings, burn_in_epochs=1), burn_in),
            "weighted": (replace(settings, burn_in_epochs=0), settings.epochs - burn_in)}


def main(cfg: Config) -> None:
    out = output_path(cfg.out, Path(cfg.out), whole_run=False) if cfg.out else None
    usual = [*ROOT.glob("results/mnist/lenet-*"), *ROOT.glob("results/vir/*/seed0"), *ROOT.glob("results/fast/*")]
    folders = [Path(folder) for folder in cfg.results] or sorted(usual)
    opened, times = {folder: open_result(folder) for folder in folders}, defaultdict(list)
    device = choose_device(cfg.device)
    turns = [(folder, phase) for folder, (_, settings, _) in opened.items() for phase in phases(settings)]
    for _, (folder, phase) in tqdm(list(product(range(1 + cfg.repeats), turns)), desc="timing", leave=False, disable=None):
        script, settings, _ = opened[folder]
        times[folder, phase].append(seconds_per_batch(script, phases(settings)[phase][0], cfg))
    rows = []
    print(f"{'defense':<26}{'s per epoch':>12}{'epochs':>8}{'minutes':>9}{'A_rob, %':>10}   result")
    for folder, (_, settings, result) in opened.items():
        images = len(load_dataset(settings.dataset, cfg.data_dir, settings.val_size).train)
        batches = -(-images // settings.batch_size)
        seconds = {phase: statistics.median(times[folder, phase][1:]) for phase in phases(settings)}
        total = sum(seconds[phase] * batches * epochs for phase, (_, epochs) in phases(settings).items())
        rows.append({**result, "result": str(folder.resolve().relative_to(ROOT) if folder.resolve().is_relative_to(ROOT) else folder),
                     "seconds_per_batch": seconds, "epochs": settings.epochs, "seconds": total})
        print(f"{result['defense']:<26}{total / settings.epochs:>12.1f}{settings.epochs:>8}{total / 60:>9.2f}{result['A_rob']:>10.2f}   "
              f"{rows[-1]['result']}")
    if out:
        facts = {"batches": cfg.batches, "repeats": cfg.repeats, "command": command_line(), "date": time.strftime("%Y-%m-%d"),
                 "environment": environment(device)}
        write_text(out, json.dumps({"rows": rows} | facts, indent=2) + "\n")
        figures.cost(rows, out.with_suffix(".png"))


if __name__ == "__main__":
    run_script(main, Config)
