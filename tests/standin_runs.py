"""A script on the CPU and on the stand-in, in one process that has both: what it wrote, where it waited."""
import collections
import concurrent.futures
import contextlib
import functools
import importlib
import io
import itertools
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from attacks import autoattack, catalogue, fab
from attacks.apgd import apgd
from attacks.frozen import predict
from attacks.pgd import pgd
from attacks.polish import polish
from attacks.pool import BUDGETS, Budget, minimal_distances
from attacks.walk import walk
from harness.config import parse_config
from harness.datasets.batches import load_dataset, to_unit
from harness.evaluation import sanity
from harness.evaluation.predictions import BatchInvariant
from harness.reporting import figures
from harness.training import fused, steps
from harness.training.precision import TrainingPrecision
from harness.training.run import Run
from models import build_model
from tests import forks, standin

# a layer of every kind that the attack's view knows: BatchNorm behind a convolution and before one, pooling
NET = '''
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes=10, in_channels=1, dropout=0.2):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 8, 3, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.average = nn.AdaptiveAvgPool2d(3)
        self.drop = nn.Dropout(dropout)
        self.linear = nn.Linear(72, num_classes)

    def forward(self, x):
        out = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        inner = self.conv2(F.relu(self.bn2(out)))
        out = self.average(out + self.conv3(F.relu(self.bn3(inner))))
        return self.linear(self.drop(out.flatten(1)))


def plain(num_classes=10, in_channels=1):
    return Net(num_classes, in_channels, dropout=0.0)
'''
TINY = ("--dataset", "digits", "--val_size", 12, "--val_num_steps", 1, "--max_batches", 3, "--epochs", 1,
        "--batch_size", 16, "--ema_decay", 0.9, "--precision", "float32", "--seed", 2)
# what the catalogue's attacks take here
FEW = {"apgd": {"num_steps": 8}, "apgd_targeted": {"num_steps": 6, "num_targets": 2},
       "fab_targeted": {"num_steps": 6, "num_targets": 2}, "square": {"num_queries": 60},
       "md": {"num_steps": 6, "change_step": 2}, "mdmt": {"num_steps": 6, "change_step": 2, "num_targets": 2},
       "spsa": {"num_steps": 2, "num_samples": 32}, "fmn": {"num_steps": 8}}
# and the pool, in which every attack has its turn
SHORT = Budget(num_steps=4, target_steps=3, num_targets=2, num_rounds=2, round_steps=3,
               polish_steps=2, num_queries=20, num_walks=1, thorough=True)


@dataclass
class Found:
    """What a run on the stand-in has shown: where it differs from the CPU's, and its counts by place."""

    differs: list[str] = field(default_factory=list)
    waits: dict[str, int] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)
    queued: dict[str, int] = field(default_factory=dict)
    casts: dict[str, int] = field(default_factory=dict)

    def counts(self):
        """Waits, copies and queued copies by "FILE: FUNCTION"."""
        return {name: _by_function(getattr(self, name)) for name in ("waits", "copies", "queued")}

    def places(self):
        """Where it waited or copied, each a "FILE: FUNCTION"."""
        counts = self.counts()
        return counts["waits"].keys() | counts["copies"].keys()


def _by_function(counts):
    found = collections.Counter()
    for place, count in counts.items():  # FILE:LINE FUNCTION: OPERATION
        file, _, line_and_function = place.split(": ")[0].partition(":")
        found[f"{file}: {line_and_function.split(' ')[-1]}"] += count
    return dict(found)


def child():
    """A process for the runs, which `pretend` changes for good."""
    return concurrent.futures.ProcessPoolExecutor(1, forks.FORK, initializer=_begin)


def _begin():
    importlib.import_module("torch._dynamo")
    standin.pretend()
    torch.set_num_threads(1)
    fused.ENABLED = False                    # the CPU takes the same forms as a GPU
    fused._is_elsewhere = lambda kind: True
    fused.is_plain = lambda tensor: True     # a stand-in's tensor too
    fab.NEWTON_ON = ()
    BUDGETS["fast"] = SHORT
    for name, few in FEW.items():
        setattr(catalogue, name, functools.partial(getattr(catalogue, name), **few))
    sanity.STEPS, sanity.RADII = (0, 1, 2), (1.0,)
    figures.redraw_run = figures.redraw_result = lambda path: None
    steps.CHECK_SECONDS = math.inf           # the look at the loss, about once a second


def trained(script, words, folder, mutation=None):
    """Train on the CPU and on the stand-in; the counts are those of every step but the first."""
    os.chdir(folder)
    Path("net.py").write_text(NET)
    found = {}
    with _mutated(mutation), _steps_alone():
        for device in ("cpu", "cuda"):
            _run(script, (*TINY, *words, "--model", "net.py:Net", "--out_dir", device), device)
            found[device] = torch.load(Path(device, "last.pt"))
            found[device]["log"] = [{name: value for name, value in row.items() if "second" not in name}
                                    for row in found[device]["log"]]
    same = ("model", "optimizer", "ema", "log", "weight_log", "delta", "example_epsilon")
    return _found([name for name in same if not is_equal(found["cpu"].get(name), found["cuda"].get(name))])


def evaluated(script, words, folder, written="{}.npz"):
    """Train a network on the CPU and evaluate it there and on the stand-in, by attacks of a few steps.

    written: the file of what was found, of `--out {}.json` or {}.
    """
    os.chdir(folder)
    Path("net.py").write_text(NET)
    if not Path("run").exists():
        _run("train_at_mnist", ("--recipe", "digits", "--model", "net.py:plain", "--epochs", 1, "--val_size",
                                40, "--epsilon_warmup_epochs", 0, "--num_steps", 1, "--precision", "float32",
                                "--out_dir", "run"), "cpu")
    found = {}
    for device in ("cpu", "cuda"):
        _run(script, (*words, "--out", device if "/" in written else f"{device}.json"), device)
        found[device] = dict(np.load(written.format(device)))
    return _found([name for name in found["cpu"]
                   if found["cpu"][name].tobytes() != found["cuda"][name].tobytes()])


def attacked(attack, arguments):
    """The adversaries of attack(model, x, y, **arguments) on the CPU and on the stand-in."""
    model, x, y = _digits_network()
    expected = attack(model, x, y, **arguments)
    narrow = contextlib.nullcontext() if attack is pooled else standin.without_float64()
    with standin.StandinMode(), narrow:
        model, x, y = model.to("cuda"), x.to("cuda"), y.to("cuda")
        pgd(model, x, y, epsilon=0.1, step_size=0.1, num_steps=1)  # the forms of the network are checked
        predict(model, x)
        standin.forget()
        found = attack(model, x, y, **arguments)
    return _found([] if is_equal(expected, standin.unwrapped(found)) else ["x_adv"])


def walked(model, x, y, **options):
    """The walk, from the images turned into their negatives."""
    return walk(model, x, y, 1 - x, **options)


def polished(model, x, y, **options):
    """The polish of the images turned into their negatives."""
    return polish(model, x, y, 1 - x, **options)


def pooled(model, x, y):
    """What the pool finds in every norm."""
    found = minimal_distances(model, x, y, budget="fast", starts=[x.flip(0)])
    return [found.distance, found.x_adv, found.winner, found.single]


def ensembled(model, x, y, **task):
    """An ensemble of two attacks."""
    members = {"apgd": apgd, "fab": functools.partial(fab.fab_targeted, num_targets=2)}
    members = [(name, functools.partial(attack, num_steps=6)) for name, attack in members.items()]
    return autoattack.run_ensemble(model, x, y, members, **task)


def _digits_network():
    """A network that has learned a little, and images, in float32 on the CPU."""
    data = load_dataset("digits", "data")
    torch.manual_seed(0)
    space = {}
    exec(NET, space)
    network = space["plain"]()
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    for rows in torch.arange(1024).split(32):
        optimizer.zero_grad()
        F.cross_entropy(network(to_unit(data.train.images[rows])), data.train.labels[rows]).backward()
        optimizer.step()
    return BatchInvariant(network.eval()), to_unit(data.test.images[:12]), data.test.labels[:12]


def casts_in_a_step(mode, name=None):
    """How many tensors one step more of an attack in bfloat16 casts; mode: of the network meanwhile.

    name: a network of the scripts, on two images of 8 x 8 pixels.
    """
    network, x, y = _digits_network()
    network = network.network
    if name:
        network, x, y = build_model(name, in_channels=1), x[:2, :, 10:18, 10:18], y[:2]
    network = TrainingPrecision(network, torch.bfloat16)
    counts = []
    with standin.StandinMode():
        network, x, y = network.to("cuda"), x.to("cuda"), y.to("cuda")
        for num_steps in (1, 1, 2):  # the first one checks the form
            standin.forget()
            pgd(network, x, y, epsilon=0.1, step_size=0.01, num_steps=num_steps, mode=mode)
            counts.append(sum(standin.casts.values()))
    return counts[2] - counts[1]


def by_command(script, words):
    """What `python -m tests.standin` says at its end."""
    standin.forget()
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        standin.main([str(standin.ROOT / script), *map(str, words)])
    return said.getvalue()


def is_equal(one, other):
    """Whether two trees of tensors and plain values are the same, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_equal(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(is_equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def _found(differs):
    return Found(differs, *map(dict, (standin.waits, standin.copies, standin.queued, standin.casts)))


def _run(script, words, device):
    standin.forget()
    module = importlib.import_module(script)
    words = [*map(str, words), "--device", device]
    sys.argv = [f"{script}.py", *words]
    with contextlib.ExitStack() as around, contextlib.redirect_stdout(io.StringIO()):
        if device == "cuda":
            around.enter_context(standin.StandinMode())
            if script != "generate_robustness_curves":  # distances are float64
                around.enter_context(standin.without_float64())
        module.main(parse_config(module.Config, words, getattr(module, "RECIPES", None)))


@contextlib.contextmanager
def _steps_alone():
    """Count from the request for the second batch to the end of the last step."""
    batches = Run.batches

    def watched(run, epoch):
        source = batches(run, epoch)
        for number in itertools.count(1):
            with standin.counted(number > 1):
                batch = next(source)  # its step ends with the next request
            with standin.counted(number > 1):
                yield batch
            if batch.number == run.batches_per_epoch:
                yield from source
                return

    Run.batches = watched
    try:
        with standin.counted(False):
            yield
    finally:
        Run.batches = batches


def _by_the_host(weights):
    return weights * float(weights.detach().sum() > 0)


def _by_an_index_of_the_host(weights):
    return weights[torch.arange(len(weights))]


def _by_a_mask(weights):
    return torch.cat([weights[weights > 0], weights[weights <= 0]])


def _by_a_list(weights):
    return weights * torch.tensor([1.0] * len(weights), device=weights.device)


def _on_the_cpu(weights):
    return weights * torch.ones(len(weights))


def _in_numpy(weights):
    return weights * float(weights.detach().numpy().mean() > 0)


MUTATIONS = {function.__name__: function for function in (
    _by_the_host, _by_an_index_of_the_host, _by_a_mask, _by_a_list, _on_the_cpu, _in_numpy)}


@contextlib.contextmanager
def _mutated(name):
    """What train_at_mnist.py does with its weights, done badly."""
    script = importlib.import_module("train_at_mnist")
    weigh = script.margin_weights
    if name:
        script.margin_weights = lambda *given: MUTATIONS[name](weigh(*given))
    try:
        yield
    finally:
        script.margin_weights = weigh
