"""Time one training step of our scripts beside the same step in the form in which the published code writes it.

    ours        `train_one_epoch` of train_at_*.py and train_trades_*.py itself: batch from the data set, noise, attack, loss, SGD,
                metering and progress bar, in the training precision
    published   float32 with torch's own settings, NCHW, parameters not frozen, on a batch that is already there. TRADES (Zhang et al.,
                ICML 2019): the clean prediction again at every attack step and once more for the KL term. AT (as released by Zeng et
                al., AAAI 2021): `backward` in the attack, which also accumulates the gradients of the parameters.
    bare        the forward and backward passes alone that ours cannot do without, in its precision, on tensors that are already there

The three take turns in one process, on synthetic images of the network's size, after a warm-up; every figure is a median.

    ratio             published / ours
    overhead_percent  (ours - bare) / ours: the part of our step that is neither forward nor backward pass
    gflops            what the algorithm needs (counted on the bare step: mul and add of convolutions and products) over the time of ours
    peak_percent      gflops over the rate of one large matrix product of the same type, the best of several, in the same process

    python benchmarks/train_step.py                                # LeNet, SmallCNN and ResNet-18, AT and TRADES
    python benchmarks/train_step.py --model resnet18 --method trades --batch_size 64 --json
    python benchmarks/train_step.py --model lenet --repeats 20 --out results/train_step_lenet.json
"""
import copy
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path, the repository's root is not

import train_at_cifar10
import train_at_mnist
import train_trades_cifar10
import train_trades_mnist
from attacks.pgd import first_iterate
from harness.config import run_script
from harness.data import Dataset, Split, to_unit
from harness.device import choose_device, choose_dtype, command_line, environment
from harness.errors import UserError
from harness.folder import write_text
from harness.precision import bare
from harness.report import output_path
from harness.run import Run
from losses.divergence import kl_divergence
from losses.trades import trades_loss
from models import MODELS, build_model

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)  # [C, H, W]
MNIST_MODELS = {"lenet", "small_cnn"}
SCRIPTS = {("at", MNIST): train_at_mnist, ("at", CIFAR): train_at_cifar10,
           ("trades", MNIST): train_trades_mnist, ("trades", CIFAR): train_trades_cifar10}
THREATS = {MNIST: {"epsilon": 0.3, "step_size": 0.01}, CIFAR: {"epsilon": 8 / 255, "step_size": 2 / 255}}
METHOD_SETTINGS = {"at": {}, "trades": {"beta": 6.0}}
NUM_CLASSES = 10


@dataclass(frozen=True)
class Config:
    model: tuple[str, ...] = ("lenet", "small_cnn", "resnet18")  # lenet, small_cnn (1x28x28), resnet18, wrn34_10, wrn28_10 (3x32x32)
    method: tuple[Literal["at", "trades"], ...] = ("at", "trades")  # adversarial training, TRADES
    batch_size: int = 128                                 # images a step
    num_steps: int | None = None                          # PGD steps a batch; none is the script's own, 40 at 1x28x28, 10 at 3x32x32
    repeats: int = 5                                      # timed steps of each form
    warmup_rounds: int = 1                                # steps of each form before the timed ones
    matmul_size: int = 4096                               # rows and columns of the matrices whose product gives the peak
    seed: int = 0                                         # of images, weights, starts and dropout
    device: str = "auto"                                  # auto, cpu, or an accelerator by its name in torch
    precision: Literal["auto", "bf16", "float32"] = "auto"  # of our step; auto is bf16 where the hardware multiplies it natively
    fuse: bool = True                                     # of our step: fold BatchNorm and fuse layers of the attacked network on a CPU
    compile: Literal["auto", "on", "off"] = "auto"        # of our step: torch.compile; for auto the steps here are too few
    graphs: bool = True                                   # with compile, on a GPU: replay each compiled piece as one CUDA graph
    json: bool = False                                    # print one line of JSON and nothing else
    out: str | None = None                                # JSON file to write, never over another


# ---- the step as the published code writes it ------------------------------------------------------------------------------------

def published_at(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, settings: object, start: str | Tensor) -> Tensor:
    """One step of adversarial training on the batch x [B, C, H, W], y [B]; returns its loss.  `start` as in `attacks.pgd.pgd`."""
    model.train()
    x_adv = first_iterate(x, settings.epsilon, start)
    for _ in range(settings.num_steps):
        x_adv = x_adv.detach().requires_grad_()
        F.cross_entropy(model(x_adv), y).backward()  # fills the gradients of x_adv and of every parameter
        x_adv = ascend(x_adv, x_adv.grad, x, settings)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x_adv), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def published_trades(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, settings: object, start: str | Tensor) -> Tensor:
    """One step of TRADES on the batch x [B, C, H, W], y [B]; returns its loss.  `start` as in `attacks.pgd.pgd`."""
    divergence = nn.KLDivLoss(reduction="sum")
    model.eval()
    x_adv = first_iterate(x, settings.epsilon, start)
    for _ in range(settings.num_steps):
        x_adv = x_adv.detach().requires_grad_()
        gradient, = torch.autograd.grad(divergence(F.log_softmax(model(x_adv), dim=1), F.softmax(model(x), dim=1)), x_adv)
        x_adv = ascend(x_adv, gradient, x, settings)
    model.train()
    optimizer.zero_grad()
    natural = F.cross_entropy(model(x), y)
    robust = divergence(F.log_softmax(model(x_adv), dim=1), F.softmax(model(x), dim=1)) / len(x)
    loss = natural + settings.beta * robust
    loss.backward()
    optimizer.step()
    return loss.detach()


def ascend(x_adv: Tensor, gradient: Tensor, x: Tensor, settings: object) -> Tensor:
    """One step of size `step_size` along the gradient's sign, back into the ball of radius `epsilon` and into [0, 1]."""
    x_adv = x_adv.detach() + settings.step_size * gradient.sign()
    x_adv = torch.min(torch.max(x_adv, x - settings.epsilon), x + settings.epsilon)
    return torch.clamp(x_adv, 0.0, 1.0)


PUBLISHED = {"at": published_at, "trades": published_trades}


# ---- the passes that no step can do without --------------------------------------------------------------------------------------

def bare_at(attacked: nn.Module, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, settings: object) -> None:
    """The forward and backward passes of one step of adversarial training.

    `attacked` is the network with frozen parameters, `model` the one with trainable ones; x_adv, which requires a gradient, stands
    for every iterate.
    """
    model.zero_grad()
    for _ in range(settings.num_steps):
        torch.autograd.grad(F.cross_entropy(attacked(x_adv), y), x_adv)
    F.cross_entropy(model(x_adv.detach()), y).backward()


def bare_trades(attacked: nn.Module, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, settings: object) -> None:
    """The forward and backward passes of one step of TRADES, with one clean prediction for the attack; arguments as in `bare_at`."""
    model.zero_grad()
    with torch.no_grad():
        logits = attacked(x)
    for _ in range(settings.num_steps):
        torch.autograd.grad(kl_divergence(attacked(x_adv), logits).sum(), x_adv)
    trades_loss(model(x), model(x_adv.detach()), y, settings.beta).mean().backward()


BARE = {"at": bare_at, "trades": bare_trades}


def count_flops(name: str, method: str, settings: object, image_shape: tuple[int, int, int]) -> int:
    """Floating-point operations of the bare step, 2 a multiply-add of convolutions and products; counted from shapes alone."""
    with torch.device("meta"):
        model = build_model(name, NUM_CLASSES, image_shape[0])
        x = torch.empty(settings.batch_size, *image_shape)
        y = torch.empty(settings.batch_size, dtype=torch.int64)
    x_adv = x.clone().requires_grad_().clone()  # no leaf: the counter's hooks do not support autograd.grad with respect to one
    with FlopCounterMode(display=False) as counter:
        BARE[method](copy.deepcopy(model).requires_grad_(False), model, x, x_adv, y, settings)
    return counter.get_total_flops()


# ---- timing ----------------------------------------------------------------------------------------------------------------------

def clock(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


class Rounds(Run):
    """A run that times each of its training steps, from asking for the batch to the end of the metering, and after each of them one
    call of every other form in `forms`; `times` holds the seconds of each."""

    def __init__(self, cfg: object, data: Dataset):
        super().__init__(cfg, data)
        self.forms: dict[str, Callable[[], object]] = {}
        self.times: dict[str, list[float]] = defaultdict(list)

    def say(self, text: str) -> None:
        """Nothing: the standard output is for the result."""

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
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
    settings = SCRIPTS[method, shape].Config(model=name, batch_size=cfg.batch_size, seed=cfg.seed, device=cfg.device, out_dir=folder,
                                             precision=cfg.precision, fuse=cfg.fuse, compile=cfg.compile, graphs=cfg.graphs,
                                             epochs=1, epsilon_warmup_epochs=0, **THREATS[shape], **METHOD_SETTINGS[method])
    return settings if cfg.num_steps is None else replace(settings, num_steps=cfg.num_steps)


def synthetic(image_shape: tuple[int, int, int], count: int, seed: int) -> Dataset:
    """`count` training images of noise with random labels: a step takes the same time whatever it learns."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, *image_shape), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.randint(0, NUM_CLASSES, (count,), generator=generator), torch.arange(count))
    return Dataset("noise", tuple(map(str, range(NUM_CLASSES))), train=split, val=split[:0], test=split)


def published_model(model: nn.Module) -> nn.Module:
    """A copy of the network as the published code holds it: without wrappers, NCHW, float32."""
    return copy.deepcopy(bare(model)).to(memory_format=torch.contiguous_format)


def sgd(model: nn.Module, settings: object) -> Optimizer:
    """The training scripts' optimiser."""
    return SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)


def other_forms(model: nn.Module, method: str, settings: object, train: Split) -> dict[str, Callable[[], object]]:
    """The published and the bare step on the first images of `train`, each with its own copy of the network."""
    x, y = to_unit(train.images[:settings.batch_size]), train.labels[:settings.batch_size]
    theirs = published_model(model)
    published = partial(PUBLISHED[method], theirs, sgd(theirs, settings), x, y, settings, settings.start)
    attacked = copy.deepcopy(model).requires_grad_(False).train(settings.attack_mode == "train")
    fast = x.contiguous(memory_format=torch.channels_last)
    iterate = first_iterate(fast, settings.epsilon, settings.start).requires_grad_()
    return {"published": published, "bare": partial(BARE[method], attacked, copy.deepcopy(model).train(), fast, iterate, y, settings)}


def measure(name: str, method: str, cfg: Config, peak: float) -> dict[str, object]:
    """Time the three forms of one step in turns; `peak` is in GFLOP/s."""
    shape = image_shape_of(name)
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(name, method, cfg, folder)
        run = Rounds(settings, synthetic(shape, cfg.batch_size * (cfg.warmup_rounds + cfg.repeats), cfg.seed))
        model = run.build(build_model)
        run.forms = other_forms(model, method, settings, run.train)
        optimizer = sgd(model, settings)
        for epoch in run.epochs(model, optimizer, scheduler=None):
            SCRIPTS[method, shape].train_one_epoch(model, optimizer, run, epoch, settings)
    seconds = {form: times[cfg.warmup_rounds:] for form, times in run.times.items()}
    ours, published, needed = (statistics.median(seconds[form]) for form in ("ours", "published", "bare"))
    gflop = count_flops(name, method, settings, shape) / 1e9
    return {"model": name, "method": method, "batch_size": cfg.batch_size, "num_steps": settings.num_steps, "image_shape": shape,
            "precision": {torch.bfloat16: "bf16", torch.float32: "float32"}[run.dtype], "fuse": cfg.fuse, "compile": cfg.compile,
            "graphs": cfg.graphs,
            "ours_seconds": ours, "published_form_seconds": published, "bare_seconds": needed, "ratio": published / ours,
            "overhead_percent": 100 * (ours - needed) / ours, "gflop": gflop, "gflops": gflop / ours,
            "published_form_gflops": gflop / published, "peak_gflops": peak, "peak_percent": 100 * gflop / ours / peak,
            "seconds": seconds}


HEADER = (f"{'model':<10}{'method':<8}{'batch':>6}{'steps':>6}{'ours s':>10}{'published s':>13}{'ratio':>7}{'overhead %':>12}"
          f"{'GFLOP/s':>11}{'published':>11}{'peak %':>8}")


def line(row: dict[str, object]) -> str:
    """One line of the table."""
    return (f"{row['model']:<10}{row['method']:<8}{row['batch_size']:>6}{row['num_steps']:>6}{row['ours_seconds']:>10.4f}"
            f"{row['published_form_seconds']:>13.4f}{row['ratio']:>7.2f}{row['overhead_percent']:>12.2f}{row['gflops']:>11,.1f}"
            f"{row['published_form_gflops']:>11,.1f}{row['peak_percent']:>8.1f}")


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
    peak = matrix_peak(cfg.matmul_size, choose_dtype(cfg.precision, device), device, cfg.repeats)
    if not cfg.json:
        print(HEADER, flush=True)
    rows = []
    for name, method in tqdm([(name, method) for name in cfg.model for method in cfg.method], desc="timing", leave=False, disable=None):
        rows.append(measure(name, method, cfg, peak))
        if not cfg.json:
            tqdm.write(line(rows[-1]))
    facts = {"repeats": cfg.repeats, "warmup_rounds": cfg.warmup_rounds, "matmul_size": cfg.matmul_size, "seed": cfg.seed,
             "command": command_line(), "date": time.strftime("%Y-%m-%d"),
             "environment": environment(device)}
    result = (rows[0] if len(rows) == 1 else {"rows": rows}) | facts
    if out:
        write_text(out, json.dumps(result, indent=2) + "\n")
    if cfg.json:
        print(json.dumps(result), flush=True)
    else:
        where = facts["environment"]
        print(f"{where['hardware']}, {where['threads']} threads, torch {where['torch']}; ours in {rows[0]['precision']}, "
              f"peak {peak:,.0f} GFLOP/s")


if __name__ == "__main__":
    run_script(main, Config)
