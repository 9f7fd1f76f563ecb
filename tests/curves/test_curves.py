"""The curve, its statistics, crossings, transfer across norms, and the measuring of distances."""
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from attacks.bim import bim_bisection
from curves import transfer
from curves.crossings import compare, stretches
from curves.curve import Curve
from curves.measure import Candidates, measure, nearest_of_another_class, norms_of
from curves.report import band, curve_points, pair, summarize
from curves.statistics import clopper_pearson, difference_half_width, dkw_half_width, mcnemar
from curves.toys import crossing_pair, sine_points

DISTANCES = st.lists(st.one_of(st.floats(0, 10), st.just(math.inf)), min_size=1, max_size=40)


# ---- the step function -------------------------------------------------------------------------------------

def test_the_value_at_a_jump_includes_it():
    curve = Curve(np.array([0.3, 0.1, 0.3, 0.2]))
    assert curve.at(0.1) == 0.25 and curve.at(np.nextafter(0.1, 0)) == 0
    assert curve.at(0.3) == 1 and curve.at(np.nextafter(0.3, 0)) == 0.5
    assert [part.tolist() for part in curve.steps()] == [[0, 0.1, 0.2, 0.3], [0, 0.25, 0.5, 1]]


def test_misclassified_points_are_at_zero_and_censored_ones_leave_the_curve_below_one():
    curve = Curve(np.array([0, 0, 0.5, np.inf]))
    assert curve.at(0) == 0.5 and curve.at(np.inf) == 0.75 and curve.at(1e300) == 0.75 and curve.censored == 1
    assert curve.jumps().tolist() == [0, 0.5]


@pytest.mark.parametrize("values", [[], [-0.1], [float("nan")]])
def test_what_is_no_distance_is_refused(values):
    with pytest.raises(ValueError):
        Curve(np.array(values))


@given(DISTANCES, st.floats(0, 12))
def test_the_curve_counts(values, t):
    assert Curve(np.array(values)).at(t) == sum(value <= t for value in values) / len(values)


@given(DISTANCES, st.floats(0.01, 1))
def test_a_quantile_is_the_first_place_that_reaches_its_share(values, share):
    curve = Curve(np.array(values))
    t = curve.quantile(share)
    assert t in values
    if math.isfinite(t):
        assert curve.at(t) >= share - 1e-9 and (t == 0 or curve.at(np.nextafter(t, 0)) < share)
    else:
        assert curve.at(np.inf) < share


@given(DISTANCES)
def test_the_area_is_that_under_the_robust_accuracy(values):
    curve, grid = Curve(np.array(values)), np.linspace(0, 5, 5001)
    assert curve.area(5.0) == pytest.approx(float(((1 - curve.at(grid[:-1])) * 0.001).sum()), abs=0.0011)


# ---- statistics --------------------------------------------------------------------------------------------

def test_the_band_has_the_published_half_widths():
    assert [round(dkw_half_width(n), 4) for n in (100, 1000, 10_000)] == [0.1358, 0.0429, 0.0136]
    assert dkw_half_width(10_000) == pytest.approx(0.01358, abs=5e-6)


def test_clopper_pearson_of_304_errors():
    low, high = clopper_pearson(304, 10_000)
    assert (round(float(low), 5), round(float(high), 5)) == (0.02712, 0.03395)


def test_clopper_pearson_at_its_ends_and_in_bulk():
    low, high = clopper_pearson(np.array([0, 10]), 10)
    assert low[0] == 0 and high[1] == 1
    assert high[0] == pytest.approx(1 - 0.025 ** (1 / 10)) and low[1] == pytest.approx(0.025 ** (1 / 10))
    with pytest.raises(ValueError):
        clopper_pearson(11, 10)


def test_mcnemar_is_the_exact_binomial_test():
    first = np.array([True] * 9 + [False] * 1 + [True] * 5)
    second = np.array([False] * 9 + [True] * 1 + [True] * 5)
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 10) / 2**10)  # 1 of 10 that differ, or fewer
    assert mcnemar(first, first) == 1


def test_the_band_covers_the_population_curve():
    random, n, half, held = np.random.default_rng(1), 200, dkw_half_width(200), 0
    for _ in range(1000):
        t = np.sort(random.uniform(size=n))  # the population curve of uniform distances is R(t) = t
        held += max(np.abs(np.arange(1, n + 1) / n - t).max(), np.abs(np.arange(n) / n - t).max()) <= half
    assert held >= 950


def test_the_bootstrap_band_covers_the_difference_and_shrinks_with_the_sample():
    t, held = np.linspace(0, 1.2, 60), 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        first = random.uniform(size=150)
        second = np.clip(first + random.normal(0.05, 0.05, 150), 0, None)
        gap = Curve(first).at(t) - Curve(second).at(t)
        large = np.random.default_rng(10_000).uniform(size=40_000)
        moved = np.clip(large + np.random.default_rng(2).normal(0.05, 0.05, 40_000), 0, None)
        truth = Curve(large).at(t) - Curve(moved).at(t)
        half_width = difference_half_width(first, second, t, num_resamples=300, seed=seed)
        held += np.abs(gap - truth).max() <= half_width
    assert held >= 52  # of 60 at 95 %: fewer has a probability below 1 %
    again = np.random.default_rng(0).uniform(size=(2, 1500))
    assert (difference_half_width(*again, t, num_resamples=200)
            < 0.5 * difference_half_width(*again[:, :150], t, num_resamples=200))


def test_the_bootstrap_is_one_of_pairs():
    values = np.random.default_rng(0).uniform(size=300)
    assert difference_half_width(values, values, np.linspace(0, 1, 2000), num_resamples=100) == 0
    wide = difference_half_width(values, values[::-1], np.linspace(0, 1, 2000), num_resamples=400)
    assert 0.03 < wide < 0.2


# ---- crossings ---------------------------------------------------------------------------------------------

def test_the_papers_toy_has_one_crossing_and_equal_areas():
    first, second = crossing_pair(4000)
    found = compare(first, second, num_resamples=200)
    supported = [crossing for crossing in found["crossings"] if crossing["supported"]]
    assert len(found["crossings"]) == len(supported) == 1
    assert supported[0]["at"] == pytest.approx(1.5, abs=1e-3)
    gaps = [part["gap"] for part in found["stretches"]]
    assert gaps == [0.5, -0.5] and all(part["p_value"] < 1e-9 for part in found["stretches"])
    assert [Curve(values).area() for values in (first, second)] == pytest.approx([1.5, 1.5], abs=1e-3)


def test_of_many_changes_by_chance_one_crossing_is_supported():
    random, n = np.random.default_rng(3), 3000
    first, second = random.uniform(0, 3, n), random.normal(1.5, 0.3, n).clip(0)  # they cross at 1.5
    found = compare(first, second, num_resamples=300)
    supported = [crossing for crossing in found["crossings"] if crossing["supported"]]
    assert len(supported) == 1 and supported[0]["at"] == pytest.approx(1.5, abs=0.05)
    assert supported[0]["after"] <= supported[0]["at"] <= supported[0]["before"]


def test_equal_models_have_no_stretch_and_other_points_are_refused():
    values = np.array([0, 1, 2, np.inf])
    assert (compare(values, values, num_resamples=100)
            == {"half_width": 0.0, "stretches": [], "crossings": [], "largest_gap": None})
    with pytest.raises(ValueError, match="the same"):
        compare(values, values[:2])


def test_a_stretch_ends_where_the_curves_meet():
    parts = stretches(np.array([1.0, 4.0]), np.array([2.0, 3.0]), 0.4)
    assert ([(part.start, part.end, part.gap, part.supported) for part in parts]
            == [(1, 2, 0.5, True), (3, 4, -0.5, True)])


# ---- reports -----------------------------------------------------------------------------------------------

def test_a_summary_counts_wrong_and_censored_points_apart():
    upper = np.array([0, 0.1, 0.3, np.inf])
    found = summarize(upper, np.array([0, 0.05, 0.1, 0.2]), (0.1, 0.3))
    assert (found["misclassified"], found["censored"], found["clean_error"]) == (1, 1, 0.25)
    assert (found["mean"] == pytest.approx(0.2) and found["area"] is None
            and found["quantiles"]["0.95"] is None)
    assert [point["R"] for point in found["thresholds"]] == [0.5, 0.75]
    assert found["thresholds"][0]["low"] < 0.5 < found["thresholds"][0]["high"] and found["lower_bounds"] == 3
    json.dumps(found, allow_nan=False)


def test_the_bracket_has_the_certified_curve_above_the_attacks():
    upper, lower = np.array([0, 0.1, 0.3, np.inf]), np.array([0, 0.05, 0.1, 0.2])
    columns = curve_points(upper, lower)
    assert (columns["R_certified"] >= columns["R"]).all() and {0.05, 0.2} <= set(columns["t"])
    assert "R_certified" not in curve_points(upper, np.zeros(4))
    assert all((columns["low"] <= columns["R"]) & (columns["R"] <= columns["high"]))


def test_the_pointwise_band_is_narrower():
    curve, t = Curve(np.random.default_rng(0).uniform(size=100)), np.linspace(0, 1, 50)
    (low, high), (wide_low, wide_high) = band(curve, t, "cp"), band(curve, t, "dkw")
    assert ((high - low) < (wide_high - wide_low) + 0.02).all()


def test_a_pair_is_tested_at_the_thresholds():
    found = pair(np.array([1.0, 1, 1, 5]), np.array([2.0, 2, 2, 5]), (1.0, 9.0), num_resamples=100)
    assert found["thresholds"] == [{"t": 1.0, "difference": 0.75, "p_value": 0.25},
                                   {"t": 9.0, "difference": 0.0, "p_value": 1.0}]


# ---- across norms ------------------------------------------------------------------------------------------

def test_rank_correlation_is_of_pairs_that_are_neither_wrong_nor_censored():
    first, second = np.array([0, 1, 2, 3, np.inf, 4]), np.array([0, 10, 20, 15, 1, 40])
    assert transfer.spearman(first, second) == pytest.approx(0.8)
    assert (transfer.spearman(first[:2], second[:2]) is None
            and transfer.spearman(np.ones(5), np.arange(1.0, 6)) is None)
    assert (set(transfer.correlations({"linf": first, "l2": second, "l1": second}))
            == {"linf-l2", "linf-l1", "l2-l1"})


def test_both_scales_are_the_factor_of_proportional_distances():
    linf = np.array([0.1, 0.3, 0.2, 0])
    assert transfer.scales(linf, 7 * linf) == pytest.approx({"quantile": 7, "paired": 7})
    assert transfer.scales(linf, np.zeros(4)) == {"quantile": None, "paired": None}
    assert transfer.image_scale(np.stack([np.ones((1, 2, 2)), np.zeros((1, 2, 2))])) == 2.0


# ---- measuring ---------------------------------------------------------------------------------------------

class Linear(nn.Module):
    """Two classes, z = (w . x + b, 0): the distances of interior points are |m| over the dual norms of w."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.25]))

    def forward(self, x):
        score = (x.flatten(1) - 0.5) @ self.weight + 0.02
        return torch.stack([score, torch.zeros_like(score)], 1)


def exact_adversaries(x, y, rows):
    """The closest points behind the boundary in each norm, from the closed form."""
    model = Linear()
    weight, score = model.weight.detach(), (model(x)[:, 0] * 1.0001)[:, None]
    steps = {"linf": weight.sign() / weight.abs().sum(), "l2": weight / weight.square().sum(),
             "l1": torch.zeros(4).index_fill_(0, weight.abs().argmax(), 1.0) / weight.abs().max()}
    found = {norm: x - (score * step).view_as(x) for norm, step in steps.items()}
    return Candidates(found, {norm: torch.zeros_like(y) for norm in found})


def points():
    x = 0.5 + 0.06 * torch.randn(40, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    y = Linear()(x).argmax(1)
    y[:3] = 1 - y[:3]
    return x, y


def test_measured_distances_of_a_linear_model_are_the_closed_form():
    (x, y), model = points(), Linear().eval()
    found = measure(model, x, y, ("linf", "l2", "l1"), exact_adversaries)
    margin, weight = model(x)[3:, 0].abs().double(), model.weight.detach().double()
    for norm, dual in (("linf", weight.abs().sum()), ("l2", weight.norm()), ("l1", weight.abs().max())):
        assert torch.allclose(found.distance[norm][3:], margin / dual, rtol=2e-4, atol=1e-6)
        assert (found.distance[norm][:3] == 0).all() and (found.winner[norm][:3] == -1).all()
        # never another norm's
        assert torch.equal(found.distance[norm], norms_of(found.x_adv[norm].double() - x.double())[norm])
        assert (found.margin[norm] < 0).all()
    assert ((found.distance["linf"] <= found.distance["l2"]).all()
            and (found.distance["l2"] <= found.distance["l1"]).all())


def test_a_candidate_that_is_not_adversarial_does_not_count():
    x, y = points()
    cheat = measure(Linear().eval(), x, y, ("l2",),
                    lambda x, y, rows: Candidates({"l2": x.clone()}, {"l2": y * 0}))
    assert (torch.isinf(cheat.distance["l2"][3:]).all() and torch.equal(cheat.x_adv["l2"], x)
            and (cheat.winner["l2"] == -1).all())


def test_a_candidate_outside_the_box_is_clamped_before_it_is_measured():
    x, y = points()
    found = measure(Linear().eval(), x, y, ("linf",), lambda x, y, rows: Candidates(
        {"linf": x - 9 * torch.sign(Linear()(x)[:, :1] * Linear().weight.detach()).view_as(x)},
        {"linf": y * 0}))
    assert (bool(((found.x_adv["linf"] >= 0) & (found.x_adv["linf"] <= 1)).all())
            and float(found.distance["linf"].max()) <= 1)


def test_a_perturbation_found_for_one_norm_counts_in_the_others():
    x, y = points()
    alone = measure(Linear().eval(), x, y, ("l2",), lambda *a: exact_adversaries(*a))
    other = measure(Linear().eval(), x, y, ("l2",),
                    lambda *a: Candidates({"linf": exact_adversaries(*a).x_adv["linf"]},
                                         {"linf": a[1] * 0}))
    assert torch.isfinite(other.distance["l2"]).all() and (other.distance["l2"] >= alone.distance["l2"]).all()


def test_attacks_begin_at_the_nearest_image_that_has_another_class():
    images, pred = torch.tensor([[0.0], [0.2], [0.9], [1.0]]).view(4, 1, 1, 1), torch.tensor([0, 0, 1, 2])
    x, y = torch.tensor([[0.5], [0.94], [0.1]]).view(3, 1, 1, 1), torch.tensor([0, 1, 0])
    assert torch.equal(nearest_of_another_class(x, y, images, pred).flatten(), torch.tensor([0.9, 1.0, 0.9]))
    assert torch.equal(nearest_of_another_class(x, y * 0, images, pred * 0), x)


def test_bim_bisection_reaches_the_linear_distance():
    (x, y), model = points(), Linear().eval()
    x_adv, distance = bim_bisection(model, x, y)
    assert torch.allclose(distance[3:], model(x)[3:, 0].abs() / model.weight.abs().sum(), rtol=0.01)
    assert (distance[:3] == 0).all() and torch.equal(x_adv[:3], x[:3])
    assert (model(x_adv).argmax(1) != y).all()


def test_bim_bisection_without_success_gives_back_the_image():
    x, y = points()
    deaf = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    nn.init.zeros_(deaf[1].weight)
    deaf[1].bias.data = torch.tensor([1.0, 0.0])
    x_adv, distance = bim_bisection(deaf.eval(), x, y * 0, num_growths=3, num_bisections=2)
    assert torch.isinf(distance).all() and torch.equal(x_adv, x)


# ---- toys --------------------------------------------------------------------------------------------------

def test_points_beside_a_sine_are_at_distance_one():
    sampled, found = sine_points(1500)
    assert sampled.shape == (1500, 2) and ((found["l2"] > 0.999) & (found["l2"] < 1.001)).all()
    assert ((found["linf"] <= found["l2"]).all() and (found["l2"] <= found["l1"]).all()
            and (found["l1"] <= 2 * found["linf"] + 1e-3).all())


def test_the_package_imports_no_attack_and_no_model():
    for path in (ROOT / "curves").glob("*.py"):
        imported = [line.split()[1].split(".")[0] for line in path.read_text().splitlines()
                    if line.startswith(("import ", "from "))]
        assert not {"attacks", "models"} & set(imported), path
