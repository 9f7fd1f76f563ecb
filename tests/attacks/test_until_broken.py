"""attacks/until_broken.py: the first misclassified iterate of PGD or its last one,
whatever shares the batch, which stays full."""
from functools import partial

import pytest
import torch
from attack_models import (
    assert_independent_of_the_batch,
    assert_pure,
    assert_refuses_what_does_not_fit,
    batch,
    misclassified,
    network,
    two_classes,
)
from torch import nn

from attacks.geometry import inside, radii
from attacks.pgd import pgd
from attacks.until_broken import pgd_until_broken
from losses.margin import cw_loss

TASK = {"linf": {"epsilon": 0.04, "step_size": 0.004, "norm": "linf"},
        "l2": {"epsilon": 0.3, "step_size": 0.03, "norm": "l2"}}
both_norms = pytest.mark.parametrize("norm", ("linf", "l2"))


@both_norms
@pytest.mark.parametrize("batch_size", (None, 1, 4, 50))
def test_the_first_misclassified_iterate_of_pgd_or_its_last(norm, batch_size):
    model = network()
    x, y, keys = batch(model, 20)
    iterates = [pgd(model, x, y, **TASK[norm], num_steps=steps, keys=keys) for steps in range(1, 13)]
    fallen = torch.stack([misclassified(model, iterate, y) for iterate in iterates])  # [steps, N]
    first = torch.where(fallen.any(0), fallen.int().argmax(0), 11)
    assert len(first[fallen.any(0)].unique()) > 2 and 0 < fallen.any(0).sum() < 20
    expected = torch.stack(iterates)[first, torch.arange(20)]
    found = pgd_until_broken(model, x, y, **TASK[norm], num_steps=12, keys=keys, batch_size=batch_size)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_any_objective_and_a_success_that_the_last_iterate_loses():
    """The step is too long: the second iterate jumps back over the boundary,
    the first one counts all the same."""

    class Shelf(nn.Module):  # class 1 for a mean between 0.6 and 0.7 alone
        def forward(self, x):
            mean = x.flatten(1).mean(1)
            return torch.stack([2 * (mean - 0.65).abs(), 0.1 - 0 * mean], 1)

    def follow(logits, y):
        # down to the shelf, then away from it
        return logits[:, 0] * torch.where(logits[:, 0] < 0.1, 1.0, -1.0)

    x, y = torch.full((2, 1, 4, 4), 0.5), torch.tensor([0, 0])
    task = {"epsilon": 0.4, "step_size": 0.12, "start": "clean", "loss_fn": follow}
    assert misclassified(Shelf(), pgd(Shelf(), x, y, **task, num_steps=1), y).all()
    assert not misclassified(Shelf(), pgd(Shelf(), x, y, **task, num_steps=2), y).any()
    assert misclassified(Shelf(), pgd_until_broken(Shelf(), x, y, **task, num_steps=2), y).all()


@both_norms
def test_a_linear_model_falls_beyond_its_distance_and_not_before(norm):
    model, x, y, w, margins = two_classes()
    distances = margins / (w.abs().sum() if norm == "linf" else w.norm())
    epsilon = 1.01 * float(distances.median())
    found = pgd_until_broken(model, x, y, epsilon=epsilon, step_size=epsilon / 4, num_steps=20, norm=norm,
                             batch_size=3)
    assert (torch.equal(misclassified(model, found, y), distances < epsilon)
            and 0 < (distances < epsilon).sum() < len(y))
    assert inside(found, x, radii(epsilon, x), norm).all()


def test_the_batch_stays_full_while_images_wait():
    """Images that fall leave after the forward pass that shows it, and the next ones take their places."""
    sizes = []

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            sizes.append(len(x))
            return self.inner(x)

    model = Counting()
    x, y, keys = batch(model, 30)
    run = partial(pgd_until_broken, model, x, y, **TASK["linf"], num_steps=12, keys=keys, loss_fn=cw_loss)
    sizes.clear()
    fallen = misclassified(model, run(), y)
    sizes.clear()
    run(batch_size=8)
    full = sizes.index(next(size for size in sizes if size < 8))
    assert sizes[:full] == [8] * full and sizes[full:] == sorted(sizes[full:], reverse=True)
    assert (30 - int(fallen.sum())) * 12 < sum(sizes) < 0.8 * 30 * 12


@both_norms
def test_properties(norm):
    model = network()
    task = batch(model)
    attack = partial(pgd_until_broken, **TASK[norm] | {"norm": norm}, num_steps=6)
    assert_pure(attack, model, *task)
    assert_independent_of_the_batch(attack, model, *task)
    assert_refuses_what_does_not_fit(
        lambda *args, **options: pgd_until_broken(*args, **{**TASK[norm], "num_steps": 6, **options}),
        model, *task)
    with pytest.raises(ValueError, match="num_steps"):
        attack(model, *task[:2], num_steps=0)
    assert len(attack(model, task[0][:0], task[1][:0])) == 0
