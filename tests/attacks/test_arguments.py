"""Labels that do not fit are refused alike by every attack, and inputs of any shape are attacked."""
from functools import partial

import pytest
import torch
from torch import nn

from attacks.alma import alma
from attacks.apgd import apgd, apgd_targeted
from attacks.apgd_l1 import apgd_l1, apgd_l1_targeted
from attacks.autoattack import autoattack
from attacks.bim import bim_bisection
from attacks.bisection import apgd_bisection, pgd_bisection
from attacks.ddn import ddn
from attacks.fab import fab_targeted
from attacks.fmn import fmn
from attacks.margin_decomposition import md, mdmt
from attacks.pdpgd import pdpgd
from attacks.polish import polish
from attacks.pool import Budget, minimal_distances
from attacks.spsa import spsa
from attacks.square import square
from attacks.until_broken import pgd_until_broken
from attacks.walk import walk

SMALL = Budget(num_steps=5, target_steps=3, num_targets=2, num_rounds=2, round_steps=3, polish_steps=3,
               num_queries=20, num_walks=1, thorough=True)
ATTACKS = {
    "alma": partial(alma, num_steps=3), "ddn": partial(ddn, num_steps=3), "fmn": partial(fmn, num_steps=3),
    "pdpgd": partial(pdpgd, num_steps=3), "fab": partial(fab_targeted, num_steps=3),
    "apgd": partial(apgd, epsilon=0.1, num_steps=3),
    "apgd_targeted": partial(apgd_targeted, epsilon=0.1, num_steps=3),
    "apgd_l1": partial(apgd_l1, epsilon=1.0, num_steps=5),
    "apgd_l1_targeted": partial(apgd_l1_targeted, epsilon=1.0, num_steps=5),
    "autoattack": partial(autoattack, epsilon=1.0),
    "bim_bisection": lambda *task: bim_bisection(*task, num_steps=2, num_growths=2, num_bisections=2)[0],
    "pgd_bisection": partial(pgd_bisection, num_steps=3, num_rounds=2),
    "apgd_bisection": partial(apgd_bisection, num_steps=3, num_rounds=2),
    "md": partial(md, epsilon=0.1, num_steps=3, change_step=1),
    "mdmt": partial(mdmt, epsilon=0.1, num_steps=3, change_step=1),
    "until_broken": partial(pgd_until_broken, epsilon=0.1, step_size=0.1, num_steps=2),
    "polish": lambda model, x, y: polish(model, x, y, 1 - x, norm="l2"),
    "walk": lambda model, x, y: walk(model, x, y, 1 - x, num_queries=10),
    "pool": lambda *task: minimal_distances(*task, budget=SMALL).x_adv["l2"],
    "spsa": partial(spsa, epsilon=0.1, num_steps=2, num_samples=32),
    "square": partial(square, epsilon=0.1, num_queries=5),
}
every_attack = pytest.mark.parametrize("name", ATTACKS)


def task(*shape):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 4)), torch.rand(6, *shape)
    return model, x, model(x).argmax(1)


@every_attack
def test_labels_that_do_not_fit_are_refused_alike(name):
    model, x, y = task(1, 4, 4)
    wrong = {"do not fit 6 images": (y[1:], y[:, None], y.float(), y.int(), y > 0),
             "must be classes from 0 to 3": (y * 0 + 4, torch.where(y == y[0], -1, y))}
    for message, labels in wrong.items():
        for one in labels:
            with pytest.raises(ValueError, match=message):
                ATTACKS[name](model, x, one)


@every_attack
@pytest.mark.parametrize("shape", ((12,), (2, 9)))
def test_vectors_and_signals_are_attacked_or_refused_in_words(name, shape):
    model, x, y = task(*shape)
    if name == "square":
        with pytest.raises(ValueError, match=r"needs images \[B, C, H, W\], not \[6"):
            ATTACKS[name](model, x, y)
        return
    x_adv = ATTACKS[name](model, x, y)
    assert x_adv.shape == x.shape and (x_adv != x).any() and ((x_adv >= 0) & (x_adv <= 1)).all()
