"""ALMA against the closed form of linear models, its penalty, and the polish."""
import pytest
import torch
from nets import interior, linear, linear_distance, tiny_mlp

from attacks.alma import _Penalty, alma
from attacks.geometry import NORMS, norm_of
from attacks.polish import nearest_loss, polish
from losses.margin import logit_margin, misclassified

norms = pytest.mark.parametrize("norm", NORMS)


@pytest.mark.parametrize("norm", ("l2", "l1"))
@pytest.mark.parametrize("num_classes", (2, 5))
def test_alma_finds_the_distance_of_a_linear_model(norm, num_classes):
    model = linear(num_classes)
    x, y = interior(model)
    x_adv = alma(model, x, y, norm=norm, num_steps=500)
    expected = linear_distance(model, x, y, norm)
    assert misclassified(model(x_adv), y).all()
    assert (norm_of(x_adv - x, norm) >= expected * (1 - 1e-9)).all()
    if norm == "l1":  # its last steps leave a little on pixels that should be still
        assert (norm_of(x_adv - x, norm) <= 1.05 * expected).all()
        x_adv = polish(model, x, y, x_adv, norm=norm)
        assert misclassified(model(x_adv), y).all()
    torch.testing.assert_close(norm_of(x_adv - x, norm), expected, rtol=0.01, atol=0)


def test_rounding_does_not_decide_at_which_class_alma_ends():
    model = linear(5)  # one point's second nearest class is 2.9 times as far as its nearest
    x, y = interior(model)
    x, y = x.repeat(50, 1, 1, 1), y.repeat(50)
    x = x + 1e-9 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    x_adv = alma(model, x, y, norm="l1", num_steps=500)
    assert (norm_of(x_adv - x, "l1") <= 1.05 * linear_distance(model, x, y, "l1")).all()


@pytest.mark.parametrize(("num_classes", "size"), ((3, 16), (10, 4), (10, 16)))
def test_alma_goes_to_the_nearest_class_of_a_linear_model_from_anywhere_in_the_box(num_classes, size):
    torch.manual_seed(size + num_classes)
    model = linear(num_classes, size, seed=num_classes)
    x = torch.rand(20, 1, 1, size, dtype=torch.float64)
    logits = model(x).detach()
    y = logits.argmax(1)
    exact = torch.full((20,), torch.inf, dtype=torch.float64)
    for k in range(num_classes):
        gradient = (model[1].weight[y] - model[1].weight[k]).detach().view_as(x)
        level = logits.gather(1, y[:, None])[:, 0] - logits[:, k]
        moved = nearest_loss(x, gradient, level, "l2")
        reached = ((gradient * moved).flatten(1).sum(1) <= 1e-9 - level) & (y != k)
        exact = torch.where(reached, exact.minimum(norm_of(moved, "l2")), exact)
    there = exact.isfinite()
    ratio = (norm_of(alma(model, x, y) - x, "l2") / exact)[there]
    assert there.sum() > 10 and (ratio >= 1 - 1e-6).all() and ratio.max() <= 1.1 and ratio.mean() <= 1.01


@pytest.mark.parametrize("norm", ("l2", "l1"))
def test_alma_leaves_a_far_adversary_that_lies_on_the_boundary(norm):
    model = linear(2)
    x, y = interior(model)
    # along the boundary, for the most part
    away = torch.linspace(-0.2, 0.2, x[0].numel(), dtype=x.dtype).view_as(x[0])
    normal = (model[1].weight[1] - model[1].weight[0]).view_as(x[0])
    away = away - normal * (away * normal).sum() / normal.square().sum()
    near = alma(model, x, y, norm=norm, num_steps=500)
    start = (near + away).clamp(0, 1).detach()
    margin = logit_margin(model(start), y)
    step = torch.where(y == 0, 1.0, -1.0) * (margin + 1e-6) / normal.square().sum()
    start = start + step[:, None, None, None] * normal  # the margin there is -1e-6
    assert misclassified(model(start), y).all() and (logit_margin(model(start), y).abs() < 1e-5).all()
    found = norm_of(alma(model, x, y, norm=norm, start=start, num_steps=200) - x, norm)
    assert (found < 0.6 * norm_of(start - x, norm)).all()


def test_the_penalty_slope_is_the_derivative_of_p2():
    constraint = torch.linspace(-2, 2, 9, dtype=torch.float64).requires_grad_()
    p2 = _Penalty(constraint)
    p2.rho, p2.mu = rho, mu = torch.full_like(constraint, 1.5), torch.full_like(constraint, 0.7)
    above = mu * constraint + mu * rho * constraint.square() + rho.square() * constraint ** 3 / 6
    penalty = torch.where(constraint >= 0, above, mu * constraint / (1 - rho * constraint.clamp(max=0)))
    slope, = torch.autograd.grad(penalty.sum(), constraint)
    torch.testing.assert_close(p2.slope(constraint.detach()), slope)


def test_the_norms_are_l2_and_l1():
    model = linear()
    with pytest.raises(ValueError, match="unknown norm 'linf': choose one of l2, l1"):
        alma(model, *interior(model), norm="linf")


# The polish

@norms
def test_one_step_of_the_polish_is_exact_on_a_linear_model(norm):
    model = linear(2)
    x, y = interior(model)
    far = (x + 0.45 * (model[1].weight[1 - y] - model[1].weight[y]).view_as(x).sign()).clamp(0, 1).detach()
    assert misclassified(model(far), y).all()
    x_adv = polish(model, x, y, far, norm=norm, num_steps=1)
    assert misclassified(model(x_adv), y).all()
    torch.testing.assert_close(norm_of(x_adv - x, norm), linear_distance(model, x, y, norm),
                               rtol=2e-4, atol=0)


@norms
def test_the_polish_never_makes_an_adversary_worse_and_leaves_the_rest_alone(norm):
    model, file = tiny_mlp()
    x, y = torch.from_numpy(file["images"])[:, None] / 255, torch.from_numpy(file["labels"])
    far = torch.cat([x[4:], x[:4]])
    x_adv = polish(model, x, y, far, norm=norm)
    wrong = misclassified(model(far), y)
    assert wrong.any() and misclassified(model(x_adv), y)[wrong].all()
    assert (norm_of(x_adv - x, norm) < norm_of(far - x, norm))[wrong].all()
    assert torch.equal(x_adv[~wrong], far[~wrong])
    still = polish(model, x, model(x).argmax(dim=1), x, norm=norm)
    assert torch.equal(still, x)


@norms
def test_the_nearest_point_of_a_half_space_within_the_box(norm):
    x = torch.tensor([[0.9, 0.5, 0.2, 0.5]], dtype=torch.float64)
    gradient = torch.tensor([[-2.0, 1.0, 1.0, 0.0]], dtype=torch.float64)  # room for 0.1, 0.5, 0.2 and any
    moved = nearest_loss(x, gradient, torch.tensor([0.5], dtype=torch.float64), norm)[0].tolist()
    expected = {"linf": [0.1, -0.15, -0.15, 0.0], "l2": [0.1, -0.15, -0.15, 0.0],
                "l1": [0.1, -0.3, 0.0, 0.0]}[norm]
    assert moved == pytest.approx(expected, abs=1e-12)
    out_of_reach = nearest_loss(x, gradient, torch.tensor([5.0], dtype=torch.float64), norm)[0].tolist()
    assert out_of_reach == pytest.approx([0.1, -0.5, -0.2, 0.0])
