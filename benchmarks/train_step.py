"""Time and memory of one training step of our scripts beside the same step as the published code writes it.

    ours        `train_one_epoch` of train_at_*.py, train_trades_*.py, train_vir.py (VIR-AT, weights switched
                on) itself: batch, noise, attack, loss, SGD, metering, progress bar; in the training precision
    published   `benchmarks/forms.py`: float32, NCHW, parameters not frozen, on a batch that is already there
    bare        the forward and backward passes alone that ours cannot do without, in its precision

The three take turns in one process, on noise of the network's size, after a warm-up; every figure is a
median.

    ratio             published / ours
    images/s          images of a batch over its time; `published` behind it is that form's
    overhead_percent  (ours - bare) / ours: the part of our step that is neither forward nor backward pass
    gflops            what the algorithm needs (mul and add of convolutions, products) over the time of ours
    peak_percent      gflops over the rate of one large matrix product of the same type, the best of several
    MB                the most memory (10^6 bytes) that a process of its own takes for three steps of a form:
                      on a CPU (Linux) beyond what it held after a LeNet step of one image, on a GPU by torch

    python benchmarks/train_step.py                                # LeNet, SmallCNN, ResNet-18; every method
    python benchmarks/train_step.py --model resnet18 --method trades --batch_size 64 --json
    python benchmarks/train_step.py --model wrn34_10 --batch_size 8 --repeats 3
    python benchmarks/train_step.py --model lenet --repeats 20 --out results/train_step_lenet.json

Stopped, the same command goes on with the rows that its file lacks.
"""
import copy
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: a script finds its own folder

import train_at_cifar10
import train_at_mnist
import train_trades_cifar10
import train_trades_mnist
import train_vir
from attacks.pgd import first_iterate
from benchmarks import common
from benchmarks.common import CIFAR, MNIST, SilentRun, TrainConfig, clock, seconds_of, sgd, synthetic
from benchmarks.forms import BARE, PUBLISHED, count_flops, published_model
from harness.config import run_script
from harness.datasets.batches import Dataset, to_unit
from harness.datasets.split import Split
from harness.device import choose_device, peak_memory, resident, torchs_own_settings
from harness.errors import UserError
from harness.folder import rows_so_far
from harness.training.batch import Batch
from harness.training.options import RunOptions
from models import MODELS, build_model

MNIST_MODELS = {"lenet", "small_cnn"}
SCRIPTS = {("at", MNIST): train_at_mnist, ("at", CIFAR): train_at_cifar10, ("vir", MNIST): train_vir,
           ("trades", MNIST): train_trades_mnist, ("trades", CIFAR): train_trades_cifar10,
           ("vir", CIFAR): train_vir}
ATTACKS = {MNIST: {"epsilon": 0.3, "step_size": 0.01, "num_steps": 40},  # of the AT and TRADES scripts
           CIFAR: {"epsilon": 8 / 255, "step_size": 2 / 255, "num_steps": 10}}
VIR = train_vir.RECIPES["vir-at"]
VIR_SETTINGS = {name: getattr(VIR, name) for name in ("base", "weights", "alpha", "beta", "gamma")}
METHODS = {"at": {}, "trades": {"beta": 6.0}, "vir": VIR_SETTINGS | {"burn_in_epochs": 0}}
MEMORY_STEPS = 3  # the second one finds gradients and momentum in their place
COLUMNS = (("model", "model", "<10"), ("method", "method", "<8"), ("batch", "batch_size", ">6"),
           ("steps", "num_steps", ">6"), ("ours s", "ours_seconds", ">10.4f"),
           ("published s", "published_form_seconds", ">13.4f"), ("ratio", "ratio", ">7.2f"),
           ("images/s", "images_per_second", ">10,.1f"),
           ("published", "published_form_images_per_second", ">11,.1f"),
           ("overhead %", "overhead_percent", ">12.2f"), ("GFLOP/s", "gflops", ">10,.1f"),
           ("peak %", "peak_percent", ">8.1f"), ("MB", "ours_mb", ">9,.0f"),
           ("published", "published_form_mb", ">11,.0f"))


@dataclass(frozen=True)
class Config:
    model: tuple[str, ...] = ("lenet", "small_cnn", "resnet18")  # of 1x28x28 images, others of 3x32x32
    method: tuple[Literal["at", "trades", "vir"], ...] = ("at", "trades", "vir")  # AT, TRADES, VIR-AT
    batch_size: int = 128        # images a step
    num_steps: int | None = None  # PGD steps a batch; none is 40 at 1x28x28, 10 at 3x32x32
    repeats: int = 5             # timed steps of each form
    warmup_rounds: int = 1       # steps of each form before the timed ones
    matmul_size: int = 4096      # rows and columns of the matrices whose product gives the peak
    memory: bool = True          # measure the memory too, each form in a process of its own
    seed: int = 0                # of images, weights, starts and dropout
    device: str = "auto"         # auto, cpu, or an accelerator by its name in torch
    precision: Literal["auto", "bf16", "float32"] = "auto"  # of our step; auto is bf16 where it is faster
    attack_view: bool = True     # of our step: a faster form of the network where one is recognised
    compile: bool = False        # of our step: torch.compile
    graphs: bool = False         # with compile, on a GPU: replay each compiled piece as one CUDA graph
    json: bool = False           # print one line of JSON and nothing else
    out: str | None = None       # JSON file to write, or to go on with


# ---- timing ------------------------------------------------------------------------------------------------

class Rounds(SilentRun):
    """A run that times its training steps, and after each of them one call of every other form in `forms`.

    A step is from asking for the batch to the end of the metering; `times` holds the seconds of each form.
    """

    def __init__(self, cfg: RunOptions, data: Dataset):
        super().__init__(cfg, data)
        self.forms: dict[str, Callable[[], object]] = {}
        self.times: dict[str, list[float]] = defaultdict(list)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of `Run.batches`."""
        source, started = super().batches(epoch), clock(self.device)
        for batch in source:
            yield batch  # the training step happens here
            self.times["ours"].append(clock(self.device) - started)
            for name, form in self.forms.items():
                self.times[name].append(seconds_of(form, self.device))
            started = clock(self.device)


def matrix_peak(size: int, dtype: torch.dtype, device: torch.device, repeats: int) -> float:
    """GFLOP/s of the fastest of `repeats` products of two `size` x `size` matrices, after a first one."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = [seconds_of(lambda: left @ right, device) for _ in range(1 + repeats)]
    return 2 * size**3 / min(seconds[1:]) / 1e9


# ---- one combination of model and method -------------------------------------------------------------------

def image_shape_of(name: str) -> tuple[int, int, int]:
    """The images that the network called `name` is timed on."""
    return MNIST if name in MNIST_MODELS else CIFAR


def settings_of(name: str, method: str, cfg: Config, folder: str) -> TrainConfig:
    """The training script's Config for one epoch of timed steps, at the full radius from the first on."""
    shape = image_shape_of(name)
    own = ATTACKS[shape] | METHODS[method]
    own |= {"num_steps": cfg.num_steps} if cfg.num_steps is not None else {}
    own |= {"crop_padding": 0, "flip": False} if (method, shape) == ("vir", MNIST) else {}  # not of digits
    own |= {flag: getattr(cfg, flag) for flag in ("batch_size", "seed", "device", "precision", "attack_view",
                                                  "compile", "graphs")}
    return SCRIPTS[method, shape].Config(model=name, epochs=1, epsilon_warmup_epochs=0, max_grad_norm=0,
                                         out_dir=folder, **own)


def first_batch(train: Split, settings: TrainConfig) -> tuple[Tensor, Tensor]:
    """The first images of `train`, [B, C, H, W] in [0, 1], and their labels [B]."""
    return to_unit(train.images[:settings.batch_size]), train.labels[:settings.batch_size]


def published_step(model: nn.Module, method: str, settings: TrainConfig,
                   train: Split) -> Callable[[], object]:
    """The published step on the first images of `train`, on a copy of the network, with torch's settings."""
    theirs, (x, y) = published_model(model), first_batch(train, settings)
    step = partial(PUBLISHED[method], theirs, sgd(theirs, settings), x, y, settings, settings.start)

    def as_torch_comes() -> None:
        with torchs_own_settings():
            step()

    return as_torch_comes


def bare_step(model: nn.Module, method: str, settings: TrainConfig, train: Split) -> Callable[[], object]:
    """The bare step on the first images of `train`, on copies of the network."""
    x, y = first_batch(train, settings)
    x = x.contiguous(memory_format=torch.channels_last)
    attacked = copy.deepcopy(model).requires_grad_(False).train(settings.attack_mode == "train")
    x_adv = first_iterate(x, settings.epsilon, settings.start).requires_grad_()
    return partial(BARE[method], attacked, copy.deepcopy(model).train(), x, x_adv, y, settings)


def take_steps(run: Rounds, model: nn.Module, method: str, settings: TrainConfig) -> None:
    """Every step of ours, with the run's other forms in turns."""
    optimizer = sgd(model, settings)
    for epoch in run.epochs(model, optimizer, scheduler=None):
        SCRIPTS[method, run.data.image_shape].train_one_epoch(model, optimizer, run, epoch, settings)


def measure(name: str, method: str, cfg: Config, peak_of: Callable[[torch.dtype], float]) -> dict[str, Any]:
    """Time the forms of one step in turns, and take the memory of two; peak_of(dtype) is in GFLOP/s."""
    shape = image_shape_of(name)
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(name, method, cfg, folder)
        run = Rounds(settings, synthetic(shape, cfg.batch_size * (cfg.warmup_rounds + cfg.repeats), cfg.seed))
        model = run.build(build_model)
        run.forms = {"published": published_step(model, method, settings, run.train),
                     "bare": bare_step(model, method, settings, run.train)}
        take_steps(run, model, method, settings)
    seconds = {form: times[cfg.warmup_rounds:] for form, times in run.times.items()}
    ours, published, needed = (statistics.median(seconds[form]) for form in ("ours", "published", "bare"))
    gflop, peak = count_flops(name, method, settings, shape) / 1e9, peak_of(run.dtype)
    return {"model": name, "method": method, "batch_size": cfg.batch_size, "num_steps": settings.num_steps,
            "image_shape": shape, "precision": "bf16" if run.dtype == torch.bfloat16 else "float32",
            "attack_view": cfg.attack_view, "compile": cfg.compile, "graphs": cfg.graphs,
            "ours_seconds": ours, "published_form_seconds": published, "bare_seconds": needed,
            "ratio": published / ours, "images_per_second": cfg.batch_size / ours,
            "published_form_images_per_second": cfg.batch_size / published,
            "overhead_percent": 100 * (ours - needed) / ours, "gflop": gflop, "gflops": gflop / ours,
            "published_form_gflops": gflop / published, "peak_gflops": peak,
            "peak_percent": 100 * gflop / ours / peak, "ours_mb": peak_mb("ours", name, method, cfg),
            "published_form_mb": peak_mb("published", name, method, cfg), "seconds": seconds}


# ---- memory ------------------------------------------------------------------------------------------------

def peak_mb(form: str, name: str, method: str, cfg: Config) -> float | None:
    """MB that a process which trains by one form only takes at most; None where nobody counts it."""
    if not cfg.memory:
        return None
    try:
        taken = common.in_a_process(peak_here, form, name, method, cfg)
    except BrokenProcessPool:
        raise UserError(f"the process that took the memory of {name}, {method} was killed: less "
                        "--batch_size, or --no-memory") from None
    return None if taken is None else taken / 1e6


def peak_here(form: str, name: str, method: str, cfg: Config) -> int | None:
    """Bytes that MEMORY_STEPS steps take at most in this process, which must have done nothing yet."""
    device = choose_device(cfg.device)
    run_alone(form, "lenet", method, replace(cfg, batch_size=1, num_steps=1))  # the libraries load their code
    if device.type == "cuda":
        return peak_memory(device, partial(run_alone, form, name, method, cfg))
    before = resident("VmRSS")
    run_alone(form, name, method, cfg)
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


# ---- the command -------------------------------------------------------------------------------------------

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
    device = choose_device(cfg.device)
    peak_of = cache(lambda dtype: matrix_peak(cfg.matmul_size, dtype, device, cfg.repeats))
    if not cfg.json:
        print(common.head(COLUMNS), flush=True)
    flags = ("repeats", "warmup_rounds", "matmul_size", "seed")
    facts = {flag: getattr(cfg, flag) for flag in flags} | common.facts(device)
    same = {name: fact for name, fact in facts.items() if name != "date"}
    rows = rows_so_far(Path(cfg.out), "rows", same) if cfg.out else []
    out = Path(cfg.out) if cfg.out and rows else common.out_file(cfg.out)
    pairs, result = [(name, method) for name in cfg.model for method in cfg.method], {"rows": rows} | facts
    for name, method in tqdm(pairs[len(rows):], desc="timing", leave=False, disable=None):
        rows.append(measure(name, method, cfg, peak_of))
        result = (rows[0] if len(pairs) == 1 else {"rows": rows}) | facts
        common.write_json(out, result)  # after each row: the next one may take minutes
        if not cfg.json:
            tqdm.write(common.line(COLUMNS, rows[-1]))
    where = facts["environment"]
    print(json.dumps(result) if cfg.json else
          f"{where['hardware']}, {where['threads']} threads, torch {where['torch']}; "
          f"ours in {rows[0]['precision']}, peak {rows[0]['peak_gflops']:,.0f} GFLOP/s", flush=True)


if __name__ == "__main__":
    run_script(main, Config)
