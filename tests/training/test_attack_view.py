"""The attack's view of a network: the network's own logits and gradients, faster where it can be,
the network itself where not."""
import copy
import itertools
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from attacks.frozen import frozen, predict
from attacks.pgd import cross_entropy, pgd
from harness.evaluation.predictions import BatchInvariant
from harness.training import attack_view, fused
from harness.training.attack_view import AttackView
from harness.training.precision import TrainingPrecision
from models import build_model
from models.wide_resnet import WideResNet

NETWORKS = {
    "lenet": lambda: build_model("lenet", 10, 3),
    "small_cnn": lambda: build_model("small_cnn", 10, 3),
    "resnet18": lambda: build_model("resnet18", 10, 3),
    "wide_resnet": lambda: WideResNet(10, 2, 10, 3),
    "normalized": lambda: build_model("resnet18", 10, 3, [0.5] * 3, [0.2] * 3),
    "torchvision": lambda: torchvision.models.resnet18(num_classes=10),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def images(count=6, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def outcome(run, network, x, seed=3):
    """Logits, and gradients with respect to the images and the trainable parameters;
    what a pass leaves in buffers and generators."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    logits = run(x)
    sources = [x, *(parameter for parameter in network.parameters() if parameter.requires_grad)]
    gradients = (torch.autograd.grad(logits.square().sum() + logits[:, 0].sum(), sources, allow_unused=True)
                 if logits.requires_grad else ())
    gradients = [torch.zeros(1) if gradient is None else gradient for gradient in gradients]
    return [logits.detach(), *gradients, *(buffer.clone() for buffer in network.buffers()),
            torch.get_rng_state()]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def assert_close(found, expected):
    """Up to rounding, of which the gradient of a bias before BatchNorm consists."""
    assert len(found) == len(expected)
    norms = (float(theirs.double().norm()) for theirs in expected if theirs.is_floating_point())
    least = 1e-7 * max(norms) + 1e-7
    for mine, theirs in zip(found, expected):
        mine, theirs = mine.double(), theirs.double()
        assert (mine - theirs).norm() <= 1e-3 * theirs.norm() + 100 * least


# ---- networks that are recognised --------------------------------------------------------------------------

@pytest.mark.parametrize("train", (False, True), ids=("eval", "train"))
@pytest.mark.parametrize("name", NETWORKS)
def test_a_known_network_has_a_view_with_its_logits_and_gradients(name, train):
    network, x = NETWORKS[name]().train(), images(6, 32)
    with torch.no_grad():
        for _ in range(3):
            network(x)  # running statistics of their own
    network.train(train)
    view, twin = AttackView(network), copy.deepcopy(network)
    for trainable in (True, False):
        network.requires_grad_(trainable)
        twin.requires_grad_(trainable)
        for _ in range(2):  # the pass that makes the form, and one that has it
            assert_close(outcome(view, network, x), outcome(twin, twin, x))
    assert [form.run is not None for form in view.forms] == [True, True]
    with torch.no_grad():
        torch.testing.assert_close(view(x), twin(x), rtol=1e-4, atol=1e-5)


def calls_of(network, x, monkeypatch, **mode):
    """How many steps of the view, and with what, a frozen pass takes."""
    view, seen, step = AttackView(network), [], fused.conv_norm_relu

    def count(x, conv, norm=None, add=None, relu=True, *others):
        seen.append((norm is not None, add is not None, relu))
        return step(x, conv, norm, add, relu, *others)

    monkeypatch.setattr(fused, "conv_norm_relu", count)
    with frozen(network):
        view(x)
        seen.clear()
        view(x)
    return seen


@pytest.mark.parametrize(("name", "norms", "additions", "relus"), (
    ("lenet", 0, 0, 0), ("small_cnn", 0, 0, 2), ("resnet18", 20, 8, 17), ("torchvision", 20, 8, 17),
    ("wide_resnet", 4, 3, 4)))
def test_every_convolution_takes_what_follows_it(name, norms, additions, relus, monkeypatch):
    seen = calls_of(NETWORKS[name](), images(2, 32), monkeypatch)
    assert len(seen) == sum(type(module) is nn.Conv2d for module in NETWORKS[name]().modules())
    assert [sum(column) for column in zip(*seen)] == [norms, additions, relus]


class Block(nn.Module):
    """Written with `spell`, one of the ways to write an addition and a ReLU."""

    def __init__(self, spell):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.other = nn.Conv2d(3, 4, 1)
        self.relu, self.relu_in_place, self.head = nn.ReLU(), nn.ReLU(inplace=True), nn.Linear(4, 5)
        self.pool, self.average, self.spell = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), spell

    def forward(self, x):
        return self.head(self.average(self.spell(self, self.norm(self.conv(x)), self.other(x))).flatten(1))


SPELLINGS = {
    "+": lambda net, a, b: F.relu(a + b), "torch.add": lambda net, a, b: torch.relu(torch.add(a, b)),
    "add": lambda net, a, b: a.add(b).relu(), "add_": lambda net, a, b: a.add_(b).relu_(),
    "modules": lambda net, a, b: net.relu(a + b), "in place": lambda net, a, b: net.relu_in_place(b + a),
    "F.relu in place": lambda net, a, b: F.relu(a + b, inplace=True),
    "positional": lambda net, a, b: F.relu(a + b, True),
    "torch.relu_": lambda net, a, b: torch.relu_(a + b),
    "pool": lambda net, a, b: net.pool(net.relu(a)) + F.max_pool2d(F.relu(b), 2),
    "pool with keywords": lambda net, a, b: (F.max_pool2d(F.relu(a), kernel_size=2, stride=2)
                                             + F.max_pool2d(b.relu(), (2, 2))),
    "other pools": lambda net, a, b: F.max_pool2d(F.relu(a), 3, 1) + F.max_pool2d(F.relu(b), 2, 1, 0, 2),
    "alpha": lambda net, a, b: torch.add(a, b, alpha=2), "a number": lambda net, a, b: F.relu(a + 1) + b,
    "broadcast": lambda net, a, b: F.relu(a + b.mean((2, 3), keepdim=True)),
    "used twice": lambda net, a, b: F.relu(a) * a + b, "with itself": lambda net, a, b: a + a + b,
    "into the other": lambda net, a, b: torch.relu(b.add_(a)), "multiplied": lambda net, a, b: F.relu(a * b),
    "the operand again": lambda net, a, b: F.relu(a + b) + b, "relu6": lambda net, a, b: F.relu6(a + b),
    "double": lambda net, a, b: (a + b.double()).float(),
    "a view": lambda net, a, b: F.relu(a.view_as(b) + b),
    "relu of the other": lambda net, a, b: F.relu(a + F.relu(b, inplace=True)) + b,
}


@pytest.mark.parametrize("train", (False, True), ids=("eval", "train"))
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_way_to_write_it_is_what_the_network_gives(spelling, train):
    network, x = Block(SPELLINGS[spelling]).train(train), images()
    network.norm.running_mean.normal_()
    view, twin = AttackView(network), copy.deepcopy(network)
    for _, trainable in itertools.product(range(2), (True, False)):
        network.requires_grad_(trainable)
        twin.requires_grad_(trainable)
        assert_close(outcome(view, network, x), outcome(twin, twin, x))
    # whose write to an operand that is used again is not in a trace
    assert view.used or spelling == "relu of the other"


def test_in_bfloat16_a_view_rounds_no_more_than_the_network():
    network, x = NETWORKS["torchvision"]().eval().requires_grad_(False), images(8, 32)
    exact = outcome(network, network, x)
    errors = []
    for viewed in (True, False):
        model = TrainingPrecision(network, torch.bfloat16, None, viewed).eval()
        outcome(model, model, x)
        errors.append([(a.double() - b.double()).norm() / b.double().norm()
                       for a, b in zip(outcome(model, model, x)[:2], exact)])
        assert not viewed or model.view.used
    assert all(ours <= 1.2 * theirs + 1e-3 for ours, theirs in zip(*errors))


def test_a_default_argument_is_as_the_network_has_it():
    class Optional(Plain):
        def forward(self, x, features=False, scale=None):
            out = super().forward(x)
            return out if features is False and scale is None else None

    network, x = Optional().eval(), images()
    view = AttackView(network)
    assert_close(outcome(view, network, x), outcome(network, network, x))
    assert view.used


# ---- networks that a trace would get wrong -----------------------------------------------------------------

class Plain(nn.Module):
    """Two convolutions with a norm, an average and a linear layer, which the networks below change."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def features(self, x):
        return self.conv2(F.relu(self.norm(self.conv(x))))

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


class OnValues(Plain):
    def forward(self, x):
        return super().forward(x if x.mean() > 0.5 else 1 - x)


class OnShapes(Plain):
    def forward(self, x):
        return super().forward(x if x.shape[-1] == 16 else F.interpolate(x, 16))


class WithoutGrad(Plain):
    def forward(self, x):
        with torch.no_grad():
            shift = self.features(x).mean((2, 3))
        return super().forward(x) + self.head(shift)


class WithoutGradOfAWeight(Plain):
    def forward(self, x):
        with torch.no_grad():
            scale = self.head.bias / self.head.bias.norm()
        return super().forward(x) * scale


class WithoutGradBehindZeros(WithoutGrad):
    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.head.weight)


class WithoutGradByAFunction(Plain):
    def forward(self, x):
        torch.set_grad_enabled(False)
        shift = self.features(x).mean((2, 3))
        torch.set_grad_enabled(True)
        return super().forward(x) + self.head(shift)


class Checkpointed(Plain):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        return self.head(checkpoint(self.features, x, use_reentrant=self.reentrant).mean((2, 3)))


class WithoutAutocast(Plain):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class Detached(Plain):
    def forward(self, x):
        return super().forward(x) + self.head(self.features(x).mean((2, 3)).detach())


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class OwnFunction(Plain):
    def forward(self, x):
        return super().forward(Straight.apply(8 * x) / 8)


class WritesAWeight(Plain):
    def forward(self, x):
        self.conv.weight.data.mul_(0.9)
        return super().forward(x)


class WritesAWeightAnew(Plain):
    def forward(self, x):
        self.conv.weight.data = self.conv.weight.data * 0.9
        return super().forward(x)


class NormalisesAWeight(Plain):
    """Which changes nothing at first."""

    def forward(self, x):
        with torch.no_grad():
            self.conv.weight.clamp_(-5, 5)
        return super().forward(x)


class Counts(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count += 1
        return super().forward(x) * self.count


class CountsInPython(Plain):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class CountsInAList(Plain):
    def __init__(self):
        super().__init__()
        self.log = [1.0]

    def forward(self, x):
        self.log.append(0.5 * self.log[-1])
        return super().forward(x) * self.log[-1]


class RemembersABatch(Plain):
    def forward(self, x):
        self.last = self.features(x)
        return self.head(self.last.mean((2, 3)))


class Noise(Plain):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


class NoiseOfAShape(Plain):
    def forward(self, x):
        return super().forward(x) + torch.randn(4)


class ACoin(Plain):
    def forward(self, x):
        return super().forward(x if torch.rand(()) < 0.5 else 1 - x)


class ACoinOfPython(Plain):
    def forward(self, x):
        return super().forward(x if random.random() < 0.5 else 1 - x)


class ACoinOfNumpy(Plain):
    def forward(self, x):
        return super().forward(x if np.random.rand() < 0.5 else 1 - x)


class ACoinOfItsOwn(Plain):
    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(0)

    def forward(self, x):
        return super().forward(x if self.generator.random() < 0.5 else 1 - x)


class FunctionalDropout(Plain):
    def forward(self, x):
        return self.head(F.dropout(self.features(x).mean((2, 3)), 0.5, self.training))


class Shared(nn.Module):
    """Modules that are called twice, BatchNorm among them, on different numbers."""

    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.other = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        out = self.first(x)
        waiting = self.conv(out)
        out = F.relu(self.norm(self.other(2 * out)))
        return self.head(F.relu(self.norm(waiting) + out + self.conv(out)).mean((2, 3)))


class InPlace(nn.Module):
    """A convolution whose input is overwritten before its output is added, which autograd does not allow."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(6, 4)

    def forward(self, x):
        x = self.first(x)
        right = self.right(x)
        left = self.left(self.relu(x))
        left += right
        return self.head((left.tanh() + x).mean((2, 3)))


class OperandAgain(Plain):
    def forward(self, x):
        shortcut = self.conv(x)
        out = self.features(x)
        kept = shortcut
        shortcut += out
        return self.head((F.relu(shortcut) + kept).mean((2, 3)))


class OwnBuffers(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.4))
        self.std, self.scale = torch.full((1, 3, 1, 1), 0.3), nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return super().forward((x - 2 * self.mean) / self.std) * self.scale.exp()


class Grouped(nn.Module):
    """Convolutions that are none of all channels with all channels, of zeros at the border,
    and other kinds of norm."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6, affine=False), nn.ReLU(),
            nn.Conv2d(6, 6, 3, dilation=2), nn.BatchNorm2d(6, track_running_stats=False),
            nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"), nn.ReLU(inplace=True),
            nn.Conv2d(6, 6, 3, padding="same"), nn.GroupNorm(2, 6), nn.Tanh(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4))

    def forward(self, x):
        return self.layers(x)


class AsksForGrad(Plain):
    def forward(self, x):
        return super().forward(x) * (2 if torch.is_grad_enabled() else 3)


def parametrized():
    network = Plain()
    parametrizations.weight_norm(network.conv)
    return network


def with_weight_norm_of_old():
    network = Plain()
    nn.utils.weight_norm(network.conv)
    return network


def with_a_forward_of_its_own():
    network = Plain()
    network.norm.forward = lambda x: 2 * x
    return network


def with_a_hook():
    network = Plain()
    network.norm.register_forward_hook(lambda module, args, output: 3 * output)
    return network


def with_a_gradient_hook():
    network = Plain()
    network.conv2.register_full_backward_hook(
        lambda module, grad_input, grad_output: tuple(2 * gradient for gradient in grad_input))
    return network


def scripted():
    return torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                                          nn.Flatten()))


VIEWED = (Detached, Noise, FunctionalDropout, OwnBuffers, Shared, Grouped, AsksForGrad)
NOT_VIEWED = (OnValues, OnShapes, WritesAWeight, WritesAWeightAnew, NormalisesAWeight, Counts, CountsInPython,
              CountsInAList, RemembersABatch, NoiseOfAShape, ACoin, ACoinOfPython, ACoinOfNumpy,
              ACoinOfItsOwn, OperandAgain, parametrized, with_weight_norm_of_old,
              with_a_forward_of_its_own, with_a_hook, with_a_gradient_hook, WithoutGrad,
              WithoutGradBehindZeros, WithoutGradOfAWeight, WithoutGradByAFunction, WithoutAutocast,
              OwnFunction)


def both(make):
    torch.manual_seed(0)
    network = make()
    torch.manual_seed(0)
    return network, make()


@pytest.mark.parametrize("train", (False, True), ids=("eval", "train"))
@pytest.mark.parametrize("make", VIEWED + NOT_VIEWED, ids=lambda make: make.__name__)
def test_whatever_a_network_does_the_view_does(make, train):
    network, twin = both(make)
    view = AttackView(network)
    for model in (network, twin):
        model.train(train)
    for k, trainable in enumerate((True, False, True, False)):
        found = []
        for model, run in ((network, view), (twin, twin)):
            model.requires_grad_(trainable)
            random.seed(k)
            np.random.seed(k)
            found.append([*outcome(run, model, images(5, 16 if k < 2 else 20), seed=k),
                          torch.tensor(random.random()), torch.tensor(np.random.rand()),
                          *(parameter.detach().clone() for parameter in model.parameters())])
            with torch.no_grad():
                found[-1].append(run(images(5)))
        (assert_same if make in NOT_VIEWED else assert_close)(*found)
    assert {form.run is not None for form in view.forms} == {make in VIEWED}
    mine, theirs = ({name: value for name, value in vars(model).items()
                     if isinstance(value, (int, float, list))}
                    for model in (network, twin))
    assert mine == theirs


@pytest.mark.parametrize("reentrant", (True, False))
def test_checkpointing_is_kept_for_the_memory_that_it_saves(reentrant):
    view = AttackView(Checkpointed(reentrant))
    view(images().requires_grad_())
    assert len(view.forms) == 1 and not view.used


def test_an_input_that_is_overwritten_is_read_before():
    network, x = InPlace(), images()
    view = AttackView(network)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(view(x), network(x))
    assert view.used


@pytest.mark.parametrize("trainable", (True, False))
def test_autocast_that_a_network_turns_off_stays_off(trainable):
    network = WithoutAutocast().eval().requires_grad_(trainable)
    view = AttackView(network)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert_same(outcome(view, network, images()), outcome(network, network, images()))


def test_what_cannot_be_traced_at_all_runs():
    network = scripted()
    view = AttackView(network)
    assert torch.equal(view(images()), network(images())) and not view.used


# ---- what changes after the view was made ------------------------------------------------------------------

def register_a_hook(network):
    network.conv.register_forward_hook(lambda module, args, output: 2 * output)


def register_a_pre_hook(network):
    network.norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def register_a_backward_hook(network):
    network.conv2.register_full_backward_hook(
        lambda module, grad_input, grad_output: tuple(2 * gradient for gradient in grad_input))


def register_a_backward_pre_hook(network):
    network.conv2.register_full_backward_pre_hook(
        lambda module, grad_output: tuple(2 * gradient for gradient in grad_output))


def replace_a_module(network):
    network.conv2 = nn.Conv2d(6, 6, 1).requires_grad_(False)


def replace_a_parameter(network):
    network.scale = nn.Parameter(torch.tensor(0.5), False)


def replace_a_buffer(network):
    network.mean = network.mean + 0.2


def write_to_a_plain_tensor(network):
    network.std.mul_(2)


def write_to_data(network):
    network.conv.weight.data.mul_(2)


def write_to_the_data_of_a_norm(network):
    network.norm.running_var.data.mul_(4)


def assign_data(network):
    network.conv.weight.data = 2 * network.conv.weight.data


def load(network):
    network.load_state_dict({name: 1.5 * value for name, value in network.state_dict().items()})


def parametrize_later(network):
    parametrizations.weight_norm(network.conv)
    network.requires_grad_(False)


def switch_one_mode(network):
    network.norm.train()


def change_a_number(network):
    network.factor = 3.0


def change_inside(network):
    network.settings["shift"][0] = 2.0


def change_an_object(network):
    network.options.power = 2


class Adjustable(OwnBuffers):
    def __init__(self):
        super().__init__()
        self.factor, self.settings, self.options = 1.0, {"shift": [0.0]}, SimpleNamespace(power=1)

    def forward(self, x):
        return self.factor * super().forward(x + self.settings["shift"][0]) ** self.options.power


CHANGES = (register_a_hook, register_a_pre_hook, register_a_backward_hook, register_a_backward_pre_hook,
           replace_a_module, replace_a_parameter, replace_a_buffer, write_to_a_plain_tensor, write_to_data,
           write_to_the_data_of_a_norm, assign_data, load, parametrize_later,
           switch_one_mode, change_a_number, change_inside, change_an_object)


@pytest.mark.parametrize("attacked", (True, False), ids=("attack", "passes"))
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_two_passes_is_honoured(change, attacked):
    network, x = Adjustable().eval().requires_grad_(False), images()
    view = AttackView(network)

    def found():
        if not attacked:
            return outcome(view, network, x)
        with frozen(network, None):
            return outcome(view, network, x)

    before = found()
    assert view.used
    change(network)
    after, twin = found(), copy.deepcopy(network) if change is not parametrize_later else network
    assert_close(after[:2], outcome(twin, network, x)[:2])
    assert not torch.allclose(before[0], after[0]) or not torch.allclose(before[1], after[1])


def test_a_hook_that_is_gone_gives_the_view_back():
    network, x = Plain().eval().requires_grad_(False), images()
    view, calls = AttackView(network), []
    view(x)
    handle = network.conv.register_forward_hook(lambda *_: calls.append(1))
    view(x)
    assert len(calls) == 1 and view._form(x) is None
    handle.remove()
    view(x)
    assert len(calls) == 1 and view._form(x) is not None


def test_a_hook_on_all_modules_is_honoured():
    network, x, calls = Plain().eval().requires_grad_(False), images(), []
    view = AttackView(network)
    view(x)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module))
    try:
        view(x)
    finally:
        handle.remove()
    assert network.conv in calls


def test_a_write_to_data_between_two_evaluations_of_a_model_is_honoured():
    model, x, y = Plain().eval(), images(), torch.arange(6) % 4
    steady = BatchInvariant(model)
    attack = {"epsilon": 0.1, "step_size": 0.05, "num_steps": 3, "start": "clean"}
    for _ in range(3):
        assert torch.equal(pgd(steady, x, y, **attack), pgd(BatchInvariant(model), x, y, **attack))
        with torch.no_grad():
            torch.testing.assert_close(steady(x), model(x))
        model.conv.weight.data.mul_(-1.5)
        model.norm.bias.data.add_(0.5)
    assert steady.view.used


def test_a_network_that_changes_all_the_time_is_soon_left_alone():
    network, x = Adjustable(), images(2, 8)
    view = AttackView(network)
    for k in range(attack_view.MOST + 3):
        network.factor = 1.0 + k
        torch.testing.assert_close(view(x), network(x), rtol=1e-4, atol=1e-5)
    assert len(view.forms) == attack_view.MOST


# ---- no trace on the network -------------------------------------------------------------------------------

def test_a_view_leaves_no_trace_on_the_network():
    network, x, y = build_model("small_cnn", 10, 3), images(4, 28), torch.arange(4)
    model = TrainingPrecision(network, torch.float32)
    before = {name: sorted(vars(module)) for name, module in network.named_modules()}
    names, values = list(network.state_dict()), [value.clone() for value in network.state_dict().values()]
    versions = [parameter._version for parameter in network.parameters()]
    pgd(model, x, y, epsilon=0.1, step_size=0.1, num_steps=2)
    model(x)
    assert model.view.used
    assert {name: sorted(vars(module)) for name, module in network.named_modules()} == before
    assert (list(network.state_dict()) == names
            and all(map(torch.equal, network.state_dict().values(), values)))
    assert list(model.state_dict()) == [f"module.{name}" for name in names]
    assert [parameter._version for parameter in network.parameters()] == versions
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)),
                                    lambda model: AveragedModel(model).module))
def test_a_copy_has_a_view_of_its_own(copied):
    model, x = TrainingPrecision(build_model("lenet", 10, 3), torch.float32), images(4, 28)
    model(x)
    twin = copied(model)
    assert twin.view.network is twin.module is not model.module and not twin.view.used
    with torch.no_grad():
        twin.module.conv1.weight.mul_(2)
        torch.testing.assert_close(twin(x), twin.module(x))
        torch.testing.assert_close(model(x), model.module(x))


def test_a_graph_that_waits_for_its_backward_pass_is_not_disturbed():
    # whose last layer is zero, and filled for the check
    network, x = build_model("small_cnn", 10, 3).eval(), images(4, 28)
    view = AttackView(network)
    waiting = network(x).sum()
    view(x)
    predict(TrainingPrecision(network, torch.float32), x)
    waiting.backward()
    assert network.classifier.fc3.weight.grad.any() and view.used


def test_the_view_is_not_used_where_torch_transforms_the_pass():
    network, x = build_model("lenet", 10, 3).requires_grad_(False), images(4, 28)
    view = AttackView(network)
    view(x)
    ours, theirs = (torch.func.grad(lambda x, run=run: cross_entropy(run(x), torch.arange(4)).sum())(x)
                    for run in (view, network))
    assert torch.equal(ours, theirs)
    with torch.inference_mode():
        assert torch.equal(view(x), network(x))
    compiled = torch.compile(lambda x: view(x), backend="eager")
    assert torch.equal(compiled(x), network(x))


def test_other_inputs_are_the_networks():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    view = AttackView(network)
    for x in (torch.rand(2, 12), torch.rand(2, 3, 2, 2)):
        assert torch.equal(view(x), network(x))
    with pytest.raises(RuntimeError):
        view(torch.rand(2, 3, 5, 5))
