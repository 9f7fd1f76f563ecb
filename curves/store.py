"""Distances of points from a model's decision boundary, on disk.

distances.npz grows point by point and can be taken up again.
"""
import json
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from curves import NORMS
from harness.datasets.split import Split
from harness.device import command_line
from harness.errors import UserError
from harness.folder import claim_folder, held, resumable, whole_file

if TYPE_CHECKING:
    from curves.found import Exact, Measured

FILE = "distances.npz"
PENDING, OK, MISCLASSIFIED, CENSORED, EXACT, OPEN = (
    "pending", "ok", "misclassified", "censored", "exact", "open")


class FolderOptions(Protocol):
    """The fields of a Config that name the folder to write."""

    @property
    def out_dir(self) -> str | None: ...

    @property
    def resume(self) -> str | None: ...


@dataclass
class Results:
    """One model's distances.  columns, n entries each:

    index, label, pred    the point's place in the data set, its class, and the class that the model gives it
    status                pending; misclassified (distance 0); ok; censored (no adversarial example found,
                          distance inf); exact (upper and lower end of l_inf agree), open (a proof was tried
                          and ran out of time)
    upper_NORM            distance of the closest adversarial example found
    lower_NORM            certified lower bound of the distance, 0 where there is none
    attack_NORM           which of about["attacks"] found it, -1 for none or unknown
    margin_NORM           probability margin at that adversarial example; clean_margin: at the point itself
    x_adv_NORM            the adversarial example itself, where it was asked for
    claimed_NORM          the distance before the check of the curve, nan where the point was not checked;
    found_NORM            that of what the check found, inf where it found nothing nearer

    about: plain values, what a reader needs in order to repeat the measurement.
    """

    about: dict
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def empty(cls, about: dict, points: Split, norms: tuple[str, ...], adversaries: bool) -> "Results":
        """All points pending; with `adversaries` the adversarial examples are kept too."""
        n = len(points)
        columns = {"index": points.index.cpu().numpy(), "label": points.labels.cpu().numpy(),
                   "pred": np.full(n, -1), "status": np.full(n, PENDING, dtype="U13"),
                   "clean_margin": np.full(n, np.nan)}
        for norm in norms:
            columns |= {f"upper_{norm}": np.full(n, np.inf), f"lower_{norm}": np.zeros(n),
                        f"margin_{norm}": np.full(n, np.nan), f"attack_{norm}": np.full(n, -1),
                        f"claimed_{norm}": np.full(n, np.nan), f"found_{norm}": np.full(n, np.inf)}
            if adversaries:
                columns[f"x_adv_{norm}"] = np.zeros(points.images.shape, np.float32)
        return cls(about, columns)

    @property
    def name(self) -> str:
        """The model's name in tables and figures."""
        return self.about["name"]

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms measured."""
        return tuple(norm for norm in NORMS if f"upper_{norm}" in self.columns)

    def __len__(self) -> int:
        return len(self.columns["index"])

    def upper(self, norm: str) -> np.ndarray:
        """Smallest distances found [n]."""
        return self.columns[f"upper_{norm}"]

    def lower(self, norm: str) -> np.ndarray:
        """Certified lower bounds [n]."""
        return self.columns[f"lower_{norm}"]

    def labelled(self, norm: str) -> tuple[str, np.ndarray, np.ndarray]:
        """The model's name, its distances and their lower bounds."""
        return self.name, self.upper(norm), self.lower(norm)

    def rows(self, status: str) -> np.ndarray:
        """Rows of the points of one status."""
        return np.flatnonzero(self.columns["status"] == status)

    def put(self, rows: np.ndarray, measured: "Measured") -> None:
        """Enter what was measured for `rows` [b]."""
        self.columns["pred"][rows] = measured.pred.cpu().numpy()
        self.columns["clean_margin"][rows] = measured.clean_margin.cpu().numpy()
        found = {"upper": measured.distance, "margin": measured.margin, "x_adv": measured.x_adv,
                 "attack": measured.winner}
        for column, by_norm in found.items():
            for norm, values in by_norm.items():
                if f"{column}_{norm}" in self.columns:
                    self.columns[f"{column}_{norm}"][rows] = values.cpu().numpy()
        censored = np.any([np.isinf(self.upper(norm)[rows]) for norm in self.norms], axis=0)
        wrong = self.columns["pred"][rows] != self.columns["label"][rows]
        self.columns["status"][rows] = np.where(wrong, MISCLASSIFIED, np.where(censored, CENSORED, OK))

    def checked(self, norm: str) -> tuple[np.ndarray, np.ndarray]:
        """(claimed, found) of the check [n] each; nan, inf in a file from before there was one."""
        n = len(self)
        return (self.columns.setdefault(f"claimed_{norm}", np.full(n, np.nan)),
                self.columns.setdefault(f"found_{norm}", np.full(n, np.inf)))

    def put_closer(self, rows: np.ndarray, measured: "Measured") -> None:
        """Enter those adversarial examples of `rows` [b] that are closer than what is there."""
        for norm, distance in measured.distance.items():
            closer = distance.cpu().numpy() < self.upper(norm)[rows]
            for column, values in (("upper", measured.distance), ("margin", measured.margin),
                                   ("x_adv", measured.x_adv), ("attack", measured.winner)):
                if f"{column}_{norm}" in self.columns:
                    self.columns[f"{column}_{norm}"][rows[closer]] = values[norm].cpu().numpy()[closer]
        reached = np.all([np.isfinite(self.upper(norm)[rows]) for norm in self.norms], axis=0)
        was_censored = self.columns["status"][rows] == CENSORED
        self.columns["status"][rows[reached & was_censored]] = OK

    def put_check(self, norm: str, rows: np.ndarray, claimed: np.ndarray, found: np.ndarray) -> None:
        """Enter what the check made of `rows`."""
        for column, values in zip(self.checked(norm), (claimed, found)):
            column[rows] = values

    def put_proof(self, row: int, found: "Exact") -> None:
        """Enter the bracket of one point in l_inf."""
        self.upper("linf")[row] = min(self.upper("linf")[row], found.upper)
        self.lower("linf")[row] = max(self.lower("linf")[row], found.lower)
        self.columns["x_adv_linf"][row] = found.x_adv.reshape(self.columns["x_adv_linf"].shape[1:])
        self.columns["status"][row] = EXACT if found.status == "exact" else OPEN

    def save(self, folder: Path) -> None:
        """Write distances.npz so that it is at every moment the old file or the whole new one."""
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / FILE) as file:
            np.savez_compressed(file, about=np.array(json.dumps(self.about)), **self.columns)


def read(path: Path) -> Results:
    """The results in distances.npz or its folder.  Raises UserError for a missing, damaged or other file."""
    path = path / FILE if path.is_dir() else path
    try:
        with np.load(path, allow_pickle=False) as archive:
            columns = {name: archive[name] for name in archive.files}
        results = Results(json.loads(str(columns.pop("about"))), columns)
        needed = {"index", "label", "pred", "status", "clean_margin"}
        needed |= {f"{kind}_{norm}" for norm in results.norms for kind in ("lower", "margin")}
        whole = results.norms and needed <= set(columns) and isinstance(results.name, str)
        whole = whole and len({len(values) for values in columns.values()}) == 1
        if not whole or any(np.isnan(results.upper(norm)).any() for norm in results.norms):
            raise ValueError("its columns are not those of distances")
    except FileNotFoundError:
        raise UserError(f"there is no {path}: compute it first") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} cannot be read as distances ({reason}): delete it and compute "
                        "again") from error
    return results


def find(folders: tuple[str, ...]) -> list[Results]:
    """The results in every distances.npz in these folders and below, each under a name of its own.

    Raises UserError where there is none, or one with points to go.
    """
    found = {path: read(path) for folder in map(Path, folders)
             for path in ([folder] if folder.is_file() else sorted(folder.rglob(FILE)))}
    if not found:
        raise UserError(f"no {FILE} in {', '.join(folders) or '(no --results given)'}: name folders that "
                        "compute wrote")
    for path, results in found.items():
        if left := len(results.rows(PENDING)):
            raise UserError(f"{path.parent / FILE} has {left:,} points to go: finish it with --resume")
    names = [results.name for results in found.values()]
    for path, results in found.items():
        if names.count(name := results.name) > 1:
            folder = path.parent if path.parent.name != name else path.parent.parent
            results.about["name"] = f"{folder.name}/{name}"
    return list(found.values())


def common_points(several: list[Results]) -> list[Results]:
    """The same results at the points that all have, in one order.  Raises UserError where there are none."""
    data = {str(results.about.get("data")) for results in several}
    if len(data) > 1:
        raise UserError(f"these results are of different data sets: {', '.join(sorted(data))}")
    shared = reduce(np.intersect1d, [results.columns["index"] for results in several])
    if not len(shared):
        raise UserError("these results have no points in common")
    rows = [np.intersect1d(shared, results.columns["index"], return_indices=True)[2] for results in several]
    return [Results(results.about, {name: values[at] for name, values in results.columns.items()})
            for results, at in zip(several, rows)]


# ---- the folder --------------------------------------------------------------------------------------------

def claim(cfg: FolderOptions, script: str) -> Path:
    """The folder to write, with config.json: the one to be resumed, cfg.out_dir, or runs/<script>/<time>.

    Raises UserError for a folder that already holds something or cannot be written.
    """
    facts = {"script": script, "command_line": command_line()}
    return Path(cfg.resume) if cfg.resume else claim_folder(cfg.out_dir, script, facts | vars(cfg), "--out")


@contextmanager
def working(folder: Path, command: str) -> Iterator[None]:
    """Work in the folder as the only process; when a signal ends the work, say how to go on."""
    try:
        with held(folder), resumable(folder, command):
            yield
    except BlockingIOError:
        raise UserError(f"another process works in {folder} at this moment") from None


def begin(folder: Path, fresh: Results, resume: bool) -> Results:
    """The results to begin with: `fresh`, or what `folder` holds of the same points when resuming.

    Files may have moved since. Raises UserError where the folder's results are of other contents.
    """
    if not resume or not (folder / FILE).exists():
        return fresh
    results = read(folder)
    before, now = results.about, fresh.about
    data = "images_sha256" if "images_sha256" in before else "data"
    other = [key for key in ("sha256", data, "budget", "seed") if before.get(key) != now.get(key)]
    same = all(np.array_equal(results.columns[name], fresh.columns[name]) for name in ("index", "label"))
    if other or not same or results.norms != fresh.norms:
        raise UserError(f"{folder / FILE} is of other {', '.join(other) or 'points or norms'}: it cannot be "
                        "gone on with")
    places = ("model", "arch", "dataset", "data_dir", "data")
    results.about |= {key: now[key] for key in places if key in now}
    return results


@contextmanager
def saving(results: Results, folder: Path, seconds: float = 10.0) -> Iterator[Callable[[], None]]:
    """Yield a function that saves when the last time is `seconds` ago; at the end, however it comes, save."""
    last = time.monotonic()

    def saved() -> None:
        nonlocal last
        if time.monotonic() - last > seconds:
            results.save(folder)
            last = time.monotonic()

    results.save(folder)
    try:
        yield saved
    finally:
        results.save(folder)
