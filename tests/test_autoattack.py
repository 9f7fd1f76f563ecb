"""attacks/autoattack.py, attacks/reference.py, benchmarks/attacks.py: who breaks what, what counts, the globals that are restored."""
import json
import sys
import types
from functools import partial

import pytest
import torch

from attacks.autoattack import MISCLASSIFIED, STANDARD, STANDING, autoattack, confirmed, run_ensemble
from attacks.ball import inside, radii
from attacks.reference import EXTRA, autoattack_reference
from benchmarks.attacks import Config, main
from harness.config import parse_config
from harness.errors import UserError
from models import build_model
from tests.attack_models import (
    assert_independent_of_the_batch,
    assert_leaves_the_misclassified_alone,
    assert_pure,
    assert_refuses_what_does_not_fit,
    batch,
    misclassified,
    network,
    two_classes,
)

QUICK = tuple((name, partial(attack, **{"num_queries" if name == "square" else "num_steps": 8})) for name, attack in STANDARD)


def quick(*args, **options):
    return run_ensemble(*args, QUICK, **options)[0]


def test_the_ensemble_and_its_order():
    assert [name for name, _ in STANDARD] == ["apgd-ce", "apgd-t", "fab-t", "square"]


@pytest.mark.parametrize("norm", ("linf", "l2"))
def test_autoattack_on_a_linear_model(norm):
    """Beyond the distance all fall; before it none do, and every image comes back as it was."""
    model, x, y, w, margins = two_classes(count=4)
    distance = margins / (w.abs().sum() if norm == "linf" else w.norm())
    beyond = autoattack(model, x, y, epsilon=1.01 * distance, norm=norm)
    assert misclassified(model, beyond, y).all() and inside(beyond, x, radii(1.01 * distance, x), norm).all()
    assert torch.equal(quick(model, x, y, epsilon=0.99 * distance, norm=norm), x)


@pytest.mark.parametrize("norm", ("linf", "l2"))
def test_properties(norm):
    model = network()
    task = batch(model, 6)
    attack = partial(quick, epsilon=0.02 if norm == "linf" else 0.15, norm=norm)
    fooled = misclassified(model, attack(model, *task[:2], keys=task[2]), task[1])
    assert fooled.any() and not fooled.all()
    assert_pure(attack, model, *task)
    assert_independent_of_the_batch(attack, model, *task)
    assert_leaves_the_misclassified_alone(attack, model, *task)
    assert_refuses_what_does_not_fit(partial(quick, epsilon=0.1), model, *task)
    whole = attack(model, *task[:2], keys=task[2])
    torch.testing.assert_close(attack(model, *task[:2], keys=task[2], batch_size=2), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("classes", (2, 3, 200))
def test_any_number_of_classes_and_radius_zero(classes):
    model = network(classes, (3, 4, 5))
    x, y, keys = batch(model, 3, (3, 4, 5))
    assert misclassified(model, quick(model, x, y, epsilon=0.3, keys=keys), y).all()
    assert torch.equal(quick(model, x, y, epsilon=0.0, keys=keys), x)


def test_each_member_meets_the_survivors_only_and_nothing_counts_unconfirmed():
    """Members that leave the ball, leave the box, return NaN, do nothing, and fool the first two images: only the last one counts."""
    model = network(2)
    x, y, _ = batch(model, 6)
    real = autoattack(model, x, y, epsilon=0.3)
    assert misclassified(model, real, y).all()
    y[5] = 1 - y[5]
    asked = []

    def member(change):
        def attack(model, x, y, *, epsilon, norm, keys):
            asked.append(len(x))
            return change(x)
        return attack

    def rows_of(part):
        return [int((x == image).flatten(1).all(1).nonzero()) for image in part]

    members = [("far", member(lambda part: real[rows_of(part)] * 0 + 0.5)), ("box", member(lambda part: part - 5)),
               ("nan", member(lambda part: part * float("nan"))), ("nothing", member(lambda part: part)),
               ("two", member(lambda part: torch.stack([real[row] if row < 2 else x[row] for row in rows_of(part)]))),
               ("all", member(lambda part: real[rows_of(part)]))]
    x_adv, broken_by = run_ensemble(model, x, y, members[:5], epsilon=0.3)
    assert broken_by.tolist() == [4, 4, STANDING, STANDING, STANDING, MISCLASSIFIED] and asked == [5] * 5
    assert torch.equal(x_adv[:2], real[:2]) and torch.equal(x_adv[2:], x[2:])
    asked.clear()
    assert run_ensemble(model, x, y, members[4:], epsilon=0.3)[1].tolist() == [0, 0, 1, 1, 1, MISCLASSIFIED] and asked == [5, 3]
    assert not confirmed(model, real, x, y, epsilon=1e-4)[:5].any()


# The published implementation

def fake_package(monkeypatch, broken=False):
    """A package with the published one's interface and its bad manners: it reseeds, ends tracing and writes into the logits."""

    class AutoAttack:
        def __init__(self, model, *, norm, eps, seed, version, device):
            self.model, self.eps, self.seed, self.setting = model, eps, seed, (norm, version)

        def run_standard_evaluation(self, x, y, *, batch_size):
            torch.manual_seed(self.seed)
            sys.settrace(None)
            self.model(x).fill_(0.0)
            if broken:
                raise RuntimeError("no")
            seen.append((self.setting, self.attacks_to_run, self.seed, batch_size))
            return (x + self.eps).clamp(0, 1), y

    seen = []
    package = types.ModuleType("pyautoattack")
    package.autoattack = types.SimpleNamespace(AutoAttack=AutoAttack)
    monkeypatch.setitem(sys.modules, "pyautoattack", package)
    return seen


@pytest.mark.parametrize("broken", (False, True))
def test_the_reference_leaves_the_globals_and_the_model_as_they_were(monkeypatch, broken):
    seen = fake_package(monkeypatch, broken)
    model, x, y, _, _ = two_classes()
    model.train()
    before, state = sys.gettrace(), torch.get_rng_state()

    def tracer(*_):
        return None

    sys.settrace(tracer)
    try:
        if broken:
            with pytest.raises(RuntimeError):
                autoattack_reference(model, x, y, epsilon=0.1)
        else:
            assert torch.equal(autoattack_reference(model, x, y, epsilon=0.1, norm="l2", seed=3), (x + 0.1).clamp(0, 1))
        traced = sys.gettrace()
    finally:
        sys.settrace(before)
    assert traced is tracer and torch.equal(torch.get_rng_state(), state)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert broken or seen == [(("L2", "standard"), ["apgd-ce", "apgd-t", "fab-t", "square"], 3, 250)]


def test_the_reference_without_its_package_or_with_an_unknown_member(monkeypatch):
    model, x, y, _, _ = two_classes()
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ValueError, match=f"pip install {EXTRA}"):
        autoattack_reference(model, x, y, epsilon=0.1)
    with pytest.raises(ValueError, match="unknown attack 'cw'"):
        autoattack_reference(model, x, y, epsilon=0.1, members=("cw",))


def test_our_apgd_against_the_published_one():
    """On one network, the same images: no more survivors than the published one has, but one."""
    pytest.importorskip("pyautoattack")
    model = network()
    x, y, _ = batch(model, 60)
    model, x = model.float(), x.float()
    theirs = autoattack_reference(model, x, y, epsilon=0.02, members=("apgd-ce", "apgd-t"))
    ours, _ = run_ensemble(model, x, y, STANDARD[:2], epsilon=0.02)
    broken = misclassified(model, theirs, y).sum()
    assert 0 < broken < 60 and misclassified(model, ours, y).sum() >= broken - 1


# The benchmark

def test_the_benchmark_counts_both_sides_with_one_checker(tmp_path, monkeypatch):
    fake_package(monkeypatch)
    torch.save(build_model("lenet", 10, 1).state_dict(), tmp_path / "net.pt")
    arguments = ["--checkpoint", str(tmp_path / "net.pt"), "--arch", "lenet", "--dataset", "digits", "--num_examples", "6",
                 "--attacks", "apgd-ce", "--seeds", "1", "2", "--device", "cpu"]
    main(parse_config(Config, [*arguments, "--out", str(tmp_path / "out.json")]))
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result["rows"][0]["seed"] for result in results] == [1, 2]
    for result in results:
        alone, union = result["rows"]
        assert union["ours"]["robust"] == alone["ours"]["robust"] <= 6 and alone["reference"]["cpu_seconds"] >= 0
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(UserError, match="optional extra"):
        main(parse_config(Config, arguments))
    with pytest.raises(UserError, match="at least one --checkpoint"):
        main(parse_config(Config, []))


def test_the_benchmark_runs_other_packages_as_they_are_called_there(tmp_path, monkeypatch):
    calls = []

    class Fake:
        def __init__(self, model, **settings):
            calls.append(settings)

        def __call__(self, x, y):
            return x + 2 * calls[-1]["eps"]  # outside the ball: nothing of it may count

    monkeypatch.setitem(sys.modules, "torchattacks", types.SimpleNamespace(FGSM=Fake, PGD=Fake, SPSA=Fake))
    torch.manual_seed(0)
    torch.save(build_model("lenet", 10, 1).state_dict(), tmp_path / "net.pt")
    arguments = ["--checkpoint", str(tmp_path / "net.pt"), "--arch", "lenet", "--dataset", "digits", "--num_examples", "20",
                 "--epsilon", "0.1"]
    names = ("fgsm", "pgd100", "spsa")
    main(parse_config(Config, [*arguments, "--sides", "reference", "--attacks", *names, "--out", str(tmp_path / "fake.json")]))
    rows = json.loads((tmp_path / "fake.json").read_text())["results"][0]["rows"]
    clean = rows[0]["reference"]["robust"]
    assert clean > 0 and [row["reference"]["robust"] for row in rows] == [clean] * 4
    assert calls == [{"eps": 0.1}, {"eps": 0.1, "alpha": 0.0125, "steps": 100},
                     {"eps": 0.1, "delta": 0.001, "lr": 0.01, "nb_iter": 100, "nb_sample": 256}]
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(UserError, match="pip install --no-deps torchattacks"):
        main(parse_config(Config, [*arguments, "--attacks", "fgsm"]))
    with pytest.raises(UserError, match="l_inf alone"):
        main(parse_config(Config, [*arguments, "--attacks", "spsa", "--norm", "l2"]))


def test_our_fmn_leaves_no_more_than_foolbox_does_and_apgd_on_dlr_is_measured_too(tmp_path):
    pytest.importorskip("foolbox")
    torch.manual_seed(0)
    torch.save(build_model("lenet", 10, 1).state_dict(), tmp_path / "net.pt")
    arguments = ["--checkpoint", str(tmp_path / "net.pt"), "--arch", "lenet", "--dataset", "digits", "--num_examples", "60",
                 "--epsilon", "0.003"]
    main(parse_config(Config, [*arguments, "--attacks", "fmn100", "--out", str(tmp_path / "fmn.json")]))
    main(parse_config(Config, [*arguments, "--attacks", "apgd-dlr", "--sides", "ours", "--out", str(tmp_path / "dlr.json")]))
    fmn, dlr = (json.loads((tmp_path / f"{name}.json").read_text())["results"][0]["rows"][0] for name in ("fmn", "dlr"))
    assert 0 < fmn["ours"]["robust"] <= fmn["reference"]["robust"] < 60 and dlr["ours"]["robust"] < 60


def test_the_ensemble_leaves_the_images_that_its_members_leave_alone(tmp_path):
    torch.manual_seed(0)
    torch.save(build_model("lenet", 10, 1).state_dict(), tmp_path / "net.pt")
    members = ("apgd-ce", "apgd-t", "fab-t", "square")
    main(parse_config(Config, ["--checkpoint", str(tmp_path / "net.pt"), "--arch", "lenet", "--dataset", "digits", "--num_examples", "12",
                               "--epsilon", "0.002", "--sides", "ours", "--attacks", *members, "autoattack",
                               "--out", str(tmp_path / "out.json")]))
    *alone, ensemble, union = json.loads((tmp_path / "out.json").read_text())["results"][0]["rows"]
    assert 0 < ensemble["ours"]["robust"] < 12 and union["ours"]["same_as_autoattack"]
    assert union["ours"]["cpu_seconds"] == pytest.approx(sum(row["ours"]["cpu_seconds"] for row in alone))
