"""The weights and losses of VIR, GAIRAT, MAIL and MART against the reference implementations' values,
their limits and extremes."""
import json
import math

import pytest
import torch
from test_losses import (
    GOLDEN,
    assert_gradient,
    assert_value,
    class_counts,
    cross_entropy,
    dtypes,
    golden,
    sample,
    tensors,
)

from losses import with_mean_one
from losses.divergence import kl_divergence
from losses.gairat import gairat_weights
from losses.mail import mail_weights
from losses.margin import probability_margin
from losses.mart import mart_loss
from losses.trades import trades_loss
from losses.vir import vir_weights

VIR = {"VIR-AT,alpha=7.0,gamma=10.0,beta=0.007": (7.0, 0.007, 10.0),
       "VIR-AT TinyImageNet,alpha=7.0,gamma=3.0,beta=0.007": (7.0, 0.007, 3.0),
       "VIR-TRADES,alpha=8.0,gamma=3.0,beta=1.6": (8.0, 1.6, 3.0)}
vir_settings = pytest.mark.parametrize("setting", VIR)
SATURATED = {"rtol": 1e-4, "atol": 1e-6}
EVERY_WEIGHT = {  # (logits, logits_adv, y, kappa) -> [B]
    **{f"vir {terms} {norm}": lambda z, z_adv, y, kappa, terms=terms, norm=norm: vir_weights(
        z, z_adv, y, 7.0, 0.007, 10.0, terms=terms, normalization=norm)
       for terms in ("both", "sv", "sd") for norm in ("none", "batch")},
    **{f"gairat {function} {lam}": lambda z, z_adv, y, kappa, f=function, a=lam: gairat_weights(
        kappa, 10, a, function=f)
       for function in ("tanh", "sigmoid", "discrete") for lam in (-5.0, -1.0, 0.0, math.inf)},
    **{f"mail {norm}": lambda z, z_adv, y, kappa, n=norm: mail_weights(z_adv, y, 10.0, -0.5, n)
       for norm in ("x3", "batch", "none")},
}
every_weight = pytest.mark.parametrize("weigh", EVERY_WEIGHT.values(), ids=EVERY_WEIGHT)


# The reference implementations' values

@dtypes
@golden("vir.json")
@vir_settings
def test_vir_weights_are_the_papers_formula(case, setting, dtype):
    logits, logits_adv, y = tensors(case, dtype, "logits_clean", "logits_adv")
    expected, (alpha, beta, gamma) = case["out"][setting], VIR[setting]
    weights = {terms: vir_weights(logits, logits_adv, y, alpha, beta, gamma, terms=terms)
               for terms in ("both", "sv", "sd")}
    assert_value(weights["both"], expected["w"], dtype)
    assert_value(weights["sv"], expected["S_v"], dtype)
    assert_value(weights["sd"], case["S_d"], dtype)
    rescaled = vir_weights(logits, logits_adv, y, alpha, beta, gamma, normalization="batch")
    # it divides by a sum as small as the divergences' rounding allows
    error = {torch.float64: 1e-9, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(rescaled.double(), torch.tensor(expected["w_sum_to_N"], dtype=torch.float64),
                               rtol=error, atol=error / 10)


@dtypes
@golden("vir.json")
@vir_settings
def test_vir_losses_are_the_papers_formula(case, setting, dtype):
    logits, logits_adv, y = tensors(case, dtype, "logits_clean", "logits_adv")
    expected, (alpha, beta, gamma) = case["out"][setting], VIR[setting]
    weights = vir_weights(logits, logits_adv, y, alpha, beta, gamma)
    assert_value((weights * cross_entropy(logits_adv, y)).mean(), expected["vir_at_loss_mean"], dtype)
    assert_value(trades_loss(logits, logits_adv, y, 5.0, weights).mean(),
                 expected["vir_trades_loss_mean,inv_lambda=5"], dtype)


@dtypes
@golden("gairat.json")
def test_gairat_weights_are_those_of_the_released_code(case, dtype):
    kappa = torch.tensor(case["kappa"]).to(dtype)
    for name, expected in case["out"].items():
        function, _, lam = name.partition(",lambda=")
        weights = gairat_weights(kappa, case["num_steps"], float(lam or 0), function=function.lower())
        if "nan" in expected["w_f64"]:  # the released code divides 0 by 0
            assert weights.isfinite().all()
        else:
            assert_value(weights, expected["w_f64"], dtype)


def test_gairat_loss_is_that_of_the_released_code():
    case = json.loads((GOLDEN / "gairat.json").read_text())["loss_example"]
    weights = gairat_weights(torch.tensor(case["kappa"]).long(), case["num_steps"], case["lambda"])
    losses = cross_entropy(torch.tensor(case["logits_adv"]), torch.tensor(case["labels"]))
    torch.testing.assert_close((weights * losses).mean(), torch.tensor(case["loss_f32"]),
                               rtol=1e-5, atol=1e-6)


@dtypes
@golden("mail.json")
def test_mail_weights_are_those_of_the_released_code(case, dtype):
    logits_adv, y = tensors(case, dtype, "logits_adv")
    names = [name for name in case["out"] if name.startswith("weights")]
    assert len(names) == 4
    assert_value(-probability_margin(logits_adv, y), case["out"]["PM_code_sign"]["f64"], dtype)
    for name in names:
        bias, slope = (float(part.split("=")[1]) for part in name.split(",")[1:])
        assert_value(mail_weights(logits_adv, y, slope, bias), case["out"][name]["w_times3_f64"], dtype)
        assert_value(mail_weights(logits_adv, y, slope, bias, "batch"),
                     case["out"][name]["derived_w_sum_to_N_f64"], dtype)
        assert_value(3 * mail_weights(logits_adv, y, slope, bias, "none"), case["out"][name]["w_times3_f64"],
                     dtype)


@dtypes
@golden("mail.json")
@pytest.mark.parametrize("base", ("mail_at", "mail_trades", "mail_mart"))
def test_mail_losses_are_those_of_the_released_code(case, base, dtype):
    logits, logits_adv, y = tensors(case, dtype, "logits_clean", "logits_adv")
    name, = (name for name in case["out"] if name.startswith(f"loss,{base},"))
    bias, slope, beta = (float(part.split("=")[1]) for part in name.split(",")[2:])
    weights, expected = mail_weights(logits_adv, y, slope, bias), case["out"][name]
    loss = {"mail_at": lambda: weights * cross_entropy(logits_adv, y) + 0 * logits.sum(),
            "mail_trades": lambda: trades_loss(logits, logits_adv, y, beta, weights),
            "mail_mart": lambda: mart_loss(logits, logits_adv, y, beta, weights)}[base]().mean()
    saturated = dtype == torch.float32 and base == "mail_mart" and "saturated" in case["name"]
    tolerance = SATURATED if saturated else None
    if tolerance:
        torch.testing.assert_close(loss.double(), torch.tensor(expected["loss_f64"], dtype=torch.float64),
                                   **tolerance)
    else:
        assert_value(loss, expected["loss_f64"], dtype)
    if case["grads_unique"] and "dloss_dlogits_adv" in expected:
        clean, adv = torch.autograd.grad(loss, (logits, logits_adv))
        assert_gradient(clean, expected["dloss_dlogits_clean"])
        assert_gradient(adv, expected["dloss_dlogits_adv"])


@dtypes
@golden("mart.json")
@pytest.mark.parametrize("beta", (5.0, 6.0))
def test_mart_loss_is_that_of_the_released_code(case, beta, dtype):
    logits, logits_adv, y = tensors(case, dtype, "logits_clean", "logits_adv")
    expected = case["out"][f"beta={beta}"]
    loss = mart_loss(logits, logits_adv, y, beta).mean()
    if dtype == torch.float32 and "saturated" in case["name"]:
        torch.testing.assert_close(loss.double(), torch.tensor(expected["loss_f64"], dtype=torch.float64),
                                   **SATURATED)
    else:
        assert_value(loss, expected["loss_f64"], dtype)
    if case["grads_unique"] and "dloss_dlogits_clean" in expected:
        clean, adv = torch.autograd.grad(loss, (logits, logits_adv))
        assert_gradient(clean, expected["dloss_dlogits_clean"])
        assert_gradient(adv, expected["dloss_dlogits_adv"])


# Limits

@dtypes
def test_unit_weights_recover_every_base_exactly(dtype):
    logits, logits_adv, y = sample(10, dtype=dtype)
    one = torch.ones(32, dtype=dtype)
    assert torch.equal(mart_loss(logits, logits_adv, y, 5.0, one), mart_loss(logits, logits_adv, y, 5.0))
    assert torch.equal(vir_weights(logits, logits_adv, y, 0.0, 1.0, 10.0), one)
    assert torch.equal(vir_weights(logits, logits, y, 7.0, 1.0, 10.0), one)  # the attack moved nothing
    assert torch.equal(gairat_weights(torch.arange(32) % 11, 10, math.inf), one.float())
    # all alike
    torch.testing.assert_close(gairat_weights(torch.full((32,), 4), 10, -1.0), one.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(mail_weights(logits_adv, y, 0.0, 0.3, "batch"), one, rtol=1e-6, atol=0)


@pytest.mark.parametrize("function", ("tanh", "sigmoid", "discrete"))
@pytest.mark.parametrize("num_steps", (1, 2, 7, 10, 40))
def test_gairat_weights_fall_with_kappa_and_have_mean_one(function, num_steps):
    weights = gairat_weights(torch.arange(num_steps + 1), num_steps, -1.0, function=function)
    assert (weights.diff() < 0).all()
    assert weights.mean().item() == pytest.approx(1.0, rel=1e-6)
    plain = gairat_weights(torch.arange(num_steps + 1).double(), num_steps, -1.0, function=function,
                           normalization="none")
    torch.testing.assert_close(with_mean_one(plain).float(), weights)


def test_gairat_tanh_has_the_papers_form():
    kappa = torch.arange(11).double()
    expected = (1 + torch.tanh(-1 + 5 * (1 - 2 * kappa / 10))) / 2
    torch.testing.assert_close(gairat_weights(kappa, 10, -1.0, normalization="none"), expected,
                               rtol=1e-9, atol=1e-15)


def test_mail_weight_is_half_its_largest_at_the_bias_and_falls_with_the_margin():
    probabilities = torch.tensor([[0.05, 0.55, 0.4],  # margins -.5, -.5, .3
                                  [0.25, 0.75, 0.0],
                                  [0.6, 0.3, 0.1]], dtype=torch.float64)
    weights = mail_weights(probabilities.log().clamp_min(-800), torch.tensor([0, 0, 0]), 10.0, -0.5)
    torch.testing.assert_close(weights[:2], torch.tensor([1.5, 1.5], dtype=torch.float64))
    assert weights[2] < 0.01


def test_vir_weighs_a_vulnerable_example_more():
    logits = torch.tensor([[4.0, 0.0], [0.0, 4.0], [4.0, 0.0]])
    logits_adv = torch.tensor([[0.0, 4.0], [0.0, 6.0], [3.9, 0.0]])
    sure, wrong, unmoved = vir_weights(logits, logits_adv, torch.zeros(3, dtype=torch.int64), 7.0, 0.007,
                                       10.0)
    assert unmoved == pytest.approx(0.007, abs=1e-4)
    assert wrong > sure > unmoved


def test_mart_weights_act_on_the_boosted_cross_entropy_alone():
    logits, logits_adv, y = sample(10, dtype=torch.float64)
    weights = torch.linspace(0, 3, 32, dtype=torch.float64)
    p, p_adv = logits.softmax(1), logits_adv.softmax(1)
    other = p_adv.masked_fill(torch.nn.functional.one_hot(y, 10).bool(), 0).amax(1)
    boosted = cross_entropy(logits_adv, y) - torch.log(1.0001 - other + 1e-12)
    missed = 1.0000001 - p.gather(1, y[:, None]).squeeze(1)
    expected = weights * boosted + 5.0 * missed * kl_divergence(logits_adv, logits)
    # log(p' + 1e-12)
    torch.testing.assert_close(mart_loss(logits, logits_adv, y, 5.0, weights), expected, rtol=1e-5, atol=1e-9)


@every_weight
@class_counts
def test_weights_are_finite_constants_for_extreme_logits_and_every_kappa(weigh, num_classes):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(2, (2, 66, num_classes), generator=generator)
    logits, logits_adv = (400.0 * bits - 200).requires_grad_()
    y, kappa = torch.randint(num_classes, (66,), generator=generator), torch.arange(66) % 11
    for z, z_adv in ((logits, logits_adv), (logits / 1e4, logits_adv / 1e4), (logits, logits)):
        weights = weigh(z, z_adv, y, kappa)
        assert weights.shape == (66,) and weights.dtype == torch.float32 and not weights.requires_grad
        assert weights.isfinite().all() and (weights >= 0).all()


@class_counts
def test_mart_loss_and_gradient_are_finite_for_extreme_logits(num_classes):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(2, (2, 64, num_classes), generator=generator)
    logits, logits_adv = (400.0 * bits - 200).requires_grad_()
    losses = mart_loss(logits, logits_adv, torch.randint(num_classes, (64,), generator=generator), 5.0)
    assert losses.isfinite().all()
    assert all(gradient.isfinite().all()
               for gradient in torch.autograd.grad(losses.sum(), (logits, logits_adv)))


@pytest.mark.parametrize("kappa", range(11))
@pytest.mark.parametrize("lam", (-50.0, -5.0, -1.0, 0.0, 5.0))
def test_a_batch_of_one_kappa_has_finite_weights(kappa, lam):
    for function in ("tanh", "sigmoid"):
        assert gairat_weights(torch.full((8,), kappa), 10, lam, function=function).isfinite().all()


@every_weight
@pytest.mark.parametrize("half", (torch.bfloat16, torch.float16))
def test_half_precision_logits_give_float32_weights(weigh, half):
    logits, logits_adv, y = sample(10, dtype=half)
    weights = weigh(logits, logits_adv, y, torch.arange(32) % 11)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, weigh(logits.float(), logits_adv.float(), y, torch.arange(32) % 11),
                               rtol=1e-6, atol=1e-7)
