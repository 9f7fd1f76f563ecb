"""What the tests share: a script run in this process, a script run as its user would, and tiny data sets."""
import importlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

# Before torch starts. On tiny tensors more threads only wait for one another. The tests are of the CPU, bit
# for bit, and start scripts in forks, which a GPU in use does not survive.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
from PIL import Image

from harness.config import parse_config
from harness.reporting import figures
from tests import forks

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--dataset", "digits", "--val_size", "40", "--num_steps", "2", "--val_num_steps", "2",
        "--max_batches", "2", "--epochs", "1")


def sketch(figure, path):
    """In place of `harness.reporting.figures.save`: the file begins as a picture does, and is none."""
    from matplotlib import pyplot

    path.write_bytes(b"\x89PNG")
    pyplot.close(figure)


@pytest.fixture(autouse=True)
def sketched(request):
    """Figures of training and evaluation are composed and not rendered, in forks too: it takes a second each.

    The marker `rendered` has them rendered. A patch of its own leaves the tests' order of undoing theirs.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not request.node.get_closest_marker("rendered"):
            patch.setattr(figures, "save", sketch)
        yield


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Run a script's main in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        module = importlib.import_module(name)
        module.main(parse_config(module.Config, recipes=getattr(module, "RECIPES", None)))

    return run


@pytest.fixture
def torchrun(tmp_path, monkeypatch):
    """Run a script in an empty folder in two processes, as torchrun does; gives the finished process."""
    monkeypatch.chdir(tmp_path)
    return partial(forks.torchrun, cwd=tmp_path)


@pytest.fixture
def shell(tmp_path):
    """Run a script as its user would, in an empty folder; gives the finished process with its output as text.

    With a `launcher`, or options of `subprocess.run`, in an interpreter of its own; else in a fork.
    """

    def run(name, *args, launcher=None, **options):
        if not launcher and not options:
            return forks.run(name, *args, cwd=tmp_path)
        command = [*(launcher or (sys.executable,)), str(ROOT / name), *map(str, args)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, **options)

    return run


@pytest.fixture
def colour_folder(tmp_path):
    """An image folder of 2 classes with 12 training and 6 test colour images of 32x32 pixels."""
    random = np.random.default_rng(0)
    folder = tmp_path / "colours"
    for split, count in (("train", 6), ("test", 3)):
        for label, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = random.integers(0, 128, (32, 32, 3)) + 127 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{k}.png")
    return folder
