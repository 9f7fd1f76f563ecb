"""train_iaat.py: the radii against the released code, attacks of a radius each,
and the memory of the radii in every circumstance."""
import json
from pathlib import Path

import pytest
import torch
from conftest import TINY
from test_scripts import read_log, same_bits, weights

import train_iaat
from attacks.iaat import iaat_epsilon, iaat_step_size
from attacks.noise import example_keys
from attacks.pgd import pgd
from harness.config import parse_config
from harness.datasets.batches import load_dataset, training_batches
from harness.errors import UserError
from harness.training.seeds import one_a_seed
from models import build_model

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/iaat_eps.json").read_text())
PLAIN = (*TINY, "--model", "lenet", "--crop_padding", 0, "--no-flip", "--precision", "float32",
         "--epsilon", 0.2, "--gamma", 0.05, "--step_size", 0.02, "--lr", 0.05)


def radii(folder):
    return torch.load(Path(folder, "last.pt"), weights_only=True)["example_epsilon"]["values"]


def distinct(values):
    """The distinct values, to five digits."""
    return {round(value, 5) for value in values.unique().tolist()}


# ---- radii -------------------------------------------------------------------------------------------------

def test_the_radii_and_steps_are_those_of_the_released_code():
    epsilon = torch.tensor(GOLDEN["eps_prev"])
    correct, here, beyond = (torch.tensor(GOLDEN[name], dtype=torch.bool) for name in
                             ("correct_clean", "correct_at_eps_prev", "correct_at_eps_high"))
    expected = GOLDEN["out"][1]
    found = iaat_epsilon(epsilon, correct, here, beyond, gamma=GOLDEN["gamma"], beta=GOLDEN["beta"])
    torch.testing.assert_close(found, torch.tensor(expected["eps_new_f32"]), atol=1e-8, rtol=1e-5)
    for radius, name in ((epsilon, "step_size_cur_f32"), (epsilon + GOLDEN["gamma"], "step_size_high_f32")):
        steps = iaat_step_size(radius, GOLDEN["attack_steps"], GOLDEN["attack_lr_min"])
        torch.testing.assert_close(steps, torch.tensor(expected[name]), atol=1e-8, rtol=1e-5)


def test_a_wrong_example_keeps_its_radius_but_for_beta_and_a_radius_is_never_negative():
    epsilon, yes, no = torch.tensor([0.2, 0.01]), torch.tensor([True, True]), torch.tensor([False, False])
    assert iaat_epsilon(epsilon, no, yes, yes, gamma=0.05, beta=0.1).tolist() == pytest.approx([0.18, 0.009])
    assert iaat_epsilon(epsilon, yes, no, no, gamma=0.05, beta=1.0).tolist() == pytest.approx([0.15, 0.0])
    # the larger one decides
    assert iaat_epsilon(epsilon, yes, no, yes, gamma=0.05, beta=1.0).tolist() == pytest.approx([0.25, 0.06])
    assert iaat_epsilon(epsilon, yes, yes, no, gamma=0.05, beta=0.3).tolist() == pytest.approx([0.2, 0.01])
    assert iaat_epsilon(epsilon, yes, yes, yes, gamma=0.05, beta=0.0).tolist() == pytest.approx([0.2, 0.01])


def test_an_attack_with_a_radius_each_is_the_attack_on_each():
    torch.manual_seed(0)
    model = build_model("lenet", 10, 1).double()
    x, y = torch.rand(5, 1, 28, 28, dtype=torch.float64), torch.arange(5)
    epsilon = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]).double()
    steps, keys = torch.tensor([0.1, 0.01, 0.05, 0.1, 0.2]).double(), y + 7
    together = pgd(model, x, y, epsilon=epsilon, step_size=steps, num_steps=4, keys=keys)
    for k in range(5):
        alone = pgd(model, x[k:k + 1], y[k:k + 1], epsilon=float(epsilon[k]), step_size=float(steps[k]),
                    num_steps=4, keys=keys[k:k + 1])
        torch.testing.assert_close(together[k:k + 1], alone, atol=1e-12, rtol=0)
        assert float((together[k] - x[k]).abs().max()) <= float(epsilon[k]) + 1e-12
    assert torch.equal(together[0], x[0]) and float(together.min()) >= 0 and float(together.max()) <= 1


@pytest.mark.parametrize(("bad", "says"), [(torch.zeros(3), r"epsilon of shape \(3,\) does not fit 2 images"),
                                           (torch.tensor([0.1, -0.1]), "every epsilon must be"),
                                           (torch.tensor([0.1, torch.nan]), "every epsilon must be")])
def test_radii_that_do_not_fit_are_refused(bad, says):
    with pytest.raises(ValueError, match=says):
        pgd(build_model("lenet", 10, 1), torch.rand(2, 1, 28, 28), torch.zeros(2).long(), epsilon=bad,
            step_size=0.1, num_steps=1)


# ---- the memory --------------------------------------------------------------------------------------------

def test_in_the_burn_in_a_radius_is_epsilon_or_zero_and_belongs_to_its_example(script):
    script("train_iaat", *PLAIN, "--burn_in_epochs", 1, "--max_batches", 3, "--batch_size", 50,
           "--out_dir", "run")
    found, index = radii("run"), load_dataset("digits", "data", 40).train.index
    assert distinct(found) == {0.0, 0.2}
    assert found.shape == (int(index.max()) + 1,)
    assert 0 < int((found > 0).sum()) <= 150
    log = read_log(Path("run"))[0]
    assert float(log["train_epsilon"]) == pytest.approx(float(found.sum()) / 150, rel=1e-5)
    assert float(log["train_A_nat"]) == pytest.approx(100 * int((found > 0).sum()) / 150, rel=1e-5)
    held_out = torch.ones_like(found, dtype=torch.bool).index_fill_(0, index, False)
    assert int(held_out.sum()) >= 38 and float(found[held_out].max()) == 0


def test_after_it_every_radius_follows_the_rule(script):
    common = (*PLAIN, "--max_batches", 30, "--batch_size", 50, "--gamma", 0.06, "--beta", 0.5)
    script("train_iaat", *common, "--burn_in_epochs", 0, "--out_dir", "zero")  # from 0: beta * gamma, or 0
    assert distinct(radii("zero")) == {0.0, 0.03}
    script("train_iaat", *common, "--burn_in_epochs", 1, "--epochs", 2, "--out_dir", "run")
    # 0 stays or grows; 0.2 stays, grows, shrinks, or halves where wrong
    assert distinct(radii("run")) <= {0.0, 0.03, 0.2, 0.23, 0.17, 0.1}
    assert len(distinct(radii("run"))) >= 4


def test_a_resumed_run_equals_the_undisturbed_one(script):
    flags = (*PLAIN, "--burn_in_epochs", 1, "--max_batches", 3)
    script("train_iaat", *flags, "--epochs", 4, "--out_dir", "whole")
    script("train_iaat", *flags, "--epochs", 2, "--out_dir", "parts")
    script("train_iaat", "--resume", "parts", "--epochs", 4)
    assert same_bits(weights("whole/last.pt"), weights("parts/last.pt"))
    assert torch.equal(radii("whole"), radii("parts")) and len(distinct(radii("whole"))) > 3


@pytest.mark.slow
def test_many_processes_give_the_weights_and_radii_of_one(script, torchrun, tmp_path):
    # 65: an uneven split
    flags = (*PLAIN, "--burn_in_epochs", 1, "--max_batches", 3, "--epochs", 2, "--batch_size", 65)
    script("train_iaat", *flags, "--out_dir", "one")
    done = torchrun("train_iaat.py", *flags, "--out_dir", "two")
    assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "one/last.pt"), weights(tmp_path / "two/last.pt")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-5
    assert torch.equal(radii(tmp_path / "one"), radii(tmp_path / "two"))


# ---- the script --------------------------------------------------------------------------------------------

def test_the_burn_in_trains_at_epsilon_where_the_image_is_correct(script, monkeypatch):
    seen = []
    monkeypatch.setattr(train_iaat, "pgd", lambda model, x, y, **options: seen.append(options) or x)
    script("train_iaat", *PLAIN, "--burn_in_epochs", 1, "--epochs", 2, "--num_steps", 10, "--max_batches", 2,
           "--out_dir", "run")
    assert len(seen) == 2 * 1 + 2 * 3  # one attack a batch, then three
    assert distinct(torch.cat([options["epsilon"] for options in seen[:2]])) == {0.0, 0.2}
    same, tried, trained = seen[2:5]
    torch.testing.assert_close(tried["epsilon"], same["epsilon"] + 0.05)
    torch.testing.assert_close(tried["step_size"], (tried["epsilon"] / 5).clamp_min(0.02))
    # each attack has its own start
    assert len({tuple(options["keys"].tolist()) for options in (same, tried, trained)}) == 3
    index = next(training_batches(load_dataset("digits", "data", 40).train, 256, 2, 2))[2]
    assert torch.equal(trained["keys"], example_keys(index, 2, 2, 0))  # seed 2, epoch 2


@pytest.mark.parametrize("flags",
                         [("--precision", "bf16"), ("--normalize", "--ema_decay", 0.9),
                          ("--crop_padding", 2, "--flip"), ("--attack_mode", "eval", "--model", "small_cnn")])
def test_precision_normalisation_averages_and_augmentation_train(flags, script):
    script("train_iaat", *PLAIN, "--burn_in_epochs", 1, "--epochs", 2, *flags, "--out_dir", "run")
    assert torch.isfinite(radii("run")).all()
    script("eval_mnist", "--checkpoint", "run/last.pt", "--num_steps", 1, "--num_restarts", 1,
           "--num_examples", 6)


def test_clean_predictions_and_attacks_move_the_batch_statistics(script):
    script("train_iaat", *PLAIN, "--model", "resnet18", "--batch_size", 2, "--max_batches", 1,
           "--val_size", 2, "--burn_in_epochs", 0, "--num_steps", 1, "--out_dir", "run")
    # clean, two tried and judged, attack, loss
    assert int(weights("run/last.pt")["bn1.num_batches_tracked"]) == 1 + 2 * 2 + 1 + 1


def test_recipes():
    for name, recipe in train_iaat.RECIPES.items():
        assert parse_config(train_iaat.Config, ["--recipe", name], train_iaat.RECIPES) == recipe
    paper = train_iaat.RECIPES["paper"]
    assert ((paper.epochs, paper.batch_size, paper.lr, paper.lr_drop_after, paper.burn_in_epochs)
            == (110, 256, 0.1, (70, 90, 100), 10))
    assert (paper.gamma, paper.beta, paper.step_size, paper.num_steps) == (1.9 / 255, 0.1, 2 / 255, 10)


def test_seeds_train_one_after_the_other(script):
    script("train_iaat", *PLAIN, "--seed", 6, "--out_dir", "alone")
    several = parse_config(train_iaat.Config, [*map(str, PLAIN), "--seeds", "5", "6", "--out_dir", "all"])
    for config in one_a_seed(several, "train_iaat"):
        train_iaat.main(config)
    assert same_bits(weights("all/seed6/last.pt"), weights("alone/last.pt"))
    assert torch.equal(radii("all/seed6"), radii("alone"))


@pytest.mark.slow
def test_mistakes_give_one_line_and_exit_code_2(shell, script):
    done = shell("train_iaat.py", *PLAIN, "--beta", 1.5)
    assert ((done.returncode, done.stderr)
            == (2, "train_iaat.py: error: --beta must be between 0 and 1, not 1.5\n"))
    for flags in (("--beta", -0.1), ("--gamma", -1), ("--burn_in_epochs", -1), ("--num_steps", "ten")):
        with pytest.raises(UserError):
            script("train_iaat", *PLAIN, *flags)
