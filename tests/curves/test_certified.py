"""Certified distances: reading a network as affine maps, bounds that hold,
the closed form of linear models."""
import pytest
import torch
from nets import interior, linear, linear_distance, tiny_mlp
from torch import nn

from attacks.geometry import norm_of, per_example, project_ball
from curves.certified import NORMS, affine_layers, certified_distances, crown_bounds, forward

norms = pytest.mark.parametrize("norm", NORMS)


class Normalized(nn.Module):
    """A convolutional network behind a normalisation, written with functions and methods."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.3]).view(1, 1, 1, 1))
        self.conv = nn.Conv2d(1, 3, 3, stride=2, padding=1)
        self.bn, self.out = nn.BatchNorm2d(3), nn.Linear(12, 4)
        self.bn.running_mean.fill_(0.2)

    def forward(self, x):
        x = self.bn(self.conv((x - self.mean) / 0.5)).relu()
        return self.out(nn.functional.relu(nn.functional.avg_pool2d(x, 2)).flatten(1))


@pytest.mark.parametrize("network", (
    Normalized,
    lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(72, 5),
                          nn.ReLU(), nn.Linear(5, 3))))
def test_a_chain_of_layers_becomes_matrices(network):
    torch.manual_seed(0)
    model = network().eval()
    x = torch.rand(6, 1, 8, 8)
    layers = affine_layers(model, (1, 8, 8))
    assert len(layers) == 3
    torch.testing.assert_close(forward(layers, x.flatten(1).double()).float(), model(x), rtol=1e-5, atol=1e-5)
    assert model.out.weight.dtype == torch.float32 if isinstance(model, Normalized) else True


class Residual(nn.Module):
    def forward(self, x):
        return x.flatten(1) + torch.relu(x.flatten(1))


class Branching(nn.Module):
    def forward(self, x):
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


@pytest.mark.parametrize(("model", "message"), (
    (nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2)), "besides affine maps"),
    (nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 2)), "besides affine maps"),
    (Residual(), "no chain"), (Branching(), "cannot be read")))
def test_other_networks_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        affine_layers(model, (1, 8, 8))


@norms
def test_no_point_of_the_ball_leaves_the_bounds(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(),
                          nn.Linear(9, 4)).double()
    layers = affine_layers(model, (1, 4, 4))
    x = torch.rand(3, 16, dtype=torch.float64)
    radius = torch.tensor([0.05, 0.2, 0.6], dtype=torch.float64)
    bounds = crown_bounds(layers, x, radius, norm)
    inside = [model[:2], model[:4]]
    for scale in (0.0, 0.3, 1.0, 30.0):
        for _ in range(50):
            delta = project_ball(scale * torch.randn_like(x), per_example(radius, x), norm)
            point = (x + delta).clamp(0, 1)
            for part, (low, high) in zip(inside, bounds):
                value = part(point)
                assert (value >= low - 1e-9).all() and (value <= high + 1e-9).all()


@norms
def test_the_certified_distance_of_a_linear_model_is_exact(norm):
    model = linear(4)
    x, y = interior(model)
    expected = linear_distance(model, x, y, norm)
    certified = certified_distances(model, x, y, 2 * expected, norm=norm, num_steps=30)
    torch.testing.assert_close(certified, expected, rtol=1e-6, atol=0)
    assert (certified_distances(model, x, (y + 1) % 4, expected, norm=norm) == 0).all()


def test_certified_distances_are_below_the_exact_ones_and_not_far(monkeypatch):
    model, file = tiny_mlp()
    x, y = torch.from_numpy(file["images"])[:, None] / 255, torch.from_numpy(file["labels"])
    exact = torch.from_numpy(file["linf_distance"])
    certified = {norm: certified_distances(model, x, y, torch.full((8,), torch.inf), norm=norm, num_steps=16)
                 for norm in NORMS}
    assert (certified["linf"] < exact).all() and (certified["linf"] > 0.6 * exact).all()
    assert (certified["l2"] >= certified["linf"]).all() and (certified["l1"] >= certified["l2"]).all()
    monkeypatch.setattr("curves.certified.ROWS_BYTES", 3 * 8 * 2 * 16 * 784)  # three images at a time
    assert torch.equal(certified["linf"],
                       certified_distances(model, x, y, torch.full((8,), torch.inf), num_steps=16))


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="unknown norm 'l0': choose one of linf, l2, l1"):
        certified_distances(linear(), torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.long),
                            torch.ones(1), norm="l0")


def test_distances_are_float64_whatever_the_images(norm="l2"):
    model = linear(dtype=torch.float32)
    x, y = interior(model)
    assert certified_distances(model, x, y, norm_of(x, norm), norm=norm).dtype == torch.float64
