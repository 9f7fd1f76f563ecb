"""The record on disk: the same for any batch size, shard or interruption; who is attacked;
what counts as an adversary."""
import time
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from attacks.catalogue import members_of, strong_attacks, weighted_attacks
from attacks.noise import example_keys
from attacks.pgd import cross_entropy, pgd
from attacks.until_broken import pgd_until_broken
from harness.datasets.split import Split
from harness.errors import UserError
from harness.evaluation.attack_record import FIELDS, UNTOUCHED, AttackRecord, broken
from harness.evaluation.attacking import Task, count_left, inspect, run
from harness.evaluation.predictions import BatchInvariant
from losses.margin import cw_loss
from models import build_model
from tests import forks

COUNT, EPSILON = 60, 0.1


def network():
    torch.manual_seed(3)
    return build_model("lenet", 10, 1).eval()


def split_of(count=COUNT):
    images = torch.randint(0, 256, (count, 1, 28, 28), generator=torch.Generator().manual_seed(0),
                           dtype=torch.uint8)
    labels = network()(images.float() / 255).argmax(1)
    labels[::6] = (labels[::6] + 1) % 10
    return Split(images, labels, 1000 + torch.arange(count))


@dataclass(frozen=True)
class Fake:
    run: object
    minimal: bool = False
    everyone: bool = False
    num_restarts: int = 1
    limit: int | None = None
    refills: bool = False
    whole: object = None


def short_pgd(model, x, y, index, restart, loss_fn=cross_entropy):
    return pgd(model, x, y, epsilon=EPSILON, step_size=0.01, num_steps=3, loss_fn=loss_fn,
               keys=example_keys(index, 0, restart))


def task_of(batch_size=25):
    return Task(BatchInvariant(network()), split_of(), EPSILON, "linf", batch_size)


def measured(folder, batch_size=25, shards=((0, 1),), attacks=None, columns=None, bar=None):
    record = AttackRecord(folder, {"seed": 0}, COUNT)
    usual = {"a": Fake(short_pgd), "b": Fake(short_pgd, everyone=True, num_restarts=2)}
    for shard in shards:
        run(record, task_of(batch_size), attacks or usual, columns or {"a": ("a",)}, shard, bar)
    return record


def same(left, right):
    return all(torch.equal(left.rows[name][key].nan_to_num(), right.rows[name][key].nan_to_num())
               for name in left.rows for key in FIELDS)


def test_the_record_is_the_same_for_any_batch_size_and_sharding(tmp_path):
    whole = measured(tmp_path / "whole", 60)
    assert 0 < int(broken(whole.rows["a"], split_of().labels).sum()) < COUNT
    assert same(whole, measured(tmp_path / "small", 7))
    assert same(whole, measured(tmp_path / "shards", 25, ((1, 3), (0, 3), (2, 3))))


def test_an_attack_that_refills_its_batch_is_given_several_at_once(tmp_path):
    given = []

    def run(model, x, y, index, restart, batch_size):
        given.append((len(x), batch_size))
        return pgd_until_broken(model, x, y, epsilon=EPSILON, step_size=0.01, num_steps=12,
                                keys=example_keys(index), batch_size=batch_size)

    attacks = {"a": Fake(run, refills=True)}
    few, many = (measured(tmp_path / str(size), size, attacks=attacks) for size in (3, 60))
    assert given == [(24, 3), (24, 3), (2, 3), (50, 60)] and same(few, many)
    assert 0 < int(broken(few.rows["a"], split_of().labels).sum()) < COUNT


def test_the_margin_of_a_broken_example_is_that_of_the_last_step(tmp_path):
    options = {"epsilon": EPSILON, "step_size": 0.01, "num_steps": 12}

    def first(model, x, y, index, restart, batch_size):
        return pgd_until_broken(model, x, y, **options, keys=example_keys(index), batch_size=batch_size)

    def whole(model, x, y, index, restart):
        return pgd(model, x, y, **options, keys=example_keys(index))

    y = split_of().labels
    early, late, last = (measured(tmp_path / name, 7, attacks={"a": attack}).rows["a"] for name, attack in (
        ("early", Fake(first, refills=True)), ("late", Fake(first, refills=True, whole=whole)),
        ("last", Fake(whole))))
    fallen = broken(early, y)
    assert (torch.equal(fallen, broken(late, y))
            and torch.equal(late["margin"][fallen], last["margin"][fallen]))
    assert (late["margin"] < early["margin"])[fallen].any()
    assert torch.equal(late["margin"][~fallen].nan_to_num(), early["margin"][~fallen].nan_to_num())


def slowly(folder):
    """The usual attacks, with time between the batches to be killed in."""
    def slow(*task):
        time.sleep(0.05)
        return short_pgd(*task)

    torch.set_num_threads(1)
    measured(folder, 2, attacks={"a": Fake(slow), "b": Fake(slow, everyone=True, num_restarts=2)})


@pytest.mark.slow
def test_a_record_killed_twice_goes_on_to_the_same_one(tmp_path):
    whole, killed = measured(tmp_path / "whole", 2), tmp_path / "killed"
    for name in ("a", "b"):
        process = forks.FORK.Process(target=slowly, args=(killed,))
        process.start()
        deadline = time.monotonic() + 60
        while len(list((killed / name).glob("*.npz"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.join()
    assert 3 <= len(list((killed / "b").glob("*.npz"))) < 30
    assert same(whole, measured(killed, 2))


def test_what_is_recorded_is_not_attacked_again(tmp_path):
    measured(tmp_path / "r")

    def refuse(*_):
        raise AssertionError

    measured(tmp_path / "r", attacks={"a": Fake(refuse), "b": Fake(refuse, everyone=True)})


def test_who_is_attacked(tmp_path):
    seen = {}

    def watch(name, breaks):
        def run(model, x, y, index, restart):
            seen.setdefault(name, set()).update((index - 1000).tolist())
            return short_pgd(model, x, y, index, restart) if breaks else x
        return run

    attacks = {"first": Fake(watch("first", True)), "second": Fake(watch("second", False)),
               "alone": Fake(watch("alone", False)),
               "few": Fake(watch("few", False), limit=20), "all": Fake(watch("all", False), everyone=True)}
    columns = {"both": ("first", "second"), "alone": ("alone",), "few": ("few",)}
    record, y = measured(tmp_path / "r", attacks=attacks, columns=columns), split_of().labels
    correct = {k for k in range(COUNT) if k % 6}
    fallen = set(broken(record.rows["first"], y).nonzero().squeeze(1).tolist())
    assert fallen and seen["first"] == seen["alone"] == correct and seen["second"] == correct - fallen
    assert seen["few"] == {k for k in correct if k < 20} and seen["all"] == set(range(COUNT))
    assert (set((record.rows["second"]["prediction"] == UNTOUCHED).nonzero().squeeze(1).tolist())
            == set(range(COUNT)) - seen["second"])


def test_the_bar_knows_how_many_attacks_there_are_and_reaches_its_end(tmp_path):
    totals = []

    def watch(model, x, y, index, restart):
        totals.append((bar.desc, bar.total))
        return short_pgd(model, x, y, index, restart)

    class Counting:
        n, total, desc = 0, None, None

        def set_description_str(self, desc):
            self.desc = desc

        def update(self, count):
            self.n += count

    bar = Counting()
    attacks = {"all": Fake(watch, everyone=True, num_restarts=2), "first": Fake(watch), "second": Fake(watch)}
    record = measured(tmp_path / "r", 60, attacks=attacks, columns={"both": ("first", "second")}, bar=bar)
    correct, fallen = 50, int(broken(record.rows["first"], split_of().labels).sum())
    assert (totals[0] == ("all", 60 + 120 + 2 * correct)
            and totals[-1] == ("second", 60 + 120 + 2 * correct - fallen))
    assert (bar.n == bar.total
            and count_left(record, split_of().labels, attacks, {"both": ("first", "second")}) == 0)


@pytest.mark.parametrize(("adversary", "minimal", "dropped"),
                         ((lambda x: x + 2 * EPSILON, False, 1), (lambda x: x + 2 * EPSILON, True, 0),
                          (lambda x: x - 1, True, 1), (lambda x: x * float("nan"), True, 1),
                          (lambda x: x + EPSILON, False, 0)))
def test_an_adversary_outside_its_ball_or_box_does_not_count(adversary, minimal, dropped):
    x, y = torch.full((2, 1, 28, 28), 0.5), torch.tensor([0, 1])
    fields, used = inspect(replace(task_of(), model=network()), x, adversary(x), y, minimal)
    assert fields["dropped"].tolist() == [dropped] * 2
    assert torch.equal(used, x) == (not torch.equal(adversary(x), x + EPSILON))


def test_another_evaluation_is_never_continued(tmp_path):
    AttackRecord(tmp_path, {"seed": 0}, COUNT)
    with pytest.raises(UserError, match="seed differs"):
        AttackRecord(tmp_path, {"seed": 1}, COUNT)


def test_logits_do_not_depend_on_the_others_and_a_hidden_gradient_is_zero():
    x = split_of(40).images.float() / 255
    whole = BatchInvariant(network())(x)
    assert all(torch.equal(whole[k:k + 3], BatchInvariant(network())(x[k:k + 3])) for k in range(0, 39, 3))

    class Hidden(nn.Module):
        def forward(self, x):
            return x.detach().flatten(1)[:, :10]

    y = torch.zeros(40, dtype=torch.int64)
    assert torch.equal(pgd(BatchInvariant(Hidden()), x, y, epsilon=0.1, step_size=0.1, num_steps=1,
                           start="clean"), x)


def test_the_catalogue_gives_every_attack_by_name_and_refuses_others():
    columns = members_of(("vir",))
    attacks = strong_attacks(columns, epsilon=EPSILON, norm="linf", seed=0, margin_loss=cw_loss,
                             num_spsa_examples=2)
    assert ({member for members in columns.values() for member in members} == attacks.keys()
            and columns["mde"][1:3] == ("md", "mdmt"))
    assert (list(weighted_attacks(short_pgd, cross_entropy, lambda alpha: cross_entropy, (1.0, 2.0), 3))
            == ["A_rob", "A_tr_1", "A_tr_2"])
    data = split_of(2)
    for name, attack in attacks.items():
        if name in ("fgsm", "cw", "pgd100", "apgd-ce", "md"):
            x = data.images.float() / 255
            assert (attack.run(network(), x, data.labels, data.index, 0) - x).abs().max() <= EPSILON + 1e-6
    with pytest.raises(ValueError, match="unknown attack 'pdg'"):
        members_of(("pdg",))
    with pytest.raises(ValueError, match="not defined"):
        strong_attacks({"fgsm": ("fgsm",)}, epsilon=1.0, norm="l2", seed=0, margin_loss=cw_loss,
                       num_spsa_examples=None)
