"""python -m harness.accept: what it says, and that each check can fail."""
import contextlib
import importlib
import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from attacks.noise import keyed_uniform
from harness.accept import __main__ as accept
from harness.accept import arithmetic, attacks, check, machine, training
from harness.accept.check import Check, Found, NotChecked, Site
from harness.errors import RunError, UserError
from models import build_model
from tests import forks, standin, standin_runs

CPU = torch.device("cpu")
GPU = torch.device("cuda")
GPU_LINES = ("no-wait", "compile", "torchrun", "speed")
HERE = {"device": "cpu", "commit": "0123"}


def run_here(monkeypatch, tmp_path, *checks, **flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(accept, "CHECKS", checks)
    accept.main(accept.Config(device="cpu", **flags))
    return json.loads(Path("accept.json").read_text())


def test_a_line_and_an_entry_for_each_check(monkeypatch, tmp_path, capsys):
    def fails(site):
        print("on the way")
        raise ValueError("not what\nwas expected")

    def is_missing(site):
        raise NotChecked("no such thing")

    checks = (Check("a", "it holds", lambda site: Found(True, "as said", {"x": 1.5})),
              Check("b", "it holds", lambda site: Found(False, "far away")), Check("c", "it runs", fails),
              Check("d", "it is there", is_missing),
              Check("e", "a GPU", lambda site: pytest.fail("run"), needs_gpu=True))
    with pytest.raises(RunError, match="2 of 5 checks failed: b, c"):
        run_here(monkeypatch, tmp_path, *checks)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:11].strip() for line in lines[1:6]] == ["PASS", "FAIL", "FAIL", "not checked",
                                                          "not checked"]
    assert "it holds: as said" in lines[1] and "ValueError: not what" in lines[3]
    rows = json.loads(Path("accept.json").read_text())["checks"]
    assert [row["verdict"] for row in rows] == ["PASS", "FAIL", "FAIL", "not checked", "not checked"]
    assert rows[0]["figures"] == {"x": 1.5}
    assert "fails" in rows[2]["trace"] and rows[2]["said"] == "on the way\n"


def test_a_check_that_breaks_the_device_has_its_line(monkeypatch, tmp_path):
    def broken(device):
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(accept, "release_memory", broken)
    with pytest.raises(RunError, match="1 of 2 checks failed: a"):
        run_here(monkeypatch, tmp_path, Check("a", "it holds", broken),
                 Check("b", "it holds", lambda site: Found(True, "as said")))
    rows = json.loads(Path("accept.json").read_text())["checks"]
    assert [row["verdict"] for row in rows] == ["FAIL", "PASS"]


def test_what_a_stopped_call_lacks_is_done_and_nothing_overwritten(monkeypatch, tmp_path, capsys):
    done, stopped = [], [True]

    def b(site):
        if stopped:
            raise KeyboardInterrupt
        done.append("b")
        return Found(False, "far away")

    checks = (Check("a", "it holds", lambda site: done.append("a") or Found(True, "so it does")),
              Check("b", "it holds", b), Check("c", "it holds", lambda site: Found(True, "so it does")))
    monkeypatch.setattr(accept, "environment", lambda device: HERE)
    with pytest.raises(KeyboardInterrupt):
        run_here(monkeypatch, tmp_path, *checks, only=("a", "b"))
    stopped.clear()
    capsys.readouterr()
    for _ in range(2):  # the second time everything is there
        with pytest.raises(RunError, match="1 of 2 checks failed: b"):
            run_here(monkeypatch, tmp_path, *checks, only=("a", "b"))
        assert done == ["a", "b"] and capsys.readouterr().out.count("it holds: ") == 2
    with pytest.raises(UserError, match="unknown check 'd'"):
        accept.main(accept.Config(device="cpu", only=("d",)))
    for other in (HERE | {"commit": "4567"}, HERE | {"hardware": "other"}):
        monkeypatch.setattr(accept, "environment", lambda device, other=other: other)
        with pytest.raises(UserError, match=r"accept\.json exists"):
            accept.main(accept.Config(device="cpu"))


def test_changed_code_does_not_go_on(monkeypatch, tmp_path):
    monkeypatch.setattr(accept, "environment", lambda device: HERE | {"commit": "0123+"})
    check = Check("a", "it holds", lambda site: Found(True, "so it does"))
    run_here(monkeypatch, tmp_path, check)
    with pytest.raises(UserError, match="code of one commit"):
        accept.main(accept.Config(device="cpu"))


def test_a_check_over_its_time_fails_and_the_next_runs(monkeypatch, tmp_path, capsys):
    def never_ends(site):
        while True:
            with contextlib.suppress(Exception):  # as code that tries and does without
                time.sleep(0.01)

    checks = (Check("a", "it ends", never_ends, seconds=0.1),
              Check("b", "it ends", lambda site: Found(True, "it does")))
    with pytest.raises(RunError, match="1 of 2 checks failed: a"):
        run_here(monkeypatch, tmp_path, *checks)
    lines = capsys.readouterr().out.splitlines()
    assert "took longer than 0.1 s" in lines[1] and lines[2].startswith("PASS")


def test_all_checks_take_less_than_ten_minutes_with_what_begins_before_them():
    assert sum(check.seconds for check in accept.CHECKS) <= 580


@pytest.mark.parametrize("name", ["cpu", "standin"])
def test_the_committed_results_are_of_these_checks_and_none_has_failed(name):
    result = json.loads((ROOT / f"results/accept/{name}.json").read_text())
    assert [row["check"] for row in result["checks"]] == [check.name for check in accept.CHECKS]
    verdicts = {row["check"]: row["verdict"] for row in result["checks"]}
    not_checked = {name for name, verdict in verdicts.items() if verdict == "not checked"}
    assert "FAIL" not in verdicts.values() and not_checked <= set(GPU_LINES)
    assert result["environment"]["hardware"] == "Stand-in" or name == "cpu"
    assert not result["environment"]["commit"].endswith("+")


def site_in(folder):
    return Site(CPU, False, folder, build_model)


def test_tf32_is_found(monkeypatch, tmp_path):
    assert arithmetic.float32(site_in(tmp_path)).holds
    product = torch.matmul

    def rounded(*given):  # the factors to ten bits, as a tensor core takes them
        return product(*(value if value.dtype == torch.float64 else
                         (value.view(torch.int32) & ~0x1FFF).view(torch.float32) for value in given))

    monkeypatch.setattr(torch, "matmul", rounded)
    found = arithmetic.float32(site_in(tmp_path))
    assert not found.holds and found.figures["ours"]["product"] > 1e-4


def test_noise_that_is_not_the_cpus_is_found(monkeypatch, tmp_path):
    assert arithmetic.noise(site_in(tmp_path)).holds
    noise = iter((lambda *given: keyed_uniform(*given) + 2.0**-24, keyed_uniform))
    monkeypatch.setattr(arithmetic, "keyed_uniform", lambda *given: next(noise)(*given))
    assert not arithmetic.noise(site_in(tmp_path)).holds


def test_the_distance_of_two_runs_is_a_part_of_the_way():
    start, end = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
    assert training.distance(end, end, start) == 0
    assert training.distance(2 * end - start, end, start) == pytest.approx(1)
    for found, expected in ((start, start), (end * torch.nan, end), (end, end * torch.nan)):
        assert training.distance(found, expected, start) == torch.inf  # nothing has moved, or is shown


def test_the_first_batches_are_those_of_a_run_and_leave_torch_and_run_as_they_were(tmp_path):
    words = (*training.SMALL, "--model", "lenet", "--num_steps", 1, "--max_batches", 2)
    before = training.Run.build, training.Run.batches
    (start, none), (end, _) = training.first_batches("train_at_mnist", words, CPU, tmp_path / "part", 2)
    assert (training.Run.build, training.Run.batches) == before and not torch.backends.cudnn.benchmark
    contents, said = check.train("train_at_mnist", words, CPU, tmp_path / "run")
    assert "finished: 1 epochs" in said and not len(none)
    assert torch.equal(end, check.weights_of(contents["model"]))
    torch.manual_seed(training.SEED)
    assert torch.equal(start, check.weights_of(build_model("lenet", 10, 1).state_dict()))


def steps_that_end_at(monkeypatch, **ends):
    """`one_step` of a GPU whose networks, one number each, go from 0 to ends[device]; the pairs it made."""
    pairs = []

    def first_batches(script, words, device, *given):
        pairs.append((script, words[words.index("--model") + 1], device.type))
        return [[torch.zeros(1), torch.zeros(0)], [torch.tensor([ends[device.type]]), torch.zeros(0)]]

    monkeypatch.setattr(training, "first_batches", first_batches)
    return pairs


def test_a_step_that_is_not_the_cpus_is_found(monkeypatch, tmp_path):
    for end, holds in ((1.05, True), (1.2, False), (torch.nan, False)):
        pairs = steps_that_end_at(monkeypatch, cuda=end, cpu=1.0)
        assert training.one_step(Site(GPU, True, tmp_path, build_model)).holds == holds
        assert len(pairs) == 2 * len(training.METHODS) * len(training.NETWORKS)
    monkeypatch.setattr(training, "SECONDS", -1)  # the time for further pairs has run out
    pairs = steps_that_end_at(monkeypatch, cuda=1.0, cpu=1.0)
    assert training.one_step(Site(GPU, True, tmp_path, build_model)).text.startswith("18 of 70 pairs")
    assert len(pairs) == 2 * 18
    pairs = steps_that_end_at(monkeypatch, cpu=0.0)  # a step that moves nothing
    found = training.one_step(site_in(tmp_path))
    assert not found.holds and found.text.startswith("18 of 70 pairs") and len(pairs) == 18


def test_the_networks_of_a_step_give_the_same_logits_twice_and_no_large_ones():
    torch.manual_seed(0)
    for name in ("small_cnn", "resnet18"):
        network = training.steady(build_model(name, 10, 3))
        x = torch.rand(4, 3, 32, 32)
        assert torch.equal(network(x), network(x)) and network.training
        assert 0.01 < network.eval()(x).detach().std() < 10


def test_a_run_that_does_not_go_on_as_it_was_is_found(monkeypatch, tmp_path):
    assert training.resumed(site_in(tmp_path / "well")).text == "a resumed run ends bit for bit"
    run = training.run
    monkeypatch.setattr(training, "run", lambda script, words: run(script, (*words[:3], 3, *words[4:])))
    assert not training.resumed(site_in(tmp_path / "badly")).holds  # an epoch too many


def test_adversaries_that_are_not_as_recorded_are_found(monkeypatch, tmp_path):
    monkeypatch.setattr(attacks, "COUNT", 8)
    monkeypatch.setattr(attacks, "ATTACKS", {name: attacks.ATTACKS[name] for name in ("pgd", "fmn")})
    found = attacks.verdicts(site_in(tmp_path / "well"))
    assert found.holds and found.figures["not_as_recorded"] == {"clean": 0, "fmn": 0, "pgd": 0}
    observe = attacks.attacking.observe
    monkeypatch.setattr(attacks.attacking, "observe", lambda model, x, y: observe(model, 1 - x, y))
    assert not attacks.verdicts(site_in(tmp_path / "badly")).holds


def test_an_adversary_where_two_logits_are_equal_may_be_of_either_class(monkeypatch, tmp_path):
    monkeypatch.setattr(attacks, "COUNT", 64)
    monkeypatch.setattr(attacks, "ATTACKS", {"fmn": attacks.ATTACKS["fmn"]})
    observe = attacks.attacking.observe

    def rounded(by):
        """The device's prediction by logits that are a little off, for or against a class by its number."""
        def seen(model, x, y):
            return observe(lambda x: model(x) + by * (torch.arange(10) % 2), x, y)
        return seen

    monkeypatch.setattr(attacks.attacking, "observe", rounded(5e-5))
    found = attacks.verdicts(site_in(tmp_path / "near"))
    assert found.holds and found.figures["not_as_recorded"]["fmn"] > 0, found
    monkeypatch.setattr(attacks.attacking, "observe", rounded(0.5))
    assert not attacks.verdicts(site_in(tmp_path / "far")).holds


def test_a_command_that_fails_is_found_and_one_that_is_given_up_ends(tmp_path):
    with pytest.raises(RuntimeError, match=r"no-such-file\.py"):
        machine._run(site_in(tmp_path), (machine.sys.executable, "no-such-file.py"))
    process = []
    popen = subprocess.Popen
    with pytest.MonkeyPatch.context() as patch, pytest.raises(accept.TookLonger), accept.within(0.2):
        patch.setattr(machine.subprocess, "Popen", lambda *given, **how: process.append(
            popen(*given, **how)) or process[0])
        machine._run(site_in(tmp_path), ("sleep", "60"))
    assert process[0].returncode == -15


def test_processes_that_do_not_find_what_one_finds_are_found(monkeypatch, tmp_path):
    alone = {"A_nat": 90.0, "A_rob": 50.0, "A_sa": {"1.0": 40.0}, "A_tr": {"1.0": 45.0}}
    together, commands = alone.copy(), []

    def run(site, command):
        commands.append(command)
        if "--out" in command:
            (site.folder / command[-1]).write_text(json.dumps(alone if "one" in command[-1] else together))

    monkeypatch.setattr(machine, "_run", run)
    assert machine.processes(site_in(tmp_path)).holds
    together["A_sa"] = {"1.0": 41.0}
    assert not machine.processes(site_in(tmp_path)).holds
    assert ["torch.distributed.run" in command for command in commands] == [True, True, False] * 2
    assert ["late.py" in command for command in commands] == [False, True, False] * 2
    assert f"sleep({machine.DELAY})" in (tmp_path / "late.py").read_text() and (
        machine.PATIENCE < machine.DELAY)
    for count, real in ((1, True), (8, False)):
        monkeypatch.setattr(machine, "num_gpus", lambda count=count: count)
        with pytest.raises(NotChecked, match="two GPUs"):
            machine.processes(Site(GPU, real, tmp_path, build_model))


@pytest.mark.slow
def test_an_attack_in_which_processes_wait_for_one_another_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "DELAY", 14)
    monkeypatch.setattr(machine, "PATIENCE", 7)
    waits = "run = attack\ndef attack(*given):\n    distributed.wait()\n    run(*given)\npipeline.run ="
    monkeypatch.setattr(machine, "LATE", machine.LATE.replace("pipeline.run =", waits, 1))
    with pytest.raises(RuntimeError, match=r"many\.json ended with 1"):
        machine.processes(site_in(tmp_path))


def test_a_network_that_does_not_fit_is_found(monkeypatch, tmp_path):
    def taken(mb):
        row = {"images_per_second": 900.0, "ratio": 4.0}
        rows = [row | {"model": "resnet18", "ours_mb": 2000.0}, row | {"model": "wrn34_10", "ours_mb": mb}]
        monkeypatch.setattr(machine, "_run", lambda site, command: (site.folder / "step.json").write_text(
            json.dumps({"rows": rows})))
        return machine.speed(site_in(tmp_path))

    assert taken(12_000.0).holds and "wrn34_10 900 images/s, 4.00 times" in taken(12_000.0).text
    assert not taken(30_000.0).holds


@pytest.mark.slow
def test_as_a_user_starts_it(tmp_path):
    done = forks.run("harness/accept/__main__.py", "--device", "cpu", "--only", "float32", "noise", "speed",
                     cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line[:11].strip() for line in lines[1:4]] == ["PASS", "PASS", "not checked"]
    assert lines[-1] == "written: accept.json"


def watched_on_the_standin(folder, waits):
    """`no_wait` where a device that is not there raises as a GPU does; waits: one step does."""
    training.COMMON, training.NETWORKS = ("AT, margin", "lenet"), {"lenet": 8}
    training.STEPS, training.METHODS = 4, {name: training.METHODS[name] for name in ("AT, margin", "IAAT")}
    script = importlib.import_module("train_at_mnist")
    weigh = script.margin_weights
    if waits:
        script.margin_weights = lambda *given: weigh(*given) * float(weigh(*given).detach().sum() > 0)
    try:
        with standin.StandinMode():
            return training.no_wait(Site(torch.device("cuda"), True, folder, build_model)).text
    finally:
        script.margin_weights = weigh


@pytest.mark.skipif(bool(standin.missing()), reason=str(standin.missing()))
@pytest.mark.slow
def test_a_wait_in_a_step_is_found(tmp_path):
    with standin_runs.child() as pool:
        (tmp_path / "well").mkdir()
        assert pool.submit(watched_on_the_standin, tmp_path / "well", False).result() == (
            "2 methods, 1 networks and generated images, 2 batches each, never")
        (tmp_path / "badly").mkdir()
        with pytest.raises(RuntimeError, match=r"synchronizing CUDA operation \(_local_scalar"):
            pool.submit(watched_on_the_standin, tmp_path / "badly", True).result()


@pytest.mark.slow
def test_a_piece_that_is_not_compiled_is_found(monkeypatch, tmp_path):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, options, **others: compiled(
        function, backend="eager", **others))  # all but the compiler
    monkeypatch.setattr(training, "COMPILED", {name: training.COMPILED[name] for name in (
        "a short last batch", "dropout")})
    monkeypatch.setattr(training, "SMALL", (*training.SMALL, "--max_batches", 3))
    torch.compiler.reset()
    found = training.compiled(site_in(tmp_path / "well"))
    assert found.holds and found.text == "4 runs, every piece", found
    monkeypatch.setattr(training, "COMPILED", {"dropout": (training.COMPILED["dropout"][0], 2)})
    torch.compiler.reset()
    found = training.compiled(site_in(tmp_path / "badly"))  # its attack's step is not one
    assert not found.holds and found.text == "not as a whole: dropout --no-graphs, dropout --graphs"


def on_the_standin(folder, wrong=False):
    """All checks at toy size; wrong: the weights of examples are not the CPU's."""
    os.chdir(folder)
    training.COMMON, training.NETWORKS = ("AT, margin", "lenet"), {"lenet": 8}
    training.METHODS = {"AT, margin": training.METHODS["AT, margin"]}
    attacks.COUNT, attacks.ATTACKS = 8, {name: attacks.ATTACKS[name] for name in ("pgd", "fmn")}
    script = importlib.import_module("train_at_mnist")
    weigh = script.margin_weights
    if wrong:
        script.margin_weights = lambda logits, *given: weigh(logits, *given) * (1 + logits.is_cuda)
    with standin.StandinMode():
        accept.main(accept.Config(only=("step",) if wrong else ()))


@pytest.mark.skipif(bool(standin.missing()), reason=str(standin.missing()))
@pytest.mark.slow
def test_on_a_standin_the_lines_of_a_gpu_are_not_checked(tmp_path):
    with standin_runs.child() as pool:
        pool.submit(on_the_standin, tmp_path).result()
        result = json.loads((tmp_path / "accept.json").read_text())
        (tmp_path / "accept.json").unlink()
        with pytest.raises(RunError, match="1 of 1 checks failed: step"):
            pool.submit(on_the_standin, tmp_path, wrong=True).result()
    verdicts = {row["check"]: row["verdict"] for row in result["checks"]}
    assert verdicts == {check.name: "not checked" if check.name in GPU_LINES else "PASS"
                        for check in accept.CHECKS}
    assert result["environment"]["device"] == "cuda"
    assert result["checks"][2]["found"].endswith("farthest: 0 % of the update")
