"""benchmarks/evaluation.py: leaving images out changes no verdict, the other side leaves none out."""
import json

import pytest
import torch
from attack_models import batch, network

from attacks import apgd
from benchmarks import evaluation
from benchmarks.evaluation import Config, compare, main
from harness.config import parse_config
from harness.errors import UserError
from models import build_model


@pytest.fixture
def short(monkeypatch):
    """Members of a few steps."""
    monkeypatch.setattr(evaluation, "STANDARD", tuple(
        (name, lambda *args, attack=attack, steps=steps, **options: attack(*args, **options, **steps))
        for (name, attack), steps in zip(
            evaluation.STANDARD,
            ({"num_steps": 12}, {"num_steps": 6}, {"num_steps": 6}, {"num_queries": 120}))))
    apgd_of_all = evaluation.apgd_of_all
    for name in ("apgd_of_all", "every_apgd_target", "every_fab_target"):
        function = getattr(evaluation, name)
        monkeypatch.setattr(evaluation, name, lambda *args, function=function, **options: function(
            *args, **options, num_steps=12 if function is apgd_of_all else 6))


@pytest.mark.parametrize("norm", ("linf", "l2"))
@pytest.mark.parametrize("name", ("pgd100", "cw", "autoattack"))
def test_verdicts_are_the_same_and_nobody_leaves_the_whole_side(name, norm, short):
    model = network(shape=(1, 28, 28))  # of LeNet's image size, which the padding of batches takes
    x, y, _ = batch(model, 40, shape=(1, 28, 28))
    y[::7] = (y[::7] + 1) % 10
    row = compare(name, model, x, y, Config(repeats=1, batch_size=16, norm=norm),
                  epsilon=0.008 if norm == "linf" else 0.15)
    assert row["verdicts_equal"] and 5 < row["robust_percent"] < 80
    steps = {"pgd100": 101, "cw": 21}.get(name)
    if steps:
        assert row["passes"]["whole"] == 40 * (steps + 1) and row["passes"]["compacted"] < 40 * steps
    else:  # a pass before and one after each member; those of each, with 9 targets
        members = (1 + 12), (1 + 9 * (1 + 6 + 1)), (1 + 9 * (2 * 6 + 1 + 3)), (1 + 120)
        assert row["passes"]["whole"] == 40 * (1 + 4 + sum(members))
    assert 1 < row["passes_ratio"] < 100 / row["robust_percent"] + 0.1
    assert row["bound"] == pytest.approx(100 / row["robust_percent"])


def test_the_searches_are_as_before_afterwards():
    before = apgd._Walk.keep
    with pytest.raises(RuntimeError), evaluation.nobody_leaves():
        assert apgd._Walk.keep is not before
        raise RuntimeError
    assert apgd._Walk.keep is before


def test_a_different_verdict_is_told(monkeypatch):
    model = network(shape=(1, 28, 28))
    x, y, _ = batch(model, 6, shape=(1, 28, 28))
    sides = {"compacted": lambda model, x, y, *_, **__: model(x)[:, 0] > -9, "whole": lambda model, x, y, *_,
             **__: model(x)[:, 0] > 9}
    monkeypatch.setitem(evaluation.SIDES, "cw", sides)
    row = compare("cw", model, x, y, Config(repeats=1), epsilon=0.1)
    assert not row["verdicts_equal"] and "6 DIFFERENT" in evaluation.line(row)


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(build_model("lenet", 10, 1).state_dict(), tmp_path / "net.pt")
    flags = ["--checkpoint", str(tmp_path / "net.pt"), "--arch", "lenet", "--dataset", "digits",
             "--num_examples", "8", "--attacks", "cw",
             "--epsilon", "0.01", "--repeats", "2", "--device", "cpu", "--out", str(tmp_path / "out.json")]
    main(parse_config(Config, flags))
    result = json.loads((tmp_path / "out.json").read_text())
    row, = result["rows"]
    assert row["verdicts_equal"] and row["epsilon"] == 0.01
    assert len(row["seconds"]["whole"]) == 2 and result["seed"] == 0
    assert "environment" in result and "command" in result and evaluation.line(row) in capsys.readouterr().out
    for words, message in ((flags, "never overwritten"), (["--checkpoint", ""], "name a --checkpoint"),
                           ([*flags[:-2], "--repeats", "0"], "--repeats")):
        with pytest.raises(UserError, match=message):
            main(parse_config(Config, words))
