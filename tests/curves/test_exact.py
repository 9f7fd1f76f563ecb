"""Exact distances: linear models, a small network, deeper ones against an independent program, open points,
and life without highspy."""
import warnings

import numpy as np
import pytest
import torch
from nets import interior, linear, linear_distance, tiny_mlp
from scipy import optimize
from torch import nn

from attacks.pool import Budget, minimal_distances
from curves import exact
from curves.certified import affine_layers, forward
from curves.exact import exact_distances

QUICK = Budget(num_steps=40, target_steps=0, num_targets=0, num_rounds=4, round_steps=10, polish_steps=10,
               num_queries=50, num_walks=1)

pytestmark = pytest.mark.filterwarnings("ignore:highspy is not installed")


def attacked(model, x, y):
    return minimal_distances(model, x, y, norms=("linf",), budget=QUICK).x_adv["linf"]


def check(model, x, y, found):
    layers = affine_layers(model, x.shape[1:])
    for one, image, label in zip(found, x.flatten(1).double(), y.tolist()):
        assert one.status == "exact" and one.upper <= 1.0002 * one.lower
        assert one.x_adv.min() >= 0 and one.x_adv.max() <= 1
        assert np.abs(one.x_adv - image.numpy()).max() == pytest.approx(one.upper, abs=1e-12)
        logits = forward(layers, torch.from_numpy(one.x_adv)[None])[0]
        others = torch.cat([logits[:label], logits[label + 1:]])
        assert abs(float(logits[label] - others.max())) <= 1e-6


@pytest.fixture(params=("highspy", "scipy"))
def solver(request, monkeypatch):
    if request.param == "scipy":
        monkeypatch.setattr(exact, "highspy", None)
    else:
        pytest.importorskip("highspy")
    return request.param


def test_the_distances_of_a_linear_model(solver):
    model = linear(4)
    x, y = interior(model)
    found = exact_distances(model, x, y, attacked(model, x, y))
    check(model, x, y, found)
    assert ([one.upper for one in found]
            == pytest.approx(linear_distance(model, x, y, "linf").tolist(), rel=1e-6))


def test_the_distances_of_a_small_network(solver):
    model, file = tiny_mlp()
    rows = [1] if solver == "scipy" else [1, 2, 7]
    x, y = (torch.from_numpy(file["images"])[:, None] / 255)[rows], torch.from_numpy(file["labels"])[rows]
    found = exact_distances(model, x, y, attacked(model, x, y))
    check(model, x, y, found)
    assert [one.upper for one in found] == pytest.approx(file["linf_distance"][rows].tolist(), rel=2e-4)


def by_enumeration(layers, x, y):
    """The distance by one linear program for every activation pattern and rival of a network
    with few units."""
    sizes = [len(bias) for _, bias in layers[:-1]]
    best = np.inf
    for number in range(2 ** sum(sizes)):
        bits = np.array([number >> k & 1 for k in range(sum(sizes))], dtype=float)
        weight, bias, rows, limits = np.eye(len(x)), np.zeros(len(x)), [], []
        for k, (matrix, shift) in enumerate(layers):
            weight, bias = matrix.numpy() @ weight, matrix.numpy() @ bias + shift.numpy()
            if k < len(sizes):
                on = bits[sum(sizes[:k]):sum(sizes[:k + 1])]
                sign = 1 - 2 * on
                rows.append(sign[:, None] * weight)
                limits.append(-sign * bias)
                weight, bias = on[:, None] * weight, on * bias
        for rival in set(range(len(bias))) - {y}:
            closeness = np.vstack([np.eye(len(x)), -np.eye(len(x))])
            matrix = np.vstack([np.hstack([closeness, -np.ones((2 * len(x), 1))]),
                                np.hstack([np.vstack([*rows, weight[y] - weight[rival]]),
                                           np.zeros((sum(sizes) + 1, 1))])])
            high = np.concatenate([x, -x, *limits, [bias[rival] - bias[y]]])
            result = optimize.linprog(np.append(np.zeros(len(x)), 1), matrix, high,
                                      bounds=[(0, 1)] * len(x) + [(0, None)])
            best = min(best, result.fun if result.status == 0 else np.inf)
    return best


@pytest.mark.parametrize("seed", range(3))
def test_two_hidden_layers_agree_with_every_pattern_tried(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(),
                          nn.Linear(3, 3)).double()
    for layer in (model[1], model[3], model[5]):
        layer.weight.data.normal_()
        layer.bias.data = -layer.weight.data.sum(dim=1) / 2
    images = torch.rand(40, 1, 2, 2, dtype=torch.float64)
    result = minimal_distances(model, images, model(images).argmax(dim=1), norms=("linf",), budget=QUICK)
    row = result.distance["linf"].isfinite().nonzero()[0]
    x, y = images[row], model(images[row]).argmax(dim=1)
    found = exact_distances(model, x, y, result.x_adv["linf"][row])
    check(model, x, y, found)
    expected = by_enumeration(affine_layers(model, (1, 2, 2)), x.flatten().numpy(), int(y))
    assert found[0].upper == pytest.approx(expected, rel=2e-4)


def test_a_far_adversary_is_brought_closer_until_it_is_the_closest():
    model, file = tiny_mlp()
    images, labels = torch.from_numpy(file["images"])[:, None] / 255, torch.from_numpy(file["labels"])
    x, y, far = images[:1], labels[:1], images[1:2]
    assert labels[1] != labels[0]
    found = exact_distances(model, x, y, far)
    check(model, x, y, found)
    assert found[0].upper == pytest.approx(file["linf_distance"][0], rel=2e-4) and found[0].rounds > 1


def test_out_of_time_a_point_is_open_with_a_bracket_that_holds():
    model, file = tiny_mlp()
    x, y = torch.from_numpy(file["images"])[:4, None] / 255, torch.from_numpy(file["labels"])[:4]
    found = exact_distances(model, x, y, attacked(model, x, y), time_limit=0.0)
    assert "open" in {one.status for one in found}  # what linear bounds alone prove takes no time
    for one, distance in zip(found, file["linf_distance"]):
        assert 0 < one.lower <= distance * (1 + 1e-9) and distance <= one.upper * (1 + 1e-4)
        assert one.status == "exact" or one.lower < 0.999 * one.upper


def test_a_misclassified_point_is_at_zero_and_a_correct_x_adv_is_refused():
    model, file = tiny_mlp()
    x, y = torch.from_numpy(file["images"])[:1, None] / 255, torch.from_numpy(file["labels"])[:1]
    found, = exact_distances(model, x, (y + 1) % 10, x)
    assert (found.lower, found.upper, found.status, found.x_adv) == (0.0, 0.0, "misclassified", None)
    with pytest.raises(ValueError, match="starts from an adversary"):
        exact_distances(model, x, y, x)


def test_without_highspy_there_is_a_clear_message(monkeypatch):
    monkeypatch.setattr(exact, "highspy", None)
    model = linear()
    x, y = interior(model, count=1)
    with pytest.warns(UserWarning, match="pip install highspy"):
        exact_distances(model, x, y, attacked(model, x, y))
    monkeypatch.setattr(exact, "highspy", object())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact_distances(model, x, (y + 1) % 3, x)
