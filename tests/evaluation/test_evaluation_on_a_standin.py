"""Attacks and an evaluation on a GPU that is not there: the CPU's verdicts bit for bit, and few waits."""
import pytest

from attacks.alma import alma
from attacks.apgd import apgd, apgd_targeted
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

pytestmark = [pytest.mark.skipif(bool(standin.missing()), reason=str(standin.missing())), pytest.mark.slow]

RADIUS = {"linf": 0.1, "l2": 1.0}

# attack: its arguments, and the most times that the host may wait for the device
ATTACKS = {
    "pgd": (pgd, {"epsilon": True, "step_size": 0.02, "num_steps": 10, "start": "clean"}, 0),
    "pgd until broken": (pgd_until_broken, {"epsilon": True, "step_size": 0.02, "num_steps": 10}, 10),
    "apgd": (apgd, {"epsilon": True, "num_steps": 11}, 1 + 3),      # who is attacked, every fifth step
    "apgd targeted": (apgd_targeted, {"epsilon": True, "num_steps": 6, "num_targets": 2}, 2 * (1 + 2)),
    # who is left of a target, every step's projection, every fifth step who is done
    "fab": (fab_targeted, {"epsilon": True, "num_steps": 6, "num_targets": 2}, 2 * (1 + 6 + 2)),
    "square": (square, {"epsilon": True, "num_queries": 120}, 3),   # every fiftieth query
    "md": (md, {"epsilon": True, "num_steps": 6, "change_step": 2}, 2 * (1 + 6)),
    "mdmt": (mdmt, {"epsilon": True, "num_steps": 6, "change_step": 2, "num_targets": 2}, 4 * (1 + 6)),
    "spsa": (spsa, {"epsilon": 0.1, "num_steps": 2, "num_samples": 32}, 3),
    "ddn": (ddn, {"num_steps": 6}, 0), "fmn": (fmn, {"num_steps": 6}, 0),
    "alma": (alma, {"num_steps": 6}, 0), "pdpgd": (pdpgd, {"num_steps": 6}, 0),
    "pgd bisection": (pgd_bisection, {"num_steps": 3, "num_rounds": 3}, 0),
    "apgd bisection": (apgd_bisection, {"num_steps": 3, "num_rounds": 2, "num_targets": 2}, 2 * 2 * 2),
}
NORMS = {"spsa": ("linf",), "ddn": ("l2",), "alma": ("l2",), "pgd bisection": ("linf",)}
PAIRS = [(name, norm) for name in ATTACKS for norm in NORMS.get(name, ("linf", "l2"))]


@pytest.fixture(scope="module")
def child():
    with standin_runs.child() as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.mark.parametrize(("name", "norm"), PAIRS)
def test_an_attack_finds_what_it_finds_on_the_cpu_and_waits_once_a_round_at_most(name, norm, child):
    attack, arguments, most = ATTACKS[name]
    if arguments.get("epsilon") is True:
        arguments = arguments | {"epsilon": RADIUS[norm]}
    if name != "spsa":
        arguments = arguments | {"norm": norm}
    found = child(standin_runs.attacked, attack, arguments)
    assert found.differs == []
    assert found.copies == {} and sum(found.waits.values()) <= most, found


# where an evaluation waits or copies
JUSTIFIED = {
    "harness/datasets/split.py": "the images go to the device, once; their fingerprint is the host's",
    "harness/training/attack_view.py": "each form of a network is checked, once",
    "harness/evaluation/pipeline.py": "the network goes to the device, once; labels for the record",
    "harness/evaluation/attacking.py": "the record is on the host: who is next, what was done to a batch",
    "harness/evaluation/predictions.py": "verdicts are float64 on the host, a batch at a time",
    "harness/evaluation/sanity.py": "the probe's figures, once",
    "harness/evaluation/verdict.py": "the probe's images, once",
    "harness/evaluation/result.py": "the labels, once", "harness/evaluation/accuracies.py": "labels, once",
    **dict.fromkeys((f"attacks/{name}.py" for name in ("until_broken", "apgd", "fab", "standing", "spsa",
                                                       "margin_decomposition")), "once a round, see above"),
}


def test_an_evaluation_has_the_verdicts_of_the_cpu(child, tmp_path):
    words = ("--checkpoint", "run/last.pt", "--arch", "net.py:plain", "--num_examples", 16, "--num_steps", 2,
             "--num_restarts", 2, "--alphas", 1, "--batch_size", 8, "--attacks", "fgsm", "cw", "pgd100",
             "fmn100", "autoattack", "mde", "square", "spsa")
    found = child(standin_runs.evaluated, "eval_mnist", words, tmp_path)
    assert found.differs == []
    places = {place.partition(":")[0] for place in (*found.waits, *found.copies)}
    assert places <= JUSTIFIED.keys(), places - JUSTIFIED.keys()
    copied = [place for place in found.copies if place.startswith("attacks/")]
    assert not copied
