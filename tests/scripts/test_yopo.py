"""train_yopo.py: the inner loop against the released code, Algorithm 1 written out,
the first layer, many processes, refusals."""
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from test_scripts import same_bits, weights
from torch import nn

import harness.datasets.batches
import harness.evaluation.predictions
import harness.training.run
import train_yopo
from attacks.noise import example_keys, keyed_uniform
from attacks.yopo import yopo_inner
from harness.config import parse_config
from harness.datasets.batches import load_dataset, training_batches
from harness.errors import UserError
from harness.training.first_layer import FirstLayer
from harness.training.precision import TrainingPrecision
from harness.training.seeds import one_a_seed
from models import MODELS, build_model

PLAIN = (*TINY, "--model", "lenet", "--crop_padding", 0, "--no-flip", "--precision", "float32", "--lr", 0.1,
         "--batch_size", 32, "--epsilon", 0.2, "--step_size", 0.1)
OWN = """
import torch
class Linear(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(784, 10))
class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.head, self.conv = torch.nn.Linear(2 * 26 * 26, 10), torch.nn.Conv2d(1, 2, 3)
    def forward(self, x):
        return self.scale * self.head(self.conv(x).relu_().flatten(1))
class Empty(torch.nn.Flatten):
    pass
"""


# ---- the inner loop ----------------------------------------------------------------------------------------

def test_the_inner_loop_gives_the_values_of_the_released_code():
    golden = json.loads((Path(__file__).parents[1] / "golden/yopo_inner.json").read_text())
    value = {name: torch.tensor(number) for name, number in golden.items() if isinstance(number, list)}
    layer = nn.Conv2d(1, 2, 3, padding=1, bias=False)
    layer.weight = nn.Parameter(value["conv_weight"])
    x_adv = yopo_inner(layer, value["x"], value["x"] + value["eta_in"], value["p"], epsilon=golden["eps"],
                       step_size=golden["sigma"], num_steps=golden["inner_steps"])
    torch.testing.assert_close(x_adv, value["x_adv_f32"], atol=1e-6, rtol=0)
    torch.testing.assert_close(x_adv - value["x"], value["eta_out_f32"], atol=1e-6, rtol=0)
    assert layer.weight.grad is None and layer.weight.requires_grad
    (-(layer(x_adv) * value["p"]).sum()).backward()
    torch.testing.assert_close(layer.weight.grad, value["conv_weight_grad_f32"], atol=1e-5, rtol=1e-5)


def test_through_a_linear_layer_it_reaches_the_corner_of_the_ball_and_the_box():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Sequential(nn.Flatten(), nn.Linear(12, 5, bias=False))
    x, p = torch.rand(7, 3, 2, 2, generator=generator), torch.randn(7, 5, generator=generator)
    downhill = -(p @ layer[1].weight.detach()).sign().view_as(x)
    x_adv = yopo_inner(layer, x, x, p, epsilon=0.3, step_size=0.1, num_steps=3)
    torch.testing.assert_close(x_adv, (x + 0.3 * downhill).clamp(0, 1))
    one = yopo_inner(layer, x, x, p, epsilon=0.3, step_size=0.1, num_steps=1)
    torch.testing.assert_close(one, (x + 0.1 * downhill).clamp(0, 1))
    # no gradient, no move
    assert torch.equal(yopo_inner(layer, x, x, 0 * p, epsilon=0.3, step_size=0.1, num_steps=3), x)


def test_a_pixel_outside_the_box_is_only_projected_at_first():
    layer = nn.Identity()
    x, p = torch.full((1, 1, 1, 2), 0.95), -torch.ones(1, 1, 1, 2)
    start = torch.tensor([[[[1.04, 0.96]]]])
    after = [yopo_inner(layer, x, start, -p, epsilon=0.1, step_size=0.02, num_steps=n).flatten().tolist()
             for n in (1, 2)]
    assert after[0] == pytest.approx([1.0, 0.94])  # on the edge of the box: from there it moves
    assert after[1] == pytest.approx([0.98, 0.92])


# ---- the first layer ---------------------------------------------------------------------------------------

FIRST = {"lenet": "conv1", "small_cnn": "feature_extractor.conv1"}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "wrn34_10"])  # the class of wrn28_10
def test_the_first_layer_is_found_behind_normalisation_and_costs_no_second_pass(name, normalize):
    statistics = ([0.3] * 3, [0.2] * 3) if normalize else (None, None)
    model, x = build_model(name, 7, 3, *statistics), torch.rand(2, 3, 16, 16)
    names = list(model.state_dict())
    model.eval()
    f0 = FirstLayer(model, x)
    layer = (model.network if normalize else model).get_submodule(FIRST.get(name, "conv1"))
    assert f0.layer[0] is layer and list(model.state_dict()) == names
    expected = layer(model.normalize(x) if normalize else x)
    assert torch.equal(f0(x), expected)
    for cut in (False, True):
        features, logits = f0.with_logits(x, cut)
        # though networks work in place
        assert torch.equal(logits, model(x)) and torch.equal(features, expected)
        model.zero_grad()
        logits.square().sum().backward()
        assert features.grad.shape == features.shape
        assert (layer.weight.grad is None) == cut
    assert not layer._forward_hooks


def test_the_costate_is_the_gradient_at_the_first_layers_output():
    torch.manual_seed(0)
    model, x = build_model("lenet", 10, 1).eval(), torch.rand(3, 1, 28, 28)
    features, logits = FirstLayer(model, x).with_logits(x)
    logits.square().sum().backward()
    output = F.conv2d(x, model.conv1.weight, model.conv1.bias, padding=2).detach().requires_grad_()
    expected, = torch.autograd.grad(behind(model, output).square().sum(), output)
    torch.testing.assert_close(features.grad, expected)


def test_a_narrow_precision_gives_features_and_costates_in_float32():
    torch.manual_seed(0)
    network, x = build_model("lenet", 10, 1), torch.rand(3, 1, 28, 28)
    exact, narrow = (FirstLayer(TrainingPrecision(network, dtype, None, False), x)
                     for dtype in (torch.float32, torch.bfloat16))
    found = {}
    for f0 in (exact, narrow):
        features, logits = f0.with_logits(x)
        logits.square().sum().backward()
        assert features.dtype == features.grad.dtype == logits.dtype == torch.float32
        found[f0] = features.detach(), features.grad
    # a pooling of near ties sends its gradient elsewhere
    for wide, rounded, share in zip(*found.values(), (0.01, 0.5)):
        assert float((wide - rounded).norm() / wide.norm()) < share


@pytest.mark.parametrize(("network", "layer"), [("Own", "conv"), ("Linear", "1")])
def test_a_network_of_the_users_own_trains(network, layer, script):
    Path("own.py").write_text(OWN)
    script("train_yopo", *PLAIN, "--model", f"own.py:{network}", "--out_dir", "run")
    assert f"{layer}.weight" in weights("run/last.pt")


def test_a_network_without_a_first_layer_is_refused_in_one_line(script):
    Path("own.py").write_text(OWN)
    with pytest.raises(UserError, match="no module with parameters of its own") as refused:
        script("train_yopo", *PLAIN, "--model", "own.py:Empty")
    assert "\n" not in str(refused.value)
    assert not Path("runs").exists()


# ---- the training ------------------------------------------------------------------------------------------

def behind(model, features):
    """LeNet from the first convolution's output on."""
    features = F.max_pool2d(F.relu(F.conv2d(F.max_pool2d(F.relu(features), 2), model.conv2.weight,
                                            model.conv2.bias)), 2)
    return model.fc3(F.relu(model.fc2(F.relu(model.fc1(features.flatten(1))))))


def by_definition(m, n, variant, num_batches, epsilon=0.2, sigma=0.1, lr=0.1, momentum=0.9, decay=5e-4,
                  seed=2):
    """YOPO-m-n on the batches of the script, in the paper's variables eta and p, with an SGD of its own."""
    torch.manual_seed(seed)
    model, data = build_model("lenet", 10, 1), load_dataset("digits", "data", 40)
    parameters, first = list(model.double().parameters()), [model.conv1.weight, model.conv1.bias]
    buffers = [torch.zeros_like(p) for p in parameters]

    def f0(images):
        return F.conv2d(images, *first, padding=2)

    for _, (x, y, index, _) in zip(range(num_batches), training_batches(data.train, 32, seed, 1)):
        eta = epsilon * (2 * keyed_uniform(example_keys(index, seed, 1), x.shape[1:]).to(x.dtype) - 1)
        totals = [torch.zeros_like(p) for p in parameters]
        for _ in range(m):
            features = f0(x + eta)
            loss = F.cross_entropy(behind(model, features), y)
            p, *gradients = (-g if k == 0 else g
                             for k, g in enumerate(torch.autograd.grad(loss, [features, *parameters])))
            for _ in range(n):
                clipped = torch.clamp(x + eta, 0, 1).requires_grad_()
                slope = torch.autograd.grad((f0(clipped) * p).sum(), clipped)[0]
                slope = slope * ((x + eta >= 0) & (x + eta <= 1))
                eta = eta - sigma * slope.sign()
                eta = torch.clamp(x + eta.clamp(-epsilon, epsilon), 0, 1) - x
            of_h = torch.autograd.grad(-(f0(x + eta) * p).sum(), first)
            for k, parameter in enumerate(parameters):
                is_first = next((j for j, own in enumerate(first) if own is parameter), None)
                if is_first is None or variant == "both":
                    totals[k] += gradients[k]
                if is_first is not None:
                    totals[k] += of_h[is_first]
        with torch.no_grad():
            for parameter, total, buffer in zip(parameters, totals, buffers):
                buffer.mul_(momentum).add_(total + decay * parameter)
                parameter -= lr / m * buffer
    return model.state_dict()


@pytest.mark.parametrize("variant", ["both", "hamiltonian"])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 2)])
def test_it_is_the_algorithm_written_out(m, n, variant, script, monkeypatch):
    """In float64: in float32 the sign of a slope of almost zero hangs on the processor's rounding."""
    for module in (harness.datasets.batches, harness.evaluation.predictions, harness.training.run):
        monkeypatch.setattr(module, "to_unit", lambda images: images.double() / 255)
    monkeypatch.setattr(harness.training.run, "TrainingPrecision", lambda module, *_: module.double())
    script("train_yopo", *PLAIN, "--max_batches", 3, "--num_passes", m, "--num_steps", n,
           "--layer_one_grad", variant, "--out_dir", "run")
    expected, found = by_definition(m, n, variant, 3), weights("run/last.pt")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4)


def test_both_variants_differ_in_the_first_layer_alone_after_one_batch(script):
    for variant in ("both", "hamiltonian"):
        script("train_yopo", *PLAIN, "--max_batches", 1, "--layer_one_grad", variant, "--out_dir", variant)
    both, hamiltonian = weights("both/last.pt"), weights("hamiltonian/last.pt")
    assert ({name.split(".")[0] for name in both if not torch.equal(both[name], hamiltonian[name])}
            == {"conv1"})


def test_a_resumed_run_equals_the_undisturbed_one(script):
    common = (*PLAIN, "--model", "small_cnn", "--lr_drop_after", 2, "--ema_decay", 0.9)  # with dropout
    script("train_yopo", *common, "--epochs", 3, "--out_dir", "whole")
    script("train_yopo", *common, "--epochs", 2, "--out_dir", "parts")
    script("train_yopo", "--resume", "parts", "--epochs", 3)
    for file in ("last.pt", "last_ema.pt"):
        assert same_bits(weights(f"whole/{file}"), weights(f"parts/{file}"))
    rate = torch.load("whole/last.pt", weights_only=True)["optimizer"]["param_groups"][0]["lr"]
    assert rate == pytest.approx(0.1 / 5 * 0.1)  # divided by the passes, dropped once


@pytest.mark.slow
def test_many_processes_give_the_weights_of_one(script, torchrun, tmp_path):
    flags = (*PLAIN, "--max_batches", 3, "--batch_size", 65)  # 65: an uneven split
    script("train_yopo", *flags, "--out_dir", "one")
    done = torchrun("train_yopo.py", *flags, "--out_dir", "two")
    assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "one/last.pt"), weights(tmp_path / "two/last.pt")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-5


def test_every_pass_takes_batch_statistics(script):
    script("train_yopo", *PLAIN, "--model", "resnet18", "--batch_size", 2, "--num_passes", 3,
           "--max_batches", 1, "--val_size", 2, "--out_dir", "run")
    assert int(weights("run/last.pt")["bn1.num_batches_tracked"]) == 3


@pytest.mark.parametrize("flags",
                         [("--precision", "bf16"), ("--normalize",), ("--crop_padding", 2, "--flip")])
def test_precision_normalisation_and_augmentation_train(flags, script):
    script("train_yopo", *PLAIN, *flags, "--out_dir", "run")
    fresh = build_model("lenet", 10, 1)
    assert all(not torch.equal(found, fresh.state_dict()[name.removeprefix("network.")])
               for name, found in weights("run/last.pt").items() if "normalize" not in name)
    script("eval_mnist", "--checkpoint", "run/last.pt", "--num_steps", 1, "--num_restarts", 1,
           "--num_examples", 6)


def test_recipes():
    for name, recipe in train_yopo.RECIPES.items():
        assert parse_config(train_yopo.Config, ["--recipe", name], train_yopo.RECIPES) == recipe
    paper, wide, mnist = (train_yopo.RECIPES[name] for name in ("paper", "wrn", "mnist"))
    assert ([recipe.lr / recipe.num_passes for recipe in (paper, wide, mnist)]
            == pytest.approx([0.1 * 2 / 5, 0.1 * 4 / 5, 0.01 / 5]))
    assert (paper.num_passes, paper.num_steps, mnist.num_passes, mnist.num_steps) == (5, 3, 5, 10)
    assert (paper.epochs, paper.lr_drop_after, paper.batch_size, mnist.epochs) == (37, (30, 34, 36), 256, 40)


def test_seeds_train_one_after_the_other(script):
    script("train_yopo", *PLAIN, "--seed", 6, "--out_dir", "alone")
    several = parse_config(train_yopo.Config, [*map(str, PLAIN), "--seeds", "5", "6", "--out_dir", "all"])
    for config in one_a_seed(several, "train_yopo"):
        train_yopo.main(config)
    assert same_bits(weights("all/seed6/last.pt"), weights("alone/last.pt"))
    assert not same_bits(weights("all/seed5/last.pt"), weights("alone/last.pt"))


@pytest.mark.slow
def test_mistakes_give_one_line_and_exit_code_2(shell, script, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    done = shell("train_yopo.py", *PLAIN, "--model", "own.py:Empty")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("train_yopo.py: error: ")
    for flags in (("--num_passes", 0), ("--layer_one_grad", "none"), ("--epsilon", -1), ("--num_pases", 3)):
        with pytest.raises(UserError):
            script("train_yopo", *PLAIN, *flags)
