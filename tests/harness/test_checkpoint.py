"""Checkpoints: whole or not there at all, nothing in them executed, everyone's parameters found,
what does not fit named."""
import collections
import io
import os
import pickle
import random
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.io import savemat
from torch import nn

from harness import checkpoint
from harness.checkpoint import read, save
from harness.errors import UserError
from models import build_model

load_model = partial(checkpoint.load_model, build=build_model)
LENET = {"name": "lenet", "num_classes": 10, "in_channels": 1, "mean": None, "std": None}
NET_FILE = '''
from pathlib import Path
from torch import nn
Path(__file__).with_suffix(".ran").touch()
class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(784, num_classes)
    def forward(self, x):
        return self.fc(x.flatten(1))
'''


@pytest.fixture
def lenet():
    torch.manual_seed(0)
    return build_model("lenet", 10, 1).eval()


def image():
    return torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def stored(folder, contents, name="theirs.pt", **options):
    torch.save(contents, folder / name, **options)
    return folder / name


def refusal(function, *args, **kwargs):
    """The one line with which something is refused."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def bytes_of(contents, zipped=True):
    file = io.BytesIO()
    torch.save(contents, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


formats = pytest.mark.parametrize("zipped", (True, False), ids=("zip", "legacy"))


# Writing

def test_what_is_saved_is_read_back(tmp_path):
    contents = {"model": {"w": torch.arange(3.0)}, "epoch": 3, "log": [{"epoch": 1, "loss": 0.5}],
                "architecture": LENET}
    save(tmp_path / "last.pt", contents)
    found = read(tmp_path / "last.pt")
    assert torch.equal(found["model"].pop("w"), torch.arange(3.0)) and found == contents | {"model": {}}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("failing", ("fsync", "rename"))
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    save(tmp_path / "last.pt", {"epoch": 1})
    monkeypatch.setattr(*((os, "fsync") if failing == "fsync" else (Path, "replace")), full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path / "last.pt", {"epoch": 2})
    assert read(tmp_path / "last.pt") == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_the_file_is_whole_and_synced_before_it_takes_its_name(tmp_path, monkeypatch):
    seen, replace, fsync = [], Path.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: seen.append("synced") or fsync(file))
    monkeypatch.setattr(Path, "replace",
                        lambda path, to: seen.append(read(path)["epoch"]) or replace(path, to))
    save(tmp_path / "last.pt", {"epoch": 2})
    assert seen == ["synced", 2]


def test_a_folder_that_is_not_there_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "absent" / "last.pt", {})


# What is no checkpoint

NO_CHECKPOINTS = {
    "empty": (b"", "is empty"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "web page"),
    "web page after blanks": (b"\n\n <html>", "web page"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n",
                        "git lfs pull"),
    "random bytes": (random.Random(0).randbytes(1000), "not a checkpoint"),
    "csv": (b"epoch,loss\n1,0.5\n", "not a checkpoint"),
    "letters": ("épochs: trente\n".encode() * 60, "a text file"),
    "json": (b'{"epoch": 3}', "a text file"),
    "zeros": (bytes(100), "not a checkpoint"),
    "zip cut off": (b"PK\x03\x04" + bytes(100), "cut off"),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), "gzip"),
    "xz": (b"\xfd7zXZ\x00" + bytes(100), "xz"),
    "bzip2": (b"BZh9" + bytes(100), "bzip2"),
    "npy": (b"\x93NUMPY\x01\x00" + bytes(100), "NumPy array"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "mat 5": (b"MATLAB 5.0 MAT-file, Platform: GLNXA64" + bytes(500), "generate_robustness_curves.py"),
    "mat 7.3": (b"MATLAB 7.3 MAT-file, Platform: GLNXA64" + bytes(500), "-v7"),
    "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0" + bytes(100), "ONNX"),
    "onnx without a producer": (b"\x08\x0a:\xa9\x01" + bytes(100), "ONNX"),
}


@pytest.mark.parametrize(("contents", "part"), NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_refused_with_what_it_is(tmp_path, contents, part):
    (tmp_path / "x.pt").write_bytes(contents)
    message = refusal(read, tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in message and part in message


def test_a_python_file_is_what_arch_names(tmp_path):
    (tmp_path / "net.py").write_text(NET_FILE)
    assert f"--arch {tmp_path / 'net.py'}:NAME" in refusal(read, tmp_path / "net.py")
    assert not (tmp_path / "net.ran").exists()


def _zip(path, *names):
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, b"...")


def _exported(path):
    example = (torch.ones(1, 3),)
    torch.export.save(torch.export.export(nn.Linear(3, 2), example), path)
    assert "weight" in torch.export.load(path).state_dict  # the advice


def _scripted(path):
    torch.jit.script(nn.Linear(3, 2)).save(path)
    assert "weight" in torch.jit.load(path).state_dict()  # the advice


def _tarred(path):
    path.with_name("weights.pt").write_bytes(bytes_of({"w": torch.ones(2)}))
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as file:
        file.add(path.with_name("weights.pt"), "weights.pt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "write", "parts"), (
    ("x.pt", _scripted, ("TorchScript", "torch.jit.load('x.pt').state_dict()")),
    ("x.pth", lambda path: torch.jit.trace(nn.Linear(3, 2), torch.ones(1, 3)).save(path), ("TorchScript",)),
    ("x{}.pt2", _exported, ("torch.export.load('x{}.pt2').state_dict",)),
    ("x.pt2", lambda path: _zip(path, "serialized_exported_program.json", "version"), ("torch.export",)),
    ("x.npz", lambda path: np.savez(path, a=np.ones(2), b=np.ones(3)), (".npz", "NumPy")),
    ("x.ckpt", lambda path: np.savez_compressed(path.open("wb"), a=np.ones(2)), (".npz", "NumPy")),
    ("x.keras", lambda path: _zip(path, "config.json", "model.weights.h5", "metadata.json"), ("Keras",)),
    ("x.zip", lambda path: _zip(path, "checkpoint.pt", "readme.txt"), ("zip archive", "unpack")),
    ("x.pt", lambda path: _zip(path), ("zip archive",)),
    ("x.zip", lambda path: _zip(path, "theirs/code/net.py", "theirs/weights.pt"), ("zip archive", "unpack")),
    ("x.tar", _tarred, ("tar archive", "unpack")),
    ("x.tar.gz", _tarred, ("gzip", "tar -xzf")),
    ("x.mat", lambda path: savemat(path, {"w": np.ones(2)}), ("MATLAB", "generate_robustness_curves.py")),
    ("x.npy", lambda path: np.save(path, np.ones(2)), ("NumPy array",)),
    ("x.onnx", lambda path: path.write_bytes(bytes(9)), ("ONNX",)),
), ids=("script", "trace", "export", "older export", "npz", "compressed npz", "keras", "zip", "empty zip",
        "zip of a repository", "tar", "tar.gz", "mat", "npy", "onnx by name"))
def test_another_kind_of_file_is_refused_with_what_to_do(tmp_path, name, write, parts):
    write(tmp_path / name)
    message = refusal(read, tmp_path / name)
    assert all(part in message for part in parts) and "damaged" not in message


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "there is no checkpoint" in refusal(read, tmp_path / "absent.pt")
    assert "is a folder" in refusal(read, str(tmp_path))


def test_a_path_through_a_file_is_refused(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"")
    assert "x.pt" in refusal(read, tmp_path / "x.pt" / "last.pt")


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert "x.pt" in refusal(read, tmp_path / "x.pt")


@formats
def test_a_checkpoint_cut_off_anywhere_is_refused_in_one_line(tmp_path, zipped):
    whole = bytes_of({"conv.weight": torch.ones(3, 4), "conv.bias": torch.ones(2)}, zipped)
    reasons = collections.Counter()
    for end in range(0, len(whole), len(whole) // 60):
        (tmp_path / "x.pt").write_bytes(whole[:end])
        try:
            read(tmp_path / "x.pt")
        except Exception as error:
            reasons[type(error).__name__, "\n" in str(error)] += 1
    assert reasons == {("UserError", False): len(range(0, len(whole), len(whole) // 60))}


@formats
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_checkpoint_with_damaged_bytes_is_read_or_refused_and_never_a_crash(tmp_path, zipped):
    whole = bytes_of({"conv.weight": torch.ones(3, 4), "conv.bias": torch.ones(2)}, zipped)
    source, reasons = random.Random(0), set()
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[source.randrange(len(whole))] = source.randrange(256)
        (tmp_path / "x.pt").write_bytes(damaged)
        try:
            read(tmp_path / "x.pt")
        except Exception as error:
            reasons.add((type(error).__name__, "\n" in str(error)))
    assert reasons == {("UserError", False)}


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("form", ("pickle", "pickled dict", "zip", "legacy"))
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, form):
    trap, path = Trap(tmp_path / "sprung"), tmp_path / "x.pt"
    contents = {"state_dict": {"w": torch.ones(2)}, "x": trap}
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps({"x": trap} if form == "pickled dict" else trap, protocol=2))
    else:
        path.write_bytes(bytes_of(contents, zipped=form == "zip"))
    message = refusal(load_model, path, "lenet", 10, 1)
    assert "refused" in message and "could run code" in message
    assert not trap.place.exists()
    run = (partial(pickle.loads, path.read_bytes()) if form.startswith("pickle")
           else partial(torch.load, path, weights_only=False))
    run()
    assert trap.place.exists()  # the trap works


@pytest.mark.parametrize("protocol", (2, 4, 5))
def test_a_refusal_is_all_that_is_said_of_a_pickle(tmp_path, recwarn, protocol):
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"x": collections.Counter}, protocol))
    refusal(read, tmp_path / "x.pt")
    assert not [str(warning.message) for warning in recwarn]


@formats
def test_a_whole_pickled_network_is_refused_with_what_to_save_instead(tmp_path, lenet, zipped):
    for contents in (lenet, {"net": lenet, "acc": 90.0}, [lenet]):
        message = refusal(read, stored(tmp_path, contents, _use_new_zipfile_serialization=zipped))
        assert "GLOBAL models.lenet.LeNet was not an allowed global by default)" in message
        assert "state_dict()" in message and "torch.serialization" not in message


@pytest.mark.parametrize("contents", ([torch.ones(2)], (), [{}], ({"epoch": 3}, 1), torch.ones(2), 3, None))
def test_whatever_is_no_dict_is_refused_with_what_it_is(tmp_path, contents):
    assert f"holds a {type(contents).__name__}" in refusal(read, stored(tmp_path, contents))


@pytest.mark.parametrize("contents", (
    {}, {"epoch": 3, "accuracy": 0.5}, {"state_dict": {}}, {"model": {"w": 1.0}},
    {0: torch.ones(2), 1: torch.ones(3)}, {"state_dict": []}, {"net": [{}, 3]}),
    ids=("empty", "numbers", "empty state dict", "no tensors", "no names", "empty list", "list of nothing"))
def test_a_checkpoint_without_named_parameters_is_refused(tmp_path, contents):
    assert "theirs.pt" in refusal(load_model, stored(tmp_path, contents), "lenet", 10, 1)


# Everyone's parameters

@pytest.mark.parametrize("wrapper", (None, "state_dict", "model", "net", "model_state_dict", "params", "ema"))
@pytest.mark.parametrize("prefix", (
    "", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.", "module.model.",
    "model.module.", "net.model._orig_mod.", "model.model.", "encoder.", "module.backbone."))
def test_parameters_are_found_under_every_wrapper_and_prefix(tmp_path, lenet, wrapper, prefix):
    parameters = {prefix + name: value for name, value in lenet.state_dict().items()}
    path, notes = stored(tmp_path, {wrapper: parameters, "epoch": 7} if wrapper else parameters), []
    model = load_model(path, "lenet", 10, 1, report=notes.append)
    assert torch.equal(model(image()), lenet(image()))
    for part in (wrapper or "", *(f"'{word}.'" for word in prefix.split(".")[:-1])):
        assert part in " ".join(notes)


class Around(nn.Module):
    """A network whose only child has the name of a prefix."""

    def __init__(self, name, *inner):
        super().__init__()
        setattr(self, name, Around(*inner) if inner else nn.Linear(4, 3))


OWN_NAMES = (("module",), ("_orig_mod",), ("model",), ("net",), ("module", "model"), ("model", "module"),
             ("net", "net"))
every_own_name = pytest.mark.parametrize("names", OWN_NAMES, ids=".".join)


@pytest.mark.parametrize("keys, chosen", (
    (("weights", "step"), "weights"), (("generator", "discriminator"), None), (("ema", "model"), "model"),
    (("state_dict", "teacher", "student"), "state_dict"), (("teacher", "student"), None)), ids=str)
def test_of_several_state_dicts_the_customary_one_is_taken_or_none(tmp_path, lenet, keys, chosen):
    contents = {key: torch.tensor(3) if key == "step" else lenet.state_dict() for key in keys}
    contents["optimizer"] = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": []}
    path, notes = stored(tmp_path, contents), []
    if chosen:
        load_model(path, "lenet", 10, 1, report=notes.append)
        assert f"parameters under '{chosen}'" in notes[0]
    else:
        message = refusal(load_model, path, "lenet", 10, 1)
        assert f"holds several state dicts ({', '.join(keys)})" in message


@every_own_name
@pytest.mark.parametrize("prefix", (
    "", "module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "model.net.module."))
def test_a_network_with_a_prefix_among_its_own_names_loads_its_own_checkpoint(tmp_path, names, prefix):
    network, notes = Around(*names), []
    path = stored(tmp_path, {prefix + name: value for name, value in network.state_dict().items()})
    loaded = load_model(path, "any", build=lambda *_: Around(*names), report=notes.append)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in network.state_dict().items())
    assert len(notes) == bool(prefix) and "".join(notes).count("stripped") == prefix.count(".")


@every_own_name
def test_a_network_with_a_prefix_among_its_names_loads_parts_compiled_within(tmp_path, names):
    network, inner = Around(*names), f"{'.'.join(names)}._orig_mod"
    path = stored(tmp_path, {f"{inner}.weight": torch.ones(3, 4), f"{inner}.bias": torch.ones(3)})
    loaded = load_model(path, "any", build=lambda *_: network)
    assert all(value.eq(1).all() for value in loaded.state_dict().values())


def test_only_a_prefix_of_all_names_is_stripped(tmp_path):
    network = nn.ModuleDict({"module": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    path, notes = stored(tmp_path, network.state_dict()), []
    load_model(path, "any", build=lambda *_: network, report=notes.append)
    assert notes == []
    parameters = {name.replace("head", "model.head"): value for name, value in network.state_dict().items()}
    message = refusal(load_model, stored(tmp_path, parameters), "any", build=lambda *_: network)
    assert "lacks head.weight" in message and "stripped" not in message


def test_a_refusal_says_what_was_stripped_when_that_fits_best(tmp_path, lenet):
    parameters = {f"module.model.{name}": value for name, value in lenet.state_dict().items()}
    del parameters["module.model.fc2.bias"]
    message = refusal(load_model, stored(tmp_path, parameters), "lenet", 10, 1)
    assert "lacks fc2.bias (1 parameters missing" in message
    assert "prefix 'module.' stripped, prefix 'model.' stripped" in message


def test_a_network_compiled_in_part_is_loaded(tmp_path, lenet):
    parameters = {name.replace("conv1.", "conv1._orig_mod."): value
                  for name, value in lenet.state_dict().items()}
    assert torch.equal(load_model(stored(tmp_path, parameters), "lenet", 10, 1)(image()), lenet(image()))


@formats
def test_both_of_torchs_file_formats_are_loaded(tmp_path, lenet, zipped):
    path = stored(tmp_path, lenet.state_dict(), _use_new_zipfile_serialization=zipped)
    assert torch.equal(load_model(path, "lenet", 10, 1)(image()), lenet(image()))


@pytest.mark.parametrize("name", ("theirs.safetensors", "theirs.pt"))
@pytest.mark.parametrize("prefix", ("", "module.", "model."))
def test_a_safetensors_file_is_loaded_whatever_its_name(tmp_path, lenet, name, prefix):
    save_file({prefix + key: value for key, value in lenet.state_dict().items()}, tmp_path / name)
    assert torch.equal(load_model(tmp_path / name, "lenet", 10, 1)(image()), lenet(image()))


def test_a_damaged_safetensors_file_is_refused_in_one_line(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"conv.weight": torch.ones(3, 4)}, path)
    whole, source = path.read_bytes(), random.Random(0)
    for _ in range(100):
        damaged = bytearray(whole[:source.randrange(len(whole))])
        for _ in range(source.randrange(3) if damaged else 0):
            damaged[source.randrange(len(damaged))] = source.randrange(256)
        path.write_bytes(damaged)
        refusal(read, path)


def test_without_safetensors_one_line_says_what_to_install(tmp_path, monkeypatch):
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in refusal(read, tmp_path / "x.safetensors")


LISTS = {"list": lambda one: [one], "tuple": lambda one: (one,), "with numbers": lambda one: (7, one, "best"),
         "with an optimizer": lambda one: [one, {"state": {}, "param_groups": [{"lr": 0.1}]}],
         "of checkpoints": lambda one: [{"model": one, "epoch": 3}]}


@pytest.mark.parametrize("wrapper", (None, "state_dict", "net"))
@pytest.mark.parametrize("form", LISTS)
def test_the_one_state_dict_of_a_list_is_loaded_and_that_is_said(tmp_path, lenet, form, wrapper):
    entries, notes = LISTS[form](dict(lenet.state_dict())), []
    path = stored(tmp_path, {wrapper: entries, "epoch": 3} if wrapper else entries)
    assert torch.equal(load_model(path, "lenet", 10, 1, report=notes.append)(image()), lenet(image()))
    assert f"the state dict in a {type(entries).__name__} of {len(entries)}" in notes[0]


@pytest.mark.parametrize("wrapper", (None, "model_state_dict"))
@pytest.mark.parametrize("count", (2, 5))
def test_a_list_of_several_state_dicts_is_refused_with_what_to_do(tmp_path, lenet, wrapper, count):
    entries = [lenet.state_dict()] * count
    path = stored(tmp_path, {wrapper: entries} if wrapper else entries)
    message = refusal(load_model, path, "lenet", 10, 1)
    assert f"a list of {count} state dicts" in message and "torch.save" in message


def test_wrappers_in_wrappers_are_opened(tmp_path, lenet):
    path, notes = stored(tmp_path, {"net": {"state_dict": lenet.state_dict()}, "model": {"depth": 5}}), []
    assert torch.equal(load_model(path, "lenet", 10, 1, report=notes.append)(image()), lenet(image()))
    assert "'net'" in notes[0] and "'state_dict'" in notes[0]


@pytest.mark.parametrize("key", ("model", "state_dict"))
def test_a_checkpoint_that_holds_itself_is_read_or_refused(tmp_path, lenet, key):
    contents = dict(lenet.state_dict())
    contents[key] = contents
    assert torch.equal(load_model(stored(tmp_path, contents), "lenet", 10, 1)(image()), lenet(image()))
    contents = {}
    contents[key] = [contents]
    refusal(load_model, stored(tmp_path, contents), "lenet", 10, 1)


@pytest.mark.parametrize("beside", (
    {"epoch": 3}, {"name": "lenet"}, {"accuracy": 98.5, "best": None}, {"cfg": {"lr": 0.1}},
    {"steps": [1, 2]}, {7: 3}))
@pytest.mark.parametrize("wrapper", (None, "model"))
def test_values_beside_the_parameters_are_left_out_and_named(tmp_path, lenet, beside, wrapper):
    contents, notes = dict(lenet.state_dict()) | beside, []
    path = stored(tmp_path, {wrapper: contents} if wrapper else contents)
    assert torch.equal(load_model(path, "lenet", 10, 1, report=notes.append)(image()), lenet(image()))
    assert f"left out, as no tensors: {', '.join(map(str, beside))}" in notes[0]


def test_a_number_in_the_place_of_a_parameter_is_refused_by_name(tmp_path, lenet):
    path = stored(tmp_path, dict(lenet.state_dict()) | {"fc3.bias": 0.5})
    message = refusal(load_model, path, "lenet", 10, 1)
    assert "lacks fc3.bias" in message and "left out, as no tensors: fc3.bias" in message


def test_parameters_in_half_precision_are_loaded_in_float32(tmp_path, lenet):
    model = load_model(stored(tmp_path, lenet.half().state_dict()), "lenet", 10, 1)
    assert torch.equal(model(image()), lenet.float()(image()))


def test_nothing_is_reported_of_a_bare_state_dict(tmp_path, lenet):
    notes = []
    load_model(stored(tmp_path, lenet.state_dict()), "lenet", 10, 1, report=notes.append)
    assert notes == []


def test_the_model_is_in_eval_mode_on_the_cpu(tmp_path):
    model = load_model(stored(tmp_path, build_model("small_cnn", 10, 1).train().state_dict()), "small_cnn",
                       10, 1)
    assert not any(module.training for module in model.modules())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_build_decides_what_is_built(tmp_path):
    asked, network = [], nn.Linear(3, 2)
    path = stored(tmp_path, {"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    assert load_model(path, "mine", 2, 3, build=lambda *what: asked.append(what) or network) is network
    assert asked == [("mine", 2, 3, None, None)] and torch.equal(network.weight, torch.ones(2, 3))


def test_a_file_of_the_users_own_gives_the_network(tmp_path):
    (tmp_path / "net.py").write_text(NET_FILE)
    weight = torch.rand(5, 784)
    model = load_model(stored(tmp_path, {"fc.weight": weight, "fc.bias": torch.zeros(5)}),
                       f"{tmp_path / 'net.py'}:Net", 5)
    torch.testing.assert_close(model(image()), image().flatten(1) @ weight.T)


# Our own checkpoints

def test_an_own_checkpoint_names_its_architecture(tmp_path, lenet):
    path, notes = stored(tmp_path, {"model": lenet.state_dict(), "architecture": LENET}), []
    model = load_model(path, num_classes=3, in_channels=3, report=notes.append)
    assert torch.equal(model(image()), lenet(image())) and notes == []


def test_an_own_checkpoint_is_held_to_the_arch_that_is_asked_for(tmp_path, lenet):
    message = refusal(load_model, stored(tmp_path, {"model": lenet.state_dict(), "architecture": LENET}),
                      "small_cnn")
    assert "does not fit --arch small_cnn" in message


def test_the_normalisation_travels_with_the_checkpoint(tmp_path):
    torch.manual_seed(0)
    trained = build_model("lenet", 10, 1, [0.1], [0.3]).eval()
    contents = {"model": trained.state_dict(), "architecture": LENET | {"mean": [0.1], "std": [0.3]}}
    model = load_model(stored(tmp_path, contents))
    assert torch.equal(model(image()), trained(image()))
    assert not torch.allclose(model.network(image()), trained(image()))


def test_an_own_checkpoint_of_a_users_file_runs_that_file_only_when_told_to(tmp_path):
    (tmp_path / "net.py").write_text(NET_FILE)
    name = f"{tmp_path / 'net.py'}:Net"
    parameters = {"fc.weight": torch.rand(5, 784), "fc.bias": torch.zeros(5)}
    path = stored(tmp_path, {"model": parameters, "architecture": LENET | {"name": name, "num_classes": 5}})
    assert f"--arch {name}" in refusal(load_model, path)
    assert not (tmp_path / "net.ran").exists()
    assert (torch.equal(load_model(path, name).fc.weight, parameters["fc.weight"])
            and (tmp_path / "net.ran").exists())


def test_a_foreign_checkpoint_without_arch_is_refused_with_what_to_add(tmp_path, lenet):
    assert "--arch" in refusal(load_model, stored(tmp_path, lenet.state_dict()))


@pytest.mark.parametrize("architecture", ("lenet", {"depth": 5}, ["conv", "fc"]),
                         ids=("text", "dict", "list"))
def test_a_foreign_checkpoint_with_an_architecture_of_its_own_kind_is_loaded_with_arch(
        tmp_path, lenet, architecture):
    path = stored(tmp_path, {"state_dict": lenet.state_dict(), "architecture": architecture})
    assert torch.equal(load_model(path, "lenet", 10, 1)(image()), lenet(image()))


# What does not fit

@pytest.mark.parametrize(("arch", "part"), (("vgg", "unknown model 'vgg'"), ("absent.py:Net", "absent.py")))
def test_an_unknown_arch_is_refused(tmp_path, lenet, arch, part):
    assert part in refusal(load_model, stored(tmp_path, lenet.state_dict()), arch, 10, 1)


def test_another_network_is_refused_with_the_first_missing_parameter(tmp_path, lenet):
    message = refusal(load_model, stored(tmp_path, lenet.state_dict()), "small_cnn", 10, 1)
    assert "small_cnn" in message and "lacks feature_extractor.conv1.weight" in message


def test_a_missing_parameter_is_refused_by_name(tmp_path, lenet):
    parameters = lenet.state_dict()
    del parameters["fc2.bias"], parameters["fc3.bias"]
    message = refusal(load_model, stored(tmp_path, parameters), "lenet", 10, 1)
    assert "lacks fc2.bias" in message and "2 parameters missing" in message


def test_a_parameter_of_another_shape_is_refused_by_name_and_shapes(tmp_path, lenet):
    message = refusal(load_model, stored(tmp_path, lenet.state_dict()), "lenet", 7, 1)
    assert "fc3.weight is (10, 84) where the network has (7, 84)" in message


def test_an_unused_block_is_reported_and_the_rest_loaded(tmp_path, lenet):
    spare = {"sub_block1.layer.0.conv1.weight": torch.ones(3), "sub_block1.layer.0.bn1.bias": torch.ones(3)}
    notes = []
    model = load_model(stored(tmp_path, spare | dict(lenet.state_dict())), "lenet", 10, 1,
                       report=notes.append)
    assert torch.equal(model(image()), lenet(image()))
    assert (len(notes) == 1 and "2 parameters of unused blocks left out: sub_block1" in notes[0]
            and "theirs.pt" in notes[0])


def test_a_spare_parameter_inside_a_used_block_is_refused_by_name(tmp_path, lenet):
    parameters = dict(lenet.state_dict()) | {"conv1.gain": torch.ones(1)}
    assert "conv1.gain" in refusal(load_model, stored(tmp_path, parameters), "lenet", 10, 1)


@pytest.mark.parametrize("names", (
    ("conv1.gain",), ("fc3.weight_u", "fc3.weight_v"), ("conv1.a", "fc1.b", "fc2.c", "fc3.d")))
@pytest.mark.parametrize("own", (False, True), ids=("foreign", "own"))
def test_extra_parameters_are_refused_by_name_or_left_out_when_told_to(tmp_path, lenet, names, own):
    parameters, notes = dict(lenet.state_dict()) | {name: torch.ones(1) for name in names}, []
    path = stored(tmp_path, {"model": parameters, "architecture": LENET} if own else parameters)
    message = refusal(load_model, path, "lenet", 10, 1)
    assert ", ".join(names[:3]) in message and "--ignore_extra" in message
    assert (f"{len(names)} in all" in message) == (len(names) > 3)
    model = load_model(path, "lenet", 10, 1, report=notes.append, ignore_extra=True)
    assert torch.equal(model(image()), lenet(image()))
    assert len(notes) == 1
    assert f"{len(names)} parameters that the network lacks left out: {names[0]}" in notes[0]


def test_leaving_out_what_is_extra_excuses_nothing_that_is_missing(tmp_path, lenet):
    parameters = dict(lenet.state_dict()) | {"conv1.gain": torch.ones(1), "aux.weight": torch.ones(2)}
    notes = []
    load_model(stored(tmp_path, parameters), "lenet", 10, 1, ignore_extra=True, report=notes.append)
    assert "1 parameters that the network lacks" in notes[0]
    assert "1 parameters of unused blocks left out: aux" in notes[0]
    del parameters["fc2.bias"]
    message = refusal(load_model, stored(tmp_path, parameters), "lenet", 10, 1, ignore_extra=True)
    assert "lacks fc2.bias" in message and "2 spare" in message


def test_batch_norm_may_lack_its_counter_and_nothing_else(tmp_path):
    def build(*_):
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))

    parameters = build().state_dict()
    parameters["1.running_mean"] += 4
    del parameters["1.num_batches_tracked"]
    assert load_model(stored(tmp_path, parameters), "any", build=build)[1].running_mean.tolist() == [4.0, 4.0]
    del parameters["1.running_var"]
    assert "1.running_var" in refusal(load_model, stored(tmp_path, parameters), "any", build=build)
