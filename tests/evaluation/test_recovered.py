"""harness/evaluation/recovered.py: what a result's other figures leave open of A_sa at a KL budget holds the
value that its examples have."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from harness.evaluation import recovered
from harness.evaluation.budget import accuracy_at_budget
from harness.evaluation.metrics import weighted_accuracy


def margins_of(count, seed):
    """Margins as those of a robust network: most are near 1, some are wrong."""
    rng = np.random.default_rng(seed)
    right = rng.random(count) < 0.9
    return torch.from_numpy(np.where(right, rng.beta(5, 0.4 + seed, count), -rng.beta(0.5 + seed, 2, count)))


def result_of(margin):
    """What an evaluation writes of them, to the digits that it has."""
    found = {str(alpha): weighted_accuracy(margin > 0, margin, alpha) for alpha in recovered.ALPHAS}
    plain = weighted_accuracy(margin > 0, margin, 0.0)
    return {"A_rob": round(100 * plain["accuracy"], 4), "num_examples": len(margin),
            "A_sa": {alpha: round(100 * entry["accuracy"], 4) for alpha, entry in found.items()},
            "effective_size": {"A_sa": {alpha: round(entry["effective_size"], 1)
                                        for alpha, entry in found.items()}}}


@pytest.mark.parametrize(("count", "seed", "width"), ((10_000, 0, 0.2), (200, 1, 2.0)))
def test_the_range_holds_the_value_of_the_examples_and_is_narrow(count, seed, width):
    margin = margins_of(count, seed)
    found = recovered.recover(recovered.figures_of(result_of(margin))["A_rob"])
    assert list(found) == ["0.05", "0.2", "0.5"]
    for budget, (low, high) in found.items():
        truth = 100 * accuracy_at_budget(margin > 0, margin, float(budget))["accuracy"]
        assert low - 0.01 <= truth <= high + 0.01 and high - low < width


@pytest.mark.parametrize("budget", (0.05, 0.5, 100.0))
def test_the_accuracy_of_a_distribution_is_that_of_examples_in_its_proportions(budget):
    counts = np.zeros(len(recovered.MARGINS), int)
    counts[[20, 90, 150, 250, 355]] = 1, 3, 10, 40, 46
    margin = torch.from_numpy(np.repeat(recovered.MARGINS, counts))
    expected = accuracy_at_budget(margin > 0, margin, budget)["accuracy"]
    assert recovered.accuracy_of(counts / 100, budget) == pytest.approx(expected, abs=1e-9)


def test_figures_that_no_margins_have_are_not_given_a_range():
    result = result_of(margins_of(500, 0))
    result["A_sa"]["2.0"] = result["A_rob"] + 1  # it never rises with alpha
    assert recovered.recover(recovered.figures_of(result)["A_rob"]) is None


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["recovered.py", *map(str, words)])
    recovered.main()


def test_the_command_takes_each_place_of_a_result_and_leaves_out_what_has_too_little(tmp_path, monkeypatch,
                                                                                     capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recovered, "recover", lambda known: {"0.2": [100 * known.robust, 99.0]})
    result = result_of(margins_of(300, 0))
    worst = {"accuracy": 50.0, "A_sa": result["A_sa"], "effective_size": result["effective_size"]["A_sa"]}
    Path("eval.json").write_text(json.dumps(result | {"worst_case": worst}))
    Path("eval-2.json").write_text(json.dumps(result | {"A_sa": {"1.0": 80.0}}))
    run(monkeypatch, ".", "--out", "out.json")
    rows = json.loads(Path("out.json").read_text())["rows"]
    assert [(row["file"], row["at"], row["A_sa_kl"]["0.2"][0]) for row in rows] == [
        ("eval.json", "A_rob", pytest.approx(result["A_rob"])), ("eval.json", "worst_case", 50.0)]
    run(monkeypatch, "eval.json", "--at", "worst_case", "--out", "worst.json")
    assert [row["at"] for row in json.loads(Path("worst.json").read_text())["rows"]] == ["worst_case"]
    assert "eval-2.json: no A_sa at alpha 1, 1.5 and 2" in capsys.readouterr().out
    for words in (("eval.json", "--out", "out.json"), ("none.json", "--out", "new.json")):
        with pytest.raises(SystemExit) as ended:
            run(monkeypatch, *words)
        assert ended.value.code == 2


def test_what_was_recovered_is_drawn_beside_a_sa_at_equal_alpha(tmp_path):
    files = [ROOT / f"results/vir/{name}/seed0/eval.json" for name in ("at", "gairat")]
    rows = [{"file": file.as_posix(), "at": "A_rob", "A_sa_kl": {"0.05": [83.0, 85.0], "0.2": [70.0, 71.0]}}
            for file in files]
    recovered.draw([*rows, {"file": "none.json", "at": "A_rob", "A_sa_kl": None}], tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 10_000
