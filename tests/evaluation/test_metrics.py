"""Weighted accuracy, its interval and its effective size, against formulas and by simulation;
averages and weights over an epoch."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.evaluation.budget import accuracy_at_budget
from harness.evaluation.metrics import (
    WEIGHT_EDGES,
    Means,
    WeightStatistics,
    paired_half_width,
    weighted_accuracy,
    wilson_interval,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "zeng.json").read_text())["cases"]
# sum_i w_i 1[correct_i] / sum_i w_i of the first golden case, in float64 from the released code's weights
WEIGHTED = {0.1: 0.41115333739902593, 0.5: 0.3121038294539353, 1.0: 0.20975718758243314,
            2.0: 0.0848192079243183, 5.0: 0.004925956483163526}
Z = 1.959963984540054

quick = settings(max_examples=100, deadline=None, derandomize=True)
margins = st.lists(st.floats(-1, 1), min_size=1, max_size=40)


def measured(margin, alpha, correct=None):
    """weighted_accuracy of margins, correct where they are positive unless said otherwise."""
    margin = torch.tensor(margin, dtype=torch.float64)
    return weighted_accuracy(margin > 0 if correct is None else torch.tensor(correct), margin, alpha)


def formula(margin, alpha):
    """A and (sum w)^2 / sum w^2 in NumPy, as they are written."""
    margin = np.asarray(margin, dtype=np.float64)
    weights = np.exp(-alpha * margin)
    return (weights * (margin > 0)).sum() / weights.sum(), weights.sum() ** 2 / (weights**2).sum()


# The accuracy

def test_three_examples_by_hand():
    # weights e^-1, e^-0.5, e^1: the two correct ones hold (e^-1 + e^-0.5) of (e^-1 + e^-0.5 + e^1)
    expected = (math.exp(-1) + math.exp(-0.5)) / (math.exp(-1) + math.exp(-0.5) + math.exp(1))
    assert measured([0.5, 0.25, -0.5], 2.0)["accuracy"] == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_the_accuracy_is_that_of_the_reference_weights(case):
    margin = torch.tensor(case["margin_f64"], dtype=torch.float64)
    correct = torch.tensor(case["logits_adv"]).double().argmax(1) == torch.tensor(case["labels"])
    for name, values in case["out"].items():
        weights = np.array(values["w_f64"])
        expected = (weights * correct.numpy()).sum() / weights.sum()
        assert (weighted_accuracy(correct, margin, float(name.partition("=")[2]))["accuracy"]
                == pytest.approx(expected, rel=1e-12))


@pytest.mark.parametrize(("alpha", "expected"), WEIGHTED.items())
def test_the_accuracy_is_the_known_one(alpha, expected):
    assert measured(GOLDEN[0]["margin_f64"], alpha)["accuracy"] == pytest.approx(expected, rel=1e-12)


@quick
@given(margins, st.floats(0, 20))
def test_the_accuracy_and_the_effective_size_follow_their_formulas(margin, alpha):
    found, (accuracy, effective) = measured(margin, alpha), formula(margin, alpha)
    assert found["accuracy"] == pytest.approx(accuracy, rel=1e-9, abs=1e-12)
    assert found["effective_size"] == pytest.approx(effective, rel=1e-9)


@quick
@given(margins)
def test_alpha_zero_is_the_plain_accuracy_with_its_wilson_interval(margin):
    found, accuracy = measured(margin, 0.0), sum(m > 0 for m in margin) / len(margin)
    assert found["accuracy"] == pytest.approx(accuracy, abs=1e-14)
    assert found["ci95"] == pytest.approx(wilson_interval(accuracy, len(margin)), abs=1e-12)
    assert found["effective_size"] == pytest.approx(len(margin), rel=1e-12)


@quick
@given(margins, st.floats(0, 50), st.floats(0, 50))
def test_the_accuracy_never_rises_with_alpha(margin, one, other):
    assert (measured(margin, max(one, other))["accuracy"]
            <= measured(margin, min(one, other))["accuracy"] + 1e-12)


def test_the_accuracy_falls_with_alpha_where_the_margins_differ():
    accuracies = [measured([0.9, 0.8, 0.1, -0.2, -0.7], alpha)["accuracy"] for alpha in (0, 0.5, 1, 2, 5)]
    assert accuracies == sorted(accuracies, reverse=True) and len(set(accuracies)) == 5


@quick
@given(margins, st.floats(0, 20), st.randoms(use_true_random=False))
def test_the_order_of_the_examples_changes_nothing(margin, alpha, random):
    shuffled = random.sample(margin, len(margin))
    first, second = measured(margin, alpha), measured(shuffled, alpha)
    assert first["accuracy"] == pytest.approx(second["accuracy"], abs=1e-12)
    assert first["ci95"] == pytest.approx(second["ci95"], abs=1e-9)


def test_it_is_one_sum_and_not_a_mean_of_batch_means():
    easy, hard = [0.9, 0.9, 0.8, -0.1], [0.1, -0.9, -0.9, -0.8]
    batch_means = [measured(part, 2.0)["accuracy"] for part in (easy, hard)]
    whole = measured(easy + hard, 2.0)["accuracy"]
    assert whole == pytest.approx(formula(easy + hard, 2.0)[0], rel=1e-12)
    assert abs(whole - np.mean(batch_means)) > 0.1


def test_equal_margins_leave_the_plain_accuracy_at_every_alpha():
    found = measured([0.3] * 8, 7.0, correct=[True] * 6 + [False] * 2)
    assert found["accuracy"] == pytest.approx(0.75) and found["effective_size"] == pytest.approx(8)


@pytest.mark.parametrize("alpha", (1e3, 1e6, 1e300))
@pytest.mark.parametrize(("margin", "expected"), (([1.0, 0.5, -1.0], 0.0), ([1.0, 0.5, 0.2], 1.0)))
def test_a_huge_alpha_leaves_the_smallest_margin_and_no_overflow(margin, expected, alpha):
    found = measured(margin, alpha)
    assert found["accuracy"] == expected and found["effective_size"] == pytest.approx(1.0)
    assert all(math.isfinite(bound) for bound in found["ci95"])


def test_the_sum_is_in_float64():
    margin = torch.tensor([0.7, 0.1, -0.3], dtype=torch.float32).repeat(1000)
    assert (weighted_accuracy(margin > 0, margin, 3.0)["accuracy"]
            == pytest.approx(formula(margin.double(), 3.0)[0], rel=1e-13))


# Effective size and interval

@quick
@given(margins, st.floats(0, 50))
def test_the_effective_size_lies_between_1_and_the_number_of_examples(margin, alpha):
    assert 1 - 1e-9 <= measured(margin, alpha)["effective_size"] <= len(margin) + 1e-9


@quick
@given(margins, st.floats(0, 50))
def test_the_interval_lies_in_0_to_1_around_the_accuracy(margin, alpha):
    found = measured(margin, alpha)
    low, high = found["ci95"]
    assert 0 <= low <= found["accuracy"] + 1e-12 and found["accuracy"] - 1e-12 <= high <= 1 and low < high


@pytest.mark.parametrize(("hits", "count", "expected"), (
    (0, 10, (0.0, 0.2775328)), (10, 10, (0.7224672, 1.0)), (50, 100, (0.4038315, 0.5961685)),
    (1, 1, (0.2065493, 1.0)), (99, 100, (0.9455138, 0.9982326))))
def test_the_wilson_interval_has_its_known_values(hits, count, expected):
    assert wilson_interval(hits / count, count) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("accuracy", "count"),
                         ((0.0, 7), (1.0, 7), (0.3, 10), (0.9, 12.5), (0.5, 10_000), (0.123, 333)))
def test_the_wilson_interval_solves_its_equation(accuracy, count):
    # (accuracy - p)^2 = z^2 p (1 - p) / count
    expected = sorted(np.roots([1 + Z**2 / count, -2 * accuracy - Z**2 / count, accuracy**2]))
    assert wilson_interval(accuracy, count) == pytest.approx(expected, abs=1e-9)


def test_the_interval_of_an_accuracy_of_1_is_wilsons_with_the_effective_size():
    found = measured([0.9, 0.5, 0.1, 0.05], 4.0)
    assert found["accuracy"] == 1.0
    assert found["ci95"] == pytest.approx(wilson_interval(1.0, formula([0.9, 0.5, 0.1, 0.05], 4.0)[1]),
                                          abs=1e-12)


@pytest.mark.parametrize("alpha", (0.5, 1.0, 3.0))
def test_the_interval_is_wilsons_with_the_trials_that_give_the_variance_of_the_ratio(alpha):
    margin = np.array([0.9] * 80 + [0.4] * 30 + [-0.1] * 20 + [-0.6] * 5)
    weights, accuracy = np.exp(-alpha * margin), formula(margin, alpha)[0]
    variance = (weights**2 * ((margin > 0) - accuracy) ** 2).sum() / weights.sum() ** 2
    trials = accuracy * (1 - accuracy) / variance
    assert trials < 0.9 * len(margin)
    assert measured(margin, alpha)["ci95"] == pytest.approx(wilson_interval(accuracy, trials), abs=1e-9)


def coverage(share_correct, alpha):
    """How often, of 400 samples of 300 examples, the interval holds the weighted accuracy
    of the population."""
    rng = np.random.default_rng(5)
    right = rng.random(100_000) < share_correct
    population = np.where(right, rng.beta(2, 1, 100_000), -rng.beta(1, 2, 100_000))
    truth = formula(population, alpha)[0]
    intervals = [measured(rng.choice(population, 300), alpha)["ci95"] for _ in range(400)]
    return np.mean([low <= truth <= high for low, high in intervals])


@pytest.mark.parametrize("alpha", (0.0, 1.0, 2.0))
# with 0.3 the weights make the estimate steadier than a proportion of 300
@pytest.mark.parametrize("share_correct", (0.9, 0.75, 0.3))
def test_the_interval_covers_the_accuracy_of_the_population_19_times_in_20(share_correct, alpha):
    assert 0.92 <= coverage(share_correct, alpha) <= 0.98


# Averages of an epoch

def test_means_weigh_examples_equally_over_uneven_batches():
    means, values = Means(), torch.tensor([1.0, 2.0, 3.0, 10.0])
    for part in (values[:3], values[3:]):
        means.add(loss=part, hit=part > 2)
    assert means.compute() == {"loss": 4.0, "hit": 0.5}


def test_means_of_two_processes_are_those_of_one():
    means = Means()
    means.add(loss=torch.tensor([1.0, 3.0]))
    other = torch.tensor([11.0, 1.0])  # its sum and count
    assert means.compute(lambda values: values + other) == {"loss": 5.0}


def test_means_of_nothing_are_nothing():
    assert Means().compute() == {}


def test_means_keep_no_graph():
    means = Means()
    means.add(loss=torch.ones(2, requires_grad=True) * 2)
    assert not means.sums["loss"].requires_grad


# The instance weights of an epoch

def weights_of(count, num_classes, seed=0):
    """Instance weights over ten decades, one of them 0, and labels that leave the last class out."""
    rng = np.random.default_rng(seed)
    weights = torch.tensor(10 ** rng.uniform(-6, 4, count), dtype=torch.float32)
    weights[count // 2] = 0
    return weights, torch.tensor(rng.integers(0, num_classes - 1, count))


def statistics_of(*batches, num_classes):
    statistics = WeightStatistics(num_classes, torch.device("cpu"))
    for weights, y in batches:
        statistics.add(weights, y)
    return statistics


def column(row, name):
    return [value for key, value in row.items() if key.startswith(f"{name}_")]


@pytest.mark.parametrize("num_classes", (2, 10, 200))
def test_the_weights_of_an_epoch_are_those_that_numpy_finds(num_classes):
    weights, y = weights_of(2000, num_classes)
    row = statistics_of(*zip(weights.split(300), y.split(300)), num_classes=num_classes).compute()
    w, k = weights.double().numpy(), y.numpy()
    sums, counts = np.bincount(k, w, num_classes), np.bincount(k, minlength=num_classes)
    edges = np.float32([-np.inf, *WEIGHT_EDGES[1:-1], np.inf])
    assert (counts[-1] == 0 and row[f"class_{num_classes - 1}"] is None
            and row[f"share_{num_classes - 1}"] == 0)
    assert column(row, "class")[:-1] == pytest.approx((sums[:-1] / counts[:-1]).tolist(), rel=2e-5)
    assert column(row, "share") == pytest.approx((100 * sums / sums.sum()).tolist(), rel=2e-5)
    assert column(row, "bin") == np.histogram(weights.numpy(), edges)[0].tolist()


def test_the_row_is_flat_and_in_order():
    row = statistics_of((torch.ones(4), torch.tensor([0, 0, 1, 2])), num_classes=3).compute()
    assert list(row) == [f"{name}_{k}" for name, count in (("class", 3), ("share", 3), ("bin", 60))
                         for k in range(count)]
    assert (column(row, "class") == [1, 1, 1] and column(row, "share") == [50, 25, 25]
            and sum(column(row, "bin")) == 4)


@pytest.mark.parametrize(("weight", "place"), (
    (0.0, 0), (1e-30, 0), (WEIGHT_EDGES[0], 0), (WEIGHT_EDGES[1], 1), (0.99, 39), (1.0, 40), (1.25, 40),
    (1.26, 41), (99.9, 59), (100.0, 59), (1e30, 59), (math.inf, 59)))
def test_a_weight_has_its_bin_and_what_lies_beyond_the_last_one(weight, place):
    bins = column(statistics_of((torch.tensor([weight]), torch.tensor([0])), num_classes=2).compute(), "bin")
    assert len(bins) == 60 and bins.index(1) == place and sum(bins) == 1


def test_the_bins_are_logarithmic():
    assert (len(WEIGHT_EDGES) == 61
            and (WEIGHT_EDGES[0], WEIGHT_EDGES[40], WEIGHT_EDGES[-1]) == (1e-4, 1.0, 1e2))
    np.testing.assert_allclose(np.diff(np.log10(WEIGHT_EDGES)), 0.1)


def test_the_weights_of_two_processes_are_those_of_one():
    weights, y = weights_of(500, 8)
    whole = statistics_of((weights, y), num_classes=7)
    first, second = (statistics_of((weights[part], y[part]), num_classes=7)
                     for part in (slice(0, 180), slice(180, None)))
    seen = []

    def reduce(values):
        seen.append(values.ndim)
        return values.add_(second.totals)  # in place, as an all-reduce

    row = first.compute(reduce)
    assert row == pytest.approx(whole.compute(), rel=1e-5) and seen == [1]
    # what the processes summed has not come back into the sums of one of them
    assert first.compute(reduce) == row


def test_a_process_without_weights_takes_part_in_the_sum():
    statistics, calls = statistics_of(num_classes=3), []
    assert statistics.compute() == {}
    other = statistics_of((torch.ones(2), torch.tensor([0, 1])), num_classes=3)
    assert (statistics.compute(lambda values: calls.append(1) or values + other.totals) == other.compute()
            and calls == [1])


@pytest.mark.parametrize("weight", (0.0, math.inf))
def test_a_total_that_cannot_be_shared_out_gives_no_shares_and_no_nan(weight):
    row = statistics_of((torch.full((3,), weight), torch.tensor([0, 1, 1])), num_classes=3).compute()
    assert column(row, "share") == [None] * 3 and column(row, "class") == [weight, weight, None]


def test_adding_weights_reads_nothing_back_from_the_device():
    # there are no values here: whatever asks for one fails
    statistics = WeightStatistics(5, torch.device("meta"))
    for dtype in (torch.float32, torch.bfloat16):
        statistics.add(torch.ones(8, device="meta", dtype=dtype),
                       torch.zeros(8, device="meta", dtype=torch.int64))
    with pytest.raises((RuntimeError, NotImplementedError)):
        statistics.compute()


def test_the_statistics_keep_no_graph():
    statistics = statistics_of((torch.ones(2, requires_grad=True) * 2, torch.tensor([0, 1])), num_classes=2)
    assert not statistics.totals.requires_grad


# Two networks on the same examples

def correlated(count, seed=5):
    """The margins of two networks, which find the same examples hard, [2, count]."""
    random = np.random.default_rng(seed)
    shared = random.normal(0.4, 0.4, count)
    return np.clip(shared + random.normal(0, 0.2, (2, count)) + [[0.05], [0.0]], -1, 1)


def test_the_interval_of_a_difference_counts_the_discordant_examples_where_all_weigh_the_same():
    first, second = (torch.tensor(margin) for margin in correlated(500))
    only_first = int(((first > 0) & (second <= 0)).sum())
    only_second = int(((first <= 0) & (second > 0)).sum())
    variance = (only_first + only_second - (only_first - only_second) ** 2 / 500) / 500**2
    found = paired_half_width([weighted_accuracy(margin > 0, margin, 0.0) for margin in (first, second)])
    assert only_first > only_second > 0 and found == pytest.approx(Z * math.sqrt(variance), rel=1e-12)
    assert paired_half_width([weighted_accuracy(first > 0, first, 2.0)] * 2) == 0


@pytest.mark.parametrize(("measure", "strength"), [
    (weighted_accuracy, 1.0), (weighted_accuracy, 2.0), (accuracy_at_budget, 0.05),
    (accuracy_at_budget, 0.2)])
def test_the_interval_of_a_difference_is_the_spread_over_samples_of_examples(measure, strength):
    def both(margins):
        return [measure(margin > 0, margin, strength) for margin in torch.from_numpy(margins)]

    expected = paired_half_width(both(correlated(1000)))
    differences = [ours["accuracy"] - theirs["accuracy"]
                   for ours, theirs in (both(correlated(1000, seed)) for seed in range(100, 500))]
    assert expected == pytest.approx(Z * np.std(differences), rel=0.08)  # 400 samples give a spread to 4 %
