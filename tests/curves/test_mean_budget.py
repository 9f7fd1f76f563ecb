"""curves/budget.py: accuracy under a mean budget against closed forms and a linear program; bands, brackets,
the command."""
import csv
import json
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from curves import store
from curves.budget import LEFT, Knapsack, columns_of
from curves.curve import Curve
from harness.datasets.batches import load_dataset
from harness.errors import UserError
from harness.evaluation.budget import at_budgets
from harness.evaluation.predictions import Predictions

INF = np.inf
BUDGETS = np.linspace(0, 1.2, 61)
distances = st.lists(st.one_of(st.just(0.0), st.just(INF), st.floats(0.01, 1)), min_size=1, max_size=25)


def sample(count=200, seed=0):
    """Distances of which some are 0 and some unknown."""
    random = np.random.default_rng(seed)
    found = random.gamma(4, 0.08, count)
    found[: count // 20], found[-count // 40:] = 0, INF
    return random.permutation(found)


# Closed forms

@pytest.mark.parametrize("order", (1, 2, 3.5))
def test_equal_distances_are_broken_in_proportion_to_the_budget(order):
    found = Knapsack(np.full(7, 0.4)).accuracy(BUDGETS, order)
    assert found == pytest.approx(np.maximum(0, 1 - (BUDGETS / 0.4) ** order), abs=1e-12)


def test_equal_distances_fall_at_once_when_each_has_the_budget():
    found = Knapsack(np.full(7, 0.4)).accuracy(np.array([0.0, 0.39, 0.4, 0.41]), INF)
    assert found.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("order", (1, 2))
def test_of_two_groups_the_nearer_one_falls_first(order):
    near, far, share = 0.1, 0.5, 0.3  # a share of the points is near
    found = Knapsack(np.repeat([far, near], [70, 30])).accuracy(BUDGETS, order)
    total = BUDGETS**order
    spent_on_near = np.minimum(total, share * near**order)
    broken = spent_on_near / near**order + np.minimum(1 - share, (total - spent_on_near) / far**order)
    assert found == pytest.approx(1 - broken, abs=1e-12)


def test_what_is_wrong_unattacked_costs_nothing_and_what_cannot_be_broken_stays():
    knapsack = Knapsack(np.array([0, 0, 0.3, INF]))
    for order in (1, 2, INF):
        found = knapsack.accuracy(np.array([0.0, 10.0]), order)
        assert found == pytest.approx([0.5, 0.25], abs=1e-12)
    assert knapsack.accuracy(np.array([0.3 / 8]), 1) == pytest.approx([0.5 - 0.5 / 4])  # half of the third
    for only, level in ((0.0, 0), (INF, 1)):
        assert Knapsack(np.full(3, only)).accuracy(BUDGETS, 2).tolist() == [level] * len(BUDGETS)


def test_a_growing_order_approaches_the_robustness_curve():
    # whoever breaks one of n points spends d^p <= n epsilon^p, so no point beyond n^(1/p) epsilon falls whole
    found, curve = Knapsack(sample()), Curve(sample())
    assert found.accuracy(BUDGETS, INF) == pytest.approx(1 - curve.at(BUDGETS), abs=1e-15)
    for order in (2, 8, 64):
        values = found.accuracy(BUDGETS, order)
        assert (values <= 1 - curve.at(BUDGETS) + 1e-12).all()
        assert (values >= 1 - curve.at(200 ** (1 / order) * BUDGETS) - 1 / 200 - 1e-12).all()
    gaps = [np.mean(1 - curve.at(BUDGETS) - found.accuracy(BUDGETS, order)) for order in (2, 8, 64)]
    assert gaps[0] > gaps[1] > gaps[2] and 0.02 > gaps[2] > 0


# Against a linear program

@pytest.mark.parametrize("order", (1, 2))
@pytest.mark.parametrize("seed", range(3))
def test_the_optimum_is_that_of_a_linear_program(order, seed):
    found = sample(60, seed)
    known = np.isfinite(found)
    accuracies = Knapsack(found).accuracy(BUDGETS, order)
    for budget, accuracy in zip(BUDGETS[::6], accuracies[::6]):
        # a share q_i in [0, 1] of each point's mass goes to its adversarial example
        best = linprog(-np.ones(known.sum()), A_ub=found[known][None] ** order, b_ub=[60 * budget**order],
                       bounds=(0, 1), options={"primal_feasibility_tolerance": 1e-10})
        assert accuracy == pytest.approx(1 + best.fun / 60, abs=1e-9)


@given(distances)
@settings(max_examples=150, deadline=None)
def test_it_falls_with_the_budget_and_rises_with_the_order(values):
    knapsack = Knapsack(np.array(values))
    found = [knapsack.accuracy(BUDGETS, order) for order in (1, 2, 3, INF)]
    clean = np.mean(np.array(values) > 0)
    assert all(curve[0] == pytest.approx(clean, abs=1e-12) for curve in found)
    assert all((np.diff(curve) <= 1e-12).all() for curve in found)
    # a budget of a higher mean is a smaller one
    assert all((low <= high + 1e-9).all() for low, high in pairwise(found))


@given(distances, st.sampled_from((1, 2, INF)), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_the_budget_that_leaves_an_accuracy_is_the_inverse(values, order, accuracy):
    knapsack = Knapsack(np.array(values))
    budget = knapsack.budget(accuracy, order)
    if budget is None:
        assert np.mean(np.isinf(values)) > accuracy
    else:
        assert knapsack.accuracy(np.array([budget * (1 + 1e-9)]), order)[0] <= accuracy + 1e-6
        if budget > 0:
            assert knapsack.accuracy(np.array([0.999 * budget]), order)[0] > accuracy - 1e-6


# Bands and brackets

@pytest.mark.parametrize("order", (1, 2, INF))
def test_a_resample_is_the_curve_of_the_points_drawn(order):
    found, random = np.sort(sample(50)), np.random.default_rng(3)
    counts = np.stack([np.bincount(random.integers(0, 50, 50), minlength=50) for _ in range(5)])
    curves = Knapsack(found).accuracies(BUDGETS, order, counts)
    for curve, count in zip(curves, counts):
        assert curve == pytest.approx(Knapsack(np.repeat(found, count)).accuracy(BUDGETS, order), abs=1e-12)


def test_the_bands_hold_the_curve_of_the_population_about_19_times_in_20():
    budgets, random = np.array([0.05, 0.15, 0.25]), np.random.default_rng(0)
    population = sample(20_000)
    for order in (1.0, 2.0):
        truth, inside = Knapsack(population).accuracy(budgets, order), []
        for _ in range(80):
            low, high = Knapsack(random.choice(population, 200)).bands(budgets, (order,), 0.95, 200, 1)[order]
            inside.append((low <= truth) & (truth <= high))
        assert 0.88 <= np.mean(inside) <= 0.99


def test_lower_bounds_prove_a_bracket_and_without_them_there_is_no_such_column():
    upper = sample()
    lower = np.where(np.isfinite(upper), 0.9 * upper, 0.5)
    found = columns_of(upper, lower, BUDGETS, (1.0, INF), num_resamples=100)
    for order, columns in found.items():
        assert (columns["certified"] <= columns["accuracy"] + 1e-12).all()
        assert (columns["lower"] <= columns["accuracy"]).all()
        assert (columns["accuracy"] <= columns["upper"]).all()
        tenth_more = Knapsack(upper).accuracy(BUDGETS[1:] / 0.9, order)
        finite = BUDGETS[1:] < 0.2  # before the points whose distance is unknown cost 0.5
        assert columns["certified"][1:][finite] == pytest.approx(tenth_more[finite], abs=1e-9)
    # a point without a bound may be broken for nothing
    some, none = np.where(np.arange(len(upper)) % 2, lower, 0), np.zeros_like(lower)
    assert columns_of(upper, some, BUDGETS, (1.0,), num_resamples=100)[1.0]["certified"][0] < 0.6
    assert "certified" not in columns_of(upper, none, BUDGETS, (1.0,), num_resamples=100)[1.0]


def test_all_of_it_takes_less_than_a_minute_for_ten_thousand_examples():
    started = time.process_time()
    random = np.random.default_rng(0)
    columns_of(random.exponential(size=10_000), np.zeros(10_000), np.linspace(0, 1, 101), (1.0, 2.0, INF),
               num_resamples=2_000)
    margin = torch.from_numpy(random.uniform(-1, 1, 10_000))
    at_budgets(Predictions((margin < 0).long(), margin.exp(), margin), torch.zeros(10_000).long(),
               (0.05, 0.2, 0.5))
    assert 3 * (time.process_time() - started) < 60  # there are three norms


# The command

@pytest.fixture
def budget(script):
    return partial(script, "generate_robustness_curves", "--command", "budget", "--num_resamples", 100)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two models' distances in l_inf and l_2 at the same points; lower bounds of the first in l_inf."""
    monkeypatch.chdir(tmp_path)
    points = load_dataset("digits", ".").test[slice(0, 40)]
    for seed, name in enumerate("ab"):
        results = store.Results.empty({"name": name, "data": "digits test"}, points, ("linf", "l2"), False)
        for norm, scale in (("linf", 1), ("l2", 4)):
            results.upper(norm)[:] = scale * sample(40, seed)
        results.lower("linf")[:] = np.where(np.isfinite(results.upper("linf")), results.upper("linf") / 2, 0)
        if name == "b":
            results.lower("linf")[:] = 0
        results.columns["status"][:] = store.OK
        results.save(Path(name))
    return Path("a"), Path("b")


def test_the_command_writes_every_curve_its_band_and_a_summary(folders, budget, capsys):
    budget("--results", *folders, "--orders", 1, 2, "--mean_budgets", 0.05, 0.1, "--format", "png", "--out",
           "out")
    assert {path.name for path in Path("out").iterdir()} == {"budget.csv", "budget.png", "summary.json",
                                                              "config.json"}
    rows = list(csv.DictReader(Path("out/budget.csv").read_text().splitlines()))
    assert list(rows[0]) == ["model", "norm", "p", "mean_budget", "accuracy", "lower", "upper", "certified"]
    assert len(rows) == 2 * 2 * 3 * 3 and {row["p"] for row in rows} == {"1", "2", "inf"}
    assert {row["certified"] != "" for row in rows if row["model"] == "b"} == {False}
    for row in rows:
        seed, scale = "ab".index(row["model"]), 1 if row["norm"] == "linf" else 4
        expected = Knapsack(scale * sample(40, seed)).accuracy([float(row["mean_budget"])], float(row["p"]))
        assert float(row["accuracy"]) == pytest.approx(expected[0], abs=1e-8)
        assert float(row["lower"]) <= float(row["accuracy"]) <= float(row["upper"])
        if row["model"] == "a" and row["norm"] == "linf":  # bounds of half the distance, 0 where unknown
            upper = sample(40, seed)
            proved = Knapsack(np.where(np.isfinite(upper), upper / 2, 0)).accuracy(
                [float(row["mean_budget"])], float(row["p"]))
            assert float(row["certified"]) == pytest.approx(proved[0], abs=1e-8)
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["points"] == {"a": 40, "b": 40}
    left = summary["mean_budget_that_leaves"]["b"]["l2"]["inf"]
    assert list(left) == [str(share) for share in LEFT]
    assert left["0.5"] == pytest.approx(Curve(4 * sample(40, 1)).quantile(0.5))
    assert f"{left['0.5']:.4f}" in capsys.readouterr().out


def test_without_named_budgets_the_grid_goes_to_the_largest_distance_of_all(folders, budget):
    budget("--results", *folders, "--orders", 1, "--no-plot", "--out", "out")
    rows = list(csv.DictReader(Path("out/budget.csv").read_text().splitlines()))
    largest = max(sample(40, seed)[np.isfinite(sample(40, seed))].max() for seed in (0, 1))
    linf = [float(row["mean_budget"]) for row in rows if row["norm"] == "linf" and row["model"] == "a"]
    assert max(linf) == pytest.approx(largest) and min(linf) == 0
    assert not Path("out/budget.png").exists()


def test_without_lower_bounds_the_file_has_no_column_for_them(folders, budget):
    budget("--results", "b", "--no-plot", "--out", "out")
    head = Path("out/budget.csv").read_text().splitlines()[0]
    assert head == "model,norm,p,mean_budget,accuracy,lower,upper"


@pytest.mark.parametrize(("flags", "says"), (
    (("--orders", 0.5), "--orders must be between 1 and 64, not 0.5"),
    (("--mean_budgets", -0.1), "--mean_budgets must be finite and at least 0, not -0.1"),
    ((), r"no distances\.npz")))
def test_what_does_not_fit_is_refused(budget, flags, says):
    with pytest.raises(UserError, match=says):
        budget(*flags)
