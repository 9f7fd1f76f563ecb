"""benchmarks/gpu.sh: its commands are ones that the scripts take, and go on where they were."""
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from harness.config import parse_config

# in the place of Python: notes the command, and leaves behind what the next part looks for
STANDIN = """#!{python} -S
import json, os, pathlib, sys
words = sys.argv[1:]
with open("commands", "a") as file:
    file.write(json.dumps(words) + "\\n")
if os.environ.get("FAILS", "none") in " ".join(words):
    sys.exit(int(os.environ["CODE"]))
name = words[words.index("--out") + 1] if "--out" in words else None
if name and pathlib.Path(name).exists() and pathlib.Path(name).read_text() == "of another machine":
    sys.exit(2)
if name:
    pathlib.Path(name).write_text("{{}}")
if "train_vir" in words[0]:
    folder = pathlib.Path(words[words.index("--resume" if "--resume" in words else "--out_dir") + 1])
    folder.mkdir(exist_ok=True)
    epoch = 5 if (folder / "config.json").exists() else 2
    (folder / "config.json").write_text("{{}}")
    (folder / "log.csv").write_text(f"epoch,lr\\n{{epoch}},0.1\\n")
"""


@pytest.fixture
def lease(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(STANDIN.format(python=sys.executable))
    stub.chmod(0o755)

    def run(*flags, **environment):
        (tmp_path / "commands").unlink(missing_ok=True)
        done = subprocess.run(["bash", str(ROOT / "benchmarks/gpu.sh"), "out", *flags], cwd=tmp_path,
                              env=os.environ | {"PYTHON": str(stub)} | environment, capture_output=True,
                              text=True, timeout=60)
        return done, [json.loads(line) for line in (tmp_path / "commands").read_text().splitlines()]

    return run


def is_accepted(words):
    """Whether the command line is one of the script's, by the script's own parser."""
    module, words = (words[1], words[2:]) if words[0] == "-m" else (Path(words[0]).stem, words[1:])
    names = {"harness.accept": "harness.accept.__main__", "train_step": "benchmarks.train_step"}
    script = importlib.import_module(names.get(module, module))
    return parse_config(script.Config, words, getattr(script, "RECIPES", None)) is not None


def names_of(commands):
    return [Path(words[1] if words[0] == "-m" else words[0]).stem for words in commands]


def test_the_most_valuable_first_by_commands_that_the_scripts_take(lease, tmp_path, monkeypatch):
    done, commands = lease("--data_dir", "elsewhere")
    assert done.returncode == 0, done.stderr
    assert names_of(commands) == ["harness", "train_step", "train_vir", "train_vir", "eval_cifar10",
                                  "eval_cifar10"]
    monkeypatch.chdir(tmp_path)
    assert all(map(is_accepted, commands))
    recipes = [words[words.index("--recipe") + 1] for words in commands if "--recipe" in words]
    assert recipes == ["at", "vir-trades"]
    assert all(words[-2:] == ["--data_dir", "elsewhere"] for words in commands[2:4])
    assert all(words[words.index("--stop_after_minutes") + 1] == "4" for words in commands[2:4])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"accept.json", "step.json", "at",
                                                                    "vir-trades"}
    assert (tmp_path / "out/at/eval-2.json").exists()


def test_the_next_lease_goes_on(lease, tmp_path):
    lease()
    (tmp_path / "out/vir-trades/eval-5.record").mkdir()
    (tmp_path / "out/vir-trades/eval-5.record/config.json").write_text("{}")
    done, commands = lease("--lr", "1", MINUTES="9")
    assert done.returncode == 0 and names_of(commands) == ["train_vir", "train_vir", "eval_cifar10",
                                                           "eval_cifar10"]
    for words, name in zip(commands, ("at", "vir-trades")):
        folder = str(tmp_path / "out" / name)
        assert words[1:] == ["--resume", folder, "--stop_after_minutes", "9"]
    assert "--checkpoint" in commands[2] and commands[3][1] == "--resume"  # a stopped evaluation
    assert (tmp_path / "out/at/eval-5.json").exists()


@pytest.mark.parametrize(("fails", "code"), [
    ("accept", 2), ("accept", 124), ("train_step", 1)])
def test_a_part_that_fails_is_named_and_done_again_and_the_others_run(fails, code, lease, tmp_path):
    done, commands = lease(FAILS=fails, CODE=str(code))
    name = "accept.json" if fails == "accept" else "step.json"
    assert done.returncode == 1 and done.stderr.strip().endswith(f"for its time: {name}")
    assert len(commands) == 6 and not (tmp_path / "out" / name).exists()
    done, commands = lease()
    assert done.returncode == 0 and (tmp_path / "out" / name).exists()


def test_a_result_of_accept_with_a_failed_check_is_kept(lease, tmp_path):
    (tmp_path / "python").write_text((tmp_path / "python").read_text() +
                                     "if 'harness.accept' in words:\n    sys.exit(1)\n")
    done, commands = lease()
    assert done.returncode == 1 and (tmp_path / "out/accept.json").exists() and len(commands) == 6
    assert names_of(lease()[1])[0] == "train_vir"


def test_what_a_part_has_begun_is_left_for_the_next_lease(lease, tmp_path):
    (tmp_path / "out").mkdir()
    begun = tmp_path / "out/step.json.part"
    begun.write_text("begun")
    done, _ = lease(FAILS="train_step", CODE="124")
    assert done.returncode == 1 and begun.read_text() == "begun"


def test_what_another_machine_has_begun_is_set_aside(lease, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/accept.json.part").write_text("of another machine")
    done, commands = lease()
    assert done.returncode == 0 and names_of(commands)[:3] == ["harness", "harness", "train_step"]
    assert (tmp_path / "out/accept.json").read_text() == "{}"
    assert (tmp_path / "out/accept.json.before").read_text() == "of another machine"


def test_every_part_has_a_limit_and_all_fit_into_half_an_hour(lease, tmp_path):
    (tmp_path / "timeout").write_text('#!/bin/sh\necho "$3" >> seconds\nshift 3\nexec "$@"\n')
    (tmp_path / "timeout").chmod(0o755)
    done, commands = lease(PATH=f"{tmp_path}:{os.environ['PATH']}")
    limits = [int(line) for line in (tmp_path / "seconds").read_text().splitlines()]
    assert done.returncode == 0 and len(limits) == len(commands) == 6 and max(limits) <= 600
    minutes = sum(float(words[words.index("--stop_after_minutes") + 1]) for words in commands[2:4])
    assert sum(limits[:2] + limits[4:]) / 60 + minutes <= 30
