"""MD and MDMT: the worst point of a linear model, schedules, early leave, batches, class counts."""
import json
import math
from pathlib import Path

import pytest
import torch
from test_spsa import images, linear

from attacks.margin_decomposition import md, mdmt, step_length
from attacks.noise import example_keys
from harness.evaluation.predictions import BatchInvariant
from losses.margin import cw_loss

GOLDEN, TOY = (json.loads((Path(__file__).parents[1] / "golden" / f"{name}.json").read_text())
               for name in ("md", "attacks_toy"))
attacks = pytest.mark.parametrize("attack", (md, mdmt))


@attacks
def test_the_margin_of_a_linear_model_of_two_classes_is_that_of_the_corner(attack):
    model, x = linear(num_classes=2), images(6)
    model[1].bias.data.copy_(torch.tensor([9.0, 0.0]))  # class 0 cannot be left
    y = torch.zeros(6, dtype=torch.int64)
    slope = (model[1].weight[1] - model[1].weight[0]).detach()
    x_adv = attack(model, x, y, epsilon=0.05)
    assert torch.allclose(cw_loss(model(x_adv), y), cw_loss(model(x), y) + 0.05 * slope.abs().sum(),
                          atol=1e-5)


@attacks
@pytest.mark.parametrize("num_classes", (2, 3, 200))
@pytest.mark.parametrize("norm", ("linf", "l2"))
def test_ball_box_and_batches(attack, num_classes, norm):
    model, x = BatchInvariant(linear(num_classes)), images(7, 0.0, 1.0)  # as an evaluation has it
    y, keys = model(x).argmax(1), example_keys(torch.arange(7), 1)
    options = {"epsilon": 0.1, "norm": norm, "num_steps": 8, "change_step": 3}
    whole = attack(model, x, y, keys=keys, **options)
    single = torch.cat([attack(model, x[k:k + 1], y[k:k + 1], keys=keys[k:k + 1], **options)
                        for k in range(7)])
    assert torch.allclose(whole, single, atol=1e-5)
    size = (whole - x).flatten(1).norm(dim=1, p=math.inf if norm == "linf" else 2)
    assert size.max() <= 0.1 + 1e-6 and whole.min() >= 0 and whole.max() <= 1


@attacks
def test_an_example_that_is_wrong_at_the_start_leaves_at_once(attack):
    model, x, seen = linear(), images(3), []
    y = (model(x).argmax(1) + 1) % 3
    model.register_forward_hook(lambda module, given, logits: seen.append(len(logits)))
    attack(model, x, y, epsilon=0.0)
    assert sum(seen) <= 6  # MDMT ranks the classes first


def test_the_steps_fall_along_two_cosines():
    lengths = [step_length(k, 1.0, 50, 20) for k in range(50)]
    assert lengths[1] == lengths[21] == 2.0 and lengths[0] == pytest.approx(1 + math.cos(math.pi / 30))
    assert lengths[20] == pytest.approx(1 + math.cos(math.pi * 19 / 30)) and lengths[49] < 0.03


def test_a_change_step_beyond_the_end_is_refused():
    with pytest.raises(ValueError, match="change_step"):
        md(linear(), images(1), torch.tensor([0]), epsilon=0.1, num_steps=10, change_step=10)


def iterates_of(attack, monkeypatch) -> torch.Tensor:
    """What the attack shows the network from the released code's start, [runs, num_steps + 1, B, ...],
    and the result."""
    shape = (len(GOLDEN["rows"]), *torch.tensor(TOY["x"]).shape[1:])
    x, start = (torch.tensor(GOLDEN[name], dtype=torch.float64).view(shape) for name in ("x", "start"))
    weights = {name: torch.tensor(value, dtype=torch.float64) for name, value in TOY["model"].items()}
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x):
            seen.append(x.detach().clone())
            return (torch.tanh(x.flatten(1) @ weights["W1"].T + weights["b1"]) @ weights["W2"].T
                    + weights["b2"])

    monkeypatch.setattr("attacks.margin_decomposition.first_iterate", lambda *_: start.clone())
    attack(Net(), x, torch.tensor(GOLDEN["labels"]), epsilon=GOLDEN["epsilon"], num_steps=GOLDEN["num_steps"],
           change_step=GOLDEN["change_step"])
    return torch.stack(seen[attack is mdmt:]).view(-1, GOLDEN["num_steps"] + 1, *shape)


def test_md_takes_the_steps_of_the_released_code(monkeypatch):
    ours, theirs = iterates_of(md, monkeypatch), torch.tensor(GOLDEN["md_f64"], dtype=torch.float64)
    assert torch.allclose(ours[:, 1:].flatten(3), theirs, rtol=0, atol=1e-8)
    assert not torch.allclose(ours[0], ours[1], atol=1e-3)  # the two runs follow different terms


def test_mdmt_ends_where_the_released_code_does(monkeypatch):
    # [class by rank, run, B, CHW]
    ours = iterates_of(mdmt, monkeypatch)[:, -1].flatten(2).unflatten(0, (9, 2))
    for rank, ends in GOLDEN["mdmt_f64"].items():
        assert torch.allclose(ours[int(rank)], torch.tensor(ends, dtype=torch.float64), rtol=0, atol=1e-8)
    assert not torch.allclose(ours[0], ours[3], atol=1e-3)
