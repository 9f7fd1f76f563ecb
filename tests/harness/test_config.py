"""The command line: what it accepts, what it refuses and how, recipes, resumption, help, exit codes."""
import dataclasses
import importlib
import inspect
import json
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from harness.config import LIMITS, parse_config
from harness.errors import UserError
from tests import forks

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.stem for kind in ("train", "eval") for path in ROOT.glob(f"{kind}_*.py"))

every_script = pytest.mark.parametrize("script", SCRIPTS)


@dataclass(frozen=True)
class Config:
    model: Literal["lenet", "resnet18"] = "lenet"  # the network
    epsilon: float = 0.3                           # radius, 100 % of it
    step_size: float | None = None                 # one step; default: a quarter of epsilon
    num_steps: int = 10                            # steps
    alphas: tuple[float, ...] = (1.0, 2.0)         # preferences
    epochs: int = 5                                # passes
    lr: float = 0.1                                # learning rate
    lr_drop_after: tuple[int, ...] = (3,)          # epochs before each drop
    flip: bool = False                             # mirror at random
    seed: int = 1                                  # of everything
    data_dir: str = "data"                         # folder of the data sets
    out_dir: str | None = None                     # run folder
    resume: str | None = None                      # run to go on with
    device: str = "auto"                           # where
    max_batches: int | None = None                 # stop early


RECIPES = {"strong": Config(num_steps=40, lr=0.5, flip=True), "quick": Config(epochs=1)}


def parse(words, **kwargs):
    return parse_config(Config, words.split(), **kwargs)


def changes(config):
    """The fields that differ from the defaults."""
    return {name: value for name, value in dataclasses.asdict(config).items()
            if value != getattr(Config(), name)}


def refusal(words, **kwargs):
    """The one line with which a command line is refused."""
    with pytest.raises(UserError) as caught:
        parse(words, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is accepted

def test_no_flags_give_the_defaults():
    assert parse("") == Config()


@pytest.mark.parametrize(("words", "expected"), (
    ("--num_steps 7", {"num_steps": 7}),
    ("--num-steps 7", {"num_steps": 7}),
    ("--num-steps=7", {"num_steps": 7}),
    ("--flip", {"flip": True}),
    ("--flip --no-flip", {}),
    ("--flip --no_flip", {}),
    ("--no_flip --flip", {"flip": True}),
    ("--epsilon 8/255", {"epsilon": 8 / 255}),
    ("--epsilon=8/255 --lr 1e-3", {"epsilon": 8 / 255, "lr": 1e-3}),
    ("--epsilon 0", {"epsilon": 0.0}),
    ("--epsilon 1", {"epsilon": 1.0}),
    ("--step_size 2/255", {"step_size": 2 / 255}),
    ("--alphas 0.5", {"alphas": (0.5,)}),
    ("--alphas 1 3/2 2", {"alphas": (1.0, 1.5, 2.0)}),
    ("--alphas", {"alphas": ()}),
    ("--lr-drop-after 60 120", {"lr_drop_after": (60, 120)}),
    ("--model resnet18", {"model": "resnet18"}),
    ("--max_batches 2 --out-dir my-runs/no-flip_x", {"max_batches": 2, "out_dir": "my-runs/no-flip_x"}),
))
def test_a_flag_sets_its_field_and_no_other(words, expected):
    assert changes(parse(words)) == expected


def test_values_have_the_type_of_their_field():
    config = parse("--epsilon 1 --alphas 1 2 --num_steps 3")
    assert ([type(value) for value in (config.epsilon, *config.alphas, config.num_steps)]
            == [float, float, float, int])


def test_the_words_come_from_the_command_line_by_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--epochs", "9"])
    assert parse_config(Config).epochs == 9


# Recipes

def test_a_recipe_gives_its_values_and_a_flag_overrides_them():
    assert parse("--recipe strong", recipes=RECIPES) == RECIPES["strong"]
    assert (changes(parse("--lr 0.2 --recipe strong --no-flip", recipes=RECIPES))
            == {"num_steps": 40, "lr": 0.2})


def test_a_flag_can_take_a_recipe_back_to_the_default():
    assert parse("--recipe quick --epochs 5", recipes=RECIPES) == Config()


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    message = refusal("--recipe weak", recipes=RECIPES)
    assert "weak" in message and "strong" in message and "quick" in message


def test_there_is_no_recipe_flag_without_recipes():
    assert "--recipe" in refusal("--recipe strong")


# Refusals

@pytest.mark.parametrize(("words", "flag", "suggestion"), (
    ("--num_stepz 7", "--num_stepz", "--num_steps"), ("--num-step 7", "--num_step", "--num_steps"),
    ("--num 7", "--num", "--num_steps"),
    ("--epsilonn=1", "--epsilonn", "--epsilon"), ("--no-flap", "--no-flap", "--no-flip")))
def test_an_unknown_flag_is_refused_with_the_nearest_one(words, flag, suggestion):
    assert f"unknown flag {flag}: did you mean {suggestion}?" in refusal(words)


@pytest.mark.parametrize("words", ("--qqqqqq 1", "stray", "--flip true", "-z"))
def test_whatever_is_no_flag_is_refused(words):
    message = refusal(words)
    assert any(word in message for word in words.split()) and "did you mean" not in message


@pytest.mark.parametrize(("words", "expected"), (
    ("--num_steps ten", "num_steps"), ("--num_steps 1.5", "num_steps"), ("--num_steps", "num_steps"),
    ("--epsilon eight/255", "epsilon"), ("--epsilon 8/0", "epsilon"), ("--epsilon 8/255/2", "epsilon"),
    ("--alphas 1 x", "alphas"), ("--model vgg", "resnet18")))
def test_a_value_of_the_wrong_kind_is_refused_by_name(words, expected):
    assert expected in refusal(words)


@pytest.mark.parametrize("words", (
    "--epsilon -0.1", "--epsilon nan", "--epsilon inf", "--epsilon 1.01", "--epsilon=-1e-9",
    "--step_size -1", "--num_steps -1", "--epochs 0", "--epochs -3", "--lr -1", "--lr nan", "--lr inf",
    "--alphas -1", "--alphas 1 nan", "--alphas 1 2 -0.5", "--lr_drop_after 3 -1", "--max_batches 0",
    "--seed -1", "--seed 2147483648"))
def test_a_number_outside_its_limits_is_refused_by_flag_and_value(words):
    flag, value = re.match(r"(--\w+)[ =].*?(\S+)$", words).groups()
    message = refusal(words)
    assert (message.startswith(f"{flag} must be ")
            and float(message.split()[-1]) == pytest.approx(float(value), nan_ok=True))


def test_a_recipe_outside_the_limits_is_refused_too():
    assert "--epochs" in refusal("--recipe endless", recipes={"endless": Config(epochs=-1)})


@every_script
def test_every_number_a_script_takes_has_limits_that_its_recipes_keep(script):
    module = importlib.import_module(script)
    fields = dataclasses.fields(module.Config)
    assert {field.name for field in fields if re.search(r"\b(int|float)\b", str(field.type))} <= set(LIMITS)
    assert parse_config(module.Config, []) == module.Config()
    for name, recipe in getattr(module, "RECIPES", {}).items():
        assert parse_config(module.Config, ["--recipe", name], module.RECIPES) == recipe


# Resumption

def saved_run(folder, script="test_config", **values):
    folder.mkdir()
    values = {"lr": 0.7, "flip": True, "alphas": (3.0,), "out_dir": "there", **values}
    contents = {"script": script, "environment": {"torch": "2"}} | dataclasses.asdict(Config(**values))
    (folder / "config.json").write_text(json.dumps(contents))
    return folder


def test_resume_takes_the_values_of_the_run(tmp_path):
    folder = saved_run(tmp_path / "run")
    assert changes(parse(f"--resume {folder}")) == {"lr": 0.7, "flip": True, "alphas": (3.0,),
                                                    "out_dir": "there", "resume": str(folder)}


@pytest.mark.parametrize("words",
                         ("--lr 0.1", "--no-flip", "--alphas 1 2", "--seed 2 --num_steps 3",
                          "--out_dir elsewhere"))
def test_resume_refuses_a_flag_that_would_change_the_run(tmp_path, words):
    message = refusal(f"--resume {saved_run(tmp_path / 'run')} {words}")
    named = [word.replace("no-", "") for word in words.split() if word.startswith("--")]
    assert "leave out " + ", ".join(named) in message


def test_resume_accepts_a_flag_that_says_what_the_run_says(tmp_path):
    assert parse(f"--resume {saved_run(tmp_path / 'run')} --lr 0.7 --alphas 3 --flip").lr == 0.7


def test_resume_lets_the_epochs_the_place_and_the_device_change(tmp_path):
    folder = saved_run(tmp_path / "run")
    config = parse(f"--resume {folder} --epochs 50 --data_dir d --device cpu --max_batches 3")
    assert ((config.epochs, config.data_dir, config.device, config.max_batches, config.lr)
            == (50, "d", "cpu", 3, 0.7))


def test_resume_and_a_recipe_are_refused_together(tmp_path):
    assert "--recipe" in refusal(f"--resume {saved_run(tmp_path / 'run')} --recipe strong", recipes=RECIPES)


def test_resume_refuses_the_run_of_another_script(tmp_path):
    message = refusal(f"--resume {saved_run(tmp_path / 'run', script='train_other')}")
    assert "train_other.py" in message and "test_config.py" in message


def test_resume_refuses_a_folder_that_is_not_there_or_holds_no_run(tmp_path):
    for folder in (tmp_path / "absent", tmp_path):
        assert f"{folder}: no run there" in refusal(f"--resume {folder}")


@pytest.mark.parametrize("contents",
                         (b"", b"{", b'{"script": "test_config", ', b"\xff\xfe\x00", b"[]", b"null",
                          b'"text"'))
def test_resume_refuses_a_config_that_cannot_be_read(tmp_path, contents):
    (tmp_path / "config.json").write_bytes(contents)
    assert str(tmp_path) in refusal(f"--resume {tmp_path}")


def test_resume_refuses_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "last.pt").write_text("")
    assert "last.pt" in refusal(f"--resume {tmp_path / 'last.pt'}")


def test_resume_takes_the_default_of_a_field_that_is_newer_than_the_run_and_says_so(tmp_path, capsys):
    folder = saved_run(tmp_path / "run")
    saved = json.loads((folder / "config.json").read_text())
    del saved["alphas"], saved["seed"]
    (folder / "config.json").write_text(json.dumps(saved))
    assert changes(parse(f"--resume {folder}")) == {"lr": 0.7, "flip": True, "out_dir": "there",
                                                    "resume": str(folder)}
    assert (capsys.readouterr().err
            == f"note: {folder / 'config.json'} lacks alphas, here (1.0, 2.0), seed, here 1\n")


@dataclass(frozen=True)
class Clipped:
    max_grad_norm: float = 1.0                            # clips
    lr: float = 0.1                                       # learning rate
    resume: str | None = None                             # run folder


def test_a_run_older_than_clipping_is_resumed_without_it(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"script": "test_config", "lr": 0.2}))
    assert parse_config(Clipped, ["--resume", str(tmp_path)]) == Clipped(0.0, 0.2, str(tmp_path))
    assert "max_grad_norm, here 0.0" in capsys.readouterr().err


@dataclass(frozen=True)
class Compiled:
    compile: bool = False                                 # whether to compile
    resume: str | None = None                             # run folder


@pytest.mark.parametrize(("saved", "meant"),
                         ((True, True), (False, False), ("on", True), ("off", False), ("auto", False)))
def test_resume_knows_compile_in_the_words_that_it_was_written_in(tmp_path, saved, meant):
    (tmp_path / "config.json").write_text(json.dumps({"script": "test_config", "compile": saved}))
    assert parse_config(Compiled, ["--resume", str(tmp_path)]).compile is meant
    assert parse_config(Compiled, ["--resume", str(tmp_path), "--no-compile"]).compile is False


@pytest.mark.parametrize("value", ("ten", None, [10], True, 1.5))
def test_resume_refuses_a_value_of_another_type_by_name(tmp_path, value):
    folder = saved_run(tmp_path / "run")
    saved = json.loads((folder / "config.json").read_text()) | {"epochs": value}
    (folder / "config.json").write_text(json.dumps(saved))
    assert (f"epochs in {folder / 'config.json'} is {json.dumps(value)}, which it cannot be"
            in refusal(f"--resume {folder}"))


def test_resume_holds_the_values_of_the_run_to_the_limits(tmp_path):
    assert "--epochs" in refusal(f"--resume {saved_run(tmp_path / 'run', epochs=0)}")


# Help

def help_of(cls, capsys, recipes=None):
    with pytest.raises(SystemExit) as stopped:
        parse_config(cls, ["--help"], recipes)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_shows_each_comment_and_default(capsys):
    shown = " ".join(help_of(Config, capsys, RECIPES).split())
    assert __doc__ in shown and "strong, quick" in shown
    for text in ("radius, 100 % of it (default: 0.3)", "preferences (default: 1.0 2.0)",
                 "run folder (default: none)", "--flip, --no-flip"):
        assert text in shown


def comments_of(cls):
    """Field -> trailing comment, of a class's own fields."""
    fields = [line for line in inspect.getsource(cls).splitlines() if re.match(r"    \w+: ", line)]
    return {line.split(":")[0].strip(): line.rpartition("  # ")[2].strip() if "  # " in line else ""
            for line in fields}


@every_script
def test_help_of_every_script_is_the_comments_beside_its_fields(script, capsys):
    module = importlib.import_module(script)
    shown = "".join(help_of(module.Config, capsys, getattr(module, "RECIPES", None)).split())
    comments = {}  # of inherited fields too
    for part in reversed(module.Config.__mro__[:-1]):
        comments |= comments_of(part)
    assert (comments.keys() == {field.name for field in dataclasses.fields(module.Config)}
            and all(comments.values()))
    places = {name: shown.index(f"{comment}(default:".replace(" ", "")) for name, comment in comments.items()}
    own = comments_of(module.Config).keys()
    inherited = [place for name, place in places.items() if name not in own]
    # a script's own fields come first
    assert max(places[name] for name in own) < min(inherited, default=len(shown))


# Exit codes

PROGRAM = '''
"""A program."""
import os, signal, sys
from dataclasses import dataclass
from harness.config import run_script
from harness.errors import RunError, UserError

@dataclass(frozen=True)
class Config:
    end: str = "well"  # how to end

def main(config):
    print("started")
    if config.end == "user": raise UserError("not\\nlike that")
    if config.end == "run": raise RunError("went wrong")
    if config.end == "disk": raise OSError(28, "No space left on device", "run/last.pt")
    if config.end == "interrupt": raise KeyboardInterrupt
    if config.end == "terminate": os.kill(os.getpid(), signal.SIGTERM)

if __name__ == "__main__":
    run_script(main, Config)
'''


def end_of(tmp_path, *words, **environment):
    """Exit code and standard error of a program that ends as it is told."""
    (tmp_path / "program.py").write_text(PROGRAM)
    done = forks.run(tmp_path / "program.py", *words, cwd=tmp_path, **environment)
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code", "line"), (
    ("user", 2, "not like that"), ("run", 1, "went wrong"), ("interrupt", 130, "interrupted"),
    ("disk", 1, "No space left on device: run/last.pt; what was saved before is intact")))
def test_a_mistake_a_failure_and_an_interruption_end_in_one_line_and_their_code(tmp_path, end, code, line):
    assert end_of(tmp_path, "--end", end) == (code, f"program.py: error: {line}\n")


@pytest.mark.slow
def test_a_bad_flag_ends_in_one_line_and_code_2(tmp_path):
    code, error = end_of(tmp_path, "--edn", "well")
    assert (code == 2 and error.count("\n") == 1
            and error.startswith("program.py: error: unknown flag --edn: did you mean --end?"))


@pytest.mark.slow
def test_a_good_end_is_code_0_without_a_word_on_standard_error(tmp_path):
    assert end_of(tmp_path) == (0, "")


@pytest.mark.slow
def test_a_termination_is_code_143(tmp_path):
    assert end_of(tmp_path, "--end", "terminate")[0] == 128 + signal.SIGTERM


@pytest.mark.slow
def test_under_torchrun_a_failure_has_its_line_and_code_too(tmp_path):
    assert end_of(tmp_path, "--end", "run", TORCHELASTIC_RUN_ID="x") == (1, "program.py: error: went wrong\n")
