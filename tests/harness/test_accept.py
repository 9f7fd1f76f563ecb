"""python -m harness.accept: what it says, and that each check can fail."""
import importlib
import json
import os
from pathlib import Path

import pytest
import torch

from attacks.noise import keyed_uniform
from harness.accept import __main__ as accept
from harness.accept import arithmetic, attacks, check, machine, training
from harness.accept.check import Check, Found, NotChecked, Site
from harness.errors import RunError, UserError
from models import build_model
from tests import forks, standin, standin_runs

CPU = torch.device("cpu")
GPU_LINES = ("no-wait", "compile", "torchrun", "speed")


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


def test_some_checks_alone_and_no_file_overwritten(monkeypatch, tmp_path):
    checks = [Check(name, "it holds", lambda site: Found(True, "so it does")) for name in "ab"]
    result = run_here(monkeypatch, tmp_path, *checks, only=("b",))
    assert [row["check"] for row in result["checks"]] == ["b"] and result["environment"]["device"] == "cpu"
    with pytest.raises(UserError, match=r"accept\.json exists"):
        accept.main(accept.Config(device="cpu"))
    with pytest.raises(UserError, match="unknown check 'c'"):
        accept.main(accept.Config(device="cpu", only=("c",)))


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


def test_the_distance_of_two_runs_is_a_part_of_the_way(tmp_path):
    words = (*training.SMALL, "--model", "lenet", "--num_steps", 1, "--max_batches", 1)
    contents, said = check.train("train_at_mnist", words, CPU, tmp_path / "run")
    assert "finished: 1 epochs" in said
    assert training.distance(contents, contents, site_in(tmp_path)) == 0
    torch.manual_seed(training.SEED)
    start = build_model("lenet", 10, 1).state_dict()
    twice = {"model": {name: 2 * value - start[name] for name, value in contents["model"].items()}}
    assert training.distance(twice, contents, site_in(tmp_path)) == pytest.approx(1, rel=1e-4)


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


def test_a_command_that_fails_is_found(tmp_path):
    with pytest.raises(RuntimeError, match=r"no-such-file\.py"):
        machine._run(site_in(tmp_path), (machine.sys.executable, "no-such-file.py"), 0.0)


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
    training.WATCHED, training.STEPS = "lenet", 4
    training.METHODS = {name: training.METHODS[name] for name in ("AT, margin", "IAAT")}
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
            "3 methods, 4 batches each, never")
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


def on_the_standin(folder):
    with standin.StandinMode():
        os.chdir(folder)
        accept.main(accept.Config(only=("float32", "noise", "resume", *GPU_LINES)))


@pytest.mark.skipif(bool(standin.missing()), reason=str(standin.missing()))
@pytest.mark.slow
def test_on_a_standin_the_lines_of_a_gpu_are_not_checked(tmp_path):
    with standin_runs.child() as pool:
        pool.submit(on_the_standin, tmp_path).result()
    result = json.loads((tmp_path / "accept.json").read_text())
    verdicts = {row["check"]: row["verdict"] for row in result["checks"]}
    assert verdicts == {"float32": "PASS", "noise": "PASS", "resume": "PASS",
                        **dict.fromkeys(GPU_LINES, "not checked")}
    assert result["environment"]["device"] == "cuda"
