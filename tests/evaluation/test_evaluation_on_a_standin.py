"""Attacks and an evaluation on a GPU that is not there: the CPU's verdicts bit for bit, and few waits."""
import json

import pytest

from attacks.alma import alma
from attacks.apgd import apgd, apgd_targeted
from attacks.apgd_l1 import apgd_l1, apgd_l1_targeted
from attacks.bim import bim_bisection
from attacks.bisection import apgd_bisection, pgd_bisection
from attacks.ddn import ddn
from attacks.fab import fab_targeted
from attacks.fmn import fmn
from attacks.margin_decomposition import md, mdmt
from attacks.pdpgd import pdpgd
from attacks.pgd import pgd
from attacks.spsa import spsa
from attacks.square import square
from attacks.until_broken import pgd_until_broken
from tests import standin, standin_runs
from tests.training.test_on_a_standin import SCRIPTS

pytestmark = [pytest.mark.skipif(bool(standin.missing()), reason=str(standin.missing())), pytest.mark.slow]

RADIUS = {"linf": 0.1, "l2": 1.0, "l1": 8.0}

# attack: its arguments, its rounds, and the most times that the host may wait for the device
ATTACKS = {
    "pgd": (pgd, {"epsilon": True, "step_size": 0.02, "num_steps": 10, "start": "clean"}, 10, 0),
    "pgd until broken": (pgd_until_broken, {"epsilon": True, "step_size": 0.02, "num_steps": 10}, 10, 10),
    "apgd": (apgd, {"epsilon": True, "num_steps": 11}, 11, 1 + 3),  # who is attacked, every fifth step
    "apgd targeted": (apgd_targeted, {"epsilon": True, "num_steps": 6, "num_targets": 2}, 12, 2 * (1 + 2)),
    # who is attacked, and as each of three balls begins
    "apgd l1": (apgd_l1, {"epsilon": True, "num_steps": 11}, 11, 1 + 3),
    "apgd l1 targeted": (apgd_l1_targeted, {"epsilon": True, "num_steps": 6, "num_targets": 2}, 12,
                         2 * (1 + 3)),
    # who is left of a target, every fifth step who is done
    "fab": (fab_targeted, {"epsilon": True, "num_steps": 6, "num_targets": 2}, 12, 2 * (1 + 1)),
    "square": (square, {"epsilon": True, "num_queries": 120}, 120, 3),  # every fiftieth query
    # the start is a round too
    "md": (md, {"epsilon": True, "num_steps": 6, "change_step": 2}, 2 * 7, 2 * 7),
    "mdmt": (mdmt, {"epsilon": True, "num_steps": 6, "change_step": 2, "num_targets": 2}, 4 * 7, 4 * 7),
    "spsa": (spsa, {"epsilon": 0.1, "num_steps": 2, "num_samples": 32}, 3, 3),
    "ddn": (ddn, {"num_steps": 6}, 6, 0), "fmn": (fmn, {"num_steps": 6}, 6, 0),
    "alma": (alma, {"num_steps": 6}, 6, 0), "pdpgd": (pdpgd, {"num_steps": 6}, 6, 0),
    "pgd bisection": (pgd_bisection, {"num_steps": 3, "num_rounds": 3}, 9, 0),
    "apgd bisection": (apgd_bisection, {"num_steps": 3, "num_rounds": 2, "num_targets": 2}, 12, 2 * 2 * 2),
    "bim bisection": (bim_bisection, {"num_steps": 3, "num_growths": 2, "num_bisections": 3}, 6 * 3, 6 * 3),
    "walk": (standin_runs.walked, {"num_queries": 60}, 60, 1),
    "polish": (standin_runs.polished, {"num_steps": 3}, 3, 3),
    "ensemble": (standin_runs.ensembled, {"epsilon": True}, 6 + 12, 2 + (1 + 2) + 2 * (1 + 1)),
    # who is attacked; FAB in three norms, APGD in two, six polishes, four walks
    "pool": (standin_runs.pooled, {}, 178, 1 + 3 * 2 + 2 * 8 + 6 * 2 + 4),
}
NORMS = {"spsa": ("linf",), "ddn": ("l2",), "alma": ("l2", "l1"), "pgd bisection": ("linf",),
         "bim bisection": ("linf",), "pool": ("all",), "apgd l1": ("l1",), "apgd l1 targeted": ("l1",),
         **dict.fromkeys(("fab", "fmn", "pdpgd", "walk", "polish"), ("linf", "l2", "l1"))}
PAIRS = [(name, norm) for name in ATTACKS for norm in NORMS.get(name, ("linf", "l2"))]
FIXED = ("spsa", "bim bisection", "pool")  # in their norm: they take none


def recorded():
    """What `python -m tests.standin_counts` has written."""
    return json.loads((standin.ROOT / "results/speed/standin.json").read_text())


def arguments_in(name, norm):
    """The arguments of an attack in a norm."""
    arguments = ATTACKS[name][1]
    if arguments.get("epsilon") is True:
        arguments = arguments | {"epsilon": RADIUS[norm]}
    return arguments if name in FIXED else arguments | {"norm": norm}


@pytest.fixture(scope="module")
def child():
    with standin_runs.child() as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.mark.parametrize(("name", "norm"), PAIRS)
def test_an_attack_finds_what_it_finds_on_the_cpu_and_waits_once_a_round_at_most(name, norm, child):
    attack, _, rounds, most = ATTACKS[name]
    found = child(standin_runs.attacked, attack, arguments_in(name, norm))
    assert found.differs == []
    assert found.copies == {} and sum(found.waits.values()) <= most <= rounds, found
    assert found.places() <= recorded()["attacks"][f"{name}, {norm}"]["waits"].keys(), "count them again"


def test_the_page_says_what_the_file_holds_of_what_is_there():
    page = " ".join((standin.ROOT / "docs/speed.md").read_text().split())
    assert "An attack of an evaluation looks once a round at most" in page
    attacks, steps = recorded()["attacks"], recorded()["steps"]
    assert attacks.keys() == {f"{name}, {norm}" for name, norm in PAIRS} and steps.keys() == SCRIPTS.keys()
    assert all(sum(counts["waits"].values()) <= counts["rounds"] for counts in attacks.values())
    assert not any(counts["copies"] for counts in attacks.values())
    assert not any(counts["waits"] or counts["copies"] for counts in steps.values())
    for place in {*JUSTIFIED}.union(*(counts["waits"] for counts in attacks.values())):
        file, function = place.split(": ")
        assert f"def {function}(" in (standin.ROOT / file).read_text(), place


# Where an evaluation or a curve waits or copies beside its attacks, each by "FILE: FUNCTION".
JUSTIFIED = {
    "harness/datasets/split.py: to": "the images go to the device, once",
    "harness/datasets/split.py: __getitem__": "a curve's points for one batch are chosen on the host",
    "harness/datasets/split.py: fingerprint": "the images' fingerprint is the host's, once",
    "harness/training/attack_view.py: _nothing_hidden": "a form of the network is checked, once",
    "harness/training/attack_view.py: _is_near": "the same",
    "harness/evaluation/pipeline.py: _evaluate": "the network goes to the device, once",
    "harness/evaluation/pipeline.py: measure": "the labels for the record, once",
    "harness/evaluation/attacking.py: run": "the labels, by which the host chooses who is next, once",
    "harness/evaluation/attacking.py: _attack_batch": "which images are attacked, their labels, once a batch",
    "harness/evaluation/attacking.py: _deepen": "which images go on to the last step, once a batch",
    "harness/evaluation/attacking.py: inspect": "the record is on the host, once a batch",
    "harness/evaluation/attacking.py: _per_image": "which of two restarts counts, once a batch",
    "harness/evaluation/predictions.py: observe": "verdicts are float64 on the host, once a batch",
    "harness/evaluation/sanity.py: look": "figures of the probe, once",
    "harness/evaluation/sanity.py: _percent": "shares of the probe, once",
    "harness/evaluation/verdict.py: probe": "labels and images of the probe, once",
    "harness/evaluation/result.py: result_of": "the labels, once",
    "harness/evaluation/accuracies.py: accuracies": "labels and places of the images, once",
    "generate_robustness_curves.py: compute": "the network goes to the device, once",
    "curves/measure.py: look_at": "which images are probed, once",
    "curves/measure.py: measure": "are all outputs finite, and which points are attacked, once a batch",
    "curves/store.py: put": "the results are the host's, once a batch",
}


def unjustified(found):
    """Places in none of the two lists: what attacks do is held to one wait a round above."""
    attacks = {place for counts in recorded()["attacks"].values() for place in counts["waits"]}
    return found.places() - attacks - JUSTIFIED.keys()


def test_an_evaluation_has_the_verdicts_of_the_cpu(child, tmp_path):
    words = ("--checkpoint", "run/last.pt", "--arch", "net.py:plain", "--num_examples", 16, "--num_steps", 2,
             "--num_restarts", 2, "--alphas", 1, "--batch_size", 8, "--attacks", "fgsm", "cw", "pgd100",
             "fmn100", "autoattack", "mde", "square", "spsa")
    found = child(standin_runs.evaluated, "eval_mnist", words, tmp_path)
    assert found.differs == []
    assert not unjustified(found)


def test_a_robustness_curve_has_the_distances_of_the_cpu(child, tmp_path):
    words = ("--model", "run", "--arch", "net.py:plain", "--n_points", 8, "--batch_size", 8,
             "--budget", "fast", "--check_radii", 0, "--adversaries", "--no-plot")
    found = child(standin_runs.evaluated, "generate_robustness_curves", words, tmp_path, "{}/distances.npz")
    assert found.differs == []
    assert not unjustified(found)
