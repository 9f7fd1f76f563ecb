"""FMN against the closed form of linear models, from the clean image and from images of other classes;
the norms and projections shared."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import interior, linear, linear_distance

from attacks.fmn import fmn
from attacks.geometry import NORMS, norm_of, per_example, project_ball
from losses.margin import logit_margin, misclassified, ranked_targets, soft_margin

norms = pytest.mark.parametrize("norm", NORMS)


@norms
@pytest.mark.parametrize("num_classes", (2, 5))
def test_fmn_finds_the_distance_of_a_linear_model(norm, num_classes):
    model = linear(num_classes)
    x, y = interior(model)
    x_adv = fmn(model, x, y, norm=norm, num_steps=300, step_size=1.0)
    expected = linear_distance(model, x, y, norm)
    assert misclassified(model(x_adv), y).all()
    distance = norm_of(x_adv - x, norm)
    assert (distance >= expected * (1 - 1e-9)).all()
    torch.testing.assert_close(distance, expected, rtol=0.01, atol=0)


@norms
def test_from_an_image_of_another_class_it_finds_what_the_clean_gradient_hides(norm):
    x, y = torch.full((1, 1, 4, 4), 0.5), torch.tensor([0])

    def flat(images):  # class 1 only where the mean is above 0.8, with no slope below 0.7
        mean = images.flatten(1).mean(dim=1)
        return torch.stack([torch.zeros_like(mean), (mean - 0.7).clamp(min=0) - 0.1], dim=1)
    model = Function(flat)
    assert torch.equal(fmn(model, x, y, norm=norm), x)
    x_adv = fmn(model, x, y, norm=norm, start=torch.ones_like(x))
    assert misclassified(model(x_adv), y).all()
    expected = {"linf": 0.3, "l2": 1.2, "l1": 4.8}[norm]
    assert norm_of(x_adv - x, norm).item() == pytest.approx(expected, rel=0.01)


class Function(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_a_start_that_is_no_adversary_changes_nothing():
    model = linear()
    x, y = interior(model)
    assert torch.equal(fmn(model, x, y, start=x), fmn(model, x, y))


@norms
def test_a_target_is_followed_and_every_misclassification_counts(norm):
    model = linear(4)
    x, y = interior(model)
    target = ranked_targets(model(x), y, 2)[:, 1]
    x_adv = fmn(model, x, y, norm=norm, num_steps=300, step_size=1.0, target=target)
    weight, logits = model[1].weight.detach(), model(x).detach()
    normal = torch.linalg.vector_norm(weight[y] - weight[target],
                                      ord={"linf": 1, "l2": 2, "l1": torch.inf}[norm], dim=1)
    to_target = (logits.gather(1, y[:, None]) - logits.gather(1, target[:, None])).squeeze(1) / normal
    assert misclassified(model(x_adv), y).all()
    assert (norm_of(x_adv - x, norm) <= 1.01 * to_target).all()


@norms
@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), radius=st.floats(0.01, 5))
def test_the_projection_is_the_nearest_point_of_the_ball(norm, seed, radius):
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn((3, 1, 2, 5), generator=generator, dtype=torch.float64)
    radii = torch.tensor([radius, radius / 2, 100.0], dtype=torch.float64)
    found = project_ball(delta, per_example(radii, delta), norm)
    assert (norm_of(found, norm) <= radii * (1 + 1e-9)).all() and torch.equal(found[2], delta[2])
    other = project_ball(torch.randn((3, 1, 2, 5), generator=generator, dtype=torch.float64),
                         per_example(radii, delta), norm)
    obtuse = ((delta - found) * (other - found)).flatten(1).sum(dim=1)  # of the projection onto a convex set
    assert (obtuse <= 1e-9).all()


def test_margins():
    logits, y = torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, -1.0]]), torch.tensor([0, 0])
    assert logit_margin(logits, y).tolist() == [1.0, 0.0]
    assert logit_margin(logits, y, torch.tensor([1, 2])).tolist() == [2.0, 1.0]
    assert misclassified(logits, y).tolist() == [False, False]
    assert misclassified(torch.tensor([[torch.nan, 1.0], [0.0, torch.inf]]), y).tolist() == [False, False]
    torch.testing.assert_close(soft_margin(logits, y), torch.special.logit(logits.softmax(dim=1)[:, 0]))


def test_the_last_iterate_and_misclassified_images_count():
    model = linear()
    x, y = interior(model)
    other = (y + 1) % 3
    assert torch.equal(fmn(model, x, other, num_steps=0), x)
    assert torch.equal(fmn(model, x, other, num_steps=5), x)


@pytest.mark.parametrize(("message", "wrong"), (
    ("unknown norm 'l3'", {"norm": "l3"}),
    ("num_steps", {"num_steps": -1}), ("labels", {"y": torch.zeros(3)}),
    (r"\[0, 1\]", {"x": torch.full((8, 1, 4, 4), 2.0)}),
    ("start of shape", {"start": torch.zeros(1, 1, 4, 4)})))
def test_bad_input_raises_a_value_error_that_names_it(message, wrong):
    model = linear(dtype=torch.float32)
    x, y = interior(model)
    with pytest.raises(ValueError, match=message):
        fmn(model, **{"x": x, "y": y} | wrong)
