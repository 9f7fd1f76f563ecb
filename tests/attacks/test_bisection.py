"""Bisection with targeted APGD against the closed form of linear models,
and the minimal-norm attacks held against foolbox."""
from dataclasses import replace

import pytest
import torch
from nets import interior, linear, linear_distance, tiny_mlp

from attacks.bisection import apgd_bisection
from attacks.ddn import ddn
from attacks.fmn import fmn
from attacks.geometry import norm_of
from attacks.pool import BUDGETS, minimal_distances
from losses.margin import misclassified


@pytest.mark.parametrize("norm", ("linf", "l2"))
@pytest.mark.parametrize("num_classes", (2, 5))
def test_apgd_with_a_radius_of_each_example_finds_the_distance_of_a_linear_model(norm, num_classes):
    model = linear(num_classes)
    x, y = interior(model)
    x_adv = apgd_bisection(model, x, y, norm=norm, num_steps=20, num_rounds=14)
    expected = linear_distance(model, x, y, norm)
    distance = norm_of(x_adv - x, norm)
    assert misclassified(model(x_adv), y).all() and (distance >= expected * (1 - 1e-9)).all()
    torch.testing.assert_close(distance, expected, rtol=0.01, atol=0)


def test_it_begins_from_the_known_distances_and_finds_nothing_below_the_true_one():
    model = linear()
    x, y = interior(model)
    expected = linear_distance(model, x, y, "linf")
    assert torch.equal(apgd_bisection(model, x, y, upper=expected * 0.99, num_steps=10, num_rounds=4), x)
    known = torch.where(torch.arange(len(x)) == 0, torch.inf, expected * 1.2)  # of the first nothing is known
    distance = norm_of(apgd_bisection(model, x, y, upper=known, num_steps=20, num_rounds=6) - x, "linf")
    torch.testing.assert_close(distance[1:], expected[1:], rtol=0.02, atol=0)
    assert not distance[0] or distance[0] >= expected[0] * (1 - 1e-9)


def test_the_thorough_budget_runs_it():
    model = linear(5)
    x, y = interior(model, count=2)
    small = replace(BUDGETS["strong"], num_steps=20, target_steps=5, num_targets=2, num_rounds=3,
                    round_steps=5, num_queries=20)
    result = minimal_distances(model, x, y, budget=small)
    assert ({name for name in result.attacks if "apgd" in name}
            == {"apgd-t bisection linf", "apgd-t bisection l2"})
    assert not any("apgd" in name
                   for name in minimal_distances(model, x, y, budget=replace(small, thorough=False)).attacks)


@pytest.mark.parametrize(("norm", "theirs", "ours"),
                         (("linf", "LInfFMNAttack", fmn), ("l2", "L2FMNAttack", fmn),
                          ("l2", "DDNAttack", ddn)))
def test_foolbox_finds_no_shorter_distance_than_the_pool_and_about_what_our_own_form_of_its_attack_finds(
        norm, theirs, ours):
    foolbox = pytest.importorskip("foolbox", reason="foolbox is in requirements-dev.txt")
    model, file = tiny_mlp()
    x, y = torch.from_numpy(file["images"])[:, None].float() / 255, torch.from_numpy(file["labels"]).long()
    attack = getattr(foolbox.attacks, theirs)(steps=200)
    _, found, success = attack(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=None)
    assert success.all() and misclassified(model(found), y).all()
    theirs, pool = norm_of(found - x, norm), minimal_distances(model, x, y, norms=(norm,)).distance[norm]
    options = {"norm": norm} if ours is fmn else {}
    alone = norm_of(ours(model, x, y, num_steps=200, **options) - x, norm)
    assert (pool <= theirs * (1 + 1e-5)).all()
    assert alone.mean() <= 1.05 * theirs.mean()
