"""The rows of docs/results.md: whole runs with several seeds, evaluated; what the tables read is kept.

Every run is a process of its own of one thread, as its user would start it; so are its evaluations. Run and
evaluations stand in RUNS/ROW/seedN, and what the tables read in OUT/ROW/seedN: config.json and log.csv of the
training; eval.json, measured on the whole test set by the paper's protocol with one random start, with
the margin of every example in margins.npz; strong.json, measured under strong attacks, with the margins in
their worst case in margins_worst.npz. The same command goes on where it was stopped: a training by its
--resume, an evaluation by its record. A weighting goes on from the burn-in of its base (--burn_in_from),
which gives the bits of the whole run. At the end benchmarks/paired.py compares each defense with its base.

    python benchmarks/campaign.py --seeds 0 1 2 3 4                         # MNIST, every row but SmallCNN's
    python benchmarks/campaign.py --setting mnist-small_cnn --seeds 0 1     # Zeng's four on SmallCNN
    python benchmarks/campaign.py --setting cifar10-w16 --seeds 0           # CIFAR-10, a narrow ResNet-18
    python benchmarks/campaign.py --setting cifar10-w16 --device cuda       # on a GPU
    python benchmarks/campaign.py --defenses AT TRADES --seeds 0 --strong   # under strong attacks too
"""
import shutil
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: a script finds its own folder

from benchmarks import paired
from benchmarks.stability import ZENG, chosen, recipes, side_by_side, start
from harness.config import run_script

STRONG = ("--num_examples", "1000", "--attacks", "fgsm", "pgd100", "cw", "fmn100", "autoattack", "mde")
MORE_ATTACKS = {"cifar10-w16": ("square", "spsa", "--num_spsa_examples", "100")}  # setting -> after STRONG
MARGIN = ("--burn_in_epochs", "0", "--weights", "margin", "--margin_alpha")
FIVE = ("--inv_lambda", "5")  # as MAIL-TRADES and VIR-TRADES have it; TRADES of VIR's recipes has 4
CONTROL = {"TRADES, 1/lambda 5, VIR's recipe": ("train_vir", "--recipe", "trades-mnist", *FIVE)}
CONTROL |= {f"{name}, mean 1, VIR's recipe": ("train_vir", "--recipe", f"{name.lower()}-mnist", flag, "batch")
            for flag, names in (("--mail_norm", ("MAIL-AT", "MAIL-TRADES")),
                                ("--vir_norm", ("VIR-AT", "VIR-TRADES"))) for name in names}
CIFAR10 = {"AT": ("at",), "AT, alpha 0.1": ("at", *MARGIN, "0.1"), "TRADES": ("trades", *FIVE),
           "TRADES, alpha 2": ("trades", *FIVE, *MARGIN, "2"), "MART": ("mart",), "GAIRAT": ("gairat",),
           "MAIL-AT": ("mail-at",), "MAIL-TRADES": ("mail-trades",), "VIR-AT": ("vir-at",),
           "VIR-TRADES": ("vir-trades",)}  # row -> method of train_vir.py and flags
OF_AT = ("gairat", "mail-at", "vir-at")
SHARED = {"vir": {"at": (*OF_AT, "mail-at-mean1", "vir-at-mean1"),  # row -> those that share its burn-in
                  "mail-trades": ("trades-5", "vir-trades", "mail-trades-mean1", "vir-trades-mean1")},
          "cifar10-w16": {"at": OF_AT, "trades": ("mail-trades", "vir-trades")}}
BURN_IN = {group: {row: base for base, rows in bases.items() for row in rows}  # row -> whose it shares
           for group, bases in SHARED.items()}


@dataclass(frozen=True)
class Config:
    setting: Literal["mnist", "mnist-small_cnn", "cifar10-w16"] = "mnist"  # whose recipes
    defenses: tuple[str, ...] = ()   # only these rows; default: all
    seeds: tuple[int, ...] = (0, 1)  # of the trainings
    strong: bool = False             # measure the first 1,000 images under strong attacks too
    num_processes: int = 2           # runs side by side, of one thread each
    device: str = "cpu"              # of trainings and evaluations: cpu, cuda, cuda:1
    cifar10: str = "cifar10"         # the data set of cifar10-w16: cifar10, or a folder of images
    data_dir: str = "data"           # folder of the data sets
    runs: str = "runs/campaign"      # folder of runs and evaluations
    out: str = "results"             # folder of what the tables read


def commands(cfg: Config) -> dict[str, tuple[str, ...]]:
    """Defense -> script and flags.  Raises UserError for a defense that the setting has not."""
    if cfg.setting != "cifar10-w16":
        return chosen(recipes(cfg.setting) | (CONTROL if cfg.setting == "mnist" else {}), cfg.defenses)
    known = {name: ("train_vir", "--recipe", f"{method}-cifar10-w16", "--dataset", cfg.cifar10, *flags)
             for name, (method, *flags) in CIFAR10.items()}
    return chosen(known, cfg.defenses)


def row_of(setting: str, defense: str) -> str:
    """The folder of a defense's runs, as in vir/trades-5 or mnist/lenet-at-alpha0.5."""
    name = defense.lower()
    for label, short in ((", alpha ", "-alpha"), (", 1/lambda ", "-"), (", mean ", "-mean")):
        name = name.replace(label, short)
    if setting == "cifar10-w16":
        return f"{setting}/{name}"
    if defense in ZENG:
        network = "small_cnn" if setting == "mnist-small_cnn" else "lenet"
        return f"mnist/{network}-{name}"
    if (method := name.removesuffix(", vir's recipe")) != name:
        return f"vir/{method}"
    return f"fast/{defense.lower().removesuffix(' at')}"


def burn_in(run: Path) -> Path | None:
    """The run of the same seed whose burn-in is that of the run in this folder."""
    group, row, seed = run.parts[-3:]
    base = BURN_IN.get(group, {}).get(row)
    return run.parents[1] / base / seed if base else None


def evaluate(run: Path, name: str, device: str, *flags: str) -> None:
    """Write run/NAME.json, or go on with the evaluation that was stopped."""
    script = "eval_cifar10" if run.parts[-3] == "cifar10-w16" else "eval_mnist"
    out = run / f"{name}.json"
    if out.exists():
        return
    record = out.with_suffix(".record")
    begin = ("--checkpoint", str(run / "last.pt"), "--num_restarts", "1", *flags, "--out", str(out),
             "--device", device)
    begun = (record / "config.json").exists()
    start(script, *(("--resume", str(record)) if begun else begin))


def keep(run: Path, out: Path) -> None:
    """Copy what the tables read, and the margins of eval.npz and strong.npz in single precision."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "log.csv", "eval.json", "strong.json"):
        if (run / name).exists():
            shutil.copy(run / name, out / name)
    kept = {"eval": ("adv", "margins.npz"), "strong": ("worst", "margins_worst.npz")}
    for source in ("eval", "strong") if (run / "strong.json").exists() else ("eval",):
        kind, name = kept[source]
        with np.load(run / f"{source}.npz") as found:
            margin, correct = found[f"margin_{kind}"], found[f"prediction_{kind}"] == found["label"]
        np.savez_compressed(out / name, margin_adv=margin.astype(np.float32), correct=correct)


def one_run(command: tuple[str, ...], run: Path, out: Path, cfg: Config) -> None:
    """Train, evaluate and keep, each as far as it is not done."""
    script, *flags = command
    begin = (*flags, "--out_dir", str(run), "--data_dir", cfg.data_dir, "--device", cfg.device)
    if (base := burn_in(run)) and (base / "burn_in.pt").exists():
        begin += ("--burn_in_from", str(base))
    start(script, *(("--resume", str(run)) if (run / "config.json").exists() else begin))
    evaluate(run, "eval", cfg.device)
    if cfg.strong:
        evaluate(run, "strong", cfg.device, *STRONG, *MORE_ATTACKS.get(cfg.setting, ()))
    keep(run, out)


def main(cfg: Config) -> None:
    jobs = [(f"{row_of(cfg.setting, defense)}/seed{seed}", (*command, "--seed", str(seed)))
            for seed, (defense, command) in product(cfg.seeds, commands(cfg).items())]
    with tqdm(total=len(jobs), unit="run") as bar:

        def work(job: tuple[str, tuple[str, ...]]) -> None:
            place, command = job
            one_run(command, Path(cfg.runs, place), Path(cfg.out, place), cfg)
            bar.update()

        for has_base in (False, True):  # the bases first
            side_by_side(work, [job for job in jobs if (burn_in(Path(job[0])) is not None) == has_base],
                         cfg.num_processes)
    paired.main(paired.Config(cfg.out))


if __name__ == "__main__":
    run_script(main, Config)
