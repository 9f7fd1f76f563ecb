"""Small networks and batches for the tests of attacks, and the properties that hold for every one of them."""
import sys
import types

import pytest
import torch
from torch import Tensor, nn

from attacks.noise import example_keys


class Linear(nn.Module):
    """logits = W x + b on the flattened image; parameters, like any network's."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


def two_classes(count: int = 12, shape: tuple[int, ...] = (1, 6, 6),
                seed: int = 0) -> tuple[Linear, Tensor, Tensor, Tensor, Tensor]:
    """A linear model of two classes, images in [0.4, 0.6] all classified correctly, their labels,
    w [D] = the gradient of the difference of the logits, and the margins z_y - z_other [B],
    small enough that no bound of the box is met on the way to the boundary."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.4 + 0.2 * torch.rand(count, *shape, generator=generator)
    w = torch.randn(x[0].numel(), generator=generator)
    scores = x.flatten(1) @ w
    bias = -scores.median()
    model = Linear(torch.stack([w, -w]) / 2.0, torch.stack([bias, -bias]) / 2.0)
    margins = scores + bias
    x = x[margins.abs() > 1e-3]
    margins = margins[margins.abs() > 1e-3]
    return model, x, (margins < 0).long(), w, margins.abs()


def network(num_classes: int = 10, shape: tuple[int, ...] = (1, 8, 8), seed: int = 0) -> nn.Module:
    """A small network with dropout, in training mode, in float64: gradients everywhere,
    and all logits equal on the grey image."""
    torch.manual_seed(seed)
    size = shape[0] * shape[1] * shape[2]
    model = nn.Sequential(nn.Flatten(), nn.Linear(size, 32), nn.Softplus(), nn.Dropout(0.5),
                          nn.Linear(32, num_classes)).double()
    with torch.no_grad():
        model[-1].bias -= model.eval()(torch.full((1, *shape), 0.5, dtype=torch.float64))[0]
    return model.train()


def batch(model: nn.Module, count: int = 9, shape: tuple[int, ...] = (1, 8, 8),
          seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Images in [0, 1], the model's own predictions as labels, and keys."""
    x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model.eval()
    y = model(x).argmax(dim=1)
    model.train()
    return x, y, example_keys(torch.arange(count), 3)


def misclassified(model: nn.Module, x_adv: Tensor, y: Tensor) -> Tensor:
    training = model.training
    model.eval()
    with torch.no_grad():
        result = model(x_adv).argmax(dim=1) != y
    model.train(training)
    return result


def assert_pure(attack, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> None:
    """The model, its modes, flags and gradients, the images, and torch's generator are as before;
    its state changes no result."""
    model.train()
    next(iter(model.parameters())).requires_grad_(False)
    flags, modes = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    image = x.clone()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = attack(model, x, y, keys=keys)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(attack(model, x, y, keys=keys), first)
    assert ([p.requires_grad for p in model.parameters()] == flags
            and [m.training for m in model.modules()] == modes)
    assert all(p.grad is None for p in model.parameters()) and not first.requires_grad
    assert torch.equal(x, image) and first.shape == x.shape and first.dtype == x.dtype
    assert first.min() >= 0 and first.max() <= 1


def assert_independent_of_the_batch(attack, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> None:
    """One by one, in two parts and in another order: each example has the same result."""
    whole = attack(model, x, y, keys=keys)
    for parts in (torch.arange(len(x)).split(1), torch.arange(len(x)).split(4),
                  (torch.arange(len(x)).flip(0),)):
        for rows in parts:
            torch.testing.assert_close(attack(model, x[rows], y[rows], keys=keys[rows]), whole[rows],
                                       rtol=0, atol=1e-6)


def assert_leaves_the_misclassified_alone(attack, model: nn.Module, x: Tensor, y: Tensor,
                                          keys: Tensor) -> None:
    """Where the label is wrong from the start, x itself comes back, for all of the batch or part of it."""
    for wrong in (torch.ones_like(y, dtype=torch.bool), torch.arange(len(y)) % 2 == 0):
        labels = torch.where(wrong, (y + 1) % model(x).shape[1], y)
        assert torch.equal(attack(model, x, labels, keys=keys)[wrong], x[wrong])


def assert_refuses_what_does_not_fit(attack, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> None:
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        attack(model, x + 1, y, keys=keys)
    with pytest.raises(ValueError, match="labels"):
        attack(model, x, y[1:], keys=keys)
    with pytest.raises(ValueError, match="keys"):
        attack(model, x, y, keys=keys[1:])
    with pytest.raises(ValueError, match="unknown norm"):
        attack(model, x, y, keys=keys, norm="l7")


def fake_package(monkeypatch, broken=False):
    """A package with the published one's interface and its bad manners:
    it reseeds, ends tracing and writes into the logits."""

    class AutoAttack:
        def __init__(self, model, *, norm, eps, seed, version, device):
            self.model, self.eps, self.seed, self.setting = model, eps, seed, (norm, version)

        def run_standard_evaluation(self, x, y, *, batch_size):
            torch.manual_seed(self.seed)
            sys.settrace(None)
            self.model(x).fill_(0.0)
            if broken:
                raise RuntimeError("no")
            seen.append((self.setting, self.attacks_to_run, self.seed, batch_size))
            return (x + self.eps).clamp(0, 1), y

    seen = []
    package = types.ModuleType("pyautoattack")
    package.autoattack = types.SimpleNamespace(AutoAttack=AutoAttack)
    monkeypatch.setitem(sys.modules, "pyautoattack", package)
    return seen
