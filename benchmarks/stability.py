"""Does a recipe always train?  Every short recipe of ours with many seeds, side by side on single threads.

Each run is a process of its own, as its user would start it; what it held out measures it: A_nat and A_rob
in percent of the last epoch, and for how many epochs it has been at chance (harness/evaluation/chance.py).
The file is written after every run, and the same command goes on with what is missing. The instruction sets
are those of this environment: ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA choose smaller ones.

    python benchmarks/stability.py --out results/stability/digits.json
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python benchmarks/stability.py --precisions float32 \\
        --out results/stability/digits.json
    python benchmarks/stability.py --setting mnist --seeds 0 1 2 --epochs 4 --out results/stability/mnist.json
    python benchmarks/stability.py --defenses AT --evaluate --out results/stability/quickstart.json
    python benchmarks/stability.py --table results/stability/digits.json
"""
import csv
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: a script finds its own folder

from harness.config import run_script
from harness.device import ROOT, choose_device, command_line, environment
from harness.errors import RunError, UserError
from harness.folder import write_text
from harness.reporting.page_tables import stability_table

ZENG = {"AT": ("train_at_mnist",), "AT, alpha 0.5": ("train_at_mnist", "--alpha", "0.5"),
        "TRADES": ("train_trades_mnist",), "TRADES, alpha 2": ("train_trades_mnist", "--alpha", "2")}
VIR = ("at", "trades", "mart", "gairat", "mail-at", "mail-trades", "vir-at", "vir-trades")
FAST = {"Free AT": "train_free", "YOPO": "train_yopo", "IAAT": "train_iaat"}
VARIABLES = {"aten": "ATEN_CPU_CAPABILITY", "onednn": "ONEDNN_MAX_CPU_ISA"}  # what chooses instruction sets


@dataclass(frozen=True)
class Config:
    setting: Literal["digits", "mnist", "mnist-small_cnn"] = "digits"  # whose recipes; SmallCNN has four
    defenses: tuple[str, ...] = ()  # only these rows of the table; default: all
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)  # of the trainings
    precisions: tuple[str, ...] = ("bf16", "float32")  # of the trainings
    epochs: int | None = None     # stop after so many; default: the recipe's
    evaluate: bool = False        # measure last.pt on the test set too: PGD, 40 steps, one start
    num_processes: int = 2        # trainings side by side, of one thread each
    data_dir: str = "data"        # folder of the data sets
    runs: str | None = None       # folder to keep the runs in; default: they are deleted
    out: str | None = None        # JSON file to write, or to go on with
    table: str | None = None      # JSON file whose table is printed, without any training


def recipes(setting: str) -> dict[str, tuple[str, ...]]:
    """Defense -> script and flags of every recipe of ours in this setting."""
    short, suffix = ("digits", "-digits") if setting == "digits" else ("short", "-mnist")
    network = ("--model", "small_cnn") if setting == "mnist-small_cnn" else ()
    zeng = {name: (script, "--recipe", short, *network, *flags) for name, (script, *flags) in ZENG.items()}
    if setting == "mnist-small_cnn":
        return zeng
    vir = {f"{method.upper()}, VIR's recipe": ("train_vir", "--recipe", method + suffix) for method in VIR}
    return zeng | vir | {name: (script, "--recipe", short) for name, script in FAST.items()}


def chosen(known: dict[str, tuple[str, ...]], defenses: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The commands of these defenses, of all by default.  Raises UserError for one that is not `known`."""
    if unknown := [name for name in defenses if name not in known]:
        raise UserError(f"--defenses: there is no {unknown[0]!r}; choose among {', '.join(map(repr, known))}")
    return {name: known[name] for name in defenses or known}


def instruction_sets() -> dict[str, str]:
    """What the two libraries that compute were told to use; "all" is whatever the processor has."""
    return {name: os.environ.get(variable, "all") for name, variable in VARIABLES.items()}


def planned(cfg: Config, rows: list[dict]) -> Iterator[tuple[tuple[str, ...], dict]]:
    """(script and flags, the facts that name its row) of every run that `rows` lacks."""
    done = {(row["defense"], row["seed"], row["precision"], row["aten"], row["onednn"]) for row in rows
            if cfg.epochs in (None, row["epochs"]) and ("test_A_nat" in row or not cfg.evaluate)}
    known, sets = chosen(recipes(cfg.setting), cfg.defenses), instruction_sets()
    for seed, precision, name in product(cfg.seeds, cfg.precisions, known):
        if (name, seed, precision, *sets.values()) not in done:
            flags = ("--seed", str(seed), "--precision", precision, "--device", "cpu", "--data_dir",
                     str(Path(cfg.data_dir).resolve()))
            flags += ("--val_size", "1000") if cfg.setting != "digits" else ()
            flags += ("--epochs", str(cfg.epochs)) if cfg.epochs else ()
            yield known[name] + flags, {"defense": name, "seed": seed, "precision": precision, **sets}


def start(script: str, *flags: str) -> None:
    """Run a script to its end, on one thread.  Raises RunError when it fails."""
    words = [sys.executable, str(ROOT / f"{script}.py"), *flags]
    done = subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RunError(f"{script} {' '.join(flags)}: {reason}")


def side_by_side(work: Callable[[Any], None], jobs: Iterable[Any], num_processes: int) -> None:
    """work(job) for every job; once one has failed no other is begun, they are left for the next call."""
    stopped = threading.Event()

    def begin(job: Any) -> None:
        if stopped.is_set():
            return
        try:
            work(job)
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(num_processes) as pool:
        try:
            for future in [pool.submit(begin, job) for job in jobs]:
                future.result()
        except BaseException:  # Ctrl-C reaches this thread only
            stopped.set()
            raise


def on_the_test_set(folder: Path) -> dict[str, float]:
    """A_nat and A_rob of a run's last.pt on the test set, in percent."""
    start("eval_mnist", "--checkpoint", str(folder / "last.pt"), "--num_restarts", "1", "--alphas", "1",
          "--device", "cpu")
    result = json.loads((folder / "eval_last.json").read_text(encoding="utf-8"))
    return {f"test_{metric}": result[metric] for metric in ("A_nat", "A_rob")}


def train(command: tuple[str, ...], folder: Path, facts: dict, evaluate: bool) -> dict:
    """The row of one run."""
    begun = (folder / "config.json").exists()
    start(command[0], *(("--resume", str(folder)) if begun else (*command[1:], "--out_dir", str(folder))))
    with (folder / "log.csv").open(encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    last, at_chance = log[-1], [int(row["epochs_at_chance"]) for row in log]
    row = facts | {"epochs": len(log), "A_nat": round(float(last["val_A_nat"]), 2),
                   "A_rob": round(float(last["val_A_rob"]), 2), "epochs_at_chance": at_chance[-1],
                   "most_epochs_at_chance": max(at_chance),
                   "seconds": round(sum(float(row["seconds"]) for row in log), 1),
                   "command": " ".join(("python", f"{command[0]}.py", *command[1:]))}
    return row | (on_the_test_set(folder) if evaluate else {})


def read_file(path: str) -> dict:
    """A file that this script has written: setting, calls (command, date, environment) and rows.

    Raises UserError for any other.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        return {"setting": found["setting"], "calls": found["calls"], "rows": found["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no file of this script ({error})") from error


def main(cfg: Config) -> None:
    if cfg.table:
        print(stability_table(read_file(cfg.table)["rows"]))
        return
    if not cfg.out:
        raise UserError("name the file to write: --out runs/stability.json")
    out, lock = Path(cfg.out), threading.Lock()
    contents = read_file(cfg.out) if out.exists() else {"setting": cfg.setting, "calls": [], "rows": []}
    if contents["setting"] != cfg.setting:
        raise UserError(f"{out} is about --setting {contents['setting']}: name another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    rows, hardware = contents["rows"], environment(choose_device("cpu")) | {"threads": 1}
    variables = "".join(f"{name}={os.environ[name]} " for name in VARIABLES.values() if name in os.environ)
    contents["calls"].append({"command": variables + command_line(), "date": time.strftime("%Y-%m-%d"),
                              "environment": hardware})
    jobs = list(planned(cfg, rows))
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=len(jobs), unit="run", disable=None) as bar:

        def work(job: tuple[tuple[str, ...], dict]) -> None:
            command, own = job
            name = "-".join(map(str, own.values())).replace(" ", "").replace(",", "-")
            row = train(command, Path(cfg.runs or temporary, name), own, cfg.evaluate)
            row |= {"commit": hardware["commit"], "torch": hardware["torch"]}
            with lock:
                rows[:] = [other for other in rows if any(other[key] != own[key] for key in own)] + [row]
                write_text(out, json.dumps(contents, indent=1) + "\n")
                bar.update()

        side_by_side(work, jobs, cfg.num_processes)
    print(stability_table(rows))


if __name__ == "__main__":
    run_script(main, Config)
