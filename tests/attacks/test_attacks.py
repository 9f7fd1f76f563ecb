"""PGD and FGSM against reference attacks and closed forms, what they guarantee of x_adv and of the model,
and the keyed noise."""
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from attacks.fgsm import fgsm
from attacks.frozen import frozen, predict
from attacks.kappa import KAPPAS, pgd_kappa
from attacks.noise import _mix, _shift, example_keys, keyed_normal, keyed_uniform
from attacks.pgd import cross_entropy, pgd
from losses.divergence import kl_divergence
from losses.margin import cw_loss, margin_weights

TOY = json.loads((Path(__file__).parents[1] / "golden" / "attacks_toy.json").read_text())
STARTS = ("uniform", "clipped", "gaussian", "clean")

dtypes = pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=("float64", "float32"))
modes = pytest.mark.parametrize("mode", ("eval", "train", None))
starts = pytest.mark.parametrize("start", STARTS)
quick = settings(max_examples=25, deadline=None, derandomize=True)


def linear_model(num_classes=2, shape=(1, 3, 3), scale=0.5, dtype=torch.float64, seed=0):
    """Logits that are linear in the pixels, so that the best perturbation is known."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), num_classes)).to(dtype)
    for parameter in model.parameters():
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model


def batch(shape=(6, 1, 3, 3), num_classes=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator, dtype=dtype)
    x.view(-1)[:2] = torch.tensor([0.0, 1.0], dtype=dtype)  # pixels on both faces of the box
    return x, torch.randint(num_classes, shape[:1], generator=generator)


def mixed_model():
    """BatchNorm and dropout, some submodules in eval mode, one weight frozen by the user,
    some gradients already there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU(), nn.Dropout(0.5)),
                          nn.Flatten(), nn.Linear(4, 2))
    model[1].eval()
    model[2][1].eval()
    model[0].weight.requires_grad_(False)
    for parameter in (model[0].bias, model[4].weight):
        parameter.grad = torch.rand_like(parameter)
    return model


def state(model):
    """Everything about the model that an attack must leave alone, in plain values:
    modes, flags, gradients, parameters."""
    return ([module.training for module in model.modules()],
            [(parameter.requires_grad, id(parameter.grad),
              parameter.grad is not None and parameter.grad.tolist(), parameter.tolist())
             for parameter in model.parameters()])


def small_attack(model, x, target, **kwargs):
    return pgd(model, x, target, **{"epsilon": 0.1, "step_size": 0.04, "num_steps": 3} | kwargs)


# The reference attacks

def weighted_cross_entropy(logits, y):
    return margin_weights(logits, y, 2.0) * cross_entropy(logits, y)


@pytest.mark.parametrize(("name", "start", "loss_fn"), (
    ("gairat.GA_PGD cent, no random start", "clean", cross_entropy),
    ("gairat.GA_PGD cent, start = clamp(x + EPS*noise_uniform)", "clamped uniform", cross_entropy),
    ("gairat.GA_PGD cw (confidence 50), no random start", "clean", cw_loss),
    ("trades.trades_loss, start = x + 0.001*noise_normal", "gaussian", kl_divergence),
    ("mart.mart_loss, start = x + 0.001*noise_normal", "gaussian", cross_entropy),
    ("zeng.PGDAttacker mode=baseline alpha=0.0, no random start", "clean", cross_entropy),
    ("zeng.PGDAttacker mode=baseline alpha=0.0, start = x + EPS*noise_uniform (not clamped)", "uniform",
     cross_entropy),
    ("zeng.PGDAttacker mode=margin alpha=2.0, no random start", "clean", weighted_cross_entropy),
    ("zeng.PGDAttacker mode=margin alpha=2.0, start = x + EPS*noise_uniform (not clamped)", "uniform",
     weighted_cross_entropy),
))
def test_pgd_is_the_attack_of_the_released_code(name, start, loss_fn):
    x, uniform, normal = (torch.tensor(TOY[key]) for key in ("x", "noise_uniform", "noise_normal"))
    model = tanh_network(TOY)
    first = {"clean": x, "uniform": x + TOY["eps"] * uniform,
             "clamped uniform": (x + TOY["eps"] * uniform).clamp(0, 1), "gaussian": x + 0.001 * normal}[start]
    target = predict(model, x) if loss_fn is kl_divergence else torch.tensor(TOY["labels"])
    x_adv = pgd(model, x, target, epsilon=TOY["eps"], step_size=TOY["step_size"], num_steps=TOY["steps"],
                loss_fn=loss_fn, start=first)
    torch.testing.assert_close(x_adv, torch.tensor(TOY["out"][name]["x_adv_f32"]), rtol=0, atol=1e-6)


def tanh_network(golden):
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 12), nn.Tanh(), nn.Linear(12, 10))
    names = {"1.weight": "W1", "1.bias": "b1", "3.weight": "W2", "3.bias": "b2"}
    model.load_state_dict({ours: torch.tensor(golden["model"][theirs]) for ours, theirs in names.items()})
    return model


def kappa_of(golden, start, kappa="count"):
    return pgd_kappa(tanh_network(golden), torch.tensor(golden["x"]), torch.tensor(golden["labels"]),
                     epsilon=golden["eps"], step_size=golden["step_size"], num_steps=golden.get("steps"),
                     start=start, kappa=kappa)


@pytest.mark.parametrize(("name", "noisy"), (
    ("gairat.GA_PGD cent, no random start", False),
    ("gairat.GA_PGD cent, start = clamp(x + EPS*noise_uniform)", True)))
def test_kappa_is_that_of_the_released_code(name, noisy):
    x = torch.tensor(TOY["x"])
    start = (x + TOY["eps"] * torch.tensor(TOY["noise_uniform"])).clamp(0, 1) if noisy else x
    x_adv, kappa = kappa_of(TOY, start)
    torch.testing.assert_close(x_adv, torch.tensor(TOY["out"][name]["x_adv_f32"]), rtol=0, atol=1e-6)
    assert kappa.tolist() == TOY["out"][name]["kappa"]


def test_kappa_counts_an_example_that_is_regained_and_can_leave_it_out():
    golden = json.loads((Path(__file__).parents[1] / "golden" / "gairat_kappa_flip.json").read_text())
    x_adv, kappa = kappa_of(golden, "clean")
    torch.testing.assert_close(x_adv, torch.tensor(golden["x_adv_f32"]), rtol=0, atol=1e-6)
    assert kappa.tolist() == golden["kappa"]
    assert kappa[9] == 6
    first = kappa_of(golden, "clean", "first")[1]
    assert first[9] == golden["first_misclassified_step_of_sample_9"]


@pytest.mark.parametrize("kappa", KAPPAS)
def test_counting_changes_nothing_of_the_attack(kappa):
    model, (x, y) = linear_model(), batch()
    keys = example_keys(torch.arange(6), 3)
    options = {"epsilon": 0.1, "step_size": 0.04, "num_steps": 5, "loss_fn": cw_loss, "keys": keys}
    x_adv, count = pgd_kappa(model, x, y, kappa=kappa, **options)
    assert torch.equal(x_adv, pgd(model, x, y, **options))
    assert count.dtype == torch.int64
    assert bool(((count >= 0) & (count <= 5)).all())


def test_kappa_is_all_steps_for_examples_out_of_reach_and_none_for_those_wrong_at_the_start():
    model, (x, y) = linear_model(), batch()
    y = torch.where(torch.arange(6) < 3, model(x).argmax(1), 1 - model(x).argmax(1))
    assert pgd_kappa(model, x, y, epsilon=1e-6, step_size=1e-6, num_steps=4)[1].tolist() == [4, 4, 4, 0, 0, 0]


# Closed forms: on a linear model the best perturbation is epsilon * sign(w), clipped to the box

def best_for_two_classes(model, x, y, epsilon):
    weight = model[1].weight
    direction = (weight[1 - y] - weight[y]).view_as(x).sign()
    return (x + epsilon * direction).clamp(0, 1).detach()


@dtypes
@pytest.mark.parametrize(("loss_fn", "start"), (
    (cross_entropy, "uniform"), (cross_entropy, "gaussian"), (cross_entropy, "clean"),
    (cw_loss, "uniform"), (weighted_cross_entropy, "uniform")))
def test_pgd_reaches_the_best_perturbation_of_a_linear_model(loss_fn, start, dtype):
    model, (x, y) = linear_model(dtype=dtype), batch(dtype=dtype)
    x_adv = pgd(model, x, y, epsilon=0.1, step_size=0.03, num_steps=8, loss_fn=loss_fn, start=start)
    assert torch.equal(x_adv, best_for_two_classes(model, x, y, 0.1))


@dtypes
def test_fgsm_is_the_best_perturbation_of_a_linear_model(dtype):
    model, (x, y) = linear_model(dtype=dtype), batch(dtype=dtype)
    assert torch.equal(fgsm(model, x, y, epsilon=0.1), best_for_two_classes(model, x, y, 0.1))


@dtypes
def test_cw_attack_follows_the_only_rival_among_many_classes(dtype):
    model, (x, y) = linear_model(7, dtype=dtype), batch(dtype=dtype)
    model[1].bias.data[2:] = -100.0  # classes 2 to 6 are out of the running
    x_adv = pgd(model, x, y, epsilon=0.1, step_size=0.03, num_steps=8, loss_fn=cw_loss)
    assert torch.equal(x_adv, best_for_two_classes(model, x, y, 0.1))


def test_kl_attack_from_the_gaussian_start_reaches_a_vertex_of_the_ball():
    model, (x, _) = linear_model(), batch()
    x = 0.2 + 0.6 * x
    x_adv = pgd(model, x, predict(model, x), epsilon=0.1, step_size=0.03, num_steps=10, loss_fn=kl_divergence,
                start="gaussian")
    torch.testing.assert_close((x_adv - x).abs(), torch.full_like(x, 0.1), rtol=0, atol=1e-12)


@starts
def test_pgd_never_ends_below_its_start_on_a_linear_model(start):
    model, (x, y) = linear_model(), batch((20, 1, 3, 3))
    keys = example_keys(torch.arange(20), 0)
    attacked = [small_attack(model, x, y, num_steps=num_steps, step_size=0.01, start=start, keys=keys)
                for num_steps in range(5)]
    losses = [cross_entropy(model(x_adv), y) for x_adv in attacked]
    for before, after in pairwise(losses):
        assert (after >= before - 1e-12).all()
    assert (losses[-1] > losses[0]).all()


# The step

def test_one_step_moves_every_pixel_by_step_size_along_the_sign():
    model, (x, y) = linear_model(), batch()
    x = 0.2 + 0.6 * x
    moved = pgd(model, x, y, epsilon=0.1, step_size=0.02, num_steps=1, start="clean") - x
    torch.testing.assert_close(moved, 0.02 * (best_for_two_classes(model, x, y, 0.1) - x).sign(),
                               rtol=0, atol=1e-12)


def test_pixels_without_a_gradient_stay_where_they_are():
    model, (x, y) = linear_model(), batch()
    model[1].weight.data[:, 4] = 0.0
    still = (small_attack(model, x, y, start="clean") == x).flatten(1)
    assert still[:, 4].all()
    assert not still[:, 5].any()


def test_kl_gradient_vanishes_at_the_clean_image_and_not_at_the_gaussian_start():
    model, (x, _) = linear_model(5), batch()
    largest = {}
    for start in ("clean", "gaussian"):
        def recording_kl(logits_adv, logits, start=start):
            logits_adv.register_hook(lambda gradient: largest.update({start: gradient.abs().max().item()}))
            return kl_divergence(logits_adv, logits)
        small_attack(model, x, predict(model, x), num_steps=1, loss_fn=recording_kl, start=start)
    assert largest["clean"] < 1e-14
    assert largest["gaussian"] > 1e-5


def test_kl_attack_from_the_clean_start_does_not_move():
    model, (x, y) = linear_model(dtype=torch.float32), batch(dtype=torch.float32)
    # probabilities of exactly 1 and 0: no rounding in the gradient
    model[1].bias.data.copy_(torch.tensor([200.0, 0.0]))
    assert torch.equal(small_attack(model, x, predict(model, x), loss_fn=kl_divergence, start="clean"), x)
    assert not torch.equal(small_attack(model, x, torch.ones_like(y), start="clean"), x)


def test_the_sum_of_losses_is_maximised_so_tiny_gradients_survive_any_batch_size():
    model, (x, y) = linear_model(dtype=torch.float32), batch((64, 1, 3, 3), dtype=torch.float32)
    x_adv = small_attack(model, x, y, loss_fn=lambda logits, y: 1e-44 * cw_loss(logits / 4, y), start="clean")
    assert not torch.equal(x_adv, x)


def test_loss_fn_is_called_once_a_step_with_the_target_untouched():
    model, (x, y) = linear_model(), batch()
    for num_steps in (0, 1, 4):
        calls = []
        target = (y, {"alpha": 2.0})

        def loss_fn(logits_adv, given, calls=calls):
            calls.append((logits_adv.shape, given))
            return cross_entropy(logits_adv, given[0])
        small_attack(model, x, target, num_steps=num_steps, loss_fn=loss_fn)
        assert len(calls) == num_steps
        assert all(shape == (6, 2) and given is target for shape, given in calls)


# The start

def test_first_iterate_reaches_the_model_unprojected_and_the_result_is_projected():
    seen = []
    model, (x, y) = linear_model(), batch()
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    first = x - 3.0
    x_adv = small_attack(model, x, y, start=first, num_steps=2)
    assert torch.equal(seen[0], first)
    assert (seen[1] - x).abs().max() <= 0.1 + 1e-12
    assert seen[1].min() >= 0
    assert (x_adv - x).abs().max() <= 0.1 + 1e-12


@dtypes
def test_random_starts_have_the_spread_they_should_have(dtype):
    torch.manual_seed(0)
    model = linear_model(shape=(1, 50, 50), dtype=dtype)
    x, y = torch.full((4, 1, 50, 50), 0.5, dtype=dtype), torch.zeros(4, dtype=torch.long)
    for keys in (None, example_keys(torch.arange(4), 1)):
        noise = {start: pgd(model, x, y, epsilon=0.1, step_size=0.0, num_steps=0, start=start, keys=keys) - x
                 for start in STARTS}
        assert noise["clean"].count_nonzero() == 0
        assert noise["uniform"].std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.03)
        assert noise["uniform"].abs().max().item() == pytest.approx(0.1, rel=0.01)
        assert noise["uniform"].mean().item() == pytest.approx(0.0, abs=0.003)
        assert noise["gaussian"].std().item() == pytest.approx(0.001, rel=0.03)
        assert noise["gaussian"].mean().item() == pytest.approx(0.0, abs=5e-5)


@pytest.mark.parametrize("start", ("uniform", "gaussian"))
def test_without_keys_the_noise_comes_from_the_global_generator(start):
    model, (x, y) = linear_model(), batch()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(small_attack(model, x, y, num_steps=0, start=start))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_inputs_are_left_as_they_were():
    model, (x, y) = linear_model(), batch()
    x_before, start = x.clone(), x + 0.05
    start_before = start.clone()
    for num_steps in (0, 2):
        x_adv = small_attack(model, x, y, start=start, num_steps=num_steps)
        x_adv.add_(1.0)
        small_attack(model, x, y, start="clean", num_steps=num_steps).add_(1.0)
    assert torch.equal(x, x_before)
    assert torch.equal(start, start_before)
    assert not x.requires_grad
    assert not start.requires_grad


# The certificate

@quick
@given(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
       st.sampled_from((0.0, 1 / 255, 0.031, 0.3, 1.0, 2.0)), st.floats(0, 1), st.integers(0, 3),
       st.sampled_from((*STARTS, "far")), st.sampled_from(("eval", "train", None)), st.booleans())
def test_x_adv_is_finite_inside_the_ball_and_inside_the_box(
        shape, epsilon, step_size, num_steps, start, mode, keyed):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(shape[1], 3, 3, padding=1), nn.Tanh(), nn.Dropout(0.2), nn.Flatten(),
                          nn.Linear(3 * shape[2] * shape[3], 4))
    x = torch.rand(shape).round(decimals=1)
    first = x + 5 * torch.randn(shape) if start == "far" else start
    x_adv = pgd(model, x, torch.randint(4, shape[:1]), epsilon=epsilon, step_size=step_size,
                num_steps=num_steps, start=first, mode=mode,
                keys=example_keys(torch.arange(shape[0])) if keyed else None)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert x_adv.isfinite().all()
    assert (x_adv - x).abs().max() <= epsilon + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@starts
@pytest.mark.parametrize("num_steps", (0, 3))
def test_epsilon_zero_leaves_x(start, num_steps):
    model, (x, y) = linear_model(dtype=torch.float32), batch(dtype=torch.float32)
    assert torch.equal(small_attack(model, x, y, epsilon=0.0, num_steps=num_steps, start=start), x)


def test_no_steps_and_no_noise_leaves_x():
    model, (x, y) = linear_model(), batch()
    assert torch.equal(small_attack(model, x, y, num_steps=0, start="clean"), x)


def test_no_steps_gives_the_projected_start():
    model, (x, y) = linear_model(), batch()
    assert torch.equal(small_attack(model, x, y, num_steps=0, start=x + 1.0), (x + 0.1).clamp(0, 1))


@pytest.mark.parametrize("num_steps", (0, 2))
def test_x_adv_has_no_graph_even_where_x_requires_a_gradient(num_steps):
    model, (x, y) = linear_model(), batch()
    for images, start in ((x, "uniform"), (x.clone().requires_grad_(), "clean"),
                          (x, x.clone().requires_grad_())):
        assert not small_attack(model, images, y, num_steps=num_steps, start=start).requires_grad


def test_an_attack_under_no_grad_is_the_same_attack():
    model, (x, y) = linear_model(), batch()
    expected = small_attack(model, x, y, start="clean")
    with torch.no_grad():
        assert torch.equal(small_attack(model, x, y, start="clean"), expected)
        assert not torch.is_grad_enabled()
    assert not torch.equal(expected, x)


@pytest.mark.parametrize(("message", "wrong"), (
    ("floating point", {"x": torch.zeros(2, 1, 3, 3, dtype=torch.uint8)}),
    (r"\[0, 1\]", {"x": torch.full((2, 1, 3, 3), 1.001)}),
    (r"\[0, 1\]", {"x": torch.full((2, 1, 3, 3), -0.001)}),
    (r"\[0, 1\]", {"x": torch.full((2, 1, 3, 3), 128.0)}),
    (r"\[0, 1\]", {"x": torch.full((2, 1, 3, 3), math.nan)}),
    ("epsilon", {"epsilon": -0.1}),
    ("epsilon", {"epsilon": math.nan}),
    ("epsilon", {"epsilon": math.inf}),
    ("step_size", {"step_size": -0.1}),
    ("num_steps", {"num_steps": -1}),
    ("unknown start 'normal'.*uniform", {"start": "normal"}),
    ("unknown norm 'l1'.*linf", {"norm": "l1"}),
    ("mode", {"mode": "test"}),
    (r"start of shape \(2, 3, 3\)", {"start": torch.zeros(2, 3, 3)}),
    (r"start of shape \(1, 1, 3, 3\)", {"start": torch.zeros(1, 1, 3, 3)}),
))
def test_bad_input_raises_a_value_error_that_names_it(message, wrong):
    model = linear_model(dtype=torch.float32)
    valid = {"x": torch.full((2, 1, 3, 3), 0.5), "target": torch.tensor([0, 1]), "epsilon": 0.1,
             "step_size": 0.1, "num_steps": 1}
    pgd(model, **valid)
    with pytest.raises(ValueError, match=message):
        pgd(model, **valid | wrong)


# The model

@modes
@pytest.mark.parametrize("fails", (False, True), ids=("returns", "raises"))
def test_modes_flags_and_gradients_come_back(mode, fails):
    model, (x, y) = mixed_model(), batch(dtype=torch.float32)
    before = state(model)
    expected = {"eval": [False] * 8, "train": [True] * 8, None: before[0]}[mode]

    def loss_fn(logits, y):
        assert [module.training for module in model.modules()] == expected
        assert not any(parameter.requires_grad for parameter in model.parameters())
        if fails:
            raise RuntimeError("boom")
        return cross_entropy(logits, y)
    if fails:
        with pytest.raises(RuntimeError, match="boom"):
            small_attack(model, x, y, loss_fn=loss_fn, mode=mode)
    else:
        small_attack(model, x, y, loss_fn=loss_fn, mode=mode)
    assert state(model) == before


def test_no_parameter_gradient_is_computed():
    model, (x, y) = linear_model(), batch()
    small_attack(model, x, y)
    assert [parameter.grad for parameter in model.parameters()] == [None, None]
    with frozen(model) as bare:
        assert not bare(x).requires_grad


def test_fgsm_runs_in_the_mode_it_is_given():
    model, (x, y), seen = linear_model(), batch(), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(module.training))
    fgsm(model, x, y, epsilon=0.1)
    fgsm(model, x, y, epsilon=0.1, mode="train")
    assert seen == [False, True]


def test_batchnorm_statistics_stay_in_eval_mode_and_move_in_train_mode():
    model, (x, y) = mixed_model().train(), batch(dtype=torch.float32)
    before = {name: value.clone() for name, value in model[1].state_dict().items()}
    small_attack(model, x, y)
    for name, value in model[1].state_dict().items():
        assert torch.equal(value, before[name]), name
    small_attack(model, x, y, mode="train")
    assert not torch.equal(model[1].running_mean, before["running_mean"])
    assert not torch.equal(model[1].running_var, before["running_var"])
    assert model[1].num_batches_tracked == 3


def test_predict_gives_logits_without_a_graph_in_the_mode_asked_for():
    model, (x, _) = mixed_model(), batch(dtype=torch.float32)
    before = state(model)
    logits = predict(model, x.clone().requires_grad_())
    assert not logits.requires_grad
    assert torch.equal(logits, mixed_model().eval()(x))
    assert not torch.equal(logits, predict(model, x, "train"))
    assert state(model) == before


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_the_bare_module_is_attacked_under_distributed_data_parallel(process_group):
    model, (x, y) = mixed_model(), batch(dtype=torch.float32)
    expected = small_attack(model, x, y, start="clean")
    wrapper, calls = DistributedDataParallel(model), []
    wrapper.register_forward_pre_hook(lambda *_: calls.append(1))
    before = state(wrapper)
    assert torch.equal(small_attack(wrapper, x, y, start="clean"), expected)
    assert not calls
    assert state(wrapper) == before
    model.zero_grad()
    wrapper(x).sum().backward()
    assert ([parameter.grad is not None for parameter in model.parameters()]
            == [False, True, True, True, True, True])


# The keyed noise

WORD = 2**64


def splitmix64(seed):
    """The generator as published (Steele, Lea & Flood 2014; Vigna's splitmix64.c),
    on Python's unbounded integers."""
    while True:
        seed = (seed + 0x9E3779B97F4A7C15) % WORD
        yield finalizer(seed)


def finalizer(z):
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB % WORD
    return z ^ z >> 31


def signed(word):
    return word - WORD if word >= WORD // 2 else word


words = st.lists(st.integers(0, WORD - 1), min_size=1,
                 max_size=20).map(lambda drawn: [*drawn, 0, 1, WORD - 1, WORD // 2, WORD // 2 - 1])


@quick
@given(words, st.integers(1, 63))
def test_mix_and_shift_are_those_of_unbounded_integers(drawn, by):
    bits = torch.tensor([signed(word) for word in drawn])
    assert _shift(bits, by).tolist() == [signed(word >> by) for word in drawn]
    assert _mix(bits).tolist() == [signed(finalizer(word)) for word in drawn]


def test_uniform_noise_is_the_top_of_the_published_splitmix64_sequence():
    published = {0: (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F),
                 1234567: (6457827717110365317, 3203168211198807973, 9817491932198370423)}
    for seed, numbers in published.items():
        generator = splitmix64(seed)
        assert tuple(next(generator) for _ in numbers) == numbers
        assert (keyed_uniform(torch.tensor([seed]), (3,)).tolist()
                == [[(number >> 40) / 2**24 for number in numbers]])


@pytest.mark.parametrize("draw", (keyed_uniform, keyed_normal))
def test_noise_depends_on_the_example_alone(draw):
    index = torch.tensor([5, 0, 59_999, 17, 2])
    whole = draw(example_keys(index, 3, 1), (2, 3, 4))
    assert whole.shape == (5, 2, 3, 4)
    assert whole.dtype == torch.float32
    order = torch.tensor([4, 2, 0])
    assert torch.equal(draw(example_keys(index[order], 3, 1), (2, 3, 4)), whole[order])
    assert torch.equal(draw(example_keys(index[3:4].int(), 3, 1), (2, 3, 4)), whole[3:4])
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 5


def test_keys_of_all_examples_and_streams_are_distinct():
    index = torch.arange(10_000)
    streams = ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (1, 2), (0, 0, 0))
    keys = torch.cat([example_keys(index, *stream) for stream in streams])
    assert keys.dtype == torch.int64
    assert len(keys.unique()) == len(keys)


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs().item()


def test_uniform_noise_is_uniform():
    noise = keyed_uniform(example_keys(torch.arange(64), 0, 0), (1, 32, 32)).double()
    assert noise.min() >= 0
    assert noise.max() < 1
    for numbers in (noise.flatten(),
                    keyed_uniform(example_keys(torch.arange(65_536), 0, 0), (1,)).double().flatten()):
        count = numbers.numel()
        assert numbers.mean().item() == pytest.approx(1 / 2, abs=4 * math.sqrt(1 / 12 / count))
        assert numbers.var().item() == pytest.approx(1 / 12, abs=4 * math.sqrt(1 / 180 / count))
        observed = torch.histc(numbers, bins=16, min=0, max=1)
        # the 99.99 % point of chi-square with 15 degrees of freedom
        assert ((observed - count / 16) ** 2 / (count / 16)).sum() < 44.3


@pytest.mark.parametrize("draw", (keyed_uniform, keyed_normal))
def test_noise_has_no_correlation_between_pixels_keys_or_streams(draw):
    index = torch.arange(33)
    noise = draw(example_keys(index, 0, 0), (1, 32, 32)).double()
    limit = 4 / math.sqrt(32 * 1024)
    assert correlation(noise[..., :-1], noise[..., 1:]) < limit * 1.02  # one column fewer
    assert correlation(noise[..., :-1, :], noise[..., 1:, :]) < limit * 1.02
    assert correlation(noise[:-1], noise[1:]) < limit
    for stream in ((0, 1), (1, 0), (0,)):
        assert correlation(noise, draw(example_keys(index, *stream), (1, 32, 32)).double()) < limit
    # neighbouring keys, not only keys of neighbouring examples
    consecutive = draw(index, (1, 32, 32)).double()
    assert correlation(consecutive[:-1], consecutive[1:]) < limit


def test_normal_noise_is_box_muller_of_the_uniform_noise_and_finite_at_zero():
    # the last one's first uniform number is exactly zero
    keys = torch.tensor([7, -7, signed(-0x9E3779B97F4A7C15 % WORD)])
    radius, angle = keyed_uniform(keys, (2, 50)).double().unbind(dim=1)
    assert radius[2, 0] == 0
    expected = (-2 * (1 - radius).log()).sqrt() * (2 * math.pi * angle).cos()
    torch.testing.assert_close(keyed_normal(keys, (50,)).double(), expected, rtol=1e-5, atol=1e-5)


def test_normal_noise_has_the_moments_of_the_normal_distribution():
    noise = keyed_normal(example_keys(torch.arange(64), 0, 0), (1, 32, 32)).double()
    error = 4 / math.sqrt(noise.numel())
    assert noise.isfinite().all()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert (noise**power).mean().item() == pytest.approx(moment, abs=error * math.sqrt(variance))
    assert (noise.abs() > 2).double().mean().item() == pytest.approx(0.0455, abs=error * math.sqrt(0.0455))


@pytest.mark.parametrize("start", ("uniform", "gaussian"))
def test_keyed_attack_on_an_example_is_the_same_alone_and_in_any_batch(start):
    model, (x, y) = linear_model(10), batch(num_classes=10)
    keys = example_keys(torch.arange(6), 0, 2)
    few_steps = {"step_size": 0.01, "start": start}  # so few that the start still shows in x_adv
    whole = small_attack(model, x, y, keys=keys, **few_steps)
    for chosen in ([3], [5, 0, 3], [0, 1, 2]):
        assert torch.equal(small_attack(model, x[chosen], y[chosen], keys=keys[chosen], **few_steps),
                           whole[chosen])
    assert not torch.equal(small_attack(model, x, y, keys=example_keys(torch.arange(6), 0, 3), **few_steps),
                           whole)


def test_keyed_attack_leaves_the_global_generator_alone():
    model, (x, y) = linear_model(), batch()
    before = torch.get_rng_state()
    for start in STARTS:
        small_attack(model, x, y, start=start, keys=example_keys(torch.arange(6)))
    assert torch.equal(torch.get_rng_state(), before)


def test_cross_entropy_is_one_value_per_example():
    logits, y = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 1])
    torch.testing.assert_close(cross_entropy(logits, y), -F.log_softmax(logits, dim=1)[torch.arange(3), y])
