"""The compiled attack step: one graph that does what plain torch does, left out where it does not."""
import copy
import os
import random
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import train_vir
import train_yopo
from attacks.frozen import frozen, predict
from attacks.kappa import pgd_kappa
from attacks.noise import example_keys
from attacks.pgd import cross_entropy, first_iterate, pgd, steps, whole_step
from harness.training.compilation import Compilation, _network_pass, distance, untouched
from harness.training.options import CompileOptions
from harness.training.precision import TrainingPrecision
from losses.divergence import kl_divergence
from losses.margin import margin_weights
from models import build_model

CPU = torch.device("cpu")


class Network(nn.Module):
    """A convolution with BatchNorm and a linear layer, behind dropout if told so."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 64, 3)
        self.dropout = nn.Dropout(dropout)
        self.norm.running_mean.normal_(0, 0.1)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.head(self.dropout(torch.relu(self.norm(self.conv(x))).flatten(1)))


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    torch.manual_seed(0)


def batch(count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 8, 8, generator=generator), torch.arange(count) % 3


def objective_of(method, alpha=0.0):
    """What the training scripts maximise, as a closure made anew at every call, and its target."""
    def at(logits_adv, y):
        losses = cross_entropy(logits_adv, y)
        return margin_weights(logits_adv, y, alpha) * losses if alpha else losses

    def trades(logits_adv, target):
        logits, y = target
        divergences = kl_divergence(logits_adv, logits)
        return margin_weights(logits_adv, y, alpha) * divergences if alpha else divergences

    def vir(logits_adv, target):
        return cross_entropy(logits_adv, target[1])

    return {"at": (at, lambda model, x, y: y), "trades": (trades, lambda model, x, y: (predict(model, x), y)),
            "vir": (vir, lambda model, x, y: (None, y)), "iaat": (at, lambda model, x, y: y)}[method]


OBJECTIVES = [("at", 0.0), ("at", 0.5), ("trades", 0.0), ("trades", 2.0), ("vir", 0.0)]


# ---- the step in one call ----------------------------------------------------------------------------------

@pytest.mark.parametrize(("method", "norm"),
                         [(method, "linf") for method in (*OBJECTIVES, ("iaat", 0.0))]
                         + [(method, "l2") for method in OBJECTIVES[1::2]], ids=str)
def test_the_whole_step_is_one_graph_that_does_what_the_plain_one_does(method, norm):
    model, (x, y) = Network().train(), batch()
    loss_fn, target_of = objective_of(*method)
    radius = 0.1 if norm == "linf" else 0.8
    if method[0] == "iaat":  # one an example
        radius = torch.linspace(0.0, 0.2, len(x))[:, None, None, None]
    settings = {"x": x, "target": target_of(model, x, y), "loss_fn": loss_fn, "norm": norm}
    tensors = {name: torch.as_tensor(size) for name, size in (("epsilon", radius), ("step_size", radius / 3))}
    counter = CompileCounterWithBackend("eager")
    # which raises where a graph would break
    compiled = torch.compile(whole_step, backend=counter, dynamic=False, fullgraph=True)
    with frozen(model), torch.enable_grad():
        plain = steps(model, **settings, epsilon=radius, step_size=radius / 3)
        left = first_iterate(x, radius, "uniform", norm=norm)
        right = left.clone()
        for _ in range(4):
            left, logits = plain(left)
            right, found = compiled(model, right, **settings, **tensors)
            torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(right, left, rtol=0, atol=0 if norm == "linf" else 1e-5)
    assert counter.frame_count == 1 and not right.requires_grad


@pytest.mark.parametrize("method", [("at", 0.5), ("trades", 2.0), ("vir", 0.0)], ids=str)
def test_ramps_batches_and_new_closures_need_no_second_graph(method):
    model, counter = Network().train(), CompileCounterWithBackend("eager")
    compiled = torch.compile(whole_step, backend=counter, dynamic=False, fullgraph=True)
    for epoch in range(3):
        loss_fn, target_of = objective_of(*method)  # as a script defines it in every epoch
        for number in range(3):
            x, y = batch(seed=3 * epoch + number)
            target = target_of(model, x, y)
            with frozen(model), torch.enable_grad():
                x_adv = first_iterate(x, 0.1, "uniform")
                for _ in range(2):
                    x_adv, _ = compiled(model, x_adv, x=x, target=target,
                                        epsilon=torch.tensor(0.01 * (epoch + number)),
                                        step_size=torch.tensor(0.005 * number), loss_fn=loss_fn, norm="linf")
    assert counter.frame_count == 1


@pytest.mark.parametrize(("name", "dtype"),
                         [("lenet", torch.float32), ("small_cnn", torch.bfloat16),
                          ("resnet18", torch.bfloat16), ("wrn34_10", torch.float32)],
                         ids=str)
def test_the_networks_of_the_scripts_compile_whole(name, dtype):
    model = TrainingPrecision(build_model(name, 3, 1), dtype)
    x, y = torch.rand(4, 1, 28, 28), torch.arange(4) % 3
    settings = {"x": x, "target": y, "epsilon": torch.tensor(0.1), "step_size": torch.tensor(0.1),
                "loss_fn": cross_entropy, "norm": "linf"}
    compiled = torch.compile(whole_step, backend="eager", dynamic=False, fullgraph=True)
    with frozen(model), torch.enable_grad():
        expected, found = steps(model, **settings)(x.clone())[0], compiled(model, x, **settings)[0]
    # signs that are rounding
    assert float((found != expected).float().mean()) < (0.01 if dtype == torch.float32 else 0.15)


def test_the_pass_of_free_training_is_one_graph_that_gives_both_of_its_gradients():
    model, (x, y) = TrainingPrecision(Network().train(), torch.float32), batch()
    compiled = torch.compile(_network_pass, backend="eager", dynamic=False, fullgraph=True)
    gradients = []
    for run in (model.plain, partial(compiled, model)):
        x_adv = x.clone().requires_grad_()
        loss = cross_entropy(run(x_adv), y).mean()
        gradients.append(torch.autograd.grad(loss, [x_adv, *model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_yopo_has_no_step_to_compile():
    """Its inner steps end each pass behind the first layer, in a hook, where a graph would break."""
    assert not issubclass(train_yopo.Config, CompileOptions)


# ---- the comparison ----------------------------------------------------------------------------------------

def compiled_by(monkeypatch, compiler, network=None, graphs=False):
    """A model that is compiled, and the lines that it says;
    compiler(function, lines) stands for torch.compile."""
    lines = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiler(function, lines))
    compilation = Compilation(graphs, lines.append)
    return TrainingPrecision(network or Network().train(), torch.float32, compilation), lines


def same(function, lines):
    return function


def failing(function, lines):
    def fail(*args, **keywords):
        raise RuntimeError("no compiler\nhere")
    return fail


def fails_later(function, lines):
    """Good until the last piece is compared."""
    def run(*args, **keywords):
        if any("pass is compiled" in line for line in lines):
            raise RuntimeError("later")
        return function(*args, **keywords)
    return run


def used(lines):
    return [line for line in lines if "is compiled" in line]


def wrong_way(function, lines):
    """A step against the gradient, a pass with logits of the other sign."""
    def run(model, images, **settings):
        out = function(model, images, **settings)
        return (2 * images - out[0], out[1]) if settings else -out
    return run


def train(model, batches=3, mode="eval", dtype=torch.float32, method=("trades", 2.0)):
    """A few training steps, the last batch smaller; returns what could tell one run from another."""
    loss_fn, target_of = objective_of(*method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attacked = []
    for number in range(batches):
        x, y = batch(8 if number < batches - 1 else 5, seed=number)
        x_adv = pgd(model, x, target_of(model, x, y), epsilon=0.05 * number, step_size=0.02 * number,
                    num_steps=2, loss_fn=loss_fn,
                    mode=mode, start="gaussian", keys=example_keys(torch.arange(len(x)), 0, number))
        optimizer.zero_grad()
        cross_entropy(model(x_adv), y).mean().backward()
        optimizer.step()
        attacked.append(x_adv)
    return {"attacked": attacked, "state": [value.clone() for value in model.state_dict().values()],
            "random": torch.rand(3), "gradients": [parameter.grad for parameter in model.parameters()],
            "python": random.random(),
            "modes": [torch.tensor([module.training for module in model.modules()])],
            "flags": [torch.tensor([parameter.requires_grad for parameter in model.parameters()])]}


def equal(left, right):
    return all(all(map(torch.equal, left[name], right[name])) if name != "python"
               else left[name] == right[name]
               for name in left)


def plain_run(network, **options):
    torch.manual_seed(1)
    random.seed(1)
    return train(TrainingPrecision(copy.deepcopy(network), torch.float32), **options)


def compiled_run(model, **options):
    torch.manual_seed(1)
    random.seed(1)
    return train(model, **options)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(("compiler", "says"),
                         [(same, "is compiled"), (failing, "(RuntimeError: no compiler)"),
                          (wrong_way, "away from plain torch)"), (fails_later, "later")])
def test_whatever_the_comparison_finds_the_run_is_the_plain_one_to_the_bit(compiler, says, mode, monkeypatch):
    network = Network(dropout=0.3).train()
    expected = plain_run(network, mode=mode)
    model, lines = compiled_by(monkeypatch, compiler, network)
    assert equal(compiled_run(model, mode=mode), expected)
    assert (says in "".join(lines)
            and all(line.startswith("torch.compile: ") and "\n" not in line for line in lines))
    # an attack that moves BatchNorm's statistics or draws dropout has no compiled step
    both = {"eval": 2, "train": 1}[mode]
    assert len(used(lines)) == (0 if compiler in (failing, wrong_way) else both)
    assert ("it draws random numbers or moves statistics" in "".join(lines)) == (mode == "train")


def test_what_is_used_is_what_was_compiled(monkeypatch):
    calls = []

    def counting(function, lines):
        def run(*args, **keywords):
            calls.append((function.__name__, len(args[1])))
            return function(*args, **keywords)
        return run

    model, lines = compiled_by(monkeypatch, counting)
    train(model, batches=2)
    tried = len(calls)
    train(model, batches=3)  # two batches of 8 images and one of 5
    assert len(lines) == 2
    assert sorted(set(calls[tried:])) == [("_network_pass", 8), ("whole_step", 8)]
    assert [name for name, _ in calls[tried:]].count("whole_step") == 2 * 2
    assert copy.deepcopy(model).compilation is model.compilation


def test_a_gradient_of_zeros_says_nothing_and_waits_for_the_next_batch(monkeypatch):
    network = Network().train()
    torch.nn.init.zeros_(network.head.weight)
    model, lines = compiled_by(monkeypatch, same, network)
    (x, y), attack = batch(), {"epsilon": 0.1, "step_size": 0.1, "num_steps": 1}
    assert torch.equal(pgd(model, x, y, **attack, start="clean"), x) and not lines
    torch.nn.init.normal_(network.head.weight)
    pgd(model, x, y, **attack)
    assert len(lines) == len(used(lines)) == 1


def test_one_radius_for_each_example_is_compiled_too(monkeypatch):
    (x, y), radius = batch(), torch.linspace(0, 0.2, 8)
    model, lines = compiled_by(monkeypatch, same)
    options = {"epsilon": radius, "step_size": radius / 3, "num_steps": 3, "start": "clean"}
    assert torch.equal(pgd(model, x, y, **options), pgd(model.module, x, y, **options))
    assert used(lines)


def test_the_counts_of_the_correct_iterates_are_those_of_the_plain_attack(monkeypatch):
    (x, y), options = batch(), {"epsilon": 0.3, "step_size": 0.1, "num_steps": 5, "start": "clean"}
    model, lines = compiled_by(monkeypatch, same)
    left, right = pgd_kappa(model, x, y, **options), pgd_kappa(model.module, x, y, **options)
    assert torch.equal(left[0], right[0]) and torch.equal(left[1], right[1]) and 0 < int(left[1].sum()) < 40
    assert used(lines)


def test_with_graphs_nothing_that_a_replay_writes_again_is_handed_out(monkeypatch):
    """A stand-in for a CUDA graph: outputs live in the same memory in every call."""
    def replaying(function, lines):
        kept = {}

        def run(model, images, **settings):
            outputs = function(model, images, **settings)
            single = isinstance(outputs, torch.Tensor)
            key = (len(images), single, model.training)
            if single and outputs.requires_grad:
                return outputs
            for k, out in enumerate((outputs,) if single else outputs):
                kept.setdefault((key, k), torch.empty_like(out)).copy_(out)
            return kept[key, 0] if single else (kept[key, 0], kept[key, 1])
        return run

    network = Network().train()
    expected = plain_run(network)
    model, lines = compiled_by(monkeypatch, replaying, network, graphs=True)
    assert equal(compiled_run(model), expected) and len(used(lines)) == 2
    first = predict(model, batch()[0])
    before = first.clone()
    assert not torch.equal(predict(model, 1 - batch()[0]), before) and torch.equal(first, before)


def test_distance_is_relative_and_never_mistakes_a_value_that_is_none():
    one, two = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 1.0])
    assert distance([one], [one]) == 0 and distance([torch.zeros(2)], [torch.zeros(2)]) == 0
    assert distance([one, one], [one, two]) == 0.5
    assert all(distance(*pair) == float("inf")
               for pair in (([one], [one * torch.nan]), ([one * torch.nan], [one]), ([0 * one], [one])))


def test_untouched_puts_random_states_and_statistics_back():
    network, x = Network(dropout=0.5).train(), batch()[0]
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    with untouched(network, CPU) as touched:
        network.eval()(x)
        assert not touched()
        network.train()(x)
        assert touched()
    assert (torch.equal(state, torch.get_rng_state())
            and all(map(torch.equal, before.values(), network.state_dict().values())))


def test_untouched_puts_back_a_statistic_that_a_network_replaces():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls = self.calls + 1
            return x

    network = nn.Sequential(Counting())
    with untouched(network, CPU) as touched:
        network(torch.zeros(1))
        assert touched()
    assert network.state_dict()["0.calls"].item() == 0


@pytest.mark.skipif(shutil.which("gcc") is None and shutil.which("g++") is None,
                    reason="no compiler for torch.compile's CPU code")
def test_the_compilers_own_step_is_used_and_attacks_as_the_plain_one():
    lines, (x, y) = [], batch()
    model = TrainingPrecision(Network().train(), torch.float32, Compilation(False, lines.append))
    options = {"epsilon": 0.1, "step_size": 0.03, "num_steps": 4, "start": "clean"}
    torch.testing.assert_close(pgd(model, x, y, **options), pgd(model.module, x, y, **options),
                               rtol=0, atol=1e-6)
    # torch's compiler may then fail, or give numbers that are far off: either is noticed
    if "ATEN_CPU_CAPABILITY" in os.environ:
        assert len(lines) == 1
    else:
        assert len(lines) == 1 and lines[0].startswith("torch.compile: the attack's step is compiled, ")


@pytest.mark.parametrize(("method", "weights"), [*((method, None) for method in train_vir.METHODS),
                                                 ("at", "margin"), ("trades", "margin")])
def test_the_weights_and_the_loss_of_every_method_are_one_graph(method, weights):
    cfg = train_vir.RECIPES[method]
    cfg = replace(cfg, weights=weights or cfg.weights)

    def mean_loss(logits, logits_adv, y, kappa):
        weights = train_vir.instance_weights(logits, logits_adv, y, kappa, cfg.weights, cfg)
        return train_vir.LOSSES[cfg.base](logits, logits_adv, y, cfg.inv_lambda, weights).mean()

    generator = torch.Generator().manual_seed(0)
    logits, logits_adv = torch.randn(2, 8, 10, generator=generator)
    given = logits_adv.requires_grad_(), torch.arange(8), torch.arange(8) % 5
    compiled = torch.compile(mean_loss, backend="eager", dynamic=False, fullgraph=True)
    found, expected = compiled(logits, *given), mean_loss(logits, *given)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits_adv)[0] for loss in (found, expected)))
