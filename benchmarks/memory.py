"""Resident memory of a training run on each data set: after its first batches, and at the end.

The two must be the same but for what a fragmented heap takes now and then, 2 % at most here. Each data set
is trained on in a process of its own, by the training script's own epoch, batch size and data path.
`loaded` is the memory once the images are there, `first` after FIRST batches, `end` after the last one,
`peak` the most that the process ever took; in MB of 10^6 bytes. A data set called `NAME-standin` is noise
of the official size of NAME, read from files written for this purpose: what a run keeps depends on the size
alone.

    python benchmarks/memory.py --out results/speed/memory.json
    python benchmarks/memory.py --dataset mnist cifar10 --batches 100
"""
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: a script finds its own folder

import train_at_cifar10
import train_at_mnist
from benchmarks import common
from harness.config import run_script
from harness.datasets.batches import Dataset, load_dataset
from harness.datasets.split import Split
from harness.device import choose_device, resident
from harness.errors import UserError
from harness.training.batch import Batch
from harness.training.options import RunOptions
from models import build_model

FIRST = 20  # batches after which nothing new should be needed
STANDINS = {"cifar100": (50_000, 10_000, 100, (3, 32, 32)), "svhn": (73_257, 26_032, 10, (3, 32, 32)),
            "tiny-imagenet": (100_000, 10_000, 200, (3, 64, 64))}  # training, test images, classes, [C, H, W]
SUFFIX = "-standin"
COLUMNS = (("data set", "dataset", "<24"), ("network", "model", "<11"), ("images MB", "images_mb", ">10.0f"),
           ("loaded", "loaded_mb", ">9.0f"), ("first", "first_mb", ">9.0f"), ("end", "end_mb", ">9.0f"),
           ("peak", "peak_mb", ">9.0f"))


@dataclass(frozen=True)
class Config:
    dataset: tuple[str, ...] = ("digits", "mnist", *(name + SUFFIX for name in STANDINS))  # names, folders
    model: str | None = None   # network; default: lenet for one channel, resnet18 for three
    batches: int = 40          # training batches of each run, of several epochs where one has fewer
    num_steps: int = 10        # PGD steps a batch
    batch_size: int = 128      # images a batch
    data_dir: str = "data"     # folder of the data sets
    seed: int = 0              # of weights and starts
    out: str | None = None     # JSON file to write, never over another


class Watched(common.SilentRun):
    """A run that notes the resident memory after each of its batches."""

    def __init__(self, cfg: RunOptions, data: Dataset):
        super().__init__(cfg, data)
        self.resident: list[float] = []  # MB

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of `Run.batches`."""
        for batch in super().batches(epoch):
            yield batch  # the training step happens here
            self.resident.append(megabytes("VmRSS"))


def megabytes(field: str) -> float:
    return (resident(field) or 0) / 1e6  # main asks whether there is any


def write_standin(name: str, folder: str) -> None:
    """Files of noise of the official size of `name`."""
    train, test, classes, shape = STANDINS[name]
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        np.save(f"{folder}/{part}_images.npy", generator.integers(0, 256, (count, *shape), dtype=np.uint8))
        np.save(f"{folder}/{part}_labels.npy", generator.integers(0, classes, count))


def read_standin(name: str, folder: str) -> Dataset:
    """The stand-in of `name` from its files."""
    parts = []
    for part in ("train", "test"):
        files = [f"{folder}/{part}_{kind}.npy" for kind in ("images", "labels")]
        images, labels = (torch.from_numpy(np.load(file)) for file in files)
        parts.append(Split(images, labels, torch.arange(len(labels))))
    train, test = parts
    return Dataset(name + SUFFIX, tuple(map(str, range(STANDINS[name][2]))), train, train[:0], test)


def measure_here(name: str, cfg: Config, folder: str) -> dict[str, Any]:
    """One run on one data set in this process; folder: of a stand-in's files."""
    standin = name.endswith(SUFFIX)
    data = read_standin(name.removesuffix(SUFFIX), folder) if standin else load_dataset(name, cfg.data_dir)
    loaded, grey = megabytes("VmRSS"), data.image_shape[0] == 1
    script = train_at_mnist if grey else train_at_cifar10
    with tempfile.TemporaryDirectory() as runs:
        epochs = -(-cfg.batches // -(-len(data.train) // cfg.batch_size))
        settings = replace(script.Config(), model=cfg.model or ("lenet" if grey else "resnet18"),
                           epochs=epochs, max_batches=cfg.batches, batch_size=cfg.batch_size, val_size=0,
                           num_steps=cfg.num_steps, seed=cfg.seed, device="cpu", out_dir=f"{runs}/run")
        run = Watched(settings, data)
        model = run.build(build_model)
        optimizer = common.sgd(model, settings)
        for epoch in run.epochs(model, optimizer, scheduler=None):
            script.train_one_epoch(model, optimizer, run, epoch, settings)
    first, end = run.resident[FIRST - 1], run.resident[-1]
    return {"dataset": name, "standin": standin, "model": settings.model, "batches": len(run.resident),
            "training_images": len(data.train), "image_shape": list(data.image_shape),
            "images_mb": (data.train.images.nbytes + data.test.images.nbytes) / 1e6, "loaded_mb": loaded,
            "first_mb": first, "end_mb": end, "peak_mb": megabytes("VmHWM"), "growth_mb": end - first,
            "resident_mb": run.resident}


def measure(name: str, cfg: Config) -> dict[str, Any]:
    """`measure_here` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        if name.endswith(SUFFIX):
            write_standin(name.removesuffix(SUFFIX), folder)
        try:
            return common.in_a_process(measure_here, name, cfg, folder)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None


def main(cfg: Config) -> None:
    if resident("VmRSS") is None:
        raise UserError("this benchmark reads /proc/self/status, which is there on Linux alone")
    if cfg.batches <= FIRST:
        raise UserError(f"--batches {cfg.batches} are too few, more than {FIRST} are needed")
    standins = [name + SUFFIX for name in STANDINS]
    if unknown := [name for name in cfg.dataset if name.endswith(SUFFIX) and name not in standins]:
        raise UserError(f"no stand-in '{unknown[0]}': choose among {', '.join(standins)}")
    out, rows = common.out_file(cfg.out), []
    print(common.head(COLUMNS), flush=True)
    for name in cfg.dataset:
        rows.append(measure(name, cfg))
        print(common.line(COLUMNS, rows[-1]), flush=True)
        common.write_json(out, {"rows": rows, "batch_size": cfg.batch_size, "num_steps": cfg.num_steps,
                                "first_batches": FIRST, "seed": cfg.seed,
                                **common.facts(choose_device("cpu"))})


if __name__ == "__main__":
    run_script(main, Config)
