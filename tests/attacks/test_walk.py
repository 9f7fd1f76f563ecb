"""attacks/walk.py: a linear model's distance, a network whose gradient is masked,
and what holds for every batch."""
from functools import partial

import pytest
import torch
from nets import interior, linear, linear_distance
from torch import nn

from attacks.alma import alma
from attacks.bisection import pgd_bisection
from attacks.ddn import ddn
from attacks.geometry import NORMS, norm_of
from attacks.noise import example_keys
from attacks.pdpgd import pdpgd
from attacks.pool import Budget, minimal_distances
from attacks.walk import walk
from losses.margin import misclassified
from tests.attack_models import (
    assert_independent_of_the_batch,
    assert_pure,
    assert_refuses_what_does_not_fit,
    batch,
    network,
    two_classes,
)

norms = pytest.mark.parametrize("norm", NORMS)


class Steps(nn.Module):
    """The network on pixels in steps of 1 / 50: right everywhere but for its gradient, which is zero."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model((50 * x).round() / 50 + 0.0 * x)


def an_adversary(x, y, w):
    """Far behind the boundary of `two_classes`, in every pixel."""
    return (x + torch.where(y == 0, -0.4, 0.4)[:, None, None, None] * w.sign().view(x.shape[1:])).clamp(0, 1)


@norms
def test_every_step_is_a_proof_and_more_of_them_never_lead_farther(norm):
    model, x, y, w, _ = two_classes()
    start = an_adversary(x, y, w)
    before = norm_of(start - x, norm)
    for num_queries in (0, 50, 400):
        x_adv = walk(model, x, y, start, norm=norm, num_queries=num_queries)
        assert misclassified(model(x_adv), y).all() and ((x_adv >= 0) & (x_adv <= 1)).all()
        assert (norm_of(x_adv - x, norm) <= before * (1 + 1e-6)).all()
    assert (norm_of(x_adv - x, norm) < 0.6 * before).all()


def test_in_linf_it_ends_near_the_distance_of_a_linear_model_and_never_below():
    model, x, y, w, margins = two_classes()
    expected = margins / w.abs().sum()
    x_adv = walk(model, x, y, an_adversary(x, y, w), num_queries=1500)
    ratio = norm_of(x_adv - x, "linf") / expected
    assert (ratio >= 1 - 1e-4).all() and ratio.median() <= 1.1


def test_without_an_adversary_it_looks_for_one_in_linf_and_gives_the_image_back_in_the_others():
    model, x, y, _, _ = two_classes()
    assert misclassified(model(walk(model, x, y, x, num_queries=300)), y).all()
    for norm in ("l2", "l1"):
        assert torch.equal(walk(model, x, y, x, norm=norm, num_queries=5), x)
    never = linear(3)
    never[1].weight.data.zero_()
    x = torch.rand((4, 1, 4, 4), dtype=torch.float64)
    assert torch.equal(walk(never, x, never(x).argmax(1), x, num_queries=20), x)


def test_where_the_gradient_is_masked_it_finds_what_no_attack_by_gradients_does():
    model = linear(2)
    x, y = interior(model, margin=2.0)
    masked, exact = Steps(model), linear_distance(model, x, y, "linf")
    by_gradient = [ddn(masked, x, y), pgd_bisection(masked, x, y), pdpgd(masked, x, y), alma(masked, x, y)]
    assert not any(misclassified(masked(x_adv), y).any() for x_adv in by_gradient)
    small = Budget(num_steps=5, target_steps=0, num_targets=0, num_rounds=1, round_steps=5, polish_steps=5,
                   num_queries=1500, num_walks=0)
    for starts in ((), (x.flip(0),)):
        found = minimal_distances(masked, x, y, budget=small, starts=starts)
        assert (found.distance["linf"] <= 1.15 * exact + 0.01).all()
        assert all(found.distance[norm].isfinite().all() for norm in NORMS)


@norms
def test_properties(norm):
    model = network()
    x, y, keys = batch(model)
    attack = partial(walk, norm=norm, num_queries=60)
    from_noise = partial(from_the_last, attack)
    assert_pure(from_noise, model, x, y, keys)
    assert_independent_of_the_batch(from_noise, model, x, y, keys)
    assert_refuses_what_does_not_fit(from_noise, model, x, y, keys)
    with pytest.raises(ValueError, match="start of shape"):
        attack(model, x, y, x[:1], keys=keys)


def from_the_last(attack, model, x, y, **options):
    """From the image turned into its negative, an adversary or not."""
    return attack(model, x, y, 1 - x, **options)


@norms
@pytest.mark.parametrize("shape", ((1, 2, 2), (3, 5, 7), (12,), (2, 9)))
def test_any_shape_of_image_or_signal(shape, norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 4)).double()
    x = torch.rand(6, *shape, dtype=torch.float64)
    start = 1 - x
    y = (model(start).argmax(1) + 1) % 4
    x_adv = walk(model, x, y, start, norm=norm, num_queries=80, keys=example_keys(torch.arange(6)))
    assert x_adv.shape == x.shape and misclassified(model(x_adv), y).all()
    assert (norm_of(x_adv - x, norm) < norm_of(start - x, norm)).all()
