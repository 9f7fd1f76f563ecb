"""attacks/autoattack.py, attacks/reference.py: who breaks what, what counts,
the globals that are restored."""
import sys
from functools import partial

import pytest
import torch

from attacks.autoattack import MISCLASSIFIED, STANDARD, STANDING, autoattack, confirmed, run_ensemble
from attacks.geometry import inside, radii
from attacks.reference import EXTRA, autoattack_reference
from tests.attack_models import (
    assert_independent_of_the_batch,
    assert_leaves_the_misclassified_alone,
    assert_pure,
    assert_refuses_what_does_not_fit,
    batch,
    fake_package,
    misclassified,
    network,
    two_classes,
)

QUICK = tuple((name, partial(attack, **{"num_queries" if name == "square" else "num_steps": 8}))
              for name, attack in STANDARD)


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
    """Members that leave the ball, leave the box, return NaN, do nothing, and fool the first two images:
    only the last one counts."""
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

    members = [("far", member(lambda part: real[rows_of(part)] * 0 + 0.5)),
               ("box", member(lambda part: part - 5)),
               ("nan", member(lambda part: part * float("nan"))), ("nothing", member(lambda part: part)),
               ("two", member(lambda part: torch.stack([real[row] if row < 2 else x[row]
                                                        for row in rows_of(part)]))),
               ("all", member(lambda part: real[rows_of(part)]))]
    x_adv, broken_by = run_ensemble(model, x, y, members[:5], epsilon=0.3)
    assert broken_by.tolist() == [4, 4, STANDING, STANDING, STANDING, MISCLASSIFIED] and asked == [5] * 5
    assert torch.equal(x_adv[:2], real[:2]) and torch.equal(x_adv[2:], x[2:])
    asked.clear()
    assert (run_ensemble(model, x, y, members[4:], epsilon=0.3)[1].tolist() == [0, 0, 1, 1, 1, MISCLASSIFIED]
            and asked == [5, 3])
    assert not confirmed(model, real, x, y, epsilon=1e-4)[:5].any()


# The published implementation

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
            assert torch.equal(autoattack_reference(model, x, y, epsilon=0.1, norm="l2", seed=3),
                               (x + 0.1).clamp(0, 1))
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
