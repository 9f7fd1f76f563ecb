"""harness/evaluation/budget.py: the worst distribution within a KL budget, against scipy; ties and limits;
the loss's worst case and CVaR; intervals."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, linprog, minimize, minimize_scalar
from scipy.special import logsumexp

from harness.evaluation.budget import accuracy_at_budget, at_budgets, cvar, loss_at_budget, tilt
from harness.evaluation.metrics import weighted_accuracy, wilson_interval
from harness.evaluation.predictions import Predictions

BUDGETS = (1e-6, 0.01, 0.05, 0.2, 0.5, 2.0)
margins = st.lists(st.floats(-1, 1).map(lambda m: round(m, 3)), min_size=2, max_size=30)


def margins_of(count, seed=0, share_correct=0.9):
    rng = np.random.default_rng(seed)
    right = rng.random(count) < share_correct
    return np.where(right, rng.beta(3, 1, count), -rng.beta(1, 3, count))


def measured(margin, budget):
    margin = torch.as_tensor(margin, dtype=torch.float64)
    return accuracy_at_budget(margin > 0, margin, budget)


def weights_at(values, alpha):
    return np.exp(-alpha * values - logsumexp(-alpha * values))


def divergence(weights):
    used = weights[weights > 0]
    return float((used * np.log(len(weights) * used)).sum())


def dual(values, budget):
    """sup { sum_i w_i v_i : KL(w || uniform) <= budget } by the dual in one variable, its logarithm."""
    def value(log_t):
        t = math.exp(log_t)
        return t * budget + t * (logsumexp(values / t) - math.log(len(values)))
    start = min(np.linspace(-8, 12, 400), key=value)
    return minimize_scalar(value, bracket=(start - 0.1, start, start + 0.1), tol=1e-13).fun


# The tilt

@pytest.mark.parametrize("budget", BUDGETS)
def test_alpha_and_accuracy_are_those_that_a_root_finder_gets(budget):
    margin = margins_of(5000)
    alpha = brentq(lambda a: divergence(weights_at(margin, a)) - budget, 0, 1e4, xtol=1e-15, rtol=1e-15)
    found = measured(margin, budget)
    assert found["alpha"] == pytest.approx(alpha, rel=1e-8)
    assert found["accuracy"] == pytest.approx(weights_at(margin, alpha)[margin > 0].sum(), abs=1e-9)
    assert found["effective_size"] == pytest.approx(1 / (weights_at(margin, alpha) ** 2).sum(), rel=1e-8)


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_mean_margin_is_the_optimum_of_the_dual(budget):
    margin = margins_of(1000, seed=1)
    weights, _ = tilt(torch.tensor(margin), budget)
    assert float(weights @ torch.tensor(margin)) == pytest.approx(-dual(-margin, budget), abs=1e-9)
    assert divergence(weights.numpy()) == pytest.approx(budget, abs=1e-12)


@pytest.mark.parametrize("budget", (0.05, 0.3))
def test_no_distribution_that_an_optimiser_finds_has_a_lower_mean_margin(budget):
    margin = np.array([-0.7, -0.2, 0.1, 0.3, 0.5, 0.9, 0.95])
    start = np.full(7, 1 / 7)
    found = minimize(lambda w: w @ margin, start, method="SLSQP", bounds=[(1e-12, 1)] * 7,
                     options={"ftol": 1e-15, "maxiter": 500}, constraints=[
                         {"type": "eq", "fun": lambda w: w.sum() - 1},
                         {"type": "ineq", "fun": lambda w: budget - divergence(w)}])
    ours = float(tilt(torch.tensor(margin), budget)[0] @ torch.tensor(margin))
    assert ours == pytest.approx(found.fun, abs=1e-7) and ours <= found.fun + 1e-9


@pytest.mark.parametrize("budget", (0.05, 0.3))
def test_the_worst_case_of_the_errors_themselves_is_a_function_of_how_many_there_are(budget):
    wrong = np.array([1.0, 0, 0, 1, 0, 0, 0, 0, 1, 0])
    found = minimize(lambda w: -w @ wrong, np.full(10, 0.1), method="SLSQP", bounds=[(1e-12, 1)] * 10,
                     options={"ftol": 1e-15, "maxiter": 500}, constraints=[
                         {"type": "eq", "fun": lambda w: w.sum() - 1},
                         {"type": "ineq", "fun": lambda w: budget - divergence(w)}])
    error = wrong.mean()
    most = brentq(lambda q: q * math.log(q / error) + (1 - q) * math.log((1 - q) / (1 - error)) - budget,
                  error, 1 - 1e-12)
    assert -found.fun == pytest.approx(most, abs=1e-6)


@pytest.mark.parametrize("alpha", (0.1, 1.0, 1.5, 2.0, 6.0))
def test_the_budget_that_an_alpha_spends_gives_that_alphas_accuracy(alpha):
    margin = margins_of(2000, seed=2)
    expected = weighted_accuracy(torch.tensor(margin > 0), torch.tensor(margin), alpha)
    found = measured(margin, divergence(weights_at(margin, alpha)))
    assert found["alpha"] == pytest.approx(alpha, rel=1e-9)
    assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-9)
    assert found["effective_size"] == pytest.approx(expected["effective_size"], rel=1e-9)


def test_no_budget_gives_the_plain_accuracy_and_its_interval():
    margin = margins_of(300)
    found = measured(margin, 0.0)
    plain = weighted_accuracy(torch.tensor(margin > 0), torch.tensor(margin), 0.0)
    assert found["alpha"] == 0 and found["accuracy"] == pytest.approx(plain["accuracy"], abs=1e-12)
    assert found["ci95"] == pytest.approx(plain["ci95"], abs=1e-12)


@given(margins)
@settings(max_examples=150, deadline=None)
def test_accuracy_and_mean_margin_never_rise_with_the_budget_and_no_more_than_it_is_spent(values):
    margin, budgets = np.array(values), (0.0, *BUDGETS, 20.0)
    found = [measured(margin, budget) for budget in budgets]
    weights = [tilt(torch.tensor(margin), budget)[0].numpy() for budget in budgets]
    assert all(np.diff([entry["accuracy"] for entry in found]) <= 1e-12)
    alphas = [entry["alpha"] for entry in found]
    assert alphas == sorted(alphas)
    assert all(np.diff([w @ margin for w in weights]) <= 1e-12)
    assert all(divergence(w) <= budget + 1e-9 and w.sum() == pytest.approx(1, abs=1e-12)
               for w, budget in zip(weights, budgets))


@pytest.mark.parametrize(("margin", "budget", "alpha", "accuracy"), (
    ([-0.5, -0.5, 0.2, 0.9], math.log(2), math.inf, 0.0),   # uniform on the two minima
    ([-0.5, -0.5, 0.2, 0.9], 5.0, math.inf, 0.0),
    ([0.1, 0.1, 0.2, 0.9], 5.0, math.inf, 1.0),             # there is no error to find
    ([0.4, 0.4, 0.4], 0.2, math.inf, 1.0),                  # nothing to choose among
    ([-0.3], 0.2, math.inf, 0.0)))
def test_a_budget_beyond_the_last_alpha_gives_the_limit(margin, budget, alpha, accuracy):
    found = measured(margin, budget)
    lowest = sum(value == min(margin) for value in margin)
    assert (found["alpha"], found["accuracy"]) == (alpha, accuracy)
    assert found["effective_size"] == pytest.approx(lowest)
    assert found["ci95"] == pytest.approx(wilson_interval(accuracy, lowest))


def test_two_values_have_a_closed_form():
    # a share q of weight on the minimum of two: KL = q log 2q + (1 - q) log 2(1 - q), alpha = logit(q) / 0.6
    share = 0.8
    budget = share * math.log(2 * share) + (1 - share) * math.log(2 * (1 - share))
    found = measured([-0.1, 0.5], budget)
    assert found["accuracy"] == pytest.approx(1 - share, abs=1e-12)
    assert found["alpha"] == pytest.approx(math.log(share / (1 - share)) / 0.6, rel=1e-12)


def test_a_budget_just_below_the_limit_is_found():
    margin = np.array([-1.0, -1.0 + 1e-9, 0.5, 0.9])
    found = measured(margin, math.log(4) - 1e-6)
    assert found["alpha"] > 1e9 and found["accuracy"] == 0
    weights, alpha = tilt(torch.tensor(margin), math.nextafter(math.log(4), 0))
    assert weights[0] == pytest.approx(1, abs=1e-9) and alpha > 1e9


def test_margins_far_apart_in_size_and_float32_are_taken_as_they_are():
    loss = torch.tensor([1e-30, 1e-8, 3.0, 90.0, 1e4], dtype=torch.float32)
    assert loss_at_budget(loss, 0.5) == pytest.approx(dual(loss.double().numpy(), 0.5), rel=1e-9)


# The loss

@pytest.mark.parametrize("budget", (0.0, *BUDGETS))
def test_the_losses_worst_mean_is_the_optimum_of_the_dual(budget):
    loss = np.random.default_rng(0).gamma(0.3, 2.0, 1000)
    expected = dual(loss, budget) if budget else loss.mean()
    assert loss_at_budget(torch.tensor(loss), budget) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("count", "share"), ((50, 0.1), (47, 0.1), (33, 0.01), (7, 1.0), (1, 0.5)))
def test_cvar_is_the_optimum_of_a_linear_program(count, share):
    loss = np.random.default_rng(count).exponential(size=count)
    found = linprog(-loss, A_eq=np.ones((1, count)), b_eq=[1], bounds=(0, 1 / (share * count)))
    assert cvar(torch.tensor(loss), share) == pytest.approx(-found.fun, abs=1e-9)


def test_cvar_of_a_whole_number_of_examples_is_their_mean_and_of_all_the_mean():
    loss = torch.arange(10.0)
    assert cvar(loss, 0.3) == pytest.approx(8.0) and cvar(loss, 1.0) == pytest.approx(4.5)
    assert cvar(torch.full((9,), 2.5), 0.37) == pytest.approx(2.5)


# What the report takes

def test_a_report_has_every_budget_once_and_none_where_no_alpha_spends_it():
    margin = torch.tensor([-0.4, 0.3, 0.6, 0.9], dtype=torch.float64)
    y = torch.zeros(4, dtype=torch.int64)
    found = Predictions((margin < 0).long(), 1 - margin, margin)
    limited, more = at_budgets(found, y, (0.2, 0.2, 0, 3))
    assert list(limited) == list(more["alpha_of_kl"]) == list(more["loss_kl"]) == ["0.2", "0.0", "3.0"]
    assert more["alpha_of_kl"]["0.0"] == 0 and more["alpha_of_kl"]["3.0"] is None
    assert more["loss_kl"] == {"0.2": pytest.approx(1 - float(tilt(margin, 0.2)[0] @ margin), abs=1e-6),
                               "0.0": 0.65, "3.0": 1.4}
    assert more["loss_cvar"] == {"0.1": 1.4, "0.01": 1.4}


@pytest.mark.parametrize("budget", (0.05, 0.2, 0.5))
@pytest.mark.parametrize("share_correct", (0.9, 0.75))
def test_the_interval_covers_the_accuracy_of_the_population_19_times_in_20(share_correct, budget):
    population, rng = margins_of(100_000, 5, share_correct), np.random.default_rng(6)
    truth = measured(population, budget)["accuracy"]
    intervals = [measured(rng.choice(population, 500), budget)["ci95"] for _ in range(300)]
    assert 0.92 <= np.mean([low <= truth <= high for low, high in intervals]) <= 0.985
