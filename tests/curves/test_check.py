"""The check of a curve: what it attacks, what it enters, the slack, and what slack means for a comparison."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from curves import check, output
from curves.canvas import Look
from curves.crossings import compare
from curves.report import pair
from curves.store import Results, read
from harness.datasets.split import Split

N = 40


def a_step(x):
    """Two classes by the first pixel of one: the distance of a point is its own, in every norm."""
    return torch.cat([x.flatten(1)[:, :1] - 0.5, torch.zeros(len(x), 1)], dim=1)


class Step(nn.Module):
    def forward(self, x):
        return a_step(x)


@pytest.fixture
def measured():
    """Points whose distances are known, in results that say 1.5 times as much of every second."""
    images = torch.linspace(255, 140, N).round().to(torch.uint8)[:, None, None, None]
    points = Split(images, torch.zeros(N, dtype=torch.long), torch.arange(N))
    results = Results.empty({"name": "step", "attacks": ["a"]}, points, ("linf", "l2"), True)
    true = images.flatten().double().numpy() / 255 - 0.5
    for norm in results.norms:
        results.upper(norm)[:] = true * np.where(np.arange(N) % 2, 1.5, 1.0) + 1e-6
    results.columns["status"][:] = "ok"
    return results, points, true


def attack_within(norm, x, y, index, radius):
    """The point behind the boundary if the radius reaches it."""
    size = torch.minimum(radius, x.flatten(1)[:, 0] - 0.5 + 1e-6)
    return x - size.view(-1, 1, 1, 1)


def run(measured, folder, **options):
    results, points, _ = measured
    options = {"num_radii": 5, "num_points": N, "seed": 0} | options
    check.run(results, Step(), points, options.pop("attack", attack_within), folder, **options)
    return results


def test_radii_are_quantiles_of_what_was_found():
    distances = np.concatenate([[0.0, 0.0, np.inf], np.arange(1, 101) / 100])
    assert check.radii_of(distances, 5) == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert check.radii_of(np.array([0.0, np.inf]), 5) == []


def test_what_is_found_enters_the_distances_and_is_the_slack(measured, tmp_path):
    claimed, true = measured[0].upper("linf").copy(), measured[2]
    results = run(measured, tmp_path)
    radii = results.about["check_radii"]["linf"]
    found = check.slack_of(results, "linf")
    for row in found["radii"]:
        nearer = (claimed > row["t"] * (1 + 1e-6)) & (true + 2e-6 <= row["t"])
        assert row["found"] == nearer.sum() and row["slack"] == nearer.mean()
        assert row["low"] <= row["slack"] <= row["high"]
    assert found["points"] == N and found["slack"] == max(row["slack"] for row in found["radii"]) > 0
    # a point that a radius tells from its claim has its true distance, in the other norm too, and no other
    told = np.array([any(t < c and d + 2e-6 <= t for t in radii) for c, d in zip(claimed, true)])
    assert told.any() and not told.all()
    for norm in ("linf", "l2"):
        assert np.allclose(results.upper(norm)[told], true[told], atol=2e-6)
    assert np.array_equal(results.upper("linf")[~told], claimed[~told])
    assert (results.columns["attack_linf"][told] == results.about["attacks"].index("check")).all()
    assert (results.columns["x_adv_linf"][told].ravel() < 0.5).all()


def test_a_curve_that_is_right_has_no_slack_and_each_point_is_attacked_once(measured, tmp_path):
    results, _, true = measured
    for norm in results.norms:
        results.upper(norm)[:] = true + 1e-6
    tried = []

    def counting(norm, x, y, index, radius):
        tried.append((norm, index.tolist(), radius.tolist()))
        return attack_within(norm, x, y, index, radius)

    run(measured, tmp_path, attack=counting)
    assert check.slack_of(results, "linf")["slack"] == 0
    assert check.slack_of(results, "linf")["high"] == pytest.approx(1 - 0.025 ** (1 / N))
    seen = [place for norm, places, _ in tried if norm == "linf" for place in places]
    assert len(seen) == len(set(seen)) and all(
        radius < results.upper(norm)[place] for norm, places, radii in tried
        for place, radius in zip(places, radii))


def test_a_check_goes_on_where_it_stopped_with_the_points_and_radii_it_began_with(measured, tmp_path,
                                                                                   monkeypatch):
    monkeypatch.setattr(check, "TOGETHER", 4)
    calls = []

    def stops(*task):
        calls.append(task)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return attack_within(*task)

    with pytest.raises(KeyboardInterrupt):
        run(measured, tmp_path, attack=stops, num_points=20)
    half = read(tmp_path)
    done = ~np.isnan(half.checked("linf")[0])
    assert 0 < done.sum() < 20
    again = []

    def noting(norm, x, y, index, radius):
        again.extend((norm, place) for place in index.tolist())
        return attack_within(norm, x, y, index, radius)

    results = run((half, *measured[1:]), tmp_path, attack=noting, num_points=20)
    assert not {("linf", place) for place in np.flatnonzero(done)} & set(again)
    assert all((~np.isnan(results.checked(norm)[0])).sum() == 20 for norm in results.norms)
    assert results.about["check_radii"] == half.about["check_radii"]


def test_what_was_not_checked_says_so(measured, capsys, tmp_path):
    results, _, _ = measured
    assert check.slack_of(results, "linf") is None
    look = replace(Look(plot=False), thresholds={"linf": (), "l2": ()})
    results.columns["pred"][:] = 0
    output.curves([results], tmp_path, look, {})
    assert "step, linf: not checked" in capsys.readouterr().out
    run(measured, tmp_path)
    output.curves([results], tmp_path, look, {})
    assert f"{N} points checked, nearer than their distance said" in capsys.readouterr().out


def test_a_difference_no_larger_than_the_slack_of_the_model_ahead_is_none():
    first = np.concatenate([np.full(300, 1.0), np.full(700, 3.0)])
    second = np.full(1000, 3.0)  # ahead by 30 points from 1 to 3
    for slack, expected in (((0.0, 0.0), True), ((0.9, 0.29), True), ((0.0, 0.31), False)):
        found = compare(first, second, num_resamples=50, slack=slack)
        assert found["largest_gap"]["supported"] is expected
    assert pair(first, second, (), num_resamples=50, slack=(None, 0.31))["largest_gap"]["supported"] is False
    assert pair(first, second, (), num_resamples=50)["slack"] == [None, None]
