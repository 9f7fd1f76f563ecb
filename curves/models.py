"""The networks of robustness curves: checkpoints of ours, state dicts of anyone, MATLAB files."""
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from curves import mat
from curves.certified import Layers, affine_layers
from curves.points import load_split
from harness.datasets.batches import image_order
from harness.datasets.split import Split
from harness.errors import UserError
from harness.evaluation.subject import Subject, open_subject, sha256
from harness.folder import readable


def names_of(paths: tuple[str, ...]) -> dict[str, Path]:
    """name -> file: a run folder stands for its last.pt.

    A checkpoint in a run is called after the run's folder, any other after itself. Raises UserError for no
    path, one that is not there, and one named twice.
    """
    if not paths:
        raise UserError("name at least one --model (a checkpoint, a run folder or a .mat file)")
    names: dict[str, Path] = {}
    for file in (path / "last.pt" if path.is_dir() else path for path in map(Path, paths)):
        if not file.is_file():
            raise UserError(f"there is no model {file}")
        folder = readable(file.resolve().parent.name)
        name = folder if file.stem == "last" else readable(file.stem)
        if name in names or file.stem == "best":
            name = f"{folder}-{name}"
        if name in names:
            raise UserError(f"two models are called {name}: name each once, in folders or files of different "
                            "names")
        names[name] = file
    return names


def open_network(name: str, path: Path, build: Callable[..., nn.Module], *, split: str,
                 nn_type: str | None = None, **known: Any) -> Subject:
    """Read a network and the images of `split` that its curve is measured at.

    nn_type: the kind of a .mat network, as its user thinks; known: as in `open_subject`.
    """
    readers = {".mat": partial(read_mat, nn_type=nn_type)}
    return open_subject(name, path, build, **known, load=partial(load_split, split=split), readers=readers)


def reopen(about: dict, build: Callable[..., nn.Module]) -> Subject:
    """The subject that results are of.  Raises UserError where the model's file has changed since."""
    path = Path(about["model"])
    if not path.is_file() or sha256(path) != about["sha256"]:
        raise UserError(f"{path} is not the file these distances were measured on: it is gone or has changed")
    known = {key: about[key] for key in ("arch", "dataset", "data_dir", "split")}
    return open_network(about["name"], path, build, ignore_extra=True, **known)


def read_mat(path: Path, nn_type: str | None = None) -> nn.Module:
    """The network in a .mat file; nn_type: its kind, as its user thinks."""
    model, kind = mat.load_network(path)
    if nn_type and nn_type != kind:
        print(f"note: {path} holds a network of the kind {kind}, not {nn_type}: its keys tell")
    return model


def about_of(subject: Subject, split: str, points: Split) -> dict:
    """What says which network and images these are, as plain values."""
    return {"name": subject.name, "model": str(subject.path), "sha256": subject.sha256, "arch": subject.arch,
            "dataset": subject.dataset, "data_dir": subject.data_dir, "split": split,
            "data": f"{subject.dataset} {split}", "image_order": image_order(subject.dataset),
            "images_sha256": points.fingerprint()}


def chain(model: nn.Module, images: Split) -> Layers:
    """The network as affine maps with ReLUs between them.  Raises UserError for any other."""
    try:
        return affine_layers(model, images.images.shape[1:])
    except ValueError as error:
        raise UserError(f"no proof for this network: {error}") from error
