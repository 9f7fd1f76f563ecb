"""The pool: closed forms in every norm, what it guarantees of its results,
and the exact distances of a small network as its measure."""
from dataclasses import replace

import pytest
import torch
from nets import interior, linear, linear_distance, tiny_mlp

from attacks import pool
from attacks.fab import fab_targeted
from attacks.geometry import NORMS, norm_of
from attacks.noise import example_keys
from attacks.pdpgd import pdpgd
from attacks.pool import BUDGETS, Budget, minimal_distances
from attacks.walk import walk
from harness.evaluation.predictions import BatchInvariant
from losses.margin import misclassified

SMALL = Budget(num_steps=40, target_steps=20, num_targets=2, num_rounds=4, round_steps=10, polish_steps=10,
               num_queries=100, num_walks=2)


@pytest.fixture(scope="module")
def digits():
    model, file = tiny_mlp()
    model = BatchInvariant(model)  # else rounding may make an image found among seven none among eight
    x = torch.from_numpy(file["images"])[:, None] / 255
    return model, x, torch.from_numpy(file["labels"]), torch.from_numpy(file["linf_distance"])


@pytest.mark.parametrize("num_classes", (2, 5))
def test_the_distances_of_a_linear_model(num_classes):
    model = linear(num_classes)
    x, y = interior(model)
    result = minimal_distances(model, x, y, budget="fast")
    for norm in NORMS:
        expected = linear_distance(model, x, y, norm)
        assert (result.distance[norm] >= expected * (1 - 1e-9)).all()
        torch.testing.assert_close(result.distance[norm], expected, rtol=0.01, atol=0)


def test_it_comes_close_to_the_exact_distances_and_never_below(digits):
    model, x, y, exact = digits
    result = minimal_distances(model, x, y)
    assert (result.distance["linf"] >= exact * (1 - 1e-4)).all()
    assert result.distance["linf"].mean() <= 1.002 * exact.mean()


def check(model, x, y, result):
    for norm in result.norms:
        found = (~result.misclassified) & result.distance[norm].isfinite()
        x_adv = result.x_adv[norm]
        assert ((x_adv >= 0) & (x_adv <= 1)).all() and x_adv.dtype == x.dtype and not x_adv.requires_grad
        assert misclassified(model(x_adv), y)[found].all()
        torch.testing.assert_close(result.distance[norm][found],
                                   norm_of(x_adv.double() - x.double(), norm)[found])
        assert torch.equal(x_adv[~found], x[~found])
        assert torch.equal(result.winner[norm] >= 0, found)
        assert (result.distance[norm][result.misclassified] == 0).all()
        if result.attacks:
            assert torch.equal(torch.stack(list(result.single[norm].values())).amin(dim=0),
                               result.distance[norm])
        for row in found.nonzero().squeeze(1):
            assert (result.single[norm][result.attacks[result.winner[norm][row]]][row]
                    == result.distance[norm][row])
    for smaller, larger in (("linf", "l2"), ("l2", "l1")):
        if {smaller, larger} <= set(result.norms):
            assert (result.distance[smaller] <= result.distance[larger] * (1 + 1e-12)).all()
    assert set(result.gradients) == set(result.seconds) == set(result.attacks)


@pytest.mark.parametrize("norms", (NORMS, ("l1",), ("l2", "linf")))
@pytest.mark.parametrize("rows", (slice(0, 8), slice(0, 1), slice(0, 0)), ids=("eight", "one", "none"))
def test_every_distance_is_proven_by_its_image(digits, norms, rows):
    model, x, y, _ = digits
    y = torch.where(torch.arange(8) == 2, (y + 1) % 10, y)  # one that is misclassified
    result = minimal_distances(model, x[rows], y[rows], norms=norms, budget=SMALL)
    assert result.norms == tuple(norms) and result.misclassified.sum() == (rows == slice(0, 8))
    check(model, x[rows], y[rows], result)


def test_all_misclassified(digits):
    model, x, y, _ = digits
    result = minimal_distances(model, x, (y + 1) % 10, budget=SMALL)
    check(model, x, (y + 1) % 10, result)
    assert result.misclassified.all() and result.attacks == []


@pytest.mark.parametrize("num_classes", (2, 200))
def test_two_and_two_hundred_classes(num_classes):
    model = linear(num_classes, dtype=torch.float32)
    x, y = interior(model, count=3)
    result = minimal_distances(model, x, y, budget=SMALL)
    check(model, x, y, result)
    assert all(result.distance[norm].isfinite().all() for norm in NORMS)


def test_a_network_that_cannot_be_fooled_is_censored():
    model = linear(3)
    model[1].weight.data.zero_()
    x = torch.rand((4, 1, 4, 4), dtype=torch.float64)
    result = minimal_distances(model, x, model(x).argmax(dim=1), budget=SMALL)
    assert all(result.distance[norm].isinf().all() and (result.winner[norm] == -1).all() for norm in NORMS)
    assert torch.equal(result.x_adv["l2"], x)


def test_a_tie_with_a_later_class_is_no_adversary():
    model = linear(2)
    model[1].weight.data.zero_()
    model[1].bias.data.zero_()
    x = torch.rand((2, 1, 4, 4), dtype=torch.float64)
    assert minimal_distances(model, x, torch.zeros(2, dtype=torch.long),
                             budget=SMALL).distance["l2"].isinf().all()


def test_an_example_does_not_depend_on_its_batch(digits):
    model, x, y, _ = digits
    model, x = model.network.double(), x.double()
    keys = example_keys(torch.arange(8), 5)
    whole = minimal_distances(model, x, y, budget=SMALL, keys=keys)
    again = minimal_distances(model, x, y, budget=SMALL, keys=keys)
    parts = [minimal_distances(model, x[rows], y[rows], budget=SMALL, keys=keys[rows])
             for rows in (slice(0, 3), slice(3, 8))]
    model.float()
    for norm in NORMS:
        assert torch.equal(whole.distance[norm], again.distance[norm])
        torch.testing.assert_close(torch.cat([part.distance[norm] for part in parts]), whole.distance[norm],
                                   rtol=1e-6, atol=0)


def test_what_other_attacks_found_counts_and_nothing_begins_at_an_image_without(digits):
    model, x, y, _ = digits
    found = minimal_distances(model, x, y, norms=("linf",))
    half = torch.where((torch.arange(8) < 4)[:, None, None, None], found.x_adv["linf"], x)
    result = minimal_distances(model, x, y, norms=("linf",), budget=SMALL, candidates={"theirs": half})
    single = result.single["linf"]["theirs"]
    assert torch.equal(single[:4], found.distance["linf"][:4]) and single[4:].isinf().all()
    assert (result.distance["linf"][:4] <= found.distance["linf"][:4]).all()
    assert sum("theirs" in name for name in result.attacks) == 1


def test_images_of_other_classes_count_and_fmn_begins_there(digits):
    model, x, y, _ = digits
    start = torch.cat([x[1:], x[:1]])  # another image, mostly of another class
    result = minimal_distances(model, x, y, norms=("linf",), budget=SMALL, starts=[start])
    wrong = misclassified(model(start), y)
    expected = torch.where(wrong, norm_of(start.double() - x.double(), "linf"), torch.inf)
    assert wrong.any() and torch.equal(result.single["linf"]["start 0"], expected)
    assert "fmn linf from start 0" in result.attacks
    best = minimal_distances(model, x, y, norms=("linf",), budget=SMALL,
                             extra={"oracle": (lambda *_, norm: result.x_adv[norm], 0)})
    assert (best.single["linf"]["oracle linf"] == result.distance["linf"]).all()
    assert (best.distance["linf"] <= result.distance["linf"]).all()


def test_the_second_chain_goes_from_the_end_of_fab_to_the_end_of_each(digits, monkeypatch):
    begun, ended = [], []

    def recorded(attack):
        def run(*task, **options):
            begun.append(options.get("start"))
            ended.append(attack(*task, **options))
            return ended[-1]

        run.__name__ = attack.__name__
        return run

    monkeypatch.setattr(pool, "fab_targeted", recorded(fab_targeted))
    for norm, attacks in pool.SECOND.items():
        monkeypatch.setitem(pool.SECOND, norm, tuple(map(recorded, attacks)))
    model, x, y, _ = digits
    result = minimal_distances(model, x, y, budget=SMALL)
    assert {"fab l2", "alma l2 from fab", "alma l1 from fab", "pdpgd l1 from fab"} <= set(result.attacks)
    assert begun[0] is None and len(begun) == 4
    assert all(start is end for start, end in zip(begun[1:], ended))


def test_walks_begin_at_the_image_with_windows_of_their_own_and_pdpgd_goes_on_from_each(digits, monkeypatch):
    model, x, y, _ = digits
    walked, descended = [], []

    def recorded_walk(*task, keys=None, start=None, **options):
        walked.append((keys, start, walk(*task, keys=keys, start=start, **options)))
        return walked[-1][2]

    def recorded_pdpgd(*task, start=None, **options):
        descended.append((start, pdpgd(*task, start=start, **options)))
        return descended[-1][1]

    recorded_pdpgd.__name__ = "pdpgd"
    monkeypatch.setattr(pool, "walk", recorded_walk)
    monkeypatch.setitem(pool.REFINE, "linf", (recorded_pdpgd, recorded_pdpgd))
    result = minimal_distances(model, x, y, norms=("linf",), budget=SMALL, keys=example_keys(torch.arange(8)))
    assert len(walked) == 3 and len(descended) == 6  # the walk from the closest comes first
    for (_, start, end), first, second in zip(walked[1:], descended[2::2], descended[3::2]):
        assert torch.equal(start, x) and first[0] is end and second[0] is first[1]
    assert len({tuple(keys.tolist()) for keys, *_ in walked}) == 3
    assert result.gradients["pdpgd linf from that walk"] == 4 * SMALL.num_steps
    without = minimal_distances(model, x, y, norms=("linf",), budget=replace(SMALL, num_walks=0))
    assert "walk linf from the image" in set(result.attacks) - set(without.attacks)


def test_the_model_is_left_as_it_was(digits):
    model, x, y, _ = digits
    model.train()
    minimal_distances(model, x[:2], y[:2], budget=SMALL)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    model.eval()


def test_bad_input_raises_a_value_error_that_names_it(digits):
    model, x, y, _ = digits
    for options, message in (({"budget": "huge"},
                              "unknown budget 'huge': choose one of fast, standard, strong"),
                             ({"norms": ("l3",)}, "unknown norm 'l3'")):
        with pytest.raises(ValueError, match=message):
            minimal_distances(model, x, y, **options)
    assert set(BUDGETS) == {"fast", "standard", "strong"}
