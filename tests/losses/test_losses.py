"""Losses and weights against the reference implementations' values,
an independent NumPy computation, and their limits."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from losses.divergence import kl_divergence
from losses.margin import (
    cw_loss,
    logit_margin,
    margin_weights,
    misclassified,
    probability_margin,
    ranked_targets,
)
from losses.trades import trades_loss

GOLDEN = Path(__file__).parents[1] / "golden"
VALUE = {torch.float64: {"rtol": 1e-9, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}
GRADIENT = {"rtol": 1e-4, "atol": 1e-6}  # they are stored as float32
ALPHAS = ("0.1", "0.5", "1.0", "2.0", "5.0")

dtypes = pytest.mark.parametrize("dtype", VALUE, ids=("float64", "float32"))
class_counts = pytest.mark.parametrize("num_classes", (2, 10, 100, 200))
quick = settings(max_examples=25, deadline=None, derandomize=True)


def golden(name):
    cases = json.loads((GOLDEN / name).read_text())["cases"]
    return pytest.mark.parametrize("case", cases, ids=[case["name"] for case in cases])


def tensors(case, dtype, *names):
    return ([torch.tensor(case[name]).to(dtype).requires_grad_() for name in names]
            + [torch.tensor(case["labels"])])


def assert_value(actual, expected, dtype):
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64).to(dtype), **VALUE[dtype])


def assert_gradient(gradient, expected):
    torch.testing.assert_close(gradient.double(), torch.tensor(expected, dtype=torch.float64), **GRADIENT)


def sample(num_classes, batch_size=32, scale=4.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(2, batch_size, num_classes, generator=generator, dtype=torch.float64)
    logits, logits_adv = (scale * normal).to(dtype)
    return logits, logits_adv, torch.randint(num_classes, (batch_size,), generator=generator)


def cross_entropy(logits, y):
    return F.cross_entropy(logits, y, reduction="none")


EVERY_LOSS = {  # (logits, logits_adv, y) -> [B]
    "kl_divergence": lambda z, z_adv, y: kl_divergence(z_adv, z),
    "trades_loss": lambda z, z_adv, y: trades_loss(z, z_adv, y, 6.0),
    "weighted trades_loss": lambda z, z_adv, y: trades_loss(z, z_adv, y, 5.0, margin_weights(z_adv, y, 2.0)),
    "margin_weights": lambda z, z_adv, y: margin_weights(z_adv, y, 2.0),
    "margin_weights, alpha 0": lambda z, z_adv, y: margin_weights(z_adv, y, 0.0),
    "probability_margin": lambda z, z_adv, y: probability_margin(z_adv, y),
    "cw_loss": lambda z, z_adv, y: cw_loss(z_adv, y),
}
every_loss = pytest.mark.parametrize("loss_fn", EVERY_LOSS.values(), ids=EVERY_LOSS)


# The reference implementations' values

@dtypes
@golden("trades.json")
@pytest.mark.parametrize("beta", (1.0, 6.0))
def test_trades_loss_is_that_of_the_released_code(case, beta, dtype):
    logits, logits_adv, y = tensors(case, dtype, "logits_clean", "logits_adv")
    expected = case["out"][f"beta={beta}"]
    loss = trades_loss(logits, logits_adv, y, beta).mean()
    assert_value(loss, expected["loss_f64"], dtype)
    if beta == 6.0:
        clean, adv = torch.autograd.grad(loss, (logits, logits_adv))
        assert_gradient(clean, expected["dloss_dlogits_clean"])
        assert_gradient(adv, expected["dloss_dlogits_adv"])


@dtypes
@golden("trades.json")
def test_kl_divergence_is_what_beta_multiplies_in_the_released_code(case, dtype):
    logits, logits_adv, _ = tensors(case, dtype, "logits_clean", "logits_adv")
    at_beta = {beta: case["out"][f"beta={beta}"] for beta in ("1.0", "6.0")}
    mean_kl = (at_beta["6.0"]["loss_f64"] - at_beta["1.0"]["loss_f64"]) / 5
    loss = kl_divergence(logits_adv, logits).mean()
    assert_value(loss, mean_kl, dtype)
    # the cross-entropy of the loss does not see logits_adv
    gradient, = torch.autograd.grad(6 * loss, logits_adv)
    assert_gradient(gradient, at_beta["6.0"]["dloss_dlogits_adv"])


@dtypes
@golden("zeng.json")
def test_probability_margin_is_that_of_the_released_code(case, dtype):
    logits_adv, y = tensors(case, dtype, "logits_adv")
    assert_value(probability_margin(logits_adv, y), case["margin_f64"], dtype)


@dtypes
@golden("zeng.json")
@pytest.mark.parametrize("alpha", ALPHAS)
def test_margin_weights_are_those_of_the_released_code(case, alpha, dtype):
    logits_adv, y = tensors(case, dtype, "logits_adv")
    assert_value(margin_weights(logits_adv, y, float(alpha)), case["out"][f"alpha={alpha}"]["w_f64"], dtype)


@dtypes
@golden("zeng.json")
@pytest.mark.parametrize("alpha", ALPHAS)
def test_margin_weighted_cross_entropy_is_that_of_the_released_code(case, alpha, dtype):
    logits_adv, y = tensors(case, dtype, "logits_adv")
    expected = case["out"][f"alpha={alpha}"]["AT+ours"]
    loss = (margin_weights(logits_adv, y, float(alpha)) * cross_entropy(logits_adv, y)).mean()
    assert_value(loss, expected["loss_f64"], dtype)
    if case["grads_unique"] and alpha == "2.0":
        assert_gradient(torch.autograd.grad(loss, logits_adv)[0], expected["dloss_dlogits_adv"])


@dtypes
@golden("zeng.json")
@pytest.mark.parametrize("alpha", ALPHAS)
def test_margin_weighted_trades_is_that_of_the_released_code(case, alpha, dtype):
    logits, logits_adv, y = tensors(case, dtype, "logits_clean", "logits_adv")
    expected = case["out"][f"alpha={alpha}"]["TRADES+ours,beta=5"]
    loss = trades_loss(logits, logits_adv, y, 5.0, margin_weights(logits_adv, y, float(alpha))).mean()
    assert_value(loss, expected["loss_f64"], dtype)
    if case["grads_unique"] and alpha == "2.0":
        clean, adv = torch.autograd.grad(loss, (logits, logits_adv))
        assert_gradient(clean, expected["dloss_dlogits_clean"])
        assert_gradient(adv, expected["dloss_dlogits_adv"])


@dtypes
@golden("cw.json")
def test_cw_loss_is_the_largest_other_logit_minus_the_true_one(case, dtype):
    logits, y = tensors(case, dtype, "logits")
    assert_value(cw_loss(logits, y), case["out"]["formula_margin_per_sample_f64 (max_other - true)"], dtype)


@dtypes
@golden("cw.json")
def test_cw_loss_is_the_released_one_without_its_clamp(case, dtype):
    logits, y = tensors(case, dtype, "logits")
    released = case["out"]["cwloss,confidence=50"]
    loss = cw_loss(logits, y)
    free = loss < 50
    assert free.any()
    assert_value(loss[free] - 50,
                 torch.tensor(released["per_sample_f64"], dtype=torch.float64)[free].tolist(), dtype)
    if "dsum_dlogits" in released:
        gradient, = torch.autograd.grad(loss.sum(), logits)
        assert_gradient(gradient[free], torch.tensor(released["dsum_dlogits"])[free].tolist())
        assert (gradient.abs().sum(dim=1) == 2).all()  # it also lives where the released one has died


# An independent computation

def numpy_margin(logits, y):
    """Margin and its gradient, float64, by sorting."""
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    rows = np.arange(len(y))
    best, second = np.argsort(-p, axis=1)[:, :2].T
    other = np.where(best == y, second, best)
    unit = np.eye(p.shape[1])
    p_true, p_other = p[rows, y][:, None], p[rows, other][:, None]
    gradient = p_true * (unit[y] - p) - p_other * (unit[other] - p)
    return (p_true - p_other)[:, 0], gradient


@quick
@given(st.sampled_from((2, 10, 100, 200)), st.integers(1, 8), st.floats(0.01, 20), st.integers(0, 2**32 - 1),
       st.floats(0.01, 5))
def test_margin_and_weights_agree_with_numpy(num_classes, batch_size, scale, seed, alpha):
    _, logits, y = sample(num_classes, batch_size, scale, torch.float64, seed)
    margin, gradient = numpy_margin(logits.numpy(), y.numpy())
    logits.requires_grad_()
    weights = margin_weights(logits, y, alpha)
    np.testing.assert_allclose(probability_margin(logits, y).detach(), margin, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(weights.detach(), np.exp(-alpha * margin), rtol=1e-9)
    weights_gradient, = torch.autograd.grad(weights.sum(), logits)
    np.testing.assert_allclose(weights_gradient, (-alpha * np.exp(-alpha * margin))[:, None] * gradient,
                               rtol=1e-8, atol=1e-12)


@quick
@given(st.sampled_from((2, 10, 100, 200)), st.floats(0.1, 10), st.integers(0, 2**32 - 1))
def test_margin_is_positive_exactly_where_the_prediction_is_correct(num_classes, scale, seed):
    logits, _, y = sample(num_classes, 16, scale, torch.float64, seed)
    y[::2] = logits.argmax(dim=1)[::2]
    correct = logits.argmax(dim=1) == y
    assert torch.equal(probability_margin(logits, y) > 0, correct)
    assert torch.equal(cw_loss(logits, y) < 0, correct)


@class_counts
def test_kl_divergence_agrees_with_the_sum_over_classes(num_classes):
    logits, logits_adv, _ = sample(num_classes, dtype=torch.float64)
    p, p_adv = (np.exp(z.numpy()) / np.exp(z.numpy()).sum(axis=1, keepdims=True)
                for z in (logits, logits_adv))
    np.testing.assert_allclose(kl_divergence(logits_adv, logits), (p * np.log(p / p_adv)).sum(axis=1),
                               rtol=1e-9)


# Limits

@dtypes
def test_alpha_zero_gives_ones_and_recovers_the_base_losses_exactly(dtype):
    logits, logits_adv, y = sample(10, dtype=dtype)
    weights = margin_weights(logits_adv, y, 0.0)
    assert weights.dtype == dtype
    assert torch.equal(weights, torch.ones(32, dtype=dtype))
    assert torch.equal(weights * cross_entropy(logits_adv, y), cross_entropy(logits_adv, y))
    assert torch.equal(trades_loss(logits, logits_adv, y, 6.0, weights),
                       trades_loss(logits, logits_adv, y, 6.0))


def test_weights_act_on_the_robust_term_alone():
    logits, logits_adv, y = sample(10, dtype=torch.float64)
    weights = torch.linspace(0, 3, 32, dtype=torch.float64)
    expected = cross_entropy(logits, y) + 6.0 * weights * kl_divergence(logits_adv, logits)
    torch.testing.assert_close(trades_loss(logits, logits_adv, y, 6.0, weights), expected, rtol=1e-12, atol=0)
    assert torch.equal(trades_loss(logits, logits_adv, y, 0.0, weights), cross_entropy(logits, y))


@class_counts
def test_weights_lie_between_exp_minus_alpha_and_exp_alpha(num_classes):
    _, logits_adv, y = sample(num_classes, batch_size=200, scale=30.0)
    for alpha in (0.1, 1.0, 5.0):
        weights = margin_weights(logits_adv, y, alpha)
        assert weights.min() >= np.exp(-alpha) * (1 - 1e-6)
        assert weights.max() <= np.exp(alpha) * (1 + 1e-6)
        assert weights.max() > 1  # misclassified examples count for more


def test_margin_weight_is_in_the_graph():
    _, logits_adv, y = sample(10)
    logits_adv.requires_grad_()
    gradient, = torch.autograd.grad(margin_weights(logits_adv, y, 1.0).sum(), logits_adv)
    assert gradient.abs().amax(dim=1).min() > 0


@class_counts
@pytest.mark.parametrize("distance", (0.0, 1e-6, 1e-3, 1.0))
@pytest.mark.parametrize(("dtype", "rounding"), ((torch.float64, 1e-14), (torch.float32, 1e-6)),
                         ids=("float64", "float32"))
def test_kl_divergence_is_never_below_zero_by_more_than_rounding(num_classes, distance, dtype, rounding):
    logits, direction, _ = sample(num_classes, batch_size=500, dtype=dtype)
    assert kl_divergence(logits + distance * direction, logits).min() >= -rounding


@dtypes
def test_kl_divergence_is_zero_at_equality_and_ignores_a_shift_of_the_logits(dtype):
    logits, logits_adv, _ = sample(10, dtype=dtype)
    assert torch.equal(kl_divergence(logits, logits.clone()), torch.zeros(32, dtype=dtype))
    torch.testing.assert_close(kl_divergence(logits_adv + 3, logits - 5), kl_divergence(logits_adv, logits),
                               rtol=1e-4, atol=1e-5)


def test_kl_divergence_weighs_by_the_clean_prediction():
    certain, even = torch.tensor([[80.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    torch.testing.assert_close(kl_divergence(even, certain), torch.tensor([2.0]).log())
    torch.testing.assert_close(kl_divergence(certain, even), torch.tensor([40.0]) - torch.tensor([2.0]).log())


@every_loss
@class_counts
def test_extreme_logits_give_finite_losses_and_gradients(loss_fn, num_classes):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(2, (2, 64, num_classes), generator=generator)
    logits, logits_adv = (400.0 * bits - 200).requires_grad_()
    y = torch.randint(num_classes, (64,), generator=generator)
    losses = loss_fn(logits, logits_adv, y)
    assert losses.isfinite().all()
    if losses.requires_grad:
        for gradient in torch.autograd.grad(losses.sum(), (logits, logits_adv), allow_unused=True):
            assert gradient is None or gradient.isfinite().all()


@every_loss
@class_counts
def test_one_value_per_example_for_any_number_of_classes(loss_fn, num_classes):
    for batch_size in (1, 5):
        logits, logits_adv, y = sample(num_classes, batch_size)
        losses = loss_fn(logits, logits_adv, y)
        assert losses.shape == (batch_size,)
        alone = loss_fn(logits[-1:], logits_adv[-1:], y[-1:])
        torch.testing.assert_close(losses[-1:], alone, rtol=1e-5, atol=1e-6)


@every_loss
@pytest.mark.parametrize("half", (torch.bfloat16, torch.float16))
def test_half_precision_logits_give_the_float32_loss(loss_fn, half):
    logits, logits_adv, y = sample(10, dtype=half)
    losses = loss_fn(logits, logits_adv, y)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, loss_fn(logits.float(), logits_adv.float(), y), rtol=1e-6, atol=1e-7)


# What is misclassified

@pytest.mark.parametrize("logits",
                         (torch.tensor([2.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 2.0]), torch.zeros(3)))
def test_misclassified_is_what_the_accuracy_counts_as_wrong_at_ties_too(logits):
    logits, y = logits.expand(3, 3), torch.arange(3)
    assert torch.equal(misclassified(logits, y), logits.argmax(dim=1) != y)
    assert misclassified(logits, y).sum() == 2
    assert misclassified(logits, y)[logit_margin(logits, y) < 0].all()
    assert not misclassified(logits, y)[logit_margin(logits, y) > 0].any()


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("place", (0, 1, 2))
def test_logits_that_are_not_finite_are_no_adversary(value, place):
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    assert misclassified(logits, torch.tensor([0])).all()
    logits[0, place] = value
    assert not misclassified(logits, torch.tensor([0])).any()


def test_the_margin_to_a_target_and_the_shared_gradient_of_tied_rivals():
    logits = torch.tensor([[3.0, 1.0, 1.0, 0.0]], requires_grad=True)
    y = torch.tensor([0])
    assert logit_margin(logits, y, torch.tensor([3])).item() == 3.0
    gradient, = torch.autograd.grad(logit_margin(logits, y).sum(), logits)
    assert gradient.tolist() == [[1.0, -0.5, -0.5, 0.0]]
    assert ranked_targets(logits, y, 2).tolist() == [[1, 2]]
