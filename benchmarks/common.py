"""What the benchmarks share: time, processes, noise to train on, networks to attack, tables and files."""
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD

import train_at_cifar10
import train_at_mnist
import train_trades_cifar10
import train_trades_mnist
import train_vir
from harness.datasets.batches import Dataset, first_examples, to_unit
from harness.datasets.split import Split
from harness.device import choose_device, command_line, environment
from harness.evaluation.report import output_path
from harness.evaluation.subject import Protocol, open_subject, radius_of
from harness.folder import write_text
from harness.training.run import Run
from models import build_model

NUM_CLASSES = 10
MNIST, CIFAR = (1, 28, 28), (3, 32, 32)  # [C, H, W]
PROTOCOL = Protocol(dataset="mnist", channels=1, epsilon=0.3, step_ratio=30)


TrainConfig = (train_at_mnist.Config | train_at_cifar10.Config | train_trades_mnist.Config
               | train_trades_cifar10.Config | train_vir.Config)


# ---- timing ------------------------------------------------------------------------------------------------

def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """What work() takes, from a device at rest to a device at rest."""
    started = clock(device)
    work()
    return clock(device) - started


def clock(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def in_a_process(work: Callable[..., Any], *args: object) -> Any:
    """work(*args) in a new process.  Raises what it raises, and BrokenProcessPool when it is killed."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


# ---- training ----------------------------------------------------------------------------------------------

class SilentRun(Run):
    """A run that says nothing: the standard output is for the result."""

    def say(self, text: str) -> None:
        """Nothing."""


def sgd(model: nn.Module, settings: TrainConfig) -> SGD:
    """The training scripts' optimiser."""
    return SGD(model.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay)


def synthetic(image_shape: tuple[int, int, int], count: int, seed: int) -> Dataset:
    """`count` training images of noise with random labels: a step takes the same time whatever it learns."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, *image_shape), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, NUM_CLASSES, (count,), generator=generator)
    split = Split(images, labels, torch.arange(count))
    return Dataset("noise", tuple(map(str, range(NUM_CLASSES))), train=split, val=split[:0], test=split)


# ---- attacks -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class AttackOptions:
    """What is attacked, and where the result goes."""

    arch: str | None = None              # network of a foreign checkpoint: a name, or file.py:callable
    dataset: str | None = None           # data set or image folder; default: the checkpoint's
    epsilon: float | None = None         # radius, pixels in [0, 1]; default: the checkpoint's
    norm: Literal["linf", "l2"] = "linf"  # of the radius
    num_examples: int | None = 1000      # the first so many test images
    data_dir: str | None = None          # folder of the data sets; default: the checkpoint's, or data
    out: str | None = None               # JSON file to write, never over another
    device: str = "auto"                 # auto, cpu, or an accelerator by its name in torch


@dataclass(frozen=True)
class Task:
    """A network and the images on which it is attacked."""

    model: nn.Module
    x: Tensor       # [N, C, H, W] in [0, 1]
    y: Tensor       # [N]
    epsilon: float
    dataset: str


def open_task(path: Path, cfg: AttackOptions) -> Task:
    """The network of a checkpoint and the images on which it is attacked; says what they are."""
    subject = open_subject(path.stem, path, build_model, arch=cfg.arch, dataset=cfg.dataset,
                           data_dir=cfg.data_dir, default=PROTOCOL.dataset)
    device, epsilon = choose_device(cfg.device), radius_of(subject, PROTOCOL, cfg.epsilon)
    test = first_examples(subject.split, cfg.num_examples).to(device)
    print(f"{path}: {len(test):,} test images of {subject.dataset}, {cfg.norm} {epsilon:g}", flush=True)
    return Task(subject.model.to(device), to_unit(test.images), test.labels, epsilon, subject.dataset)


# ---- output ------------------------------------------------------------------------------------------------

Columns = tuple[tuple[str, str, str], ...]  # of a printed table: title, key of a row, format


def head(columns: Columns) -> str:
    """The titles, each as wide as its cells."""
    return "".join(f"{title:{width(spec)}}" for title, _, spec in columns)


def line(columns: Columns, row: dict[str, Any]) -> str:
    """One row of the table; None is `-`."""
    return "".join(f"{'-':{width(spec)}}" if row[key] is None else f"{row[key]:{spec}}"
                   for _, key, spec in columns)


def width(spec: str) -> str:
    """The alignment and the width of a format."""
    return spec.split(".")[0].rstrip(",")


def out_file(out: str | None) -> Path | None:
    """The file named by --out, if any.  Raises UserError for one that exists, or cannot be written."""
    return output_path(out, Path(out), whole_run=False) if out else None


def facts(device: torch.device) -> dict[str, Any]:
    """What stands behind a number: command, date and environment."""
    return {"command": command_line(), "date": time.strftime("%Y-%m-%d"), "environment": environment(device)}


def write_json(out: Path | None, result: dict[str, Any]) -> None:
    """Write the result so far, where there is a file for it."""
    if out:
        write_text(out, json.dumps(result, indent=2) + "\n")
