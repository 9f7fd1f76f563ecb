"""The networks of which robustness curves are measured: checkpoints of ours, state dicts of anyone, MATLAB files."""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from torch import nn

from curves import mat
from curves.points import load_split
from curves.store import sha256
from harness.checkpoint import model_from, own_architecture, read
from harness.datasets.split import Split
from harness.errors import UserError


@dataclass(frozen=True)
class Subject:
    """A network in eval mode on the CPU and the images it is measured on; about: what says which these are, as plain values."""

    model: nn.Module
    split: Split
    about: dict


def names_of(paths: tuple[str, ...]) -> dict[str, Path]:
    """name -> file: a run folder stands for its last.pt; a checkpoint in a run is called after the run's folder, any other after itself.

    Raises UserError for no path, one that is not there, and one named twice.
    """
    if not paths:
        raise UserError("name at least one --model (a checkpoint, a run folder or a .mat file)")
    files, names = [Path(path) / "last.pt" if Path(path).is_dir() else Path(path) for path in paths], {}
    for file in files:
        if not file.is_file():
            raise UserError(f"there is no model {file}")
        name = file.resolve().parent.name if file.stem == "last" else file.stem
        if name in names or file.stem == "best":
            name = f"{file.resolve().parent.name}-{file.stem}"
        if name in names:
            raise UserError(f"two models are called {name}: name each once, in folders or files of different names")
        names[name] = file
    return names


def open_subject(name: str, path: Path, cfg: object, build: Callable[..., nn.Module]) -> Subject:
    """Read a network and its images: cfg has arch, nn_type, dataset, data_dir and split, of which a checkpoint of ours knows most."""
    contents = {} if path.suffix == ".mat" else read(path)
    own = own_architecture(contents)
    dataset = cfg.dataset or (contents["dataset"] if own else None)
    if dataset is None:
        raise UserError(f"{path} does not name its data set: add --dataset mnist, cifar10, ...")
    data_dir = cfg.data_dir or (contents["data_dir"] if own and Path(contents["data_dir"]).is_dir() else "data")
    split = load_split(dataset, data_dir, cfg.split)
    if path.suffix == ".mat":
        model, kind = mat.load_network(path)
        if cfg.nn_type and cfg.nn_type != kind:
            print(f"note: {path} holds a network of the kind {kind}, not {cfg.nn_type}: its keys tell")
    else:
        channels, classes = split.images.shape[1], int(split.labels.max()) + 1
        model = model_from(contents, path, cfg.arch, classes, channels, build=build, report=print)
    about = {"name": name, "model": str(path), "sha256": sha256(path), "arch": cfg.arch, "dataset": dataset, "data_dir": data_dir,
             "split": cfg.split, "data": f"{dataset} {cfg.split}"}
    return Subject(model, split, about)


def reopen(about: dict, build: Callable[..., nn.Module]) -> Subject:
    """The subject that results are of.  Raises UserError where the model's file has changed since."""
    path = Path(about["model"])
    if not path.is_file() or sha256(path) != about["sha256"]:
        raise UserError(f"{path} is not the file these distances were measured on: it is gone or has changed")
    settings = SimpleNamespace(nn_type=None, **{key: about[key] for key in ("arch", "dataset", "data_dir", "split")})
    return open_subject(about["name"], path, settings, build)
