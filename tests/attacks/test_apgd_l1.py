"""attacks/apgd_l1.py: the projection against a root finder, exact distances of linear models, every batch."""
from functools import partial

import pytest
import torch
from scipy.optimize import brentq

from attacks.apgd_l1 import apgd_l1, apgd_l1_targeted
from attacks.autoattack import autoattack
from attacks.geometry import inside, norm_of, project_l1_box, radii
from attacks.noise import example_keys
from harness.evaluation.predictions import BatchInvariant
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

ATTACKS = {"ce": apgd_l1, "dlr": partial(apgd_l1, loss="dlr"), "targeted": apgd_l1_targeted}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def test_the_projection_onto_ball_and_box_is_the_nearest_point():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, 1, 3, 4, generator=generator, dtype=torch.float64)
    scale = 10 ** (3 * torch.rand(200, 1, 1, 1, generator=generator, dtype=torch.float64) - 2)
    delta = scale * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    radius = 10 ** (2.8 * torch.rand(200, 1, 1, 1, generator=generator, dtype=torch.float64) - 2)
    for one, point, size, found in zip(delta, x, radius.flatten().tolist(), project_l1_box(delta, x, radius)):
        room = torch.where(one > 0, 1 - point, point)

        def length(theta, one=one, room=room):
            return torch.minimum((one.abs() - theta).clamp_min(0), room)

        least = 0.0
        if length(0.0).sum() > size:
            least = brentq(lambda theta, size=size: float(length(theta).sum()) - size, 0.0,
                           float(one.abs().max()), xtol=1e-15)
        torch.testing.assert_close(found, one.sign() * length(least), rtol=0, atol=1e-12)


def test_the_projection_of_many_pixels_stays_inside_in_single_precision():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(64, 3, 32, 32, generator=generator)
    radius = torch.full((64, 1, 1, 1), 12.0)
    moved = project_l1_box(torch.randn(x.shape, generator=generator), x, radius)
    assert inside(x + moved, x, radius, "l1").all() and (norm_of(moved, "l1") > 11.9999).all()


def exact_distances(x, w, margins, y):
    """The l_1 distance to the boundary of two classes in [0, 1]: pixels by falling |w|, to their bounds."""
    ascent = torch.where(y == 0, -1.0, 1.0)[:, None] * w
    room = torch.where(ascent > 0, 1 - x.flatten(1), x.flatten(1))
    order = w.abs().argsort(descending=True)
    gain, cost = (w.abs() * room)[:, order].cumsum(1), room[:, order].cumsum(1)
    place = (gain < margins[:, None]).sum(1, keepdim=True)
    missing = gain.gather(1, place) - margins[:, None]
    return (cost.gather(1, place) - missing / w.abs()[order][place]).squeeze(1)


@every_attack
def test_a_linear_model_falls_just_beyond_its_distance_and_not_before(attack):
    model, x, y, w, margins = two_classes()
    distance = exact_distances(x, w, margins, y)
    beyond = attack(model, x, y, epsilon=1.05 * distance)
    assert misclassified(model, beyond, y).all() and inside(beyond, x, radii(1.05 * distance, x), "l1").all()
    before = attack(model, x, y, epsilon=0.99 * distance)
    assert not misclassified(model, before, y).any()
    assert inside(before, x, radii(0.99 * distance, x), "l1").all()


@every_attack
def test_a_linear_model_whose_nearest_points_lie_on_bounds_of_the_box(attack):
    """So far from the boundary that some ten pixels have to go to their bounds."""
    model, _, _, w, _ = two_classes(shape=(1, 16, 16))
    x = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.bias[0] += 20.0
        scores = model(x)[:, 0] - model(x)[:, 1]
    y, margins = (scores < 0).long(), scores.abs()
    distance = exact_distances(x, w, margins, y)
    assert (distance > 1.3 * margins / w.abs().max()).float().mean() > 0.8
    beyond = attack(model, x, y, epsilon=1.02 * distance)
    assert misclassified(model, beyond, y).sum() >= 38
    assert inside(beyond, x, radii(1.02 * distance, x), "l1").all()
    assert not misclassified(model, attack(model, x, y, epsilon=0.99 * distance), y).any()


def test_autoattack_in_l1_on_a_linear_model():
    model, x, y, w, margins = two_classes(count=4)
    distance = exact_distances(x, w, margins, y)
    model = BatchInvariant(model)  # as an evaluation has it: FAB ends on the boundary, where rounding decides
    for factor in (1.002, 1.01, 1.015, 1.03, 1.05):
        beyond = autoattack(model, x, y, epsilon=factor * distance, norm="l1")
        assert misclassified(model, beyond, y).all(), factor
        assert inside(beyond, x, radii(factor * distance, x), "l1").all()
    assert torch.equal(autoattack(model, x, y, epsilon=0.99 * distance, norm="l1"), x)


@every_attack
def test_properties(attack):
    model = network()
    task = batch(model)
    within = partial(attack, epsilon=0.7, num_steps=20)
    fooled = misclassified(model, within(model, *task[:2], keys=task[2]), task[1])
    assert fooled.any() and not fooled.all()
    assert_pure(within, model, *task)
    assert_independent_of_the_batch(within, model, *task)
    assert_leaves_the_misclassified_alone(within, model, *task)
    assert_refuses_what_does_not_fit(within, model, *task)
    with pytest.raises(ValueError, match="num_steps"):
        within(model, *task[:2], num_steps=-1)


def test_starts_depend_on_the_keys_and_a_loss_function_is_used():
    model = network()
    x, y, keys = batch(model)
    first = apgd_l1(model, x, y, epsilon=0.1, num_steps=10, keys=keys)
    assert not torch.equal(first, apgd_l1(model, x, y, epsilon=0.1, num_steps=10, keys=example_keys(keys, 1)))
    upwards = apgd_l1(model, x, y, epsilon=0.3, keys=keys, loss=lambda logits, y: logits[range(len(y)), y])
    model.eval()
    assert (model(upwards)[range(len(y)), y] > model(x)[range(len(y)), y]).all()
    with pytest.raises(ValueError, match="unknown loss"):
        apgd_l1(model, x, y, epsilon=0.1, loss="hinge")
