"""What is measured: which network, on which images, in which ball.

A flag wins over the checkpoint, and the checkpoint over the default.
"""
import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from torch import nn

from harness.checkpoint import (
    architecture_of,
    last_length,
    model_from,
    own_architecture,
    parameters_of,
    read,
)
from harness.datasets import arrays
from harness.datasets.batches import image_order, load_dataset
from harness.datasets.class_names import match_classes
from harness.datasets.split import Split
from harness.errors import UserError
from harness.training.checks import check_network
from harness.training.trial import trial_pass

CHECKPOINTS = ("last", "best", "last_ema", "best_ema")  # of a run, in the order of the result's columns


@dataclass(frozen=True)
class Protocol:
    """What a script assumes of a checkpoint that does not say: the setting of the paper's tables."""

    dataset: str       # data set
    channels: int      # image channels of the runs that the script looks for
    epsilon: float     # l_inf radius, pixels in [0, 1]
    step_ratio: float  # epsilon over PGD step


@dataclass(frozen=True)
class Ball:
    """Where adversarial examples may lie, and how far PGD goes in a step, pixels in [0, 1]."""

    norm: str
    epsilon: float
    step_size: float


@dataclass(frozen=True)
class Subject:
    """A network in eval mode on the CPU, and the images that it is measured on."""

    name: str                 # in results and figures
    path: Path                # file of the network
    contents: dict            # of a checkpoint; empty for a file of another kind
    model: nn.Module
    split: Split              # all images, on the CPU
    classes: tuple[str, ...]  # names of the classes; empty where the images come without
    dataset: str
    data_dir: str
    arch: str | None          # the network as the user named it; None where the file says what it is

    @property
    def own(self) -> dict | None:
        """The architecture that a checkpoint of ours names, None for a file of anyone else."""
        return own_architecture(self.contents)

    @cached_property
    def sha256(self) -> str:
        """Checksum of the file."""
        return sha256(self.path)


def sha256(path: Path) -> str:
    """Checksum of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def find_checkpoints(given: str | None, channels: int) -> list[tuple[str, Path]]:
    """(name, file) of what is evaluated: the file given, or the CHECKPOINTS of the run given or the newest.

    The newest run is the one in runs/ whose last.pt was written last, among those on images with `channels`
    channels. Raises UserError when there is none.
    """
    if given and not Path(given).is_dir():
        return [(Path(given).stem, Path(given))]
    folder = Path(given) if given else _newest_run(channels)
    files = [(name, folder / f"{name}.pt") for name in CHECKPOINTS if (folder / f"{name}.pt").is_file()]
    if not files and (runs := sorted(path.parent for path in folder.glob("seed*/last.pt"))):
        raise UserError(f"{folder} holds one run a seed: name one of them ({', '.join(map(str, runs))})")
    if not files:
        raise UserError(f"{folder} holds no last.pt or best.pt: has its first epoch ended?")
    return files


def _newest_run(channels: int) -> Path:
    def fits(folder: Path) -> bool:
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return config["image_shape"][0] == channels
        except (OSError, ValueError, KeyError, TypeError):
            return False

    runs = sorted(Path("runs").rglob("last.pt"), key=lambda path: path.stat().st_mtime)
    newest = next((path.parent for path in reversed(runs) if fits(path.parent)), None)
    if newest is None:
        raise UserError(f"there is no finished epoch of a run on {channels}-channel images in "
                        f"{Path('runs').resolve()}: train one first (python train_at_mnist.py --recipe "
                        "digits takes a minute) or name a --checkpoint")
    return newest


def load_test(name: str, data_dir: str) -> tuple[Split, tuple[str, ...]]:
    """The test images of a data set, and the names of its classes."""
    if name.startswith(arrays.PREFIX):
        classes, _, test = arrays.load_arrays(Path(name.removeprefix(arrays.PREFIX)))
        return test, tuple(classes)
    data = load_dataset(name, data_dir)
    return data.test, data.classes


def open_subject(name: str, path: Path, build: Callable[..., nn.Module], *, arch: str | None = None,
                 dataset: str | None = None, data_dir: str | None = None, default: str | None = None,
                 load: Callable[[str, str], tuple[Split, tuple[str, ...]]] = load_test,
                 readers: dict[str, Callable[[Path], nn.Module]] | None = None,
                 ignore_extra: bool = False) -> Subject:
    """Read a network and its images.

    build: as in `harness.checkpoint.load_model`. arch, dataset, data_dir: None where the checkpoint says it;
    default: the data set where neither does. load(dataset, data_dir) -> images, and the names of their
    classes, () where there are none. readers: suffix of a file that is no checkpoint -> function that reads
    the network in it; ignore_extra: as in `load_model`. Raises UserError in one line for what does not fit.
    """
    reader = (readers or {}).get(path.suffix)
    contents = {} if reader else read(path)
    own = own_architecture(contents)
    dataset = dataset or (contents["dataset"] if own else default)
    if dataset is None:
        raise UserError(f"{path} does not name its data set: add --dataset mnist, cifar10, ...")
    if not reader:
        check_network(architecture_of(contents, path, arch), build)  # before images are decoded or downloaded
    data_dir = data_dir or (contents["data_dir"] if own and Path(contents["data_dir"]).is_dir() else "data")
    split, classes = load(dataset, data_dir)
    channels, num_classes = split.images.shape[1], len(classes) or int(split.labels.max()) + 1
    if own and own["in_channels"] != channels:
        raise UserError(f"{path} takes {own['in_channels']}-channel images, but {dataset} has "
                        f"{channels}-channel images: name a --dataset that fits")
    published = image_order(dataset) == "published"
    fill = partial(model_from, contents, path, arch, in_channels=channels, build=build, report=print,
                   ignore_extra=ignore_extra)
    if reader:
        model = reader(path)
    elif own or published:
        model = fill(num_classes)
    else:
        model = _with_outputs(fill, num_classes, last_length(parameters_of(contents, path)[0]))
    trial = trial_pass(model.eval(), split.images, num_classes if published else 1)
    if classes and (own or not published):
        split, classes = _matched(split, classes, contents, dataset, trial.num_outputs)
    elif not published and int(split.labels.max()) >= trial.num_outputs:
        raise UserError(f"the network gives {trial.num_outputs} outputs, and {dataset} has labels up to "
                        f"{int(split.labels.max())}")
    return Subject(name, path, contents, model, split, classes, dataset, data_dir, arch)


def _with_outputs(fill: Callable[[int], nn.Module], num_classes: int, num_outputs: int) -> nn.Module:
    """The network with an output for each class of the images, or else with as many as its file has."""
    try:
        return fill(num_classes)
    except UserError:
        if num_outputs <= num_classes:
            raise
        with suppress(UserError):
            return fill(num_outputs)
        raise


def _matched(split: Split, classes: tuple[str, ...], contents: dict, dataset: str,
             num_outputs: int) -> tuple[Split, tuple[str, ...]]:
    """The split and the names of its classes, numbered as the network numbers them."""
    known, trained_on = contents.get("classes"), contents.get("dataset", dataset)
    orders = {image_order(dataset), image_order(trained_on)}
    if orders == {"published"} and len(classes) == num_outputs:
        return split, classes
    split, classes, note = match_classes(split, classes, tuple(known) if known else None, num_outputs)
    if note:
        print(note)
    return split, classes


def radius_of(subject: Subject, protocol: Protocol, epsilon: float | None) -> float:
    """The radius that a flag says, or else that of the checkpoint's training, or else the protocol's."""
    trained = subject.contents["threat_model"]["epsilon"] if subject.own else None
    radius = next(value for value in (epsilon, trained, protocol.epsilon) if value is not None)
    if trained is not None and radius != trained:
        print(f"note: evaluated at epsilon {radius:g}, trained at {trained:g}")
    return radius


def ball_of(subject: Subject, protocol: Protocol, norm: str, epsilon: float | None,
            step_size: float | None) -> Ball:
    """The ball of `radius_of`, and the step that a flag says, or else epsilon over the protocol's ratio."""
    radius, channels = radius_of(subject, protocol, epsilon), subject.split.images.shape[1]
    if channels != protocol.channels and step_size is None:
        print(f"note: steps of epsilon / {protocol.step_ratio:g}, as for {protocol.dataset}, on "
              f"{channels}-channel images: another --step_size, or the other eval script, may be meant")
    return Ball(norm, radius, radius / protocol.step_ratio if step_size is None else step_size)
