"""What a shell, a cluster or a notebook leaves in the environment and on the command line."""
import json
import os
import sys
from pathlib import Path

import pytest
from conftest import TINY
from PIL import Image

from harness import distributed
from harness.config import parse_config
from harness.errors import UserError
from harness.evaluation.options import EvalConfig
from harness.training.checks import check_network
from models import build_model


@pytest.mark.parametrize(("variables", "expected"), [
    ({}, (0, 1)), ({"WORLD_SIZE": "1"}, (0, 1)), ({"RANK": "3"}, (0, 1)),
    ({"LOCAL_RANK": "1", "SLURM_PROCID": "2"}, (0, 1)),
    ({"WORLD_SIZE": "4", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}, (2, 4))])
def test_processes_are_counted_as_torchrun_says(variables, expected, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.expected() == expected


@pytest.mark.parametrize(("variables", "says"), [
    ({"WORLD_SIZE": "4"}, "RANK, MASTER_ADDR, MASTER_PORT missing"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR, MASTER_PORT"),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x"}, "MASTER_PORT missing"),
    ({"WORLD_SIZE": "two", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "WORLD_SIZE=two"),
    ({"WORLD_SIZE": "2", "RANK": "none", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK is none"),
    ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK is 2"),
    ({"WORLD_SIZE": "", "RANK": "0"}, "missing")])
def test_a_half_set_environment_is_one_line_before_anything_is_done(variables, says, monkeypatch, script):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        script("train_at_mnist", *TINY)
    assert not Path("runs").exists()


@pytest.mark.parametrize("words",
                         [["--checkpoint=~/a.pt", "--dataset", "npz:~/b.npz", "--arch", "~/net.py:Net"],
                          ["--checkpoint", "~/a.pt", "--dataset=npz:~/b.npz", "--arch=~/net.py:Net"]])
def test_a_tilde_is_the_users_folder_in_every_path(words, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = parse_config(EvalConfig, words)
    assert (cfg.checkpoint, cfg.dataset, cfg.arch) == ("/home/me/a.pt", "npz:/home/me/b.npz",
                                                       "/home/me/net.py:Net")


@pytest.mark.parametrize(("flags", "says"), [
    (("--model", "lenett"), "unknown model 'lenett'"),
    (("--model", "none.py:Net"), r"there is no file none\.py"),
    (("--model", "net.py:Nett"), r"net\.py defines no callable 'Nett'"),
    (("--model", "broken.py:Net"), r"broken\.py, line 2, is not Python"),
    (("--model", "binary.py:Net"), r"binary\.py.* is not Python"),
    (("--device", "warp"), "--device warp is not available"),
    (("--out_dir", "taken"), "taken already holds something"),
    (("--model", "lenett", "--seeds", 1, 2), "unknown model 'lenett'")])
def test_what_is_wrong_in_a_command_is_said_before_data_is_read(flags, says, script, monkeypatch):
    import train_at_mnist

    Path("taken").mkdir()
    Path("taken/mine.txt").write_text("")
    Path("net.py").write_text("from torch import nn as Net\n")
    Path("broken.py").write_text("class Net:\n    def\n")
    Path("binary.py").write_bytes(b"\xff\x00Net")
    monkeypatch.setattr(train_at_mnist, "load_dataset", lambda *_: pytest.fail("the data was read"))
    with pytest.raises(UserError, match=says):
        script("train_at_mnist", *TINY, *flags)
    assert not Path("runs").exists()


@pytest.mark.parametrize("text", ("class Net: ...", "def Net(): ...", "Net = 3", "import torch as Net",
                                  "from torch.nn import Net", "from torch.nn import *", "Net, other = 1, 2",
                                  "if True:\n    class Net: ...", "globals()['N' + 'et'] = 3",
                                  "exec('class N' + 'et: ...')",
                                  "import sys\nsys.modules[__name__].__dict__['N' + 'et'] = 3",
                                  "def __getattr__(name): ...", "with open('x') as Net: ...",
                                  "for Net in (1, 2): ...", "(Net := 3)"))
def test_a_network_that_a_file_may_define_is_not_denied_before_the_file_runs(text, tmp_path):
    (tmp_path / "net.py").write_text(text)
    check_network(f"{tmp_path}/net.py:Net", build_model)


def test_an_evaluation_needs_its_architecture_before_its_data(script, monkeypatch):
    import torch


    torch.save(build_model("lenet", 10, 1).state_dict(), "theirs.pt")
    monkeypatch.setattr("curves.points.load_dataset", lambda *_: pytest.fail("the data was read"))
    for flags, says in (((), "does not name its architecture"),
                        (("--arch", "lenett"), "unknown model 'lenett'"),
                        (("--arch", "net.py:Net"), r"there is no file net\.py"),
                        (("--arch", f"{__file__}:Net"), "defines no callable 'Net'")):
        with pytest.raises(UserError, match=says):
            script("eval_mnist", "--checkpoint", "theirs.pt", *flags)


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="there a name is always Unicode")
@pytest.mark.rendered
def test_names_that_are_not_utf_8_are_names(script, tmp_path):
    odd = os.fsdecode(b"d\xe9")
    for split, count in (("train", 8), ("test", 3)):
        for name in ("a", odd):
            (tmp_path / odd / split / name).mkdir(parents=True)
            for k in range(count):
                image = os.fsdecode(b"\xfa%d.png" % k)
                Image.new("L", (28, 28), 20 * k + 9).save(tmp_path / odd / split / name / image)
    script("train_at_mnist", "--dataset", odd, *TINY[2:], "--model", "lenet", "--val_size", 4,
           "--batch_size", 4, "--out_dir", f"run{odd}")
    script("eval_mnist", "--checkpoint", f"run{odd}/last.pt", "--num_restarts", 1, "--num_steps", 1,
           "--alphas", 1)
    result, = Path(f"run{odd}").glob("eval*.json")
    assert json.loads(result.read_text())["classes"] == ["a", r"d\xe9"]
    script("generate_robustness_curves", "--model", f"run{odd}", "--n_points", 2, "--norms", "inf",
           "--budget", "original", "--format", "png", "--out", f"curve{odd}")
    assert Path(f"curve{odd}/curves.png").exists()
