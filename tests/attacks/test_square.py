"""attacks/square.py: its windows, patterns and schedule, a linear model's distance,
and what holds for every batch."""
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from attacks import square as module
from attacks.geometry import inside, norm_of, radii
from attacks.noise import example_keys, keyed_uniform
from attacks.square import share_of_window, square
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

every_norm = pytest.mark.parametrize("norm", ("linf", "l2"))


def test_the_share_of_the_window_halves_on_the_unscaled_schedule():
    assert ([share_of_window(0.8, query) for query in (1, 10, 11, 51, 501, 4999)]
            == [0.8, 0.8, 0.4, 0.2, 0.05, 0.8 / 128])


def test_windows_reach_every_pixel_equally_likely_positions():
    place = keyed_uniform(example_keys(torch.arange(4000)), (2,))
    windows = module._window(place, 3, 5, 6)
    assert (windows.sum((1, 2, 3)) == 9).all()
    corners = windows[:, 0, 0, 0].float().mean(), windows[:, 0, -1, -1].float().mean()
    assert all(abs(share - 1 / 12) < 0.02 for share in corners)


@pytest.mark.parametrize("side", (1, 3, 5))
def test_the_pixels_of_a_window_are_those_inside_it(side):
    place = keyed_uniform(example_keys(torch.arange(50)), (2,))
    pixels = module._pixels(*module._corner(place, side, 5, 6), side, 6)
    assert torch.equal(torch.zeros(50, 30).scatter(1, pixels, 1.0).view(50, 1, 5, 6).bool(),
                       module._window(place, side, 5, 6))


@pytest.mark.parametrize("side", (1, 2, 3, 5, 8))
def test_the_pattern_is_two_bumps_of_opposite_sign(side):
    pattern = module._pattern(side, torch.zeros(1))
    assert pattern.shape == (side, side) and pattern.norm().item() == pytest.approx(1.0)
    assert ((pattern[:side // 2] > 0).all() and (pattern[side // 2:] < 0).all() if side > 1
            else pattern.item() == 1.0)
    if side > 2:
        assert pattern.abs().argmax() != 0  # the peak is inside


@every_norm
def test_a_linear_model_falls_beyond_its_distance_and_never_before(norm):
    model, x, y, w, margins = two_classes()
    distance = margins / (w.abs().sum() if norm == "linf" else w.norm())
    beyond = square(model, x, y, epsilon=(1.3 if norm == "linf" else 2.5) * distance, norm=norm,
                    num_queries=1000)
    assert misclassified(model, beyond, y).all()
    before = square(model, x, y, epsilon=0.99 * distance, norm=norm, num_queries=200)
    assert (not misclassified(model, before, y).any()
            and inside(before, x, radii(0.99 * distance, x), norm).all())


@every_norm
def test_more_queries_never_raise_the_margin_and_the_whole_radius_is_used(norm):
    """On a model that no perturbation fools: each result is at least as good as the shorter search's,
    of which it is the continuation."""
    model, x, y, w, margins = two_classes()
    epsilon = 0.5 * margins / (w.abs().sum() if norm == "linf" else w.norm())
    left = []
    for queries in (1, 30, 60, 300):
        x_adv = square(model, x, y, epsilon=epsilon, norm=norm, num_queries=queries)
        logits = model(x_adv).detach()
        left.append((logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None])).squeeze(1))
        torch.testing.assert_close(norm_of(x_adv - x, norm), epsilon, rtol=1e-3, atol=1e-6)
    assert all((after <= before + 1e-5).all() for before, after in pairwise(left))
    assert (left[-1] < 0.8 * margins).all() if norm == "linf" else (left[-1] < left[0]).all()


class Counting(nn.Module):
    """A network that counts the images it is asked about."""

    def __init__(self, model):
        super().__init__()
        self.model, self.count = model, 0

    def forward(self, x):
        self.count += len(x)
        return self.model(x)


def test_fooled_images_are_not_asked_about_and_queries_are_counted():
    model, x, y, _, _ = two_classes()
    counting = Counting(model)
    square(counting, x, y, epsilon=0.0, num_queries=120)
    assert counting.count == 121 * len(x)
    counting.count = 0
    square(counting, x, y, epsilon=0.4, num_queries=500)
    assert counting.count <= 251 * len(x)


@every_norm
def test_properties(norm):
    model = network()
    task = batch(model)
    attack = partial(square, epsilon=0.03 if norm == "linf" else 0.3, norm=norm, num_queries=120)
    fooled = misclassified(model, attack(model, *task[:2], keys=task[2]), task[1])
    assert fooled.any() and not fooled.all()
    assert_pure(attack, model, *task)
    assert_independent_of_the_batch(attack, model, *task)
    assert_refuses_what_does_not_fit(partial(square, epsilon=0.1), model, *task)
    with pytest.raises(ValueError, match="p_init"):
        square(model, *task[:2], epsilon=0.1, p_init=0.0)


@every_norm
@pytest.mark.parametrize("classes", (2, 3, 200))
@pytest.mark.parametrize("shape", ((1, 2, 2), (3, 5, 7)))
def test_any_number_of_classes_and_shape_of_image(classes, shape, norm):
    model = network(classes, shape)
    x, y, keys = batch(model, 5, shape)
    x_adv = square(model, x, y, epsilon=0.2, norm=norm, num_queries=60, keys=keys)
    assert inside(x_adv, x, radii(0.2, x), norm).all() and (x_adv != x).flatten(1).any(1).all()
    torch.testing.assert_close(square(model, x, y, epsilon=0.0, norm=norm, num_queries=5, keys=keys), x)
    assert_leaves_the_misclassified_alone(partial(square, epsilon=0.2, norm=norm, num_queries=5), model, x, y,
                                          keys)
