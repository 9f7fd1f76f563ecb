"""SPSA and l_2 PGD: closed forms on linear models, the estimate against the true gradient,
independence of batches."""
import pytest
import torch
from torch import nn

from attacks.noise import example_keys
from attacks.pgd import pgd
from attacks.spsa import estimate, keyed_signs, spsa


def linear(num_classes=3, pixels=12, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, num_classes))


def images(count, low=0.3, high=0.7, seed=1):
    return low + (high - low) * torch.rand((count, 1, 3, 4), generator=torch.Generator().manual_seed(seed))


def test_signs_belong_to_their_key_and_are_balanced():
    keys = example_keys(torch.arange(5), 3)
    signs = keyed_signs(keys, (50, 7, 11))
    assert signs.shape == (5, 50, 7, 11) and set(signs.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(signs[2:3], keyed_signs(keys[2:3], (50, 7, 11)))
    assert abs(float(signs.mean())) < 0.03 and abs(float((signs[0] * signs[1]).mean())) < 0.06


def test_the_estimate_points_along_the_gradient_of_a_linear_margin():
    model, x = linear(num_classes=2), images(4)
    y = torch.tensor([0, 1, 0, 1])
    slope = ((model[1].weight[1] - model[1].weight[0]).detach().view(1, 1, 3, 4)
             * (1 - 2 * y).view(-1, 1, 1, 1))
    found = estimate(model, x, y, example_keys(torch.arange(4)), 2048, 0.01).detach()
    assert torch.cosine_similarity(found.flatten(1), slope.flatten(1)).min() > 0.98
    assert found.norm() == pytest.approx(float(slope.norm()), rel=0.1)


def test_spsa_reaches_the_corner_of_a_linear_models_ball():
    model, x, epsilon = linear(num_classes=2), images(6), 0.05
    model[1].bias.data.copy_(torch.tensor([9.0, 0.0]))  # class 0 cannot be left
    y = torch.zeros(6, dtype=torch.int64)
    corner = x + epsilon * (model[1].weight[1] - model[1].weight[0]).sign().view(1, 1, 3, 4)
    x_adv = spsa(model, x, y, epsilon=epsilon, num_steps=30, delta=0.01)
    assert torch.allclose(x_adv, corner, atol=0.011)


def test_spsa_stays_in_ball_and_box_and_does_not_depend_on_the_batch():
    model, x = linear(), images(9, 0.0, 1.0)
    y, keys = model(x).argmax(1), example_keys(torch.arange(9), 4)
    options = {"epsilon": 0.1, "num_steps": 5, "num_samples": 32}
    whole = spsa(model, x, y, keys=keys, **options)
    parts = torch.cat([spsa(model, x[k:k + 4], y[k:k + 4], keys=keys[k:k + 4], **options) for k in (0, 4, 8)])
    assert torch.allclose(whole, parts, atol=1e-6)
    assert torch.allclose(whole, spsa(model, x, y, keys=keys, max_probes=64, **options), atol=1e-6)
    assert whole.min() >= 0 and whole.max() <= 1 and (whole - x).abs().max() <= 0.1 + 1e-6
    assert torch.equal(spsa(model, x, y, epsilon=0.0, num_steps=2, num_samples=32), x)


def test_probes_that_do_not_fit_in_memory_are_halved():
    whole, x, seen = linear(), images(9), []

    def full(x):
        seen.append(len(x))
        if len(x) > 150:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(x)

    model, y = nn.Sequential(whole), whole(x).argmax(1)
    options = {"epsilon": 0.1, "num_steps": 5, "num_samples": 32}
    expected = spsa(model, x, y, max_probes=128, **options)
    model.forward = full
    assert torch.equal(spsa(model, x, y, max_probes=512, **options), expected)
    assert [size for size in seen if size > 150] == [8 * 64, 4 * 64] and 128 in seen
    whole.forward = lambda x: full(torch.zeros(151))
    with pytest.raises(torch.OutOfMemoryError):
        spsa(model, x, y, **options)


def test_what_is_wrong_already_is_left_alone_and_costs_one_forward_pass():
    model, x, seen = linear(), images(3), []
    y = (model(x).argmax(1) + 1) % 3
    model.register_forward_hook(lambda module, given, logits: seen.append(len(logits)))
    assert torch.equal(spsa(model, x, y, epsilon=0.1), x) and seen == [3]


def test_samples_that_do_not_fill_a_chunk_are_refused():
    with pytest.raises(ValueError, match="multiple of 32"):
        spsa(linear(), images(1), torch.tensor([0]), epsilon=0.1, num_samples=100)


@pytest.mark.parametrize("start", ("uniform", "clean"))
def test_l2_pgd_goes_to_the_sphere_along_a_linear_models_gradient(start):
    model, x, epsilon = linear(num_classes=2).double(), images(5).double(), 0.2
    y = torch.zeros(5, dtype=torch.int64)
    slope = (model[1].weight[1] - model[1].weight[0]).detach()
    x_adv = pgd(model, x, y, epsilon=epsilon, step_size=0.05, num_steps=60, start=start, norm="l2")
    assert torch.allclose(x_adv - x, (epsilon * slope / slope.norm()).view(1, 1, 3, 4).expand_as(x),
                          atol=2e-3)


def test_l2_pgd_stays_in_its_ball_and_box_and_survives_a_zero_gradient():
    model, x = linear(), images(5, 0.0, 1.0)
    x_adv = pgd(model, x, torch.zeros(5, dtype=torch.int64), epsilon=0.5, step_size=0.2, num_steps=7,
                norm="l2")
    assert (x_adv - x).flatten(1).norm(dim=1).max() <= 0.5 + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    model[1].weight.data.zero_()
    y = torch.zeros(5, dtype=torch.int64)
    assert torch.equal(pgd(model, x, y, epsilon=0.5, step_size=0.2, num_steps=2, start="clean", norm="l2"), x)
