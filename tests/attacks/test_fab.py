"""attacks/fab.py: the projections against linear programmes and bisection, distances on linear models,
and what holds for every batch."""
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from attacks import fab
from attacks.fab import fab_targeted, project_box
from attacks.geometry import inside, norm_of, radii
from tests.attack_models import (
    assert_independent_of_the_batch,
    assert_leaves_the_misclassified_alone,
    assert_pure,
    assert_refuses_what_does_not_fit,
    batch,
    misclassified,
    network,
    two_classes,
)

NORMS = ("linf", "l2", "l1")
DUAL = {"linf": lambda w: w.abs().sum(), "l2": lambda w: w.norm(), "l1": lambda w: w.abs().max()}
every_norm = pytest.mark.parametrize("norm", NORMS)


def nearest_distance(x, w, c, norm):
    """The least |d| with <w, d> + c = 0 and 0 <= x + d <= 1: linear programmes for l_inf and l_1,
    bisection on the multiplier for l_2."""
    size = len(x)
    if norm == "l2":
        low, high = 0.0, 1e6
        for _ in range(200):
            level = (low + high) / 2
            moved = np.clip(x - np.sign(c) * level * w, 0, 1)
            low, high = (level, high) if np.sign(c) * (w @ (moved - x) + c) > 0 else (low, level)
        return np.linalg.norm(moved - x)
    slack = 1 if norm == "linf" else size  # d = the first variables, |d_i| <= the others
    bound = np.ones((size, 1)) if norm == "linf" else np.eye(size)
    both = np.block([[np.eye(size), -bound], [-np.eye(size), -bound]])
    solved = linprog(np.r_[np.zeros(size), np.ones(slack)], both, np.zeros(2 * size),
                     np.r_[w, np.zeros(slack)][None], [-c],
                     bounds=[(-a, 1 - a) for a in x] + [(0, None)] * slack)
    return solved.fun


@pytest.mark.parametrize("newton_on", (("cpu",), ()), ids=("newton", "sort"))
@every_norm
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 12), share=st.floats(-0.98, 0.98), flat=st.booleans())
def test_the_projection_is_the_nearest_point_of_hyperplane_and_box(norm, newton_on, seed, size, share,
                                                                      flat):
    random = np.random.default_rng(seed)
    # ties, zeros and bounds
    x, w = random.random(size).round(1 if flat else 8), random.normal(size=size).round(0 if flat else 8)
    reach = np.maximum(w * (1 - x), -w * x).sum() if share < 0 else np.maximum(-w * (1 - x), w * x).sum()
    c = share * reach
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fab, "NEWTON_ON", newton_on)
        z = project_box(torch.tensor(x)[None], torch.tensor(w)[None], torch.tensor([c]), norm)
    assert z.min() >= 0 and z.max() <= 1
    assert float(w @ (z[0].numpy() - x) + c) == pytest.approx(0.0, abs=1e-8)
    assert (norm_of(z - torch.tensor(x), norm).item()
            == pytest.approx(nearest_distance(x, w, c, norm), rel=1e-6, abs=1e-7))


@pytest.mark.parametrize("norm", ("linf", "l2"))
@pytest.mark.parametrize(("dtype", "far"), ((torch.float32, 1e-5), (torch.float64, 1e-12)), ids=str)
def test_newtons_method_and_the_sort_of_other_devices_give_the_same_point(norm, dtype, far, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 300, generator=generator, dtype=dtype)
    w = torch.randn(40, 300, generator=generator, dtype=dtype)
    x[10:20], w[10:20] = x[10:20].round(), w[10:20].round()  # ties, zeros and bounds
    # one room after the other, each half as wide, for which Newton takes the most steps
    powers = torch.arange(300).clamp(max=20)
    x[20:30], w[20:30] = 0.5**powers, 1.5**powers
    reach = torch.where(w > 0, w * x, w * (x - 1)).sum(1)
    c = reach * torch.linspace(0, 0.98, 40, dtype=dtype)
    c[30:32] = 2 * reach[30:32] + 1
    w[32:, ::7] = 0
    c[32:] = torch.where(w > 0, w * x, w * (x - 1)).sum(1)[32:]  # just within reach, or just beyond
    by_newton = project_box(x, w, c, norm)
    monkeypatch.setattr(fab, "NEWTON_ON", ())
    by_sorting = project_box(x, w, c, norm)
    torch.testing.assert_close(by_sorting[:32], by_newton[:32], rtol=0, atol=far)
    assert not torch.equal(by_newton, x)
    # the last pixel to fill hardly changes the logits: both get as far, by moves in the right direction
    reached, wanted = ((w * moved).sum(1)[32:] for moved in (by_sorting - x, by_newton - x))
    torch.testing.assert_close(reached, wanted, rtol=far, atol=0)
    assert (w * (by_sorting - x) <= 0).all()


@every_norm
def test_a_hyperplane_beyond_the_box_and_a_dead_gradient(norm):
    x, w = torch.tensor([[0.2, 0.5, 0.9], [0.2, 0.5, 0.9]]), torch.tensor([[1.0, 0.0, -2.0], [0.0, 0.0, 0.0]])
    z = project_box(x, w, torch.tensor([-50.0, 1.0]), norm)
    torch.testing.assert_close(z, torch.tensor([[1.0, 0.5, 0.0], [0.2, 0.5, 0.9]]))


@every_norm
def test_distances_on_a_linear_model(norm):
    """margin / |w|_dual, where the box is wide enough: for l_1, whose perturbation is on one pixel,
    so near the boundary only."""
    model, x, y, w, margins = two_classes(seed=3)
    near = margins / DUAL[norm](w) < 0.35
    assert near.sum() >= 4
    x, y, distance = x[near], y[near], (margins / DUAL[norm](w))[near]
    x_adv = fab_targeted(model, x, y, norm=norm)
    assert misclassified(model, x_adv, y).all()
    ratio = norm_of(x_adv - x, norm) / distance
    assert ratio.min() > 1 - 1e-4 and ratio.max() < 1.001
    early = fab_targeted(model, x, y, norm=norm, epsilon=1.2 * distance)
    assert misclassified(model, early, y).all() and (norm_of(early - x, norm) <= 1.2001 * distance).all()


def test_nothing_found_is_x_itself():
    """A constant network that is right about everything."""
    model, x, y, _, _ = two_classes()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([1.0, 0.0]))
    assert torch.equal(fab_targeted(model, x, torch.zeros_like(y)), x)


@every_norm
def test_properties(norm):
    model = network()
    task = batch(model)
    attack = partial(fab_targeted, norm=norm, num_steps=8, num_targets=2)
    x_adv = attack(model, *task[:2])
    assert misclassified(model, x_adv, task[1]).all()
    distance = norm_of(x_adv - task[0], norm)
    within = partial(attack, epsilon=distance.median().item())
    reached = within(model, *task[:2])
    inside_ball = inside(reached, task[0], radii(distance.median().item(), task[0]), norm)
    assert inside_ball[distance <= distance.median()].all() and not inside_ball.all()
    assert_pure(attack, model, *task)
    assert_independent_of_the_batch(attack, model, *task)
    assert_independent_of_the_batch(within, model, *task)
    assert_refuses_what_does_not_fit(fab_targeted, model, *task)


@every_norm
@pytest.mark.parametrize("classes", (2, 3, 200))
def test_any_number_of_classes_and_shape_of_image(classes, norm):
    model = network(classes, (3, 5, 7))
    x, y, keys = batch(model, 5, (3, 5, 7))
    x_adv = fab_targeted(model, x, y, norm=norm, num_steps=10, num_targets=3)
    found = (x_adv != x).flatten(1).any(1)
    assert found.any() and torch.equal(misclassified(model, x_adv, y), found)
    attack = partial(fab_targeted, norm=norm, num_steps=5, num_targets=2)
    assert_leaves_the_misclassified_alone(attack, model, x, y, keys)
