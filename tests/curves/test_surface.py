"""The robustness surface: its two provable properties, its weights, and the ladder of attacks below it."""
import json

import numpy as np
import pytest
from conftest import ROOT

from curves.curve import Curve
from curves.surface import both, climb, margin_weights, surface, tilted, weighted_share

GOLDEN = json.loads((ROOT / "tests/golden/zeng.json").read_text())["cases"]
EPSILONS, ALPHAS = np.linspace(0, 0.5, 11), (0.0, 0.5, 1.0, 2.0, 8.0)


def softmax_margin(logits, labels):
    logits = np.array(logits, dtype=np.float32).astype(np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    true = p[np.arange(len(labels)), labels]
    p[np.arange(len(labels)), labels] = -1
    return true - p.max(1)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_weights_and_accuracy_agree_with_the_published_code(case):
    margin = softmax_margin(case["logits_adv"], case["labels"])
    assert np.abs(margin - np.array(case["margin_f64"], dtype=float)).max() < 1e-6
    for name, out in case["out"].items():
        weights = np.array(next(value for key, value in out.items() if key.startswith("w_f64")), dtype=float)
        assert (np.abs(margin_weights(margin, float(name.split("=")[1])) - weights / weights.sum()).max()
                < 1e-6)


@pytest.fixture
def ladder():
    """400 points whose margin falls linearly and crosses 0 at the distance; attacks find 80 % of them."""
    random = np.random.default_rng(0)
    true = random.uniform(0.02, 0.6, 400)
    true[:30] = 0
    slope = random.uniform(0.5, 3, 400)
    stored = np.where(random.uniform(size=400) < 0.8, true * random.choice([1, 1.3], 400), np.inf)
    stored[:30] = 0
    clean = np.where(true > 0, np.clip(slope * true, 0, 1), -0.3)

    def attack(epsilon, alpha=0.0):
        return np.clip(clean - slope * epsilon * (0.9 if alpha else 1.0), -1, 1), np.full(400, epsilon)

    return stored, clean, np.where(stored > 0, -1e-4, clean), attack


def test_at_alpha_zero_the_surface_is_one_minus_the_curve(ladder):
    stored, clean, at_stored, attack = ladder
    found = climb(EPSILONS, stored, clean, at_stored, attack)
    values, n_eff = surface(EPSILONS, found.distances, found.margins, ALPHAS)
    assert found.improved > 50
    assert np.abs(values[:, 0] - (1 - Curve(found.distances).at(EPSILONS))).max() < 1e-12
    assert n_eff[:, 0] == pytest.approx(np.full(11, 400)) and (n_eff[:, -1] < 400).any()


def test_the_surface_never_rises_with_alpha(ladder):
    stored, clean, at_stored, attack = ladder
    found = climb(EPSILONS, stored, clean, at_stored, attack)
    values, _ = surface(EPSILONS, found.distances, found.margins, ALPHAS)
    assert (np.diff(values, axis=1) <= 1e-12).all() and (np.diff(values, axis=1) < -0.01).any()


def test_margins_and_distances_of_a_ladder_agree(ladder):
    stored, clean, at_stored, attack = ladder
    found = climb(EPSILONS, stored, clean, at_stored, attack)
    for row, epsilon in zip(found.margins, EPSILONS):
        assert ((row < 0) == (found.distances <= epsilon)).all()
    assert (np.diff(found.margins, axis=0) <= 0).all() and (found.distances <= stored).all()


def test_rounding_beyond_epsilon_does_not_part_curve_and_surface():
    found = climb(np.array([0.1]), np.array([np.inf]), np.array([0.5]), np.array([np.nan]),
                  lambda epsilon: (np.array([-0.2]), np.array([epsilon + 3e-8])))
    assert found.distances.tolist() == [0.1] and found.margins.tolist() == [[-0.2]]


def test_the_stored_example_counts_from_its_distance_on():
    found = climb(np.array([0.1, 0.2, 0.3]), np.array([0.2]), np.array([0.5]), np.array([-0.01]),
                  lambda epsilon: (np.array([0.4]), np.array([epsilon])))
    assert found.margins.ravel().tolist() == [0.4, -0.01, -0.01] and found.improved == 0


def test_both_surfaces_meet_at_alpha_zero_and_differ_above(ladder):
    stored, clean, at_stored, attack = ladder
    asked = []

    def counted(epsilon, alpha):
        asked.append(alpha)
        return attack(epsilon, alpha)

    found = both(EPSILONS, ALPHAS, (stored, clean, at_stored), counted)
    assert (np.array_equal(found["A_sa"][:, 0], found["A_tr"][:, 0])
            and not np.array_equal(found["A_sa"], found["A_tr"]))
    # one unweighted attack, and one for each alpha above 0
    assert [asked.count(alpha) for alpha in ALPHAS] == [11] * 5
    assert found["tilted"].shape == found["n_eff_tr"].shape == (11, 5)


def test_a_share_of_all_or_none_is_exact():
    weights = margin_weights(np.random.default_rng(0).uniform(-1, 1, 1001), 3.0)
    assert (weighted_share(np.ones(1001, bool), weights)[0] == 1.0
            and weighted_share(np.zeros(1001, bool), weights)[0] == 0.0)
    assert margin_weights(np.array([-1.0, 1.0]), 1e4).tolist() == [1, 0]


def test_the_tilted_curve_begins_with_the_curve_and_falls_with_beta():
    distances = np.array([0, 0.1, 0.2, 0.3, np.inf])
    values = tilted(np.array([0, 0.15, 0.5]), distances, (0.0, 1.0, 4.0))
    assert values[:, 0].tolist() == pytest.approx([0.8, 0.6, 0.2])
    assert (np.diff(values[:2], axis=1) < 0).all() and values[2, 1] == values[2, 2] == 0
