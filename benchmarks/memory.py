"""Resident memory of a training run on each data set: after its first batches, and at the end, which must be the same but for
what a fragmented heap takes now and then, 2 % at most here.

Each data set is trained on in a process of its own, by the training script's own epoch, batch size and data path. `loaded` is the memory
once the images are there, `first` after FIRST batches, `end` after the last one, `peak` the most that the process ever took, loading
included; in MB of 10^6 bytes. A data set called `NAME-standin` is noise of the official size of NAME, read from files written for this
purpose: what a run keeps depends on the size alone, what reading the official files takes meanwhile is not in its figures.

    python benchmarks/memory.py --out results/speed/memory.json
    python benchmarks/memory.py --dataset mnist cifar10 --batches 100
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.optim import SGD

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path, the repository's root is not

import train_at_cifar10
import train_at_mnist
from harness.config import run_script
from harness.datasets.batches import Dataset, load_dataset
from harness.datasets.split import Split
from harness.device import choose_device, command_line, environment, resident
from harness.errors import UserError
from harness.evaluation.report import output_path
from harness.folder import write_text
from harness.training.batch import Batch
from harness.training.options import RunOptions
from harness.training.run import Run
from models import build_model

FIRST = 20  # batches after which nothing new should be needed
STANDINS = {"cifar100": (50_000, 10_000, 100, (3, 32, 32)), "svhn": (73_257, 26_032, 10, (3, 32, 32)),
            "tiny-imagenet": (100_000, 10_000, 200, (3, 64, 64))}  # training images, test images, classes, [C, H, W]
SUFFIX = "-standin"


@dataclass(frozen=True)
class Config:
    dataset: tuple[str, ...] = ("digits", "mnist", "cifar100-standin", "svhn-standin", "tiny-imagenet-standin")  # names, folders, stand-ins
    model: str | None = None                     # network; default: lenet for one channel, resnet18 for three
    batches: int = 40                            # training batches of each run, of several epochs where one has fewer
    num_steps: int = 10                          # PGD steps a batch
    batch_size: int = 128                        # images a batch
    data_dir: str = "data"                       # folder of the data sets
    seed: int = 0                                # of weights and starts
    out: str | None = None                       # JSON file to write, never over another
    inside: str | None = None                    # folder of a stand-in's files: measure the one data set in this process


class Watched(Run):
    """A run that notes the resident memory after each of its batches."""

    def __init__(self, cfg: RunOptions, data: Dataset):
        super().__init__(cfg, data)
        self.resident: list[int] = []

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of `Run.batches`."""
        for batch in super().batches(epoch):
            yield batch  # the training step happens here
            self.resident.append(resident("VmRSS"))


def write_standin(name: str, folder: Path) -> None:
    """Files of noise of the official size of `name`."""
    train, test, classes, shape = STANDINS[name]
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        np.save(folder / f"{part}_images.npy", generator.integers(0, 256, (count, *shape), dtype=np.uint8))
        np.save(folder / f"{part}_labels.npy", generator.integers(0, classes, count))


def open_data(name: str, cfg: Config) -> Dataset:
    """The data set; a stand-in from the files in the folder `inside`."""
    if not name.endswith(SUFFIX):
        return load_dataset(name, cfg.data_dir)
    parts = {}
    for part in ("train", "test"):
        images, labels = (torch.from_numpy(np.load(f"{cfg.inside}/{part}_{kind}.npy")) for kind in ("images", "labels"))
        parts[part] = Split(images, labels, torch.arange(len(labels)))
    classes = STANDINS[name.removesuffix(SUFFIX)][2]
    return Dataset(name, tuple(map(str, range(classes))), parts["train"], parts["train"][:0], parts["test"])


def measure_here(cfg: Config) -> dict[str, object]:
    """One run on the one data set of `cfg`, in this process."""
    name, = cfg.dataset
    data = open_data(name, cfg)
    loaded, grey = resident("VmRSS"), data.image_shape[0] == 1
    script = train_at_mnist if grey else train_at_cifar10
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(script.Config(), model=cfg.model or ("lenet" if grey else "resnet18"), max_batches=cfg.batches, seed=cfg.seed,
                           epochs=-(-cfg.batches // -(-len(data.train) // cfg.batch_size)), batch_size=cfg.batch_size, val_size=0,
                           num_steps=cfg.num_steps, device="cpu", out_dir=f"{folder}/run")
        run = Watched(settings, data)
        model = run.build(build_model)
        optimizer = SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
        for epoch in run.epochs(model, optimizer, scheduler=None):
            script.train_one_epoch(model, optimizer, run, epoch, settings)
    images = data.train.images.nbytes + data.test.images.nbytes
    return {"dataset": name, "standin": name.endswith(SUFFIX), "model": settings.model, "batches": len(run.resident),
            "training_images": len(data.train), "image_shape": list(data.image_shape), "images_mb": images / 1e6, "loaded_mb": loaded / 1e6,
            "first_mb": run.resident[FIRST - 1] / 1e6, "end_mb": run.resident[-1] / 1e6, "peak_mb": resident("VmHWM") / 1e6,
            "growth_mb": (run.resident[-1] - run.resident[FIRST - 1]) / 1e6, "resident_mb": [value / 1e6 for value in run.resident]}


def measure(name: str, cfg: Config) -> dict[str, object]:
    """`measure_here` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        if name.endswith(SUFFIX):
            write_standin(name.removesuffix(SUFFIX), Path(folder))
        flags = {"dataset": name, "inside": folder, **({"model": cfg.model} if cfg.model else {})}
        flags |= {flag: getattr(cfg, flag) for flag in ("batches", "num_steps", "batch_size", "data_dir", "seed")}
        words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise UserError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(cfg: Config) -> None:
    if not Path("/proc/self/status").exists():
        raise UserError("this benchmark reads /proc/self/status, which is there on Linux alone")
    if cfg.batches <= FIRST:
        raise UserError(f"--batches {cfg.batches} are too few, more than {FIRST} are needed")
    if unknown := [name for name in cfg.dataset if name.endswith(SUFFIX) and name.removesuffix(SUFFIX) not in STANDINS]:
        raise UserError(f"no stand-in '{unknown[0]}': choose among {', '.join(name + SUFFIX for name in STANDINS)}")
    if cfg.inside:
        print(json.dumps(measure_here(cfg)))
        return
    out, rows = output_path(cfg.out, Path(cfg.out), whole_run=False) if cfg.out else None, []
    print(f"{'data set':<24}{'network':<11}{'images MB':>10}{'loaded':>9}{'first':>9}{'end':>9}{'peak':>9}", flush=True)
    for name in cfg.dataset:
        rows.append(row := measure(name, cfg))
        print(f"{name:<24}{row['model']:<11}" + f"{row['images_mb']:>10.0f}"
              + "".join(f"{row[f'{key}_mb']:>9.0f}" for key in ("loaded", "first", "end", "peak")), flush=True)
        if out:
            write_text(out, json.dumps({
                "rows": rows, "batch_size": cfg.batch_size, "num_steps": cfg.num_steps, "first_batches": FIRST, "seed": cfg.seed,
                "command": command_line(), "date": time.strftime("%Y-%m-%d"), "environment": environment(choose_device("cpu"))},
                indent=2) + "\n")


if __name__ == "__main__":
    run_script(main, Config)
