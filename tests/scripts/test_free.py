"""train_free.py: Algorithm 1 written out, what the checkpoint remembers,
schedules, many processes, refusals."""
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from test_scripts import read_log, same_bits, weights

import train_free
from harness.config import parse_config
from harness.datasets.batches import load_dataset, training_batches
from harness.errors import UserError
from harness.training.rows import PersistentRows
from harness.training.seeds import one_a_seed
from models import build_model

PLAIN = (*TINY[:4], *TINY[6:], "--model", "lenet", "--crop_padding", 0, "--no-flip", "--precision", "float32",
         "--schedule", "steps", "--lr", 0.05, "--epsilon", 0.2)  # TINY without --num_steps


def saved(folder):
    return torch.load(Path(folder, "last.pt"), weights_only=True)


def by_definition(num_replays, batch_size, num_batches, epsilon=0.2, lr=0.05, momentum=0.9, decay=5e-4,
                  seed=2):
    """Free AT on the batches of the script, with an SGD of its own; gives the weights,
    delta, and the mean loss."""
    torch.manual_seed(seed)
    model, data = build_model("lenet", 10, 1), load_dataset("digits", "data", 40)
    buffers = [torch.zeros_like(p) for p in model.parameters()]
    delta, losses = torch.zeros(batch_size, 1, 28, 28), []
    source = training_batches(data.train, batch_size, seed, 1)
    for _, (x, y, *_) in zip(range(num_batches), source):
        for _ in range(num_replays):
            noise = delta[:len(x)].clone().requires_grad_()
            loss = F.cross_entropy(model(x + noise), y)
            towards, *gradients = torch.autograd.grad(loss, [noise, *model.parameters()])
            moved = torch.clamp(noise.detach() + epsilon * torch.sign(towards), -epsilon, epsilon)
            delta[:len(x)] = torch.clamp(x + moved, 0, 1) - x
            with torch.no_grad():
                for parameter, gradient, buffer in zip(model.parameters(), gradients, buffers):
                    buffer.mul_(momentum).add_(gradient + decay * parameter)
                    parameter -= lr * buffer
            losses.append(loss.item())
    return model.state_dict(), delta, sum(losses) / len(losses)


@pytest.mark.parametrize("num_replays", [1, 3])
def test_it_is_the_algorithm_written_out(num_replays, script):
    script("train_free", *PLAIN, "--max_batches", 4, "--batch_size", 32, "--num_replays", num_replays,
           "--out_dir", "run")
    expected, delta, loss = by_definition(num_replays, 32, 4)
    found = saved("run")
    for name, value in expected.items():
        torch.testing.assert_close(found["model"][name], value, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found["delta"]["values"], delta, atol=1e-6, rtol=0)
    assert float(read_log(Path("run"))[0]["train_loss"]) == pytest.approx(loss, rel=1e-4)
    assert delta.abs().max() > 0.19


def test_the_last_short_batch_leaves_the_other_perturbations_alone(script):
    # 1,397 images: six batches of 200 and one of 197
    common = (*PLAIN, "--batch_size", 200, "--num_replays", 2)
    script("train_free", *common, "--max_batches", 6, "--out_dir", "six")
    script("train_free", *common, "--max_batches", 7, "--out_dir", "seven")
    six, seven = (saved(folder)["delta"]["values"] for folder in ("six", "seven"))
    assert torch.equal(six[197:], seven[197:])
    assert not any(torch.equal(six[k], seven[k]) for k in range(197))


def test_the_perturbation_survives_a_resumption(script):
    common = (*PLAIN, "--num_replays", 2, "--lr_drop_after", 2)
    script("train_free", *common, "--epochs", 4, "--out_dir", "whole")
    script("train_free", *common, "--epochs", 2, "--out_dir", "parts")
    script("train_free", "--resume", "parts", "--epochs", 4)
    assert same_bits(weights("whole/last.pt"), weights("parts/last.pt"))
    assert torch.equal(saved("whole")["delta"]["values"], saved("parts")["delta"]["values"])
    contents = saved("parts")
    contents["delta"]["values"].zero_()
    torch.save(contents, "parts/last.pt")
    script("train_free", "--resume", "parts", "--epochs", 5)
    script("train_free", "--resume", "whole", "--epochs", 5)
    assert not same_bits(weights("whole/last.pt"), weights("parts/last.pt"))  # so delta matters


@pytest.mark.parametrize("part", ("delta", "optimizer", "model"))
def test_a_checkpoint_without_one_of_its_parts_does_not_continue_the_run(script, part):
    script("train_free", *PLAIN, "--out_dir", "run")
    contents = saved("run")
    contents[part] = None
    torch.save(contents, "run/last.pt")
    with pytest.raises(UserError, match="does not continue this run"):
        script("train_free", "--resume", "run", "--epochs", 2)


@pytest.mark.slow
def test_many_processes_give_the_weights_and_the_perturbation_of_one(script, torchrun, tmp_path):
    # 65: an uneven split
    flags = (*PLAIN, "--max_batches", 3, "--batch_size", 65, "--num_replays", 2, "--lr", 0.01)
    script("train_free", *flags, "--out_dir", "one")
    done = torchrun("train_free.py", *flags, "--out_dir", "two")
    assert done.returncode == 0, done.stderr
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert max(float((one["model"][name] - two["model"][name]).abs().max()) for name in one["model"]) <= 1e-5
    assert float((one["delta"]["values"] - two["delta"]["values"]).abs().max()) <= 1e-6


def test_the_learning_rate_moves_at_every_replay(script):
    recipe = train_free.Config()
    rates = [train_free.learning_rate(done, recipe) for done in (0, 2.5, 5, 7.5, 10, 11)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0, 0])
    paper = train_free.RECIPES["paper"]
    assert ([train_free.learning_rate(done, paper) for done in (0, 12.99, 13, 19)]
            == pytest.approx([1, 1, 0.1, 0.01]))
    script("train_free", *PLAIN, "--schedule", "cyclic", "--epochs", 2, "--num_replays", 3,
           "--out_dir", "run")
    state = saved("run")
    assert state["scheduler"]["last_epoch"] == 2 * 2 * 3  # epochs, batches, replays
    assert state["optimizer"]["param_groups"][0]["lr"] == 0
    assert [float(row["lr"]) for row in read_log(Path("run"))] == pytest.approx([0, 0.05])


@pytest.mark.parametrize("flags",
                         [("--precision", "bf16"), ("--normalize", "--ema_decay", 0.9),
                          ("--crop_padding", 2, "--flip")])
def test_precision_normalisation_averages_and_augmentation_train(flags, script):
    script("train_free", *PLAIN, "--num_replays", 2, *flags, "--out_dir", "run")
    found = saved("run")["delta"]["values"]
    assert torch.isfinite(found).all() and 0.19 < float(found.abs().max()) <= 0.2 + 1e-6
    script("eval_mnist", "--checkpoint", "run/last.pt", "--num_steps", 1, "--num_restarts", 1,
           "--num_examples", 6)


def test_batchnorm_networks_train(script):
    script("train_free", *PLAIN, "--model", "resnet18", "--batch_size", 2, "--num_replays", 2,
           "--max_batches", 1, "--val_size", 2, "--out_dir", "run")
    # train mode throughout: one forward a replay
    assert int(weights("run/last.pt")["bn1.num_batches_tracked"]) == 2


def test_persistent_rows_are_read_written_and_saved_as_one():
    rows = PersistentRows(4, (2,), torch.device("cpu"))
    rows[torch.tensor([2, 0])] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    rows.synchronize()
    assert rows[torch.tensor([0, 1, 2, 3])].tolist() == [[3, 4], [0, 0], [1, 2], [0, 0]]
    other = PersistentRows(4, (2,), torch.device("cpu"))
    other.load_state_dict(rows.state_dict())
    assert torch.equal(other.values, rows.values) and list(rows.state_dict()) == ["values"]
    with pytest.raises(RuntimeError):
        PersistentRows(3, (2,), torch.device("cpu")).load_state_dict(rows.state_dict())


def test_recipes():
    for name, recipe in train_free.RECIPES.items():
        assert parse_config(train_free.Config, ["--recipe", name], train_free.RECIPES) == recipe
    default = train_free.Config()
    assert ((default.num_replays, default.epochs, default.lr, default.epsilon, default.weight_decay)
            == (8, 10, 0.04, 8 / 255, 5e-4))


def test_seeds_train_one_after_the_other(script):
    script("train_free", *PLAIN, "--seed", 6, "--out_dir", "alone")
    several = parse_config(train_free.Config, [*map(str, PLAIN), "--seeds", "5", "6", "--out_dir", "all"])
    for config in one_a_seed(several, "train_free"):
        train_free.main(config)
    assert same_bits(weights("all/seed6/last.pt"), weights("alone/last.pt"))
    assert not torch.equal(saved("all/seed5")["delta"]["values"], saved("alone")["delta"]["values"])


@pytest.mark.slow
def test_mistakes_give_one_line_and_exit_code_2(shell, script):
    done = shell("train_free.py", *PLAIN, "--num_replays", 0)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("train_free.py: error: ")
    for flags in (("--num_replays", "many"), ("--schedule", "linear"), ("--num_step", 3),
                  ("--batch_size", 0)):
        with pytest.raises(UserError):
            script("train_free", *PLAIN, *flags)
