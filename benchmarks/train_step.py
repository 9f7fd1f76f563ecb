"""Time and memory of one training step of our scripts beside the same step in the form in which the published code writes it.

    ours        `train_one_epoch` of train_at_*.py, train_trades_*.py and train_vir.py itself: batch from the data set, noise, attack, loss,
                SGD, metering and progress bar, in the training precision. VIR is VIR-AT with its weights switched on
    published   `benchmarks/forms.py`: float32 with torch's own settings, NCHW, parameters not frozen, on a batch that is
                already there
    bare        the forward and backward passes alone that ours cannot do without, in its precision, on tensors that are already there

The three take turns in one process, on synthetic images of the network's size, after a warm-up; every figure is a median.

    ratio             published / ours
    images/s          images of a batch over its time; `published` behind it is that form's
    overhead_percent  (ours - bare) / ours: the part of our step that is neither forward nor backward pass
    gflops            what the algorithm needs (counted on the bare step: mul and add of convolutions and products) over the time of ours
    peak_percent      gflops over the rate of one large matrix product of the same type, the best of several, in the same process
    MB                the most memory (10^6 bytes) that a process of its own takes for three steps of one form, network, gradients and
                      momentum included: on a CPU (Linux) beyond what it held after a LeNet step of one image, on a GPU by torch's allocator

    python benchmarks/train_step.py                                # LeNet, SmallCNN and ResNet-18; AT, TRADES and VIR
    python benchmarks/train_step.py --model resnet18 --method trades --batch_size 64 --json
    python benchmarks/train_step.py --model wrn34_10 --batch_size 8 --repeats 3
    python benchmarks/train_step.py --model lenet --repeats 20 --out results/train_step_lenet.json
"""
import copy
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path, the repository's root is not

import train_at_cifar10
import train_at_mnist
import train_trades_cifar10
import train_trades_mnist
import train_vir
from attacks.pgd import first_iterate
from benchmarks.forms import BARE, NUM_CLASSES, PUBLISHED, count_flops, published_model
from harness.config import run_script
from harness.datasets.batches import Dataset, to_unit
from harness.datasets.split import Split
from harness.device import choose_device, command_line, environment, peak_memory, resident
from harness.errors import UserError
from harness.evaluation.report import output_path
from harness.folder import write_text
from harness.training.batch import Batch
from harness.training.options import RunOptions
from harness.training.run import Run
from models import MODELS, build_model

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)  # [C, H, W]
MNIST_MODELS = {"lenet", "small_cnn"}
SCRIPTS = {("at", MNIST): train_at_mnist, ("at", CIFAR): train_at_cifar10, ("vir", MNIST): train_vir,
           ("trades", MNIST): train_trades_mnist, ("trades", CIFAR): train_trades_cifar10, ("vir", CIFAR): train_vir}
THREATS = {MNIST: {"epsilon": 0.3, "step_size": 0.01}, CIFAR: {"epsilon": 8 / 255, "step_size": 2 / 255}}
NUM_STEPS = {MNIST: 40, CIFAR: 10}  # of PGD, as the AT and TRADES scripts have it
VIR = train_vir.RECIPES["vir-at"]
METHOD_SETTINGS = {"at": {}, "trades": {"beta": 6.0},
                   "vir": {name: getattr(VIR, name) for name in ("base", "weights", "alpha", "beta", "gamma")} | {"burn_in_epochs": 0}}
PLAIN = {("vir", MNIST): {"crop_padding": 0, "flip": False}}  # digits are not cropped or flipped
MEMORY_STEPS = 3  # the second one finds gradients and momentum in their place


@dataclass(frozen=True)
class Config:
    model: tuple[str, ...] = ("lenet", "small_cnn", "resnet18")  # lenet, small_cnn (1x28x28), resnet18, wrn34_10, wrn28_10 (3x32x32)
    method: tuple[Literal["at", "trades", "vir"], ...] = ("at", "trades", "vir")  # adversarial training, TRADES, VIR-AT
    batch_size: int = 128                                 # images a step
    num_steps: int | None = None                          # PGD steps a batch; none is 40 at 1x28x28, 10 at 3x32x32
    repeats: int = 5                                      # timed steps of each form
    warmup_rounds: int = 1                                # steps of each form before the timed ones
    matmul_size: int = 4096                               # rows and columns of the matrices whose product gives the peak
    memory: bool = True                                   # measure the memory too, each form in a process of its own
    seed: int = 0                                         # of images, weights, starts and dropout
    device: str = "auto"                                  # auto, cpu, or an accelerator by its name in torch
    precision: Literal["auto", "bf16", "float32"] = "auto"  # of our step; auto is bf16 where it is faster (harness/device.py)
    attack_view: bool = True                              # of our step: a faster form of the network where one is recognised
    compile: bool = False                                 # of our step: torch.compile
    graphs: bool = False                                  # with compile, on a GPU: replay each compiled piece as one CUDA graph
    json: bool = False                                    # print one line of JSON and nothing else
    out: str | None = None                                # JSON file to write, never over another


# ---- timing ----------------------------------------------------------------------------------------------------------------------

def clock(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


class Rounds(Run):
    """A run that times each of its training steps, from asking for the batch to the end of the metering, and after each of them one
    call of every other form in `forms`; `times` holds the seconds of each."""

    def __init__(self, cfg: RunOptions, data: Dataset):
        super().__init__(cfg, data)
        self.forms: dict[str, Callable[[], object]] = {}
        self.times: dict[str, list[float]] = defaultdict(list)

    def say(self, text: str) -> None:
        """Nothing: the standard output is for the result."""

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of `Run.batches`."""
        source = super().batches(epoch)
        while True:
            started = clock(self.device)
            if (batch := next(source, None)) is None:
                return
            yield batch  # the training step happens here
            self.times["ours"].append(clock(self.device) - started)
            for name, form in self.forms.items():
                started = clock(self.device)
                form()
                self.times[name].append(clock(self.device) - started)


def matrix_peak(size: int, dtype: torch.dtype, device: torch.device, repeats: int) -> float:
    """GFLOP/s of the fastest of `repeats` products of two `size` x `size` matrices, after one that does not count."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(1 + repeats):
        started = clock(device)
        left @ right
        seconds.append(clock(device) - started)
    return 2 * size**3 / min(seconds[1:]) / 1e9


# ---- one combination of model and method -----------------------------------------------------------------------------------------

def image_shape_of(name: str) -> tuple[int, int, int]:
    """The images that the network called `name` is timed on."""
    return MNIST if name in MNIST_MODELS else CIFAR


def settings_of(name: str, method: str, cfg: Config, folder: str) -> object:
    """The training script's Config for one epoch of timed steps, at the full radius from the first batch on."""
    shape = image_shape_of(name)
    values = {**THREATS[shape], **METHOD_SETTINGS[method], **PLAIN.get((method, shape), {}),
              "num_steps": NUM_STEPS[shape] if cfg.num_steps is None else cfg.num_steps}
    return SCRIPTS[method, shape].Config(model=name, batch_size=cfg.batch_size, seed=cfg.seed, device=cfg.device, out_dir=folder,
                                         precision=cfg.precision, attack_view=cfg.attack_view, compile=cfg.compile, graphs=cfg.graphs,
                                         epochs=1, epsilon_warmup_epochs=0, max_grad_norm=0, **values)


def synthetic(image_shape: tuple[int, int, int], count: int, seed: int) -> Dataset:
    """`count` training images of noise with random labels: a step takes the same time whatever it learns."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, *image_shape), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.randint(0, NUM_CLASSES, (count,), generator=generator), torch.arange(count))
    return Dataset("noise", tuple(map(str, range(NUM_CLASSES))), train=split, val=split[:0], test=split)


def sgd(model: nn.Module, settings: object) -> Optimizer:
    """The training scripts' optimiser."""
    return SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)


def first_batch(train: Split, settings: object) -> tuple[Tensor, Tensor]:
    """The first images of `train`, [B, C, H, W] in [0, 1], and their labels [B]."""
    return to_unit(train.images[:settings.batch_size]), train.labels[:settings.batch_size]


def published_step(model: nn.Module, method: str, settings: object, train: Split) -> Callable[[], object]:
    """The published step on the first images of `train`, on a copy of the network."""
    theirs = published_model(model)
    return partial(PUBLISHED[method], theirs, sgd(theirs, settings), *first_batch(train, settings), settings, settings.start)


def bare_step(model: nn.Module, method: str, settings: object, train: Split) -> Callable[[], object]:
    """The bare step on the first images of `train`, on copies of the network."""
    x, y = first_batch(train, settings)
    x = x.contiguous(memory_format=torch.channels_last)
    attacked = copy.deepcopy(model).requires_grad_(False).train(settings.attack_mode == "train")
    x_adv = first_iterate(x, settings.epsilon, settings.start).requires_grad_()
    return partial(BARE[method], attacked, copy.deepcopy(model).train(), x, x_adv, y, settings)


def take_steps(run: Rounds, model: nn.Module, method: str, settings: object) -> None:
    """Every step of ours, with the run's other forms in turns."""
    optimizer = sgd(model, settings)
    for epoch in run.epochs(model, optimizer, scheduler=None):
        SCRIPTS[method, run.data.image_shape].train_one_epoch(model, optimizer, run, epoch, settings)


def measure(name: str, method: str, cfg: Config, peak_of: Callable[[torch.dtype], float]) -> dict[str, object]:
    """Time the three forms of one step in turns, and take the memory of ours and of the published one; peak_of(dtype) is in GFLOP/s."""
    shape = image_shape_of(name)
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(name, method, cfg, folder)
        run = Rounds(settings, synthetic(shape, cfg.batch_size * (cfg.warmup_rounds + cfg.repeats), cfg.seed))
        model = run.build(build_model)
        run.forms = {"published": published_step(model, method, settings, run.train), "bare": bare_step(model, method, settings, run.train)}
        take_steps(run, model, method, settings)
    seconds = {form: times[cfg.warmup_rounds:] for form, times in run.times.items()}
    ours, published, needed = (statistics.median(seconds[form]) for form in ("ours", "published", "bare"))
    gflop, peak = count_flops(name, method, settings, shape) / 1e9, peak_of(run.dtype)
    return {"model": name, "method": method, "batch_size": cfg.batch_size, "num_steps": settings.num_steps, "image_shape": shape,
            "precision": {torch.bfloat16: "bf16", torch.float32: "float32"}[run.dtype], "attack_view": cfg.attack_view,
            "compile": cfg.compile, "graphs": cfg.graphs,
            "ours_seconds": ours, "published_form_seconds": published, "bare_seconds": needed, "ratio": published / ours,
            "images_per_second": cfg.batch_size / ours, "published_form_images_per_second": cfg.batch_size / published,
            "overhead_percent": 100 * (ours - needed) / ours, "gflop": gflop, "gflops": gflop / ours,
            "published_form_gflops": gflop / published, "peak_gflops": peak, "peak_percent": 100 * gflop / ours / peak,
            "ours_mb": peak_mb("ours", name, method, cfg), "published_form_mb": peak_mb("published", name, method, cfg),
            "seconds": seconds}


# ---- memory ----------------------------------------------------------------------------------------------------------------------

def peak_mb(form: str, name: str, method: str, cfg: Config) -> float | None:
    """MB that a process which trains by one form only takes at most; None without --memory, and where the system keeps no account."""
    if not cfg.memory:
        return None
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            taken = pool.submit(peak_here, form, name, method, cfg).result()
        except BrokenProcessPool:
            raise UserError(f"the process that took the memory of {name}, {method} was killed: less --batch_size, or --no-memory") from None
    return None if taken is None else taken / 1e6


def peak_here(form: str, name: str, method: str, cfg: Config) -> int | None:
    """Bytes that MEMORY_STEPS steps of one form and what they stand on take at most in this process, which must have done nothing yet."""
    device, work = choose_device(cfg.device), partial(run_alone, form, name, method, cfg)
    run_alone(form, "lenet", method, replace(cfg, batch_size=1, num_steps=1))  # the libraries load their own code and buffers
    if device.type == "cuda":
        return peak_memory(device, work)
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before if device.type == "cpu" and before else None


def run_alone(form: str, name: str, method: str, cfg: Config) -> None:
    """MEMORY_STEPS steps of one form, with nothing of the others in memory."""
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(name, method, cfg, folder)
        run = Rounds(settings, synthetic(image_shape_of(name), cfg.batch_size * MEMORY_STEPS, cfg.seed))
        model = run.build(build_model)
        if form == "ours":
            take_steps(run, model, method, settings)
        else:
            step = published_step(model, method, settings, run.train)
            del model
            for _ in range(MEMORY_STEPS):
                step()


HEADER = (f"{'model':<10}{'method':<8}{'batch':>6}{'steps':>6}{'ours s':>10}{'published s':>13}{'ratio':>7}{'images/s':>10}"
          f"{'published':>11}{'overhead %':>12}{'GFLOP/s':>10}{'peak %':>8}{'MB':>9}{'published':>11}")


def line(row: dict[str, object]) -> str:
    """One line of the table."""
    ours_mb, published_mb = ("-" if row[key] is None else f"{row[key]:,.0f}" for key in ("ours_mb", "published_form_mb"))
    return (f"{row['model']:<10}{row['method']:<8}{row['batch_size']:>6}{row['num_steps']:>6}{row['ours_seconds']:>10.4f}"
            f"{row['published_form_seconds']:>13.4f}{row['ratio']:>7.2f}{row['images_per_second']:>10,.1f}"
            f"{row['published_form_images_per_second']:>11,.1f}{row['overhead_percent']:>12.2f}{row['gflops']:>10,.1f}"
            f"{row['peak_percent']:>8.1f}{ours_mb:>9}{published_mb:>11}")


def check(cfg: Config) -> None:
    """Raise UserError for what the flags' types let through."""
    if unknown := [name for name in cfg.model if name not in MODELS]:
        raise UserError(f"unknown model '{unknown[0]}': choose among {', '.join(MODELS)}")
    for flag, least in {"model": 1, "method": 1, "repeats": 1, "warmup_rounds": 0, "matmul_size": 1}.items():
        value = getattr(cfg, flag)
        if (len(value) if isinstance(value, tuple) else value) < least:
            raise UserError(f"--{flag} needs at least {least}")


def main(cfg: Config) -> None:
    check(cfg)
    out = output_path(cfg.out, Path(cfg.out), whole_run=False) if cfg.out else None
    device = choose_device(cfg.device)
    peak_of = cache(lambda dtype: matrix_peak(cfg.matmul_size, dtype, device, cfg.repeats))
    if not cfg.json:
        print(HEADER, flush=True)
    facts = {"repeats": cfg.repeats, "warmup_rounds": cfg.warmup_rounds, "matmul_size": cfg.matmul_size, "seed": cfg.seed,
             "command": command_line(), "date": time.strftime("%Y-%m-%d"), "environment": environment(device)}
    pairs, rows = [(name, method) for name in cfg.model for method in cfg.method], []
    for name, method in tqdm(pairs, desc="timing", leave=False, disable=None):
        rows.append(measure(name, method, cfg, peak_of))
        result = (rows[0] if len(pairs) == 1 else {"rows": rows}) | facts
        if out:
            write_text(out, json.dumps(result, indent=2) + "\n")  # after each row: the next one may take minutes
        if not cfg.json:
            tqdm.write(line(rows[-1]))
    if cfg.json:
        print(json.dumps(result), flush=True)
    else:
        where = facts["environment"]
        print(f"{where['hardware']}, {where['threads']} threads, torch {where['torch']}; ours in {rows[0]['precision']}, "
              f"peak {rows[0]['peak_gflops']:,.0f} GFLOP/s")


if __name__ == "__main__":
    run_script(main, Config)
