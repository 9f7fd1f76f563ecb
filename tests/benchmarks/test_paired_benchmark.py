"""benchmarks/paired.py: the differences of a defense and its base on the same seeds and images."""
import json

import numpy as np
import pytest
import torch
from conftest import ROOT

from benchmarks import campaign, paired
from harness.errors import UserError
from harness.evaluation.metrics import weighted_accuracy


def test_the_kept_differences_are_those_of_the_kept_margins():
    results = ROOT / "results"
    kept = {row["row"]: row for row in json.loads((results / "paired.json").read_text())["rows"]}
    for row, base in paired.BASES.items():
        again = paired.compare(results / row, results / base)
        assert bool(again["A_rob"]["seeds"]) == (row in kept)
        for name, found in again.items() if row in kept else ():
            assert kept[row][name]["seeds"] == found["seeds"]
            for key in ("differences", "images"):
                assert kept[row][name][key] == pytest.approx(found[key], abs=1e-3), (row, name)


def test_every_defense_of_the_campaign_has_a_base_that_is_a_row_of_it():
    rows = {campaign.row_of(setting, defense) for setting in ("mnist", "mnist-small_cnn", "cifar10-w16")
            for defense in campaign.commands(campaign.Config(setting))}
    bases = set(paired.BASES.values())
    assert not bases & paired.BASES.keys()
    assert paired.BASES.keys() | bases | {"vir/trades"} == rows  # TRADES of another 1/lambda


def test_only_the_seeds_that_both_have_are_compared(tmp_path):
    random = np.random.default_rng(0)
    margins = {}
    for name, seeds in (("at", (0, 1, 2)), ("gairat", (1, 2, 3))):
        for seed in seeds:
            folder = tmp_path / "vir" / name / f"seed{seed}"
            folder.mkdir(parents=True)
            margin = margins[name, seed] = random.normal(0.3, 0.4, 200).clip(-1, 1)
            np.savez(folder / "margins.npz", margin_adv=margin, correct=margin > 0)
    paired.main(paired.Config(str(tmp_path)))
    (row,) = json.loads((tmp_path / "paired.json").read_text())["rows"]
    assert (row["row"], row["base"]) == ("vir/gairat", "vir/at")
    assert row["A_rob"]["seeds"] == [1, 2] and row["worst case"] == {"seeds": [], "differences": [],
                                                                     "images": None}
    terms = []
    for k, seed in enumerate((1, 2)):
        both = (torch.tensor(margins[name, seed]) for name in ("gairat", "at"))
        ours, theirs = (weighted_accuracy(margin > 0, margin, 2.0) for margin in both)
        difference = 100 * (ours["accuracy"] - theirs["accuracy"])
        assert row["A_sa 2"]["differences"][k] == pytest.approx(difference, abs=1e-4)
        terms.append(ours["terms"] - theirs["terms"])
    images = 196 * float((sum(terms) / 2).square().sum()) ** 0.5
    assert row["A_sa 2"]["images"] == pytest.approx(images, rel=1e-3)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        paired.main(paired.Config(str(tmp_path / "none")))
