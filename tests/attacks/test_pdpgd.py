"""PDPGD: its proximal operators, the closed form of linear models, and PGD with bisection of the radius."""
import pytest
import torch
from nets import interior, linear, linear_distance

from attacks.bisection import pgd_bisection
from attacks.geometry import NORMS, norm_of
from attacks.noise import example_keys
from attacks.pdpgd import _prox, pdpgd
from losses.margin import misclassified

norms = pytest.mark.parametrize("norm", NORMS)


@norms
@pytest.mark.parametrize("num_classes", (2, 5))
def test_pdpgd_finds_the_distance_of_a_linear_model(norm, num_classes):
    model = linear(num_classes)
    x, y = interior(model)
    x_adv = pdpgd(model, x, y, norm=norm, num_steps=1000)
    expected = linear_distance(model, x, y, norm)
    assert misclassified(model(x_adv), y).all()
    assert (norm_of(x_adv - x, norm) >= expected * (1 - 1e-9)).all()
    torch.testing.assert_close(norm_of(x_adv - x, norm), expected, rtol=0.01, atol=0)


@norms
def test_the_logits_scale_is_of_no_matter(norm):
    model = linear()
    x, y = interior(model)
    x_adv = pdpgd(model, x, y, norm=norm, num_steps=100)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e4)
    torch.testing.assert_close(pdpgd(model, x, y, norm=norm, num_steps=100), x_adv, rtol=1e-4, atol=1e-6)


@norms
def test_the_proximal_operator_minimises_its_objective(norm):
    generator = torch.Generator().manual_seed(0)
    point = torch.randn((6, 1, 3, 4), generator=generator, dtype=torch.float64)
    metric = torch.rand(point.shape, generator=generator, dtype=torch.float64) + 0.1
    metric = metric if norm != "l2" else metric[:, :, :1, :1].expand_as(point)
    weight = torch.tensor([0.01, 0.1, 0.5, 1.0, 2.0, 100.0], dtype=torch.float64)

    def objective(r):
        return weight * norm_of(r, norm) + (metric * (r - point).square()).flatten(1).sum(dim=1) / 2
    found = _prox(point, metric, weight, norm)
    least = objective(found)
    assert found[5].count_nonzero() == 0  # so heavy a norm leaves nothing
    for scale in (1e-4, 1e-2, 1.0):
        for _ in range(20):
            nearby = found + scale * torch.randn(point.shape, generator=generator, dtype=torch.float64)
            assert (objective(nearby) >= least - 1e-12).all()
    assert ((objective(0.999 * found) >= least - 1e-12).all()
            and (objective(1.001 * found) >= least - 1e-12).all())


def test_bisection_finds_the_distance_of_a_linear_model():
    model = linear(5)
    x, y = interior(model)
    expected = linear_distance(model, x, y, "linf")
    for keys in (None, example_keys(torch.arange(8), 0)):
        x_adv = pgd_bisection(model, x, y, num_steps=20, num_rounds=16, keys=keys)
        assert misclassified(model(x_adv), y).all()
        torch.testing.assert_close(norm_of(x_adv - x, "linf"), expected, rtol=0.01, atol=0)


def test_bisection_below_the_distance_finds_nothing():
    model = linear()
    x, y = interior(model)
    assert torch.equal(pgd_bisection(model, x, y, upper=linear_distance(model, x, y, "linf") * 0.99), x)


def test_bad_input_raises_a_value_error_that_names_it():
    model = linear()
    x, y = interior(model)
    for attack, options, message in ((pdpgd, {"norm": "l0"}, "unknown norm 'l0'"),
                                     (pgd_bisection, {"norm": "l2"}, "choose one of linf"),
                                     (pdpgd, {"start": x[:1]}, "start of shape")):
        with pytest.raises(ValueError, match=message):
            attack(model, x, y, **options)
