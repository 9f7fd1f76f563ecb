"""The user's code is the user's: their names are theirs, at import and later, and ours stay ours."""
import copy
import dataclasses
import importlib
import inspect
import io
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import attacks
import losses.margin
import models
from models import build_model

NAMES = ("models", "attacks", "losses", "harness", "curves", "benchmarks", "tables", "train_at_mnist",
         "eval_cifar10", "generate_robustness_curves", "utils", "config", "data", "random", "tests")
NET = """
import torch
from torch import nn
{above}
class Net(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.fc = nn.Linear(4, num_classes)
    def forward(self, x):
        {inside}
        return self.fc(x) * 0 + SCALE
"""


def written(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def net(above="", inside="pass"):
    return NET.format(above=above, inside=inside)


def output(folder, name="net.py:Net"):
    """The one number that a network of NET gives."""
    values = build_model(f"{folder}/{name}", 3)(torch.rand(2, 4)).unique()
    return int(values)


def refusal(folder, name="net.py:Net"):
    with pytest.raises(ValueError) as caught:
        build_model(f"{folder}/{name}", 3)
    message = str(caught.value)
    assert "\n" not in message and name in message and "user_code" not in message
    return message


@pytest.fixture(autouse=True)
def nothing_of_ours_changes(tmp_path):
    before, path = dict(sys.modules), list(sys.path)
    yield
    assert all(sys.modules.get(name) is module for name, module in before.items())
    new = [name for name in sys.modules.keys() - before.keys() if not name.startswith("user_code_")]
    files = [str(getattr(sys.modules[name], "__file__", "")) for name in new]
    assert not [file for file in files if file.startswith(str(tmp_path))]
    assert sys.path == path
    assert importlib.import_module("models") is models and models.LeNet.__module__ == "models.lenet"
    assert importlib.import_module("attacks") is attacks and losses.margin.cw_loss


LAYOUTS = {"module": "{name}.py", "package": "{name}/__init__.py"}
IMPORTS = {
    "from": "from {name} import SCALE",
    "plain": "import {name}; SCALE = {name}.SCALE",
    "as": "import {name} as it; SCALE = it.SCALE",
    "all": "from {name} import *",
    "importlib": "import importlib; SCALE = importlib.import_module('{name}').SCALE",
    "from importlib": "from importlib import import_module; SCALE = import_module('{name}').SCALE",
    "importlib.util": "import importlib.util; SCALE = importlib.import_module('{name}').SCALE",
    "__import__": "SCALE = __import__('{name}').SCALE",
    "exec": "it = dict(__builtins__=__builtins__); exec('from {name} import SCALE', it); SCALE = it['SCALE']",
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_their_folder_is_theirs(tmp_path, name, layout):
    place = LAYOUTS[layout].format(name=name)
    written(tmp_path, {place: "SCALE = 7", "net.py": net(f"from {name} import SCALE")})
    assert output(tmp_path) == 7


@pytest.mark.parametrize("lazy", (False, True), ids=("at import", "in forward"))
@pytest.mark.parametrize("form", IMPORTS)
def test_every_form_of_import_finds_theirs_at_import_and_later(tmp_path, form, lazy):
    line = IMPORTS[form].format(name="models")
    if lazy and form == "all":
        line = "from models.blocks import SCALE"
    written(tmp_path, {"models/__init__.py": "SCALE = 7", "models/blocks.py": "SCALE = 7",
                       "net.py": net(inside=line) if lazy else net(line)})
    assert output(tmp_path) == 7


@pytest.mark.parametrize("above", (
    "from models.lenet import LeNet as SCALE", "import models.lenet; SCALE = models.lenet.LeNet",
    "import models.lenet as it; SCALE = it.LeNet", "from models import lenet; SCALE = lenet.LeNet",
    "from importlib import import_module; SCALE = import_module('models.lenet').LeNet",
    "from importlib import import_module; SCALE = import_module('.lenet', 'models').LeNet"))
@pytest.mark.parametrize("package", (True, False), ids=("package", "folder"))
def test_a_submodule_that_we_have_too_is_theirs(tmp_path, above, package):
    if "'.lenet'" in above:
        above = "import models; " + above.replace("'models'", "models.__name__")
    files = {"models/lenet.py": "LeNet = 5", "net.py": net(above)}
    written(tmp_path, {**files, "models/__init__.py": ""} if package else files)
    assert output(tmp_path) == 5


def test_a_lazy_import_in_a_neighbour_and_in_its_neighbour_is_theirs(tmp_path):
    written(tmp_path, {
        "net.py": net("from harness.blocks import scale", "SCALE = scale()"),
        "harness/blocks.py": "def scale():\n    from attacks import deeper\n    return deeper()",
        "attacks/__init__.py": "def deeper():\n    import losses.margin\n    return losses.margin.SCALE",
        "losses/margin.py": "SCALE = 9"})
    network = build_model(f"{tmp_path}/net.py:Net", 3)
    for _ in range(2):
        assert int(network(torch.rand(1, 4)).unique()) == 9


def test_two_folders_with_a_neighbour_of_one_name_do_not_see_one_another(tmp_path):
    for number in (1, 2):
        written(tmp_path / f"folder{number}", {"utils.py": f"SCALE = {number}",
                                              "net.py": net("import utils", "from utils import SCALE")})
    networks = [build_model(f"{tmp_path}/folder{number}/net.py:Net", 3) for number in (1, 2)]
    for _ in range(2):
        assert [int(network(torch.rand(1, 4)).unique()) for network in networks] == [1, 2]


def test_a_file_that_was_changed_is_read_anew_with_its_neighbours(tmp_path):
    for number in (1, 22):
        written(tmp_path, {"utils.py": f"SCALE = {number}", "net.py": net("from utils import SCALE")})
        assert output(tmp_path) == number


def test_a_neighbour_is_one_module_for_all_who_import_it(tmp_path):
    written(tmp_path, {"registry.py": "NETS = []", "models.py": "from registry import NETS\nNETS.append(6)",
                       "net.py": net("import models\nfrom registry import NETS", "SCALE = sum(NETS)")})
    assert output(tmp_path) == 6


def test_a_neighbour_may_import_the_file_itself(tmp_path):
    written(tmp_path, {"net.py": "BASE = 4\n" + net("from other import twice", "SCALE = twice()"),
                       "other.py": "from net import BASE\ndef twice():\n    return 2 * BASE"})
    assert output(tmp_path) == 8


# Packages

@pytest.mark.parametrize(("above", "place"), (
    ("from .blocks import SCALE", "theirs/blocks.py"),
    ("from . import blocks; SCALE = blocks.SCALE", "theirs/blocks.py"),
    ("from ..common import SCALE", "common.py"),
    ("from .models.blocks import SCALE", "theirs/models/blocks.py"),
    ("from theirs.blocks import SCALE", "theirs/blocks.py"),
    ("import theirs.losses as it; SCALE = it.SCALE", "theirs/losses.py"),
    ("from blocks import SCALE", "theirs/blocks.py"), ("from common import SCALE", "common.py"),
    ("from harness.x import SCALE", "harness/x.py")))
@pytest.mark.parametrize("package", (True, False), ids=("package", "folder"))
def test_imports_within_the_files_package_and_from_around_it(tmp_path, above, place, package):
    written(tmp_path, {place: "SCALE = 3", "theirs/net.py": net(above)})
    written(tmp_path, {"theirs/__init__.py": ""} if package else {})
    if above.startswith("from ..") and not package:
        assert "attempted relative import beyond top-level package" in refusal(tmp_path, "theirs/net.py:Net")
    else:
        assert output(tmp_path, "theirs/net.py:Net") == 3


def test_a_file_deep_in_a_package_is_a_member_of_it(tmp_path):
    written(tmp_path, {
        "theirs/__init__.py": "SCALE = 1", "theirs/models/__init__.py": "from .net import Net",
        "theirs/blocks.py": "SCALE = 2",
        "theirs/models/net.py": net("from ..blocks import SCALE\nfrom theirs import SCALE as x\nSCALE += x")})
    assert output(tmp_path, "theirs/models/net.py:Net") == 3
    assert output(tmp_path, "theirs/models/__init__.py:Net") == 3
    assert build_model(f"{tmp_path}/theirs/models/net.py:Net", 3).__module__.endswith(".theirs.models.net")


@pytest.mark.parametrize("file", (
    "my-net.py", "my net.py", "net.v2.py", "nétwörk.py", "models.py", "random.py", "torch.py",
    "v1.2/net.py", "a-b/net.py", "models/net.py", "__init__.py"))
@pytest.mark.parametrize("package", (True, False), ids=("package", "folder"))
def test_a_file_of_any_name_is_loaded(tmp_path, file, package):
    place = (tmp_path / "inner" / file).parent
    written(place, {"utils.py": "SCALE = 2", **({"__init__.py": ""} if package else {})})
    written(tmp_path / "inner", {file: net("from utils import SCALE")})
    assert output(tmp_path / "inner", f"{file}:Net") == 2


# What stays as it is

def test_what_is_installed_is_not_hidden_by_a_data_folder_or_by_the_folder_around(tmp_path):
    written(tmp_path, {
        "torchvision/mnist.txt": "", "numpy.py": "raise RuntimeError", "theirs/scipy/x.txt": "",
        "theirs/net.py": net("import numpy, scipy.stats, torchvision.models\nSCALE = int(numpy.float64(4))")})
    assert output(tmp_path, "theirs/net.py:Net") == 4


def test_our_code_answers_where_their_folder_has_no_such_name(tmp_path):
    written(tmp_path, {"net.py": "from models.lenet import LeNet\nfrom losses.margin import cw_loss"})
    assert type(build_model(f"{tmp_path}/net.py:LeNet", 3, 1)) is models.LeNet


def test_a_file_within_our_own_folder_gets_our_modules():
    path = Path(models.__file__).parent / "lenet.py"
    assert build_model(f"{path}:LeNet", 3, 1)(torch.rand(1, 1, 28, 28)).shape == (1, 3)


@pytest.mark.parametrize("how", ("append", "insert"))
def test_what_their_code_adds_to_the_path_counts_before_ours_and_apart(tmp_path, how):
    add = "sys.path.append(ROOT)" if how == "append" else "sys.path.insert(0, ROOT)"
    path = list(sys.path)
    for number in (1, 2):
        root = written(tmp_path / str(number), {
            "models/resnet.py": f"ResNet = {number}", "utils.py": f"ONE = {number}",
            "a/b/net.py": net("import os, sys\nROOT = os.path.join(os.path.dirname(__file__), '..', '..')\n"
                              f"{add}\nfrom models.resnet import ResNet\nfrom utils import ONE",
                              "SCALE = ResNet * ONE")})
        assert output(root, "a/b/net.py:Net") == number ** 2
    sys.path[:] = path


RICH = """
import dataclasses
from torch import nn
@dataclasses.dataclass
class Config:
    width: int = 4
class Net(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.cfg = Config()
        self.fc = nn.Linear(self.cfg.width, num_classes)
    def forward(self, x):
        return self.fc(x)
"""


def test_copies_source_dataclasses_and_pickles_go_on_working(tmp_path):
    written(tmp_path, {"net.py": RICH})
    network = build_model(f"{tmp_path}/net.py:Net", 3)
    clone = copy.deepcopy(network)
    assert type(clone) is type(network) and clone.cfg == network.cfg
    assert dataclasses.asdict(clone.cfg) == {"width": 4}
    assert inspect.getsource(type(network)).startswith("class Net")
    assert Path(inspect.getfile(type(network))) == tmp_path / "net.py"
    assert pickle.loads(pickle.dumps(network)).cfg == network.cfg
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    clone.load_state_dict(torch.load(file, weights_only=True))
    assert isinstance(torch.fx.symbolic_trace(network), nn.Module)


# What cannot be loaded

@pytest.mark.parametrize(("files", "parts"), (
    ({"net.py": "import argparse\nargparse.ArgumentParser().parse_args(['--epochs', '3'])"},
     ("ends the program at import", "__main__")),
    ({"net.py": "raise SystemExit"}, ("ends the program at import",)),
    ({"net.py": "import utils", "utils.py": "import sys\nsys.exit('done')"}, ("ends the program at import",)),
    ({"net.py": "def Net():\n    raise SystemExit(0)"}, ("Net() ends the program",)),
    ({"net.py": "from models.blocks import X", "models/__init__.py": ""},
     ("No module named 'models.blocks'",)),
    ({"net.py": "from models import X", "models.py": ""}, ("cannot import name 'X' from 'models'",)),
    ({"net.py": "from models import LeNet", "models/x.txt": ""},
     ("cannot import name 'LeNet' from 'models'",)),
    ({"net.py": "import no_such_thing"}, ("No module named 'no_such_thing'",)),
    ({"net.py": "from .no_such import X"}, ("no_such",)),
    ({"net.py": "from ..blocks import X"}, ("relative import",)),
    ({"net.py": "class Net(:"}, ("SyntaxError", "line 1")),
    ({"net.py": "raise RuntimeError('one\\ntwo')"}, ("RuntimeError: one two",)),
    ({"net.py": "raise ValueError('one\\ntwo')"}, (": one two",)),
    ({"net.py": "import utils", "utils.py": "1 / 0"}, ("ZeroDivisionError",))),
    ids=("argparse", "exit", "exit of a neighbour", "exit of the callable", "submodule", "name", "folder",
         "absent", "relative", "above", "syntax", "two lines", "two lines of a ValueError", "neighbour"))
def test_what_their_code_raises_is_one_line_with_the_names_they_know(tmp_path, capsys, files, parts):
    message = refusal(written(tmp_path, files))
    assert all(part in message for part in parts)
    assert capsys.readouterr() == ("", "")


def test_their_code_can_be_loaded_after_it_was_mended(tmp_path):
    written(tmp_path, {"net.py": net("import utils\nfrom utils import SCALE"), "utils.py": "1 / 0"})
    refusal(tmp_path)
    written(tmp_path, {"utils.py": "SCALE = 11"})
    assert output(tmp_path) == 11


def test_their_logging_and_warnings_are_left_alone(tmp_path, capsys):
    written(tmp_path, {"net.py": net("import logging, sys\nSCALE = 1\nprint('hello', file=sys.stderr)")})
    handlers = list(logging.getLogger().handlers)
    assert output(tmp_path) == 1 and capsys.readouterr().err == "hello\n"
    assert logging.getLogger().handlers == handlers


FROM_A_SHELL = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from models import build_model
network = build_model("theirs/net.py:Net", 3)
print(int(network(torch.rand(1, 4)).unique()))
import attacks.pgd, tables, losses.margin, harness.config, train_at_mnist, models
ours = (attacks, tables, losses, harness, train_at_mnist, models)
print(all(module.__file__.startswith(sys.argv[1]) for module in ours))
"""


@pytest.mark.slow
def test_ours_can_be_imported_for_the_first_time_after_theirs(tmp_path):
    names = ("attacks", "tables", "losses", "harness", "train_at_mnist")
    written(tmp_path / "theirs", {f"{name}.py": "SCALE = 1" for name in names})
    written(tmp_path / "theirs", {"net.py": net("\n".join(f"import {name}" for name in names),
                                               "SCALE = attacks.SCALE + train_at_mnist.SCALE")})
    command = [sys.executable, "-c", FROM_A_SHELL, str(Path(models.__file__).parents[1])]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (result.stdout, result.stderr) == ("2\nTrue\n", "")
