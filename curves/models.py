"""The networks of robustness curves: checkpoints of ours, state dicts of anyone, MATLAB files."""
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from torch import nn

from curves import mat
from curves.points import load_split
from harness.datasets.split import Split
from harness.errors import UserError
from harness.evaluation.subject import Subject, open_subject, sha256


class Settings(Protocol):
    """What a command line says of a network and its images; None where the file knows."""

    arch: str | None
    nn_type: str | None
    dataset: str | None
    data_dir: str | None
    split: Literal["test", "train"]


def names_of(paths: tuple[str, ...]) -> dict[str, Path]:
    """name -> file: a run folder stands for its last.pt.

    A checkpoint in a run is called after the run's folder, any other after itself. Raises UserError for no
    path, one that is not there, and one named twice.
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
            raise UserError(f"two models are called {name}: name each once, in folders or files of different "
                            "names")
        names[name] = file
    return names


def open_network(name: str, path: Path, cfg: Settings, build: Callable[..., nn.Module]) -> Subject:
    """Read a network and the images that its curve is measured at, those of `cfg.split`."""
    return _open(name, path, build, split=cfg.split, nn_type=cfg.nn_type, arch=cfg.arch, dataset=cfg.dataset,
                 data_dir=cfg.data_dir)


def _open(name: str, path: Path, build: Callable[..., nn.Module], *, split: str, nn_type: str | None = None,
          **known: str | None) -> Subject:
    def load(dataset: str, data_dir: str) -> tuple[Split, tuple[str, ...]]:
        return load_split(dataset, data_dir, split), ()

    readers = {".mat": partial(_read_mat, nn_type=nn_type)}
    return open_subject(name, path, build, **known, load=load, readers=readers)


def _read_mat(path: Path, nn_type: str | None) -> nn.Module:
    model, kind = mat.load_network(path)
    if nn_type and nn_type != kind:
        print(f"note: {path} holds a network of the kind {kind}, not {nn_type}: its keys tell")
    return model


def about_of(subject: Subject, split: str) -> dict:
    """What says which network and images these are, as plain values."""
    return {"name": subject.name, "model": str(subject.path), "sha256": subject.sha256, "arch": subject.arch,
            "dataset": subject.dataset, "data_dir": subject.data_dir, "split": split,
            "data": f"{subject.dataset} {split}"}


def reopen(about: dict, build: Callable[..., nn.Module]) -> Subject:
    """The subject that results are of.  Raises UserError where the model's file has changed since."""
    path = Path(about["model"])
    if not path.is_file() or sha256(path) != about["sha256"]:
        raise UserError(f"{path} is not the file these distances were measured on: it is gone or has changed")
    known = {key: about[key] for key in ("arch", "dataset", "data_dir", "split")}
    return _open(about["name"], path, build, **known)
