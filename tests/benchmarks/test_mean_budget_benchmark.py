"""benchmarks/mean_budget.py: the first-order attack on a mean budget keeps it, moves as it should, and is
never stronger than the knapsack where distances are exact."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from attacks.geometry import norm_of
from benchmarks import mean_budget
from benchmarks.mean_budget import Config, first_order, main, shrink, spent
from curves.budget import Knapsack
from harness.config import parse_config
from harness.errors import UserError
from losses.margin import cw_loss, misclassified
from models import build_model


class Linear(nn.Module):
    """Logits (0, w x + b): class 1 has the distance (w x + b) / ||w||_* where no pixel meets its box."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0, -2.0, 1.0, 4.0]))

    def forward(self, x):
        score = x.flatten(1) @ self.w - 2.0
        return torch.stack([torch.zeros_like(score), score], dim=1)


def points(count=40, seed=0):
    """Images of class 1, most of them right, far from the ends of the box."""
    generator = torch.Generator().manual_seed(seed)
    return 0.35 + 0.3 * torch.rand(count, 1, 2, 2, generator=generator), torch.ones(count, dtype=torch.int64)


@pytest.mark.parametrize(("norm", "dual"), (("linf", 1), ("l2", 2)))
def test_it_keeps_the_mean_budget_and_is_no_stronger_than_the_knapsack(norm, dual):
    model, (x, y) = Linear(), points()
    score = model(x)[:, 1].detach().double().numpy()
    distances = np.maximum(score, 0) / np.linalg.norm([3, -2, 1, 4], ord=dual)
    knapsack, found = Knapsack(distances), []
    for accuracy in (0.7, 0.4, 0.1):
        epsilon = knapsack.budget(accuracy, 2.0)
        x_adv = first_order(model, x, y, epsilon=epsilon, norm=norm, batch_size=16)
        assert spent(norm_of(x_adv - x, norm)) <= epsilon * (1 + 1e-5)
        assert x_adv.min() >= 0 and x_adv.max() <= 1
        robust = 1 - float(misclassified(model(x_adv), y).double().mean())
        assert robust >= knapsack.accuracy([epsilon], 2.0)[0] - 1e-9
        found.append(robust)
    assert found[0] > found[2] and found[2] < (distances > 0).mean() - 0.2  # and it does break points


@pytest.mark.parametrize(("norm", "dual"), (("linf", 1), ("l2", 2)))
def test_a_step_moves_each_image_in_proportion_to_its_gradient(norm, dual):
    model, (x, y) = Linear(), points(6)
    scale = torch.tensor([1.0, 2.0, 2.5, 0.0, 1.0, 0.5])
    x_adv = first_order(model, x, y, epsilon=0.14, norm=norm, num_steps=1, reach=1.0,
                        loss_fn=lambda logits, labels: scale * cw_loss(logits, labels))
    expected = 0.14 * scale / scale.square().mean().sqrt()
    assert norm_of(x_adv - x, norm).tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    fall = expected * np.linalg.norm([3, -2, 1, 4], ord=dual)
    left = model(x)[:, 1] - fall
    assert torch.allclose(model(x_adv)[:, 1], left, atol=1e-5) and 0 < int((left > 0).sum()) < 6


@pytest.mark.parametrize("norm", ("linf", "l2"))
def test_what_is_within_the_budget_stays_and_the_rest_shrinks_to_it(norm):
    delta = torch.randn(20, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    size = spent(norm_of(delta, norm))
    assert torch.equal(shrink(delta, 1.01 * size, norm), delta)
    for epsilon in (0.9 * size, 0.1 * size):
        assert spent(norm_of(shrink(delta, epsilon, norm), norm)) == pytest.approx(epsilon, rel=1e-5)


def test_the_benchmark_holds_both_against_each_other(tmp_path, script):
    torch.manual_seed(0)
    torch.save(build_model("lenet", 10, 1).state_dict(), "net.pt")
    script("generate_robustness_curves", "--model", "net.pt", "--arch", "lenet", "--dataset", "digits",
           "--n_points", 12, "--norms", "inf", "--budget", "fast", "--no-plot", "--out", "curve")
    main(parse_config(Config, ["--results", "curve", "--leaving", "0.01", "0.5", "--num_steps", "3", "--out",
                               "out.json"]))
    rows = json.loads(Path("out.json").read_text())["rows"]
    assert all(row["norm"] == "linf" and row["ours"] <= min(row["first_order"], row["one_radius"]) + 1e-9
               and row["spent"] <= row["mean_budget"] * (1 + 1e-5) and row["nearer"] == 0 for row in rows)
    with pytest.raises(UserError, match="name a folder"):
        main(parse_config(Config, []))


def test_it_needs_a_device_with_float64(monkeypatch):
    def refuse(name, wide):
        raise UserError(f"{name}, wide: {wide}")

    monkeypatch.setattr(mean_budget.store, "find", lambda folders: [None])
    monkeypatch.setattr(mean_budget, "choose_device", refuse)
    with pytest.raises(UserError, match="mps, wide: True"):
        main(Config(results="curve", device="mps"))
