"""harness/training/trial.py: what a network must do is seen before anything is written,
and seeing leaves no trace."""
import copy
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from torch import nn

from harness.errors import UserError
from harness.training.precision import memory_format_of
from harness.training.trial import trial_pass
from models import build_model

IMAGES = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class Net(nn.Module):
    """Two convolutions and a linear layer, with something done before and after."""

    def __init__(self, before=lambda x: x, after=lambda z: z, flatten=lambda x: x.flatten(1), num_classes=10):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 2))
        self.fc = nn.Linear(36, num_classes)
        self.before, self.after, self.flatten = before, after, flatten

    def forward(self, x):
        return self.after(self.fc(self.flatten(self.conv(self.before(x)))))


def in_place(x):
    with torch.no_grad():
        x -= 0.5
    return x


def fail(x):
    raise KeyError("weights")


@pytest.mark.parametrize(("change", "says"), [
    ({"after": lambda z: (z, z)}, "gives a tuple, not a tensor of logits"),
    ({"after": lambda z: {"logits": z, "maps": z}}, "gives a dict with logits, maps, not"),
    ({"after": lambda z: None}, "gives a NoneType"), ({"after": lambda z: [z]}, "gives a list"),
    ({"after": lambda z: z.detach().numpy()}, "gives a ndarray"),
    ({"after": lambda z: z[:, :, None, None]}, r"shape \(4, 10, 1, 1\)"),
    ({"after": lambda z: z[:, 0]}, r"shape \(4,\)"),
    ({"after": lambda z: z[:1]}, r"shape \(1, 10\)"),
    ({"after": lambda z: z.argmax(1, keepdim=True)}, "torch.int64"),
    ({"num_classes": 7}, "gives 7 outputs where the data set has 10 classes"),
    ({"after": lambda z: z / 0}, "not finite"),
    ({"after": lambda z: z.where(z > z.mean(), torch.inf)}, "not finite"),
    ({"before": lambda x: x.sub_(0.5)}, "changes its input in place"),
    ({"before": in_place}, "changes its input in place"),
    ({"before": lambda x: x.data.mul_(2)}, "changes its input in place"),
    ({"after": lambda z: z.detach()}, "no gradient"), ({"before": lambda x: x.detach()}, "no gradient"),
    ({"before": torch.no_grad()(lambda x: x * 2)}, "no gradient"),
    ({"before": lambda x: torch.from_numpy(x.detach().numpy() * 2)}, "no gradient"),
    ({"before": lambda x: torch.from_numpy(x.numpy())}, "with a gradient for them"),
    ({"before": lambda x: (x * 255).byte().float()}, "no gradient"),
    ({"before": fail}, "KeyError: 'weights'"),
    ({"before": lambda x: x[:, :, :2, :2]}, "does not take images of 3x32x32"),
    ({"flatten": lambda x: x.reshape(len(x), 9)}, "does not take images of 3x32x32 .RuntimeError")])
def test_what_a_network_does_wrong_is_one_line(change, says):
    with pytest.raises(UserError, match=says) as refused:
        trial_pass(Net(**change), IMAGES, 10, report=pytest.fail)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("before", [lambda x: torch.round(x * 15) / 15, lambda x: (x > 0.5).float() + 0 * x,
                                    lambda x: x.floor() + x.sign()])
def test_a_gradient_of_zero_is_refused_in_training_and_left_to_the_verdict_in_evaluation(before):
    with pytest.raises(UserError, match="zero at every image"):
        trial_pass(Net(before=before).train(), IMAGES, 10)
    assert trial_pass(Net(before=before).eval(), IMAGES, 10).num_outputs == 10
    zero = Net().train()
    nn.init.zeros_(zero.fc.weight)
    assert trial_pass(zero, IMAGES, 10).num_outputs == 10  # as residual networks begin


def strided(x):
    return torch.as_strided(x.clone(memory_format=torch.preserve_format), (len(x), 36), (36, 1))


@pytest.mark.parametrize(("flatten", "reason"), [
    (lambda x: x.view(len(x), -1), "channels last fails: .*view size is not compatible"),
    (lambda x: x.view(-1, 36), "channels last fails"), (strided, "changes its outputs")])
def test_a_network_that_cannot_work_channels_last_stays_contiguous_and_says_so(flatten, reason):
    lines = []
    network = Net(flatten=flatten)
    expected = network.eval()(IMAGES.float() / 255)
    trial_pass(network, IMAGES, 10, report=lines.append)
    assert len(lines) == 1 and lines[0].startswith("note: the network stays contiguous")
    assert re.search(reason, lines[0])
    assert memory_format_of(network) == torch.contiguous_format
    assert torch.equal(network(IMAGES.float() / 255), expected)


@pytest.mark.parametrize("name", ["lenet", "small_cnn", "resnet18"])
def test_our_networks_are_channels_last(name):
    network = build_model(name, 10, 3)
    assert trial_pass(network, IMAGES, 10, report=pytest.fail).num_outputs == 10
    assert memory_format_of(network) == torch.channels_last


class Restless(Net):
    """Uses every kind of random number, statistics, a counter and a cache."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))
        self.count, self.cache, self.unused = 0, {}, nn.Linear(2, 2)

    def forward(self, x):
        self.passes += 1
        self.count += 1
        self.cache[self.count] = x
        noise = random.random() + np.random.rand() + torch.rand(())
        return super().forward(nn.functional.dropout(x, 0.1) + 0.01 * noise)


@pytest.mark.parametrize("training", [True, False])
def test_a_trial_leaves_no_trace(training):
    network = Restless().train(training)
    network.conv[1].eval()
    before = copy.deepcopy(network.state_dict())
    random_states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    trial = trial_pass(network, IMAGES, 10, report=lambda line: None)
    assert trial.unused == ("unused.weight", "unused.bias")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert ((network.count, network.cache, network.training, network.conv[1].training)
            == (0, {}, training, False))
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), random_states[0]) and random.getstate() == random_states[1]
    assert np.array_equal(np.random.get_state()[1], random_states[2])


def test_batchnorm_and_a_batch_of_one_image_are_refused_in_training_alone():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10), nn.BatchNorm1d(10))
    assert trial_pass(network.eval(), IMAGES[:1], 10).num_outputs == 10
    with pytest.raises(UserError, match="more than 1 value per channel"):
        trial_pass(network.train(), IMAGES[:1], 10)


OWN = """
import torch
class Net(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(1, 4, 5, 4), torch.nn.Linear(144, num_classes)
    def forward(self, x):
        return self.fc(self.conv(x).view(len(x), 144))
class Two(Net):
    def forward(self, x):
        return super().forward(x), x
"""


def test_training_evaluation_and_curves_try_before_they_write(script, capsys):
    Path("net.py").write_text(OWN)
    script("train_at_mnist", *TINY, "--model", "net.py:Net", "--out_dir", "run")
    assert capsys.readouterr().out.count("note: the network stays contiguous") == 1
    script("eval_mnist", "--checkpoint", "run/last.pt", "--arch", "net.py:Net", "--num_examples", 20,
           "--num_restarts", 1, "--num_steps", 2, "--alphas", 1)
    assert "stays contiguous" in capsys.readouterr().out
    with pytest.raises(UserError, match="gives a tuple"):
        script("train_at_mnist", *TINY, "--model", "net.py:Two", "--out_dir", "two")
    with pytest.raises(UserError, match="gives a tuple"):
        script("eval_mnist", "--checkpoint", "run/last.pt", "--arch", "net.py:Two", "--out", "two.json")
    with pytest.raises(UserError, match="gives a tuple"):
        script("generate_robustness_curves", "--model", "run/last.pt", "--arch", "net.py:Two",
               "--n_points", 4, "--out", "two")
    assert not list(Path().glob("two*"))


LAZY = """import torch
def Net(num_classes):
    return torch.nn.Sequential(torch.nn.LazyConv2d(4, 3), torch.nn.LazyBatchNorm2d(), torch.nn.Flatten(),
                               torch.nn.LazyLinear(num_classes))
"""


def test_a_network_that_takes_its_shapes_from_images_is_trained_and_evaluated(script):
    Path("net.py").write_text(LAZY)
    script("train_trades_mnist", *TINY, "--model", "net.py:Net", "--epochs", 2, "--out_dir", "run")
    script("eval_mnist", "--checkpoint", "run/last.pt", "--arch", "net.py:Net", "--num_examples", 8,
           "--num_steps", 1)
    assert json.loads(Path("run/eval_last.json").read_text())["num_examples"] == 8


def test_a_lazy_network_that_fails_is_one_line():
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.Linear(5, 10))
    with pytest.raises(UserError, match="the network does not take images of 1x8x8"):
        trial_pass(network, torch.zeros(4, 1, 8, 8, dtype=torch.uint8), 10)
