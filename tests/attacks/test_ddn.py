"""DDN against the closed form of linear models, where its loss saturates, and on bad input."""
import pytest
import torch
from nets import interior, linear, linear_distance

from attacks.ddn import ddn
from attacks.geometry import norm_of
from losses.margin import logit_margin, misclassified, ranked_targets


def sharp(num_classes):
    """A linear model of logits so far apart that the cross-entropy follows the nearest rival alone."""
    model = linear(num_classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(100)
    return model


@pytest.mark.parametrize("num_classes", (2, 5))
def test_ddn_finds_the_distance_of_a_linear_model(num_classes):
    model = sharp(num_classes)
    x, y = interior(model, margin=50.0)
    x_adv = ddn(model, x, y, num_steps=300)
    expected = linear_distance(model, x, y, "l2")
    assert misclassified(model(x_adv), y).all()
    assert (norm_of(x_adv - x, "l2") >= expected * (1 - 1e-9)).all()
    torch.testing.assert_close(norm_of(x_adv - x, "l2"), expected, rtol=0.01, atol=0)


def test_a_target_is_followed():
    model = sharp(4)
    x, y = interior(model, margin=50.0)
    target = ranked_targets(model(x), y, 3)[:, 2]
    lead = [-logit_margin(model(ddn(model, x, y, num_steps=1, target=aim)), y, target)
            for aim in (target, None)]
    assert (lead[0] > lead[1] + 50).all()  # of the target over y, after one step of length one
    assert misclassified(model(ddn(model, x, y, num_steps=100, target=target)), y).all()


def test_saturated_logits_give_a_direction_all_the_same():
    model = linear(dtype=torch.float32)
    x, y = interior(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2000)  # the probabilities are 0 and 1, the gradient of the cross-entropy is 0
    loss = torch.nn.functional.cross_entropy(model(x.requires_grad_()), y)
    assert torch.autograd.grad(loss, x)[0].abs().sum() == 0
    assert misclassified(model(ddn(model, x.detach(), y)), y).all()


def test_the_only_norm_is_l2():
    model = linear()
    with pytest.raises(ValueError, match="unknown norm 'linf': choose one of l2"):
        ddn(model, *interior(model), norm="linf")
