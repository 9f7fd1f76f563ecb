"""Every method and network: a step against the CPU's, no wait in a step, compiling, stopping and going on."""
import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

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
NETWORKS = {"lenet": 32, "small_cnn": 32, "resnet18": 8, "wrn28_10": 2, "wrn34_10": 2}  # and images a batch
LR = 0.001     # of a step that is compared: small, or the second of two steps is far more than a step
SECONDS = 90   # after which `one_step` begins no other pair
SMALL = ("--dataset", "digits", "--epochs", 1, "--val_size", 0, "--precision", "float32", "--seed", SEED,
         "--max_grad_norm", 0, "--epsilon_warmup_epochs", 0, "--crop_padding", 2, "--momentum", 0)
COMMON = "TRADES, margin", "resnet18"  # the method that every network has, and the network of every method
UNWATCHED, STEPS = 2, 12  # batches before those without a wait, and with them


def one_step(site: Site) -> Found:
    """In float32, one batch of each method and of each network; on a GPU further pairs too, for SECONDS."""
    _write_images(site.folder / "images")
    some = dict.fromkeys([*((method, "lenet") for method in METHODS),
                          *((COMMON[0], name) for name in NETWORKS)])
    pairs = list(dict.fromkeys([*some, *((method, name) for name in NETWORKS for method in METHODS)]))
    chosen, distances, started = pairs if site.real_gpu else some, {}, time.monotonic()
    for number, (method, name) in enumerate(chosen):
        if number >= len(some) and time.monotonic() - started > SECONDS:
            break
        script, *words = METHODS[method]
        words = (*SMALL, "--dataset", site.folder / "images", "--lr", LR, *words, "--model", name,
                 "--batch_size", NETWORKS[name])
        folder = site.folder / str(number)
        start, there = first_batches(script, words, site.device, folder / "there", 1, steady)
        here = there
        if site.device.type != "cpu":  # against itself nothing would be shown
            _, here = first_batches(script, words, torch.device("cpu"), folder / "here", 1, steady)
        parts = zip(there, here, start)
        distances[f"{method}, {name}"] = max(distance(*part) for part in parts if len(part[0]))
    worst = max(distances, key=lambda pair: distances[pair])
    text = f"{len(distances)} of {len(pairs)} pairs, "
    text += ("beside no other device: weights have moved and are finite" if site.device.type == "cpu" else
             f"{worst} is farthest: {100 * distances[worst]:.2g} % of the update")
    return Found(distances[worst] <= NEAR, text, {"distance": distances, "most": NEAR})


def no_wait(site: Site) -> Found:
    """Ten batches of each method and of each network in bfloat16, averaged; torch raises at a wait."""
    random = np.random.default_rng(0)
    np.savez(site.folder / "extra.npz", image=random.integers(0, 256, (2000, 28, 28, 1), dtype=np.uint8),
             label=random.integers(0, 10, 2000))
    runs = [*((*words, "--model", COMMON[1]) for words in METHODS.values()),
            *((*METHODS[COMMON[0]], "--model", name) for name in NETWORKS if name != COMMON[1]),
            ("train_vir", "--num_steps", 2, "--extra_data", site.folder / "extra.npz", "--model", COMMON[1])]
    for number, (script, *words) in enumerate(runs):
        words = (*SMALL, *words, "--batch_size", 32, "--precision", "bf16", "--ema_decay", 0.9)
        first_batches(script, words, site.device, site.folder / str(number), STEPS, watch=True)
    return Found(True, f"{len(METHODS)} methods, {len(NETWORKS)} networks and generated images, "
                 f"{STEPS - UNWATCHED} batches each, never")


def distance(found: Tensor, expected: Tensor, start: Tensor) -> float:
    """How far weights have ended from others, as a part of the way that the others have gone; or infinity."""
    apart = float((found - expected).norm() / (expected - start).norm())
    return apart if math.isfinite(apart) else math.inf


def _write_images(folder: Path) -> None:
    """Fifty images of noise: where pixels are equal, rounding alone decides which one a maximum is of."""
    random = np.random.default_rng(0)
    for number in range(50):
        place = folder / ("test" if number < 10 else "train") / str(number % 10)
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")


class _Enough(Exception):
    """A run has taken the batches that are asked of it."""


def steady(network: nn.Module) -> nn.Module:
    """The new network in a state in which a step hangs little on rounding.

    Dropout, whose masks are each device's own, is off. The last layer, zero in SmallCNN, has a gradient. In
    eval mode BatchNorm keeps the logits small, where softmax is not flat: it has seen images. Blocks are near
    the identity: through deep new ones one pixel changes a gradient by half (Balduzzi et al., ICML 2017).
    """
    layers = list(network.modules())
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    for name, value in network.named_parameters():
        if ".conv2." in name or ".bn2." in name:  # the last layers of a block
            value.data *= 0.1
    nn.init.normal_(layers[-1].weight, 0.0, 0.05)
    for layer in norms:
        layer.momentum = 1.0
    with torch.no_grad():
        network(torch.rand(8, 3, 32, 32))
    for layer in norms:
        layer.momentum = 0.1
    return network


def first_batches(script: str, words: tuple[object, ...], device: torch.device, folder: Path, count: int,
                  prepare: Callable[[nn.Module], nn.Module] = lambda network: network,
                  watch: bool = False) -> list[list[Tensor]]:
    """A network before and after the first `count` batches of a training, which then ends and saves nothing.

    A network is two vectors on the CPU, of its parameters and of its buffers, which move by far more.
    prepare: of the new network; watch: after UNWATCHED batches, torch raises where the host waits for the
    device.
    """
    gc.collect()  # the network of the run before, which a GPU's memory does not ask for
    build, batches, seconds, networks = Run.build, Run.batches, steps.CHECK_SECONDS, []

    def note(network: nn.Module) -> None:
        parts = (dict(network.named_parameters()), dict(network.named_buffers()))
        networks.append([weights_of(part) for part in parts])

    def some(run: Run, epoch: int) -> Iterator[Batch]:
        """The first batches of an epoch."""
        note(run.state["model"])
        with closing(batches(run, epoch)) as source:
            for number in range(1, count + 1):
                if watch:
                    raise_at_waits(number > UNWATCHED)
                yield next(source)
        if watch:
            raise_at_waits(False)
        note(run.state["model"])
        raise _Enough

    def prepared(run: Run, build_model: Callable[..., nn.Module]) -> nn.Module:
        return build(run, lambda *given: prepare(build_model(*given)))

    try:
        Run.build, Run.batches = prepared, some
        steps.CHECK_SECONDS = math.inf  # it looks at the loss about once a second
        with suppress(_Enough):
            train(script, words, device, folder)
    finally:
        Run.build, Run.batches, steps.CHECK_SECONDS = build, batches, seconds
        if watch:
            raise_at_waits(False)
    return networks


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
            if done < pieces or not bool(weights_of(contents["model"]).isfinite().all()):
                missing.append(f"{name} {graphs}")
    text = f"not as a whole: {', '.join(missing)}" if missing else f"{len(lines)} runs, every piece"
    return Found(not missing, text, {"said": lines})


def resumed(site: Site) -> Found:
    """Two epochs at once, and one after the other: the same weights, on a CPU bit for bit."""
    words = (*SMALL, "--model", "lenet", "--num_steps", 2, "--max_batches", 4)
    train("train_at_mnist", words, site.device, site.folder / "parts")
    whole, _ = train("train_at_mnist", (*words, "--epochs", 2), site.device, site.folder / "whole")
    torch.manual_seed(SEED)
    start = site.build(*(whole["architecture"][key] for key in ("name", "num_classes", "in_channels")))
    ends = (weights_of(contents["model"]) for contents in (_resume(site.folder / "parts", site), whole))
    apart = distance(*ends, weights_of(start.state_dict()))
    exact = "bit for bit" if apart == 0 else f"{100 * apart:.2g} % of the update away"
    most = 0.0 if site.device.type == "cpu" else NEAR
    return Found(apart <= most, f"a resumed run ends {exact}", {"distance": apart, "most": most})


def _resume(folder: Path, site: Site) -> dict:
    run("train_at_mnist", ("--resume", folder, "--epochs", 2, "--device", site.device.type))
    return checkpoint.read(folder / "last.pt")


CHECKS = (Check("step", "a step of every method and network is the CPU's", one_step, seconds=115),
          Check("no-wait", "the host never waits in a step", no_wait, seconds=80, needs_gpu=True),
          Check("compile", "torch.compile, with graphs and without", compiled, seconds=100, needs_gpu=True),
          Check("resume", "a stopped run goes on", resumed, seconds=20))
