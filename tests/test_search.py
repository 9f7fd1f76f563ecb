"""attacks/search.py: a view of the network decides nothing, costs nothing where it is wrong, and is asked by some attacks only."""
from functools import partial

import pytest
import torch
from torch import nn

from attacks.autoattack import STANDARD, STANDING, confirmed, run_ensemble
from attacks.ball import choose
from attacks.catalogue import members_of, strong_attacks
from attacks.search import ON_VIEW, searched, settled
from harness.run import TrainingPrecision, view_for_search
from losses.margin import cw_loss
from tests.attack_models import assert_independent_of_the_batch, assert_pure, batch, misclassified, network

QUICK = tuple((name, partial(attack, **{"num_queries" if name == "square" else "num_steps": 8})) for name, attack in STANDARD)
TASK = {"linf": {"epsilon": 0.02, "norm": "linf"}, "l2": {"epsilon": 0.15, "norm": "l2"}}
every_norm = pytest.mark.parametrize("norm", TASK)


class View(nn.Module):
    """What `change` makes of a network's logits and its input."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x):
        return self.change(self.model(x), x)


def verdicts(model, x, y, keys, norm, view=None):
    return run_ensemble(model, x, y, QUICK, **TASK[norm], keys=keys, view=view)


def lies(x):
    """Views that are wrong in every way that shows, on the images x too or anywhere but there."""
    def away(logits, point):
        images = (point.flatten(1)[:, None] == x.flatten(1)[None]).all(2).any(1)
        return torch.where(images[:, None], logits, logits.roll(1, 1))  # claims a success at every other point

    return {"constant": lambda logits, _: 0.0 * logits, "negated": lambda logits, _: -logits,
            "permuted": lambda logits, _: logits.roll(3, 1), "not a number": lambda logits, _: logits * float("nan"),
            "infinite": lambda logits, _: logits / 0.0,
            "scaled": lambda logits, _: 1e3 * logits, "claiming": away,
            "without a gradient": lambda logits, _: (0.0 * logits).detach() + 0.0 * logits}


@every_norm
def test_the_network_itself_as_the_view_changes_no_bit(norm):
    model = network()
    task = batch(model, 8)
    plain, viewed = verdicts(model, *task, norm), verdicts(model, *task, norm, view=model)
    assert 0 < (plain[1] == STANDING).sum() < 8
    assert all(torch.equal(a, b) for a, b in zip(plain, viewed))


@pytest.mark.parametrize("lie", lies(torch.zeros(1, 1, 1, 1)))
@every_norm
def test_a_view_that_lies_changes_no_verdict(norm, lie):
    model = network()
    x, y, keys = batch(model, 8)
    (_, plain), (x_adv, viewed) = verdicts(model, x, y, keys, norm), verdicts(model, x, y, keys, norm, view=View(model, lies(x)[lie]))
    assert torch.equal(plain == STANDING, viewed == STANDING)
    assert torch.equal(confirmed(model, x_adv, x, y, **TASK[norm]), viewed != STANDING)


def test_nothing_unconfirmed_counts_whatever_the_view():
    """Right values and a useless gradient do not show in two points: less is found, and all of it is true."""
    model = network()
    x, y, keys = batch(model, 8)
    x_adv, broken_by = verdicts(model, x, y, keys, "linf", view=View(model, lambda logits, _: logits.detach() + 0.0 * logits))
    broken = broken_by != STANDING
    assert torch.equal(misclassified(model, x_adv, y), broken) and torch.equal(x_adv[~broken], x[~broken])
    assert torch.equal(confirmed(model, x_adv, x, y, **TASK["linf"]), broken)


@every_norm
def test_with_a_view_the_ensemble_is_pure_and_independent_of_the_batch(norm):
    model = network()
    task = batch(model, 6)

    def attack(network, x, y, *, keys):
        return verdicts(network, x, y, keys, norm, view=View(network, lambda logits, _: logits.bfloat16().double()))[0]

    assert_pure(attack, model, *task)
    assert_independent_of_the_batch(attack, model, *task)


def test_what_is_settled():
    """Logits (z, -z) with z the first pixel: margins 2 z, and views that are off by a given amount."""
    model = View(nn.Identity(), lambda x, _: torch.stack([x[:, 0, 0, 0], -x[:, 0, 0, 0]], 1) - torch.tensor([0.25, -0.25]))
    x, y = torch.full((1, 1, 1, 1), 0.75), torch.zeros(1, dtype=torch.long)  # margin 1, the boundary at 0.25

    def is_settled(value, off=0.0, off_at_x=0.0, radius=1.0):
        def change(logits, point):
            return logits + torch.where(point.flatten(1) == 0.75, off_at_x, off) * torch.tensor([0.5, -0.5])

        point = torch.full_like(x, value)
        return bool(settled(model, View(model, change), point, x, y, torch.tensor([radius]), "linf"))

    assert is_settled(0.2) and is_settled(0.2, off=9.0, off_at_x=9.0)   # misclassified in fact
    assert not is_settled(0.2, radius=0.5) and is_settled(0.2, radius=0.3)  # beyond the ball, 0.25 and 0.45 being the point within
    assert not is_settled(0.3) and is_settled(0.4)                      # near and far from the boundary
    assert is_settled(0.4, off=0.15) and not is_settled(0.4, off=-0.25) and not is_settled(0.4, off_at_x=0.25)
    assert not is_settled(float("nan")) and not is_settled(0.4, off=float("nan"))


def test_only_some_attacks_see_the_view():
    model, seen = network(), []
    x, y, _ = batch(model, 4)
    view = View(model, lambda logits, _: logits)

    def member(name):
        def attack(net, x, y, *, epsilon, norm, keys):
            seen.append((name, net is view))
            return x
        return attack

    run_ensemble(model, x, y, [(name, member(name)) for name, _ in STANDARD], **TASK["linf"], view=view)
    assert seen == [(name, name in ON_VIEW) for name, _ in STANDARD] and 0 < len(ON_VIEW) < 4


def test_a_report_searches_on_the_view_and_gives_the_same_verdicts():
    model = network()
    x, y, _ = batch(model, 8)
    seen = []

    def view_of(network):
        seen.append(network)
        return View(network, lambda logits, _: logits)

    columns = members_of(("apgd-ce", "fab-t"))
    settings = {"epsilon": 0.02, "norm": "linf", "seed": 0, "margin_loss": cw_loss, "num_spsa_examples": None}
    plain, viewed = strong_attacks(columns, **settings), strong_attacks(columns, **settings, view_of=view_of)
    for name in columns:
        found = [attacks[name].run(model, x, y, torch.arange(8), 0) for attacks in (plain, viewed)]
        assert torch.equal(*found) and misclassified(model, found[0], y).any()
    assert seen == [model]


def test_the_view_of_a_network_is_in_bfloat16_or_there_is_none(monkeypatch):
    device = torch.device("cpu")
    assert view_for_search("float32", device) is None
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert view_for_search("auto", device) is None
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    view = view_for_search("auto", device)(nn.Linear(3, 2))
    assert isinstance(view, TrainingPrecision) and view.dtype == torch.bfloat16


@pytest.mark.parametrize("mask", ((True, False, True), (False, False, False), (True, True, True)))
def test_rows_are_chosen_and_nothing_is_overwritten(mask):
    new, old = torch.rand(3, 1, 2, 2), torch.rand(3, 1, 2, 2)
    new[1] = float("nan")
    before, mask = (new.clone(), old.clone()), torch.tensor(mask)
    result = choose(mask, new, old)
    assert torch.equal(result.nan_to_num(7), torch.where(mask[:, None, None, None], new, old).nan_to_num(7))
    assert torch.equal(old, before[1]) and torch.equal(new.nan_to_num(7), before[0].nan_to_num(7))


def test_searching_asks_the_network_again_where_the_view_is_in_doubt_only():
    """A view that lies about every other image: those are attacked again, with their own keys and radii."""
    model = network()
    x, y, keys = batch(model, 6)
    asked = []

    def deny(logits, point):
        return torch.where((point.flatten(1)[:, None] == x[::2].flatten(1)).all(2).any(1)[:, None], -logits, logits)

    liar = View(model, deny)

    def attack(net, x, y, *, epsilon, norm, keys):
        asked.append((net is liar, keys, epsilon))
        return x

    radius = torch.linspace(0.01, 0.02, 6, dtype=torch.float64)
    assert torch.equal(searched(attack, model, x, y, view=liar, epsilon=radius, norm="linf", keys=keys), x)
    (first, _, _), (again, its_keys, its_radius) = asked
    assert first and not again and torch.equal(its_keys, keys[::2]) and torch.equal(its_radius, radius[::2])
