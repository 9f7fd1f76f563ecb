"""Strong attacks from the command line: the report, its independence of batches, shards and interruptions,
a closed form, refusals."""
import csv
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import distributed
from harness.datasets.batches import first_examples, load_dataset, to_unit
from harness.errors import RunError, UserError
from harness.evaluation import pipeline, recheck
from harness.evaluation.attack_record import AttackRecord
from harness.evaluation.budget import accuracy_at_budget
from harness.evaluation.verdict import Certificate
from harness.evaluation.worst_case import columns_of, worst_case
from models import build_model
from tests.forks import start

COUNT = 24
FLAGS = ("--checkpoint", "net.pt", "--arch", "lenet", "--dataset", "digits", "--epsilon", 0.1,
         "--num_steps", 2, "--num_restarts", 1, "--num_examples", COUNT, "--alphas", 1)
LINEAR = ("import torch\n"
          "def Net(num_classes=10):\n"
          "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, num_classes))\n")


def trained(model, steps):
    """The model after a few steps on the embedded digits."""
    torch.manual_seed(0)
    split, optimizer = load_dataset("digits", "data").train, torch.optim.Adam(model.parameters(), 0.003)
    for k in range(steps):
        part = split[slice(64 * (k % 15), 64 * (k % 15) + 64)]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(to_unit(part.images)), part.labels).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def lenet():
    torch.manual_seed(0)
    return trained(build_model("lenet", 10, 1), 45).state_dict()


@pytest.fixture
def evaluated(script, lenet):
    """Run eval_mnist.py on LeNet in this process; gives the per-example results."""
    torch.save(lenet, "net.pt")

    def run(out, *flags, attacks=("fgsm", "cw")):
        script("eval_mnist", *FLAGS, "--out", out, *flags, *(("--attacks", *attacks) if attacks else ()))
        return dict(np.load(Path(out).with_suffix(".npz"))) if Path(out).exists() else None

    return run


def same_exactly(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


def same(left, right):
    exact = [key for key in left if left[key].dtype.kind in "bi"]
    assert len(exact) >= 7
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in exact)


@pytest.mark.rendered
def test_the_report(evaluated, capsys):
    examples = evaluated("r.json", "--num_spsa_examples", 10, "--save_adversaries")
    result, printed = json.loads(Path("r.json").read_text()), capsys.readouterr().out
    attacks, worst = result["attacks"], result["worst_case"]
    assert (list(attacks) == ["fgsm", "cw"]
            and all({"accuracy", "ci95", "num_examples", "settings", "seconds"} <= a.keys()
                    for a in attacks.values()))
    assert (0 < worst["accuracy"] < result["A_nat"]
            and worst["accuracy"] <= min(result["A_rob"], *(a["accuracy"] for a in attacks.values())))
    assert (worst["A_sa"]["1.0"] <= worst["accuracy"]
            and result["verdict"].split(":")[0] in ("ok", "suspicious") and result["evidence"])
    assert (worst["accuracy"]
            == pytest.approx(100 * (examples["prediction_worst"] == examples["label"]).mean(), abs=1e-4))
    assert np.array_equal(examples["prediction_worst"] == examples["label"], examples["margin_worst"] > 0)
    assert set(worst["A_sa_kl"]) == set(result["A_sa_kl"]) == {"0.05", "0.2", "0.5"}
    margin = torch.from_numpy(examples["margin_worst"])
    for budget, value in worst["A_sa_kl"].items():
        expected = accuracy_at_budget(margin > 0, margin, float(budget))
        assert value == pytest.approx(100 * expected["accuracy"], abs=1e-4)
        assert worst["alpha_of_kl"][budget] == pytest.approx(expected["alpha"], rel=1e-5)
        assert worst["A_sa_kl_effective_size"][budget] == pytest.approx(expected["effective_size"], abs=0.05)
        assert value <= worst["A_sa_kl_ci95"][budget][1] and f"KL {budget}: {value:.2f} %" in printed
    assert worst["loss_kl"].keys() == worst["A_sa_kl"].keys() and worst["loss_cvar"].keys() == {"0.1", "0.01"}
    rows = list(csv.DictReader(Path("r_attacks.csv").read_text().splitlines()))
    assert [(row["attack"], float(row["accuracy"])) for row in rows] == [
        *((name, a["accuracy"]) for name, a in attacks.items()), ("worst case", worst["accuracy"])]
    assert all(Path(f"r{end}.png").stat().st_size > 10_000 for end in ("", "_confusion", "_attacks"))
    assert (f"worst case          {worst['accuracy']:6.2f} %" in printed
            and f"verdict net: {result['verdict']}" in printed)
    assert result["certificate"]["ok"] and 0.09 < result["certificate"]["max_perturbation"] < 0.1 + 1e-6
    found = recheck.recheck(Path("r.record/net"), None, "data", build_model)
    assert (set(found) == {"clean", "fgsm", "cw", "A_rob", "A_tr_1"}
            and found["A_rob"] == (COUNT, 0) == found["clean"])
    assert all(wrong == 0 for _, wrong in found.values())
    torch.save(build_model("lenet", 10, 1).state_dict(), "other.pt")
    assert (recheck.recheck(Path("r.record/net"), Path("other.pt"), "data", build_model)["clean"][1]
            > COUNT // 2)


def test_a_finished_record_is_reported_at_other_budgets_without_an_attack(evaluated, script, monkeypatch):
    first = evaluated("first.json", attacks=())
    monkeypatch.setattr(AttackRecord, "write", None)  # whatever attacks fails
    with pytest.raises(UserError, match="name another --out"):
        script("eval_mnist", "--resume", "first.record", "--kl_budgets", 0.3)
    script("eval_mnist", "--resume", "first.record", "--kl_budgets", 0.3, "--out", "more.json")
    before, after = (json.loads(Path(name).read_text()) for name in ("first.json", "more.json"))
    assert set(after["A_sa_kl"]) == {"0.3"} and after["A_sa"] == before["A_sa"]
    assert before["A_sa_kl"]["0.5"] <= after["A_sa_kl"]["0.3"] <= before["A_sa_kl"]["0.2"]
    assert same_exactly(first, dict(np.load("more.npz")))
    with pytest.raises(UserError, match="leave out --alphas"):
        script("eval_mnist", "--resume", "first.record", "--alphas", 3, "--out", "other.json")


def test_a_budget_below_0_is_refused(evaluated):
    with pytest.raises(UserError, match="--kl_budgets must be finite and at least 0, not -1"):
        evaluated("r.json", "--kl_budgets", 0.1, -1)


@pytest.mark.slow
def test_verdicts_do_not_depend_on_batch_size_shards_or_interruptions(evaluated, script):
    whole = evaluated("whole.json", "--batch_size", 500)
    assert same(whole, evaluated("small.json", "--batch_size", 5))
    assert evaluated("parts.json", "--shard", "1/2") is None
    assert same(whole, evaluated("parts.json", "--shard", "0/2"))
    flags = *FLAGS, "--out", "killed.json", "--batch_size", 1, "--attacks", "fgsm", "cw"
    process, = start("eval_mnist.py", flags)
    deadline = time.monotonic() + 60
    while len(list(Path("killed.record").rglob("*.npz"))) < COUNT + 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not Path("killed.json").exists()
    script("eval_mnist", "--resume", "killed.json")
    assert same(whole, dict(np.load("killed.npz")))


def test_the_worst_case_of_a_linear_model_is_its_closed_form(script):
    Path("net.py").write_text(LINEAR)
    torch.manual_seed(0)
    model = trained(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)), 45)
    torch.save(model.state_dict(), "linear.pt")
    # MDMT goes to the corner of each class in turn; CW alone may end at the corner of a class that is no help
    script("eval_mnist", *FLAGS[4:], "--epsilon", 0.03, "--checkpoint", "linear.pt", "--arch", "net.py:Net",
           "--attacks", "mdmt", "--out", "r.json", "--num_examples", 100)
    split = first_examples(load_dataset("digits", "data").test, 100)
    x, y = to_unit(split.images).flatten(1), split.labels
    w, b = model[1].weight.detach(), model[1].bias.detach()
    lead = (w[None] - w[y][:, None]).double()                                      # [N, K, pixels]
    best = torch.where(lead > 0, (x + 0.03).clamp(max=1)[:, None], (x - 0.03).clamp(min=0)[:, None])
    gap = (lead * best).sum(2) + (b[None] - b[y][:, None])
    standing = (gap.scatter(1, y[:, None], -torch.inf).amax(1) < 0).numpy()
    assert 10 < standing.sum() < 90
    assert np.array_equal(np.load("r.npz")["prediction_worst"] == y.numpy(), standing)


def test_without_attacks_the_result_has_a_verdict_and_no_columns(evaluated, capsys):
    evaluated("r.json", attacks=())
    result, printed = json.loads(Path("r.json").read_text()), capsys.readouterr().out
    assert not {"attacks", "worst_case"} & result.keys()
    assert result["evidence"] and result["probe"] and f"verdict net: {result['verdict']}" in printed
    assert (sorted(path.name for path in Path().glob("r*"))
            == ["r.json", "r.npz", "r.png", "r.record", "r_confusion.png"])
    evaluated("s.json", attacks=("fgsm",))
    strong = json.loads(Path("s.json").read_text())
    assert all(strong[key] == result[key]
               for key in ("A_nat", "A_rob", "A_sa", "A_tr", "confusion", "certificate", "probe"))


@pytest.mark.parametrize(("flags", "message"), (
    (("--attacks", "pdg"), "unknown attack 'pdg'"), (("--attacks", "fgsm", "--shard", "2/2"), "give i/n"),
    (("--attacks", "fgsm", "--norm", "l2", "--epsilon", 2), "fgsm is not defined in the norm l2"),
    (("--shard", "1"), "give i/n"), (("--norm", "l2"), "needs its own --epsilon")))
def test_what_does_not_fit_is_refused(flags, message, script, lenet):
    torch.save(lenet, "net.pt")
    with pytest.raises(UserError, match=message):
        script("eval_mnist", *FLAGS[:6], *FLAGS[8:], *flags)
    assert not list(Path().glob("*.record"))


@pytest.mark.slow
def test_an_unknown_attack_is_one_line_and_exit_code_2(shell, lenet, tmp_path):
    torch.save(lenet, tmp_path / "net.pt")
    done = shell("eval_mnist.py", *FLAGS, "--attacks", "pdg")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "unknown attack 'pdg'" in done.stderr


def test_ctrl_c_says_how_to_go_on_and_a_damaged_record_is_refused(evaluated, monkeypatch, capsys, script):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "run", stopped)
        evaluated("r.json")
    assert "stopped; go on with: python eval_mnist.py --resume r.record" in capsys.readouterr().err
    script("eval_mnist", "--resume", "r.record")
    batch, about = next(Path("r.record/net/cw").glob("*.npz")), Path("r.record/net/about.json")
    for path in Path().glob("r[._]*[!d]"):  # all but the record
        path.unlink()
    batch.write_bytes(batch.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"\.npz is damaged .* delete it"):
        script("eval_mnist", "--resume", "r.record")
    for text in ("{", "[]"):
        about.write_text(text)
        with pytest.raises(UserError, match=r"about\.json is damaged"):
            script("eval_mnist", "--resume", "r.record")


@pytest.mark.parametrize("count", (0, 1))
def test_a_plain_evaluation_goes_on_and_is_shared_like_any_other(count, evaluated, script):
    whole = evaluated("whole.json", attacks=())
    for shard in ("1/2", "0/2")[:count + 1]:
        evaluated("r.json", "--shard", shard, "--batch_size", 5, attacks=())
    batches = sorted(Path("r.record/net/A_rob").glob("*.npz"))
    assert Path("r.json").exists() == bool(count) and len(batches) == 3 * (count + 1)
    if not count:
        script("eval_mnist", "--resume", "r.json")
    assert same_exactly(whole, dict(np.load("r.npz")))


def test_under_torchrun_a_plain_evaluation_is_shared_and_no_collective_follows(evaluated, monkeypatch):
    whole = evaluated("whole.json", attacks=())
    for name in ("barrier", "all_reduce", "all_gather", "broadcast", "broadcast_object_list"):
        monkeypatch.setattr(distributed.dist, name, lambda *given, **options: pytest.fail("a collective"))
    monkeypatch.setattr(distributed, "from_first", lambda place: (Path("r.json"), Path("r.record")))
    for rank in (1, 0):  # the first process comes half an hour later
        monkeypatch.setattr(distributed, "start", lambda device, tensors, rank=rank: (rank, 2))
        evaluated("r.json", attacks=())
        done = [np.load(path)["position"] for path in Path("r.record/net/A_rob").glob("*.npz")]
        assert Path("r.json").exists() == (rank == 0)
        assert sorted(np.concatenate(done)) == list(range(rank, COUNT, 2 if rank else 1))
    assert same_exactly(whole, dict(np.load("r.npz")))


def test_without_out_a_stopped_evaluation_goes_on_and_another_one_gets_its_own_name(evaluated, script, lenet):
    torch.save(lenet, "net.pt")
    for extra in (("--shard", "0/2"), ("--shard", "0/2", "--seed", 1), ("--shard", "1/2"), ("--seed", 1)):
        script("eval_mnist", *FLAGS, *extra)
    assert {path.name for path in Path().glob("eval*.json")} == {"eval_net.json", "eval_net-2.json"}
    assert {path.name for path in Path().glob("*.record")} == {"eval_net.record", "eval_net-2.record"}
    assert [json.loads(Path(f"eval_net{end}.json").read_text())["seed"] for end in ("", "-2")] == [0, 1]


def test_a_record_is_resumed_wherever_it_is(evaluated, script):
    evaluated("r.json", "--shard", "0/2")
    Path("r.record").rename("moved")
    script("eval_mnist", "--resume", "moved")
    assert Path("r.json").exists() and not Path("r.record").exists()


@pytest.mark.parametrize("value", (float("nan"), 2.0))
def test_an_attack_that_leaves_ball_or_box_is_named_and_fails_the_evaluation(
        value, evaluated, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "pgd_by_index",
                        lambda model, x, *args, **options: torch.full_like(x, value))
    with pytest.raises(RunError, match="left its ball or box"):
        evaluated("r.json", attacks=())
    result = json.loads(Path("r.json").read_text())
    assert (not result["certificate"]["ok"] and "certificate" in result["verdict"]
            and "BROKEN" in capsys.readouterr().out)
    assert result["A_rob"] == result["A_nat"]  # what was dropped counts as no adversary


def test_pgd_in_l2(evaluated):
    evaluated("r.json", "--norm", "l2", "--epsilon", 1.5, attacks=("pgd100",))
    result = json.loads(Path("r.json").read_text())
    assert result["threat_model"]["norm"] == "l2" and result["certificate"]["ok"]
    assert 1 < result["certificate"]["max_perturbation"] < 1.5 + 1e-5
    assert result["worst_case"]["accuracy"] < result["A_nat"]


def test_a_column_on_a_subset_says_how_many_images_and_the_worst_of_an_example_is_a_misclassification():
    row = {"prediction": torch.tensor([1, 0, -1]),
           "margin": torch.tensor([-0.1, 0.2, float("nan")], dtype=torch.float64),
           "loss": torch.zeros(3, dtype=torch.float64)}
    other = {"prediction": torch.tensor([0, 0, 0]),
             "margin": torch.tensor([0.3, 0.1, 0.5], dtype=torch.float64), "loss": torch.ones(3)}
    y = torch.zeros(3, dtype=torch.int64)
    worst = worst_case({"clean": other, "few": row}, y)
    assert worst.prediction.tolist() == [1, 0, 0] and worst.margin.tolist() == [-0.1, 0.1, 0.5]
    attack = type("Few", (), {"limit": 2, "settings": {}})
    record = type("Stored", (), {"rows": {"clean": other, "few": row}, "seconds": {"few": 1.0}})
    facts, standing = columns_of(record, y, {"few": attack}, {"few": ("few",)})
    assert (facts["few"]["num_examples"] == 2 and facts["few"]["accuracy"] == 50
            and standing["few"].tolist() == [False, True, True])


def test_a_larger_l2_ball_allows_rounding_in_proportion():
    assert (Certificate(max_perturbation=2.0000015).broken(2.0) == ""
            and Certificate(max_perturbation=2.00001).broken(2.0))
