"""Every method and network: a step against the CPU's, no wait in a step, compiling, stopping and going on."""
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from harness import checkpoint
from harness.accept.check import Check, Found, Site, run, train, weights_of
from harness.device import raise_at_waits
from harness.training import steps
from harness.training.batch import Batch
from harness.training.run import Run

SEED = 2
NEAR = 0.1  # how far a step's update may be from the CPU's, as a part of it: signs of gradients near 0 change
WEIGHTS = (("at", "uniform"), ("trades", "uniform"), ("mart", "uniform"), ("at", "gairat"), ("at", "mail"),
           ("trades", "mail"), ("at", "vir"), ("trades", "vir"), ("mart", "margin"))
METHODS = {
    "AT, margin": ("train_at_mnist", "--alpha", 1, "--num_steps", 2),
    "TRADES, margin": ("train_trades_mnist", "--alpha", 1, "--num_steps", 2),
    **{f"{base}, {kind}": ("train_vir", "--base", base, "--weights", kind, "--burn_in_epochs", 0,
                           "--num_steps", 2) for base, kind in WEIGHTS},
    "Free AT": ("train_free", "--num_replays", 2),
    "YOPO": ("train_yopo", "--num_passes", 2, "--num_steps", 2),
    "IAAT": ("train_iaat", "--num_steps", 2, "--burn_in_epochs", 0),
}
NETWORKS = {"small_cnn": 16, "resnet18": 8, "wrn34_10": 4}  # beside LeNet, and images a batch
SMALL = ("--dataset", "digits", "--epochs", 1, "--val_size", 0, "--precision", "float32", "--seed", SEED,
         "--max_grad_norm", 0, "--epsilon_warmup_epochs", 0, "--crop_padding", 2, "--momentum", 0)
WATCHED, STEPS = "resnet18", 10  # the network and the batches without a wait


def one_step(site: Site) -> Found:
    """In float32, one batch of each method with LeNet, and of TRADES with each network."""
    runs = {f"{name}, LeNet": (*words, "--model", "lenet", "--batch_size", 32)
            for name, words in METHODS.items()}
    runs |= {f"TRADES, {name}": ("train_trades_cifar10", "--num_steps", 1, "--model", name, "--batch_size",
                                 batch) for name, batch in NETWORKS.items()}
    distances = {}
    for number, (name, (script, *words)) in enumerate(runs.items()):
        words = (*SMALL, "--max_batches", 1, *words)
        there, _ = train(script, words, site.device, site.folder / f"{number}-there")
        if site.device.type == "cpu":  # against itself nothing would be shown
            distances[name] = 0.0 if bool(weights_of(there).isfinite().all()) else float("inf")
            continue
        here, _ = train(script, words, torch.device("cpu"), site.folder / f"{number}-cpu")
        distances[name] = distance(there, here, site)
    worst = max(distances, key=lambda name: distances[name])
    text = f"{len(runs)} steps, {worst} is farthest: {100 * distances[worst]:.2g} % of the update"
    if site.device.type == "cpu":
        text = f"{len(runs)} steps run here, their weights are finite"
    return Found(max(distances.values()) <= NEAR, text, {"distance": distances, "most": NEAR})


def no_wait(site: Site) -> Found:
    """Ten batches of each method in bfloat16, averages and generated images too; torch raises at a wait."""
    random = np.random.default_rng(0)
    np.savez(site.folder / "extra.npz", image=random.integers(0, 256, (2000, 28, 28, 1), dtype=np.uint8),
             label=random.integers(0, 10, 2000))
    runs = METHODS | {"generated images": ("train_vir", "--num_steps", 2, "--extra_data",
                                           site.folder / "extra.npz")}
    for number, (script, *words) in enumerate(runs.values()):
        words = (*SMALL, *words, "--model", WATCHED, "--max_batches", STEPS, "--precision", "bf16",
                 "--ema_decay", 0.9)
        with _raising_at_a_wait():
            train(script, words, site.device, site.folder / str(number))
    return Found(True, f"{len(runs)} methods, {STEPS} batches each, never")


def distance(found: dict, expected: dict, site: Site) -> float:
    """How far a run has ended from another, as a part of the way that the other has gone."""
    torch.manual_seed(SEED)
    start = site.build(*(expected["architecture"][key] for key in ("name", "num_classes", "in_channels")))
    way = weights_of(expected) - weights_of({"model": start.state_dict()})
    return float((weights_of(found) - weights_of(expected)).norm() / way.norm())


@contextmanager
def _raising_at_a_wait() -> Iterator[None]:
    """From the third batch of an epoch on, torch raises where the host waits for the device."""
    batches, seconds = Run.batches, steps.CHECK_SECONDS

    def watched(run: Run, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch."""
        source = batches(run, epoch)
        for number in itertools.count(1):
            raise_at_waits(number > 2)
            batch = next(source)
            yield batch
            if batch.number == run.batches_per_epoch:
                raise_at_waits(False)
                yield from source
                return

    try:
        Run.batches, steps.CHECK_SECONDS = watched, float("inf")  # it looks at the loss about once a second
        yield
    finally:
        Run.batches, steps.CHECK_SECONDS = batches, seconds
        raise_at_waits(False)


COMPILED = {  # what is compiled, and how many pieces of it must be; an attack with dropout is not
    "LeNet": (("train_trades_mnist", "--model", "lenet"), 2),
    "a short last batch": (("train_trades_mnist", "--model", "lenet", "--batch_size", 512), 2),
    "dropout": (("train_at_mnist", "--model", "small_cnn"), 1),
    "IAAT": (("train_iaat", "--model", "lenet"), 2)}


def compiled(site: Site) -> Found:
    """An epoch each, with and without CUDA graphs; the run compares its first batch with plain torch."""
    lines, missing = {}, []
    for graphs in ("--no-graphs", "--graphs"):
        for name, ((script, *words), pieces) in COMPILED.items():
            folder = site.folder / f"{name}{graphs}".replace(" ", "-")
            words = (*SMALL, "--crop_padding", 0, "--num_steps", 2, *words, "--compile", graphs)
            contents, said = train(script, words, site.device, folder)
            lines[f"{name} {graphs}"] = [line for line in said.splitlines() if "torch.compile" in line]
            done = sum("is compiled" in line for line in lines[f"{name} {graphs}"])
            if done < pieces or not bool(weights_of(contents).isfinite().all()):
                missing.append(f"{name} {graphs}")
    text = f"not as a whole: {', '.join(missing)}" if missing else f"{len(lines)} runs, every piece"
    return Found(not missing, text, {"said": lines})


def resumed(site: Site) -> Found:
    """Two epochs at once, and one after the other: the same weights, on a CPU bit for bit."""
    words = (*SMALL, "--model", "lenet", "--num_steps", 2, "--max_batches", 4)
    train("train_at_mnist", words, site.device, site.folder / "parts")
    whole, _ = train("train_at_mnist", (*words, "--epochs", 2), site.device, site.folder / "whole")
    apart = distance(_resume(site.folder / "parts", site), whole, site)
    exact = "bit for bit" if apart == 0 else f"{100 * apart:.2g} % of the update away"
    most = 0.0 if site.device.type == "cpu" else NEAR
    return Found(apart <= most, f"a resumed run ends {exact}", {"distance": apart, "most": most})


def _resume(folder: Path, site: Site) -> dict:
    run("train_at_mnist", ("--resume", folder, "--epochs", 2, "--device", site.device.type))
    return checkpoint.read(folder / "last.pt")


CHECKS = (Check("step", "a step of every method and network is the CPU's", one_step),
          Check("no-wait", "the host never waits in a step", no_wait, needs_gpu=True),
          Check("compile", "torch.compile, with graphs and without", compiled, needs_gpu=True),
          Check("resume", "a stopped run goes on", resumed))
