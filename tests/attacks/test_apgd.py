"""attacks/apgd.py, attacks/dlr.py and attacks/geometry.py: closed forms on linear models, the schedule,
and what holds for every batch."""
from functools import partial

import pytest
import torch

from attacks.apgd import apgd, apgd_targeted, checkpoints
from attacks.dlr import dlr_loss, targeted_dlr_loss
from attacks.geometry import inside, norm_of, projection, radii, random_point, steepest, unit_noise
from attacks.noise import example_keys
from losses.margin import ranked_targets
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

ATTACKS = {"ce": apgd, "dlr": partial(apgd, loss="dlr"), "targeted": apgd_targeted}
DUAL = {"linf": lambda w: w.abs().sum(), "l2": lambda w: w.norm()}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
every_norm = pytest.mark.parametrize("norm", ("linf", "l2"))


# Losses and schedule

def test_dlr_losses_by_hand_and_unchanged_by_shift_and_scale():
    logits, y = torch.tensor([[4.0, 1.0, 3.0, 0.0], [1.0, 2.0, 6.0, 4.0]]), torch.tensor([0, 3])
    torch.testing.assert_close(dlr_loss(logits, y), torch.tensor([-1.0 / 3.0, 2.0 / 4.0]))
    target = torch.tensor([1, 0])
    torch.testing.assert_close(targeted_dlr_loss(logits, y, target), torch.tensor([-3.0 / 3.5, -3.0 / 4.5]))
    torch.testing.assert_close(dlr_loss(100 * logits + 7, y), dlr_loss(logits, y))
    torch.testing.assert_close(targeted_dlr_loss(100 * logits + 7, y, target),
                               targeted_dlr_loss(logits, y, target))


def test_dlr_with_two_and_three_classes_still_has_a_gradient():
    for logits in (torch.tensor([[2.0, 1.0]]), torch.tensor([[2.0, 1.0, -1.0]])):
        logits.requires_grad_()
        for loss in (dlr_loss(logits, torch.tensor([0])),
                     targeted_dlr_loss(logits, torch.tensor([0]), torch.tensor([1]))):
            torch.testing.assert_close(loss, torch.tensor([-1.0 if logits.shape[1] == 2 else -1.0 / 3.0]))
            assert torch.autograd.grad(loss.sum(), logits)[0].abs().sum() > 0.1


def test_checkpoints_of_the_paper():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_targets_are_the_other_classes_by_descending_logit():
    logits = torch.tensor([[1.0, 5.0, 3.0, 2.0]])
    assert ranked_targets(logits, torch.tensor([2]), 2).tolist() == [[1, 3]]
    assert ranked_targets(logits, torch.tensor([1]), 9).tolist() == [[2, 3, 0]]


# Balls

@every_norm
def test_projection_direction_and_random_points(norm):
    x = torch.rand(20, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    radius = radii(torch.linspace(0.0, 0.5, 20), x)
    keys = example_keys(torch.arange(20))
    project = projection(x, radius, norm)
    far = project(x + 3.0 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    assert (inside(far, x, radius, norm).all()
            and (norm_of(far - x, norm)[5:] > 0.2 * radius.flatten()[5:]).all())
    torch.testing.assert_close(project(far.clone()), far)
    point = random_point(x, radius, norm, keys)
    assert (inside(point, x, radius, norm).all()
            and torch.equal(point[3:5], random_point(x[3:5], radius[3:5], norm, keys[3:5])))
    torch.testing.assert_close(norm_of(steepest(x - 0.5, norm), norm), torch.ones(20))
    assert not steepest(torch.zeros_like(x), norm).any()
    outside = far.clone()
    outside[0, 0, 0, 0] = float("nan")
    assert not inside(outside, x, radius, norm)[0] and not inside(x + 1.5, x, radius + 9, norm).any()


def test_steepest_ascent_in_l2_of_gradients_whose_squares_underflow():
    gradient = torch.full((2, 1, 2, 2), 1e-30)
    gradient[1] = 0.0
    assert torch.equal(steepest(gradient, "l2"), torch.tensor([0.5, 0.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2))


@every_norm
@pytest.mark.parametrize("keyed", (True, False))
def test_noise_in_the_unit_ball(norm, keyed):
    torch.manual_seed(0)
    x = torch.zeros(500, 1, 3, 3, dtype=torch.float64)
    noise = unit_noise(x, norm, example_keys(torch.arange(500)) if keyed else None)
    length = norm_of(noise, norm)
    assert length.max() <= 1 + 1e-6 and noise.dtype == x.dtype and noise.mean().abs() < 0.03
    assert (length > 1 - 1e-6).all() == (norm == "l2")


# Closed forms

@every_norm
@every_attack
def test_a_linear_model_falls_just_beyond_its_distance_and_not_before(attack, norm):
    """The distance to the boundary is margin / |w|_dual; a radius of its own for each example."""
    model, x, y, w, margins = two_classes()
    distance = margins / DUAL[norm](w)
    beyond = attack(model, x, y, epsilon=1.01 * distance, norm=norm)
    assert misclassified(model, beyond, y).all() and inside(beyond, x, radii(1.01 * distance, x), norm).all()
    before = attack(model, x, y, epsilon=0.99 * distance, norm=norm)
    assert (not misclassified(model, before, y).any()
            and inside(before, x, radii(0.99 * distance, x), norm).all())


@every_norm
def test_the_point_of_largest_loss_of_a_linear_model(norm):
    """Not fooled: the best point is x - epsilon * d(w) on the side of the other class,
    whose margin is margin - epsilon |w|_dual."""
    model, x, y, w, margins = two_classes()
    epsilon = 0.5 * margins / DUAL[norm](w)
    logits = model(apgd(model, x, y, epsilon=epsilon, norm=norm)).detach()
    left = (logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None])).squeeze(1)
    torch.testing.assert_close(left, 0.5 * margins, rtol=1e-2, atol=1e-5)


def test_a_loss_function_and_a_start_are_used():
    model, x, y, _, _ = two_classes()
    start = (x + 0.01).clamp(0, 1)
    right = ~misclassified(model, start, y)
    assert torch.equal(apgd(model, x, y, epsilon=0.02, num_steps=0, start=start)[right], start[right])
    upwards = apgd(model, x, y, epsilon=0.001, loss=lambda logits, y: logits.gather(1, y[:, None]).squeeze(1))
    assert (model(upwards).gather(1, y[:, None]) > model(x).gather(1, y[:, None])).all()
    for wrong in ({"start": "gaussian"}, {"start": x[1:]}, {"loss": "hinge"}, {"epsilon": -1.0},
                  {"epsilon": torch.ones(2)}, {"num_steps": -1}):
        with pytest.raises(ValueError):
            apgd(model, x, y, **({"epsilon": 0.1} | wrong))


def test_it_is_stronger_than_its_start_on_a_network():
    model = network()
    x, y, keys = batch(model, count=30)
    assert misclassified(model, apgd(model, x, y, epsilon=0.05, keys=keys), y).sum() > 5 + misclassified(
        model, apgd(model, x, y, epsilon=0.05, num_steps=0, keys=keys), y).sum()


# Every batch

@every_norm
@every_attack
def test_properties(attack, norm):
    model = network()
    task = *batch(model)[:2], batch(model)[2]
    some = partial(attack, epsilon=0.02 if norm == "linf" else 0.15, norm=norm, num_steps=12)
    fooled = misclassified(model, some(model, task[0], task[1], keys=task[2]), task[1])
    assert fooled.any() and not fooled.all()  # so that the active set shrinks, and not to nothing
    assert_pure(some, model, *task)
    assert_independent_of_the_batch(some, model, *task)
    assert_refuses_what_does_not_fit(partial(attack, epsilon=0.1), model, *task)


@every_attack
@pytest.mark.parametrize("classes", (2, 3, 200))
@pytest.mark.parametrize("shape", ((1, 4, 4), (3, 5, 7)))
def test_any_number_of_classes_and_shape_of_image(attack, classes, shape):
    model = network(classes, shape)
    x, y, keys = batch(model, 5, shape)
    x_adv = attack(model, x, y, epsilon=0.2, num_steps=10, keys=keys)
    assert inside(x_adv, x, radii(0.2, x), "linf").all() and misclassified(model, x_adv, y).any()
    assert torch.equal(attack(model, x, y, epsilon=0.0, num_steps=5, keys=keys), x)
    assert_leaves_the_misclassified_alone(partial(attack, epsilon=0.2, num_steps=5), model, x, y, keys)
