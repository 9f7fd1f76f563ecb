"""Distances of points from a model's decision boundary, on disk: distances.npz, which grows point by point and can be taken up again."""
import dataclasses
import json
import os
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from harness.datasets.split import Split
from harness.device import command_line
from harness.errors import UserError
from harness.evaluation.report import dumps
from harness.folder import claim_folder, write_text

FILE = "distances.npz"
NORMS = ("linf", "l2", "l1")
PENDING, OK, MISCLASSIFIED, CENSORED, EXACT, OPEN = "pending", "ok", "misclassified", "censored", "exact", "open"


@dataclass
class Results:
    """One model's distances.  columns, n entries each:

    index, label, pred    the point's place in the data set, its class, and the class that the model gives it
    status                pending; misclassified (distance 0); ok; censored (no adversarial example found, distance inf);
                          exact (upper and lower end of l_inf agree), open (a proof was tried and ran out of time)
    upper_NORM            distance of the closest adversarial example found
    lower_NORM            certified lower bound of the distance, 0 where there is none
    attack_NORM           which of about["attacks"] found it, -1 for none or unknown
    margin_NORM           probability margin at that adversarial example; clean_margin: at the point itself
    x_adv_NORM            the adversarial example itself, where it was asked for

    about: plain values, what a reader needs in order to repeat the measurement.
    """

    about: dict
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def empty(cls, about: dict, index: np.ndarray, label: np.ndarray, norms: tuple[str, ...],
              image_shape: tuple[int, ...] | None) -> "Results":
        """All points pending; with an `image_shape` the adversarial examples are kept too."""
        n = len(index)
        columns = {"index": index.astype(np.int64), "label": label.astype(np.int64), "pred": np.full(n, -1),
                   "status": np.full(n, PENDING, dtype="U13"), "clean_margin": np.full(n, np.nan)}
        for norm in norms:
            columns |= {f"upper_{norm}": np.full(n, np.inf), f"lower_{norm}": np.zeros(n), f"margin_{norm}": np.full(n, np.nan),
                        f"attack_{norm}": np.full(n, -1)}
            if image_shape:
                columns[f"x_adv_{norm}"] = np.zeros((n, *image_shape), np.float32)
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

    def pending(self) -> np.ndarray:
        """Rows of the points that are still to be measured."""
        return np.flatnonzero(self.columns["status"] == PENDING)

    def put(self, rows: np.ndarray, measured: object) -> None:
        """Enter what was measured (pred, clean_margin, and by norm distance, margin, x_adv and winner, as tensors) for `rows` [b]."""
        self.columns["pred"][rows] = measured.pred.cpu().numpy()
        self.columns["clean_margin"][rows] = measured.clean_margin.cpu().numpy()
        for norm in self.norms:
            for column, values in (("upper", measured.distance), ("margin", measured.margin), ("x_adv", measured.x_adv),
                                   ("attack", measured.winner)):
                if f"{column}_{norm}" in self.columns:
                    self.columns[f"{column}_{norm}"][rows] = values[norm].cpu().numpy()
        found = np.isfinite(np.stack([self.upper(norm)[rows] for norm in self.norms])).all(axis=0)
        wrong = self.columns["pred"][rows] != self.columns["label"][rows]
        self.columns["status"][rows] = np.where(wrong, MISCLASSIFIED, np.where(found, OK, CENSORED))

    def put_proof(self, row: int, found: object) -> None:
        """Enter the bracket of one point in l_inf: found has upper, lower, status and x_adv, flat, which proves the upper end."""
        self.upper("linf")[row] = min(self.upper("linf")[row], found.upper)
        self.lower("linf")[row] = max(self.lower("linf")[row], found.lower)
        self.columns["x_adv_linf"][row] = found.x_adv.reshape(self.columns["x_adv_linf"].shape[1:])
        self.columns["status"][row] = EXACT if found.status == "exact" else OPEN

    def save(self, folder: Path) -> None:
        """Write distances.npz so that it is at every moment the old file or the whole new one."""
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{FILE}.{os.getpid()}.tmp"
        try:
            with partial.open("wb") as file:
                np.savez_compressed(file, about=np.array(json.dumps(self.about)), **self.columns)
            partial.replace(folder / FILE)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def read(path: Path) -> Results:
    """The results in distances.npz, or in the folder that holds it.  Raises UserError for a file that is missing, damaged or another."""
    path = path / FILE if path.is_dir() else path
    try:
        with np.load(path, allow_pickle=False) as archive:
            columns = {name: archive[name] for name in archive.files}
        results = Results(json.loads(str(columns.pop("about"))), columns)
        lengths = {len(values) for values in columns.values()}
        complete = results.norms and {"index", "label", "pred", "status", "clean_margin"} <= set(columns) and isinstance(results.name, str)
        bounds = {f"{kind}_{norm}" for norm in results.norms for kind in ("lower", "margin")} <= set(columns)
        if not complete or not bounds or len(lengths) != 1 or any(np.isnan(results.upper(norm)).any() for norm in results.norms):
            raise ValueError("its columns are not those of distances")
    except FileNotFoundError:
        raise UserError(f"there is no {path}: compute it first") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read as distances ({str(error).splitlines()[0] if str(error) else type(error).__name__}): "
                        "delete it and compute again") from error
    return results


def find(folders: tuple[str, ...]) -> list[tuple[Path, Results]]:
    """(folder, results) of every distances.npz in these folders and below, complete ones only.  Raises UserError where there is none."""
    paths = [path for folder in folders for path in ([Path(folder)] if Path(folder).is_file() else sorted(Path(folder).rglob(FILE)))]
    if not paths:
        raise UserError(f"no {FILE} in {', '.join(folders) or '(no --results given)'}: name folders that compute wrote")
    found = [(path.parent, read(path)) for path in dict.fromkeys(paths)]
    for path, results in found:
        if len(results.pending()):
            raise UserError(f"{path / FILE} has {len(results.pending()):,} points to go: finish it with --resume")
    names = [results.name for _, results in found]
    for (path, results), name in zip(found, names):
        if names.count(name) > 1:
            results.about["name"] = f"{path.name}/{name}" if path.name != name else f"{path.parent.name}/{name}"
    return found


def common_points(several: list[Results]) -> list[Results]:
    """The same results, each with the points alone that all of them have, in one order.  Raises UserError where there are none."""
    data = {results.about.get("data") for results in several}
    if len(data) > 1:
        raise UserError(f"these results are of different data sets: {', '.join(sorted(map(str, data)))}")
    shared = several[0].columns["index"]
    for results in several[1:]:
        shared = np.intersect1d(shared, results.columns["index"])
    if not len(shared):
        raise UserError("these results have no points in common")
    rows = [np.argsort(results.columns["index"])[np.searchsorted(np.sort(results.columns["index"]), shared)] for results in several]
    return [Results(results.about, {name: values[at] for name, values in results.columns.items()}) for results, at in zip(several, rows)]


def original_json(results: Results) -> dict[str, dict[str, list[float]]]:
    """The published system's file format, {norm: {"x": rising distances, "y": i / n}}; a censored point is left out but counts in n."""
    names = {"linf": "inf", "l2": "2", "l1": "1"}
    curves = {}
    for norm in results.norms:
        x = np.sort(results.upper(norm)[np.isfinite(results.upper(norm))])
        curves[names[norm]] = {"x": x.tolist(), "y": (np.arange(1, len(x) + 1) / len(results)).tolist()}
    return curves


# ---- the folder ----------------------------------------------------------------------------------------------------------------------

def claim(cfg: object, script: str) -> Path:
    """The folder to write: the one to be resumed, cfg.out, or runs/<script>/<time>, with config.json in it.

    A resumed folder's config.json keeps the command that began it.

    Raises UserError for a folder that already holds something or cannot be written.
    """
    try:
        folder = claim_folder(SimpleNamespace(resume=cfg.resume, out_dir=cfg.out), script)
    except UserError as error:
        raise UserError(str(error).replace("--out_dir", "--out")) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        saved = folder / "config.json"
        before = json.loads(saved.read_text(encoding="utf-8")) if saved.exists() else {}
        facts = {"script": script, "command_line": before.get("command_line", command_line())}
        write_text(saved, dumps(facts | dataclasses.asdict(cfg) | {"resume": None}))
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): name another --out") from error
    return folder


def begin(folder: Path, about: dict, points: Split, norms: tuple[str, ...], adversaries: bool, resume: bool) -> Results:
    """The results in `folder` when resuming and there are any, or all points pending.  Raises UserError where they are of other things."""
    index, label = points.index.cpu().numpy(), points.labels.cpu().numpy()
    shape = tuple(points.images.shape[1:]) if adversaries else None
    if not resume or not (folder / FILE).exists():
        return Results.empty(about, index, label, norms, shape)
    results = read(folder)
    other = [key for key in ("sha256", "data", "budget", "seed") if results.about.get(key) != about[key]]
    same_points = np.array_equal(results.columns["index"], index) and np.array_equal(results.columns["label"], label)
    if other or not same_points or set(results.norms) != set(norms):
        raise UserError(f"{folder / FILE} is of other {', '.join(other) or 'points or norms'}: it cannot be gone on with")
    return results


@contextmanager
def saving(results: Results, folder: Path, seconds: float = 10.0) -> Iterator[Callable[[], None]]:
    """Yield a function to be called after every batch: it saves when the last time is `seconds` ago; at the end, however it comes, all is
    saved."""
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


def write_json(path: Path, value: object) -> None:
    """Write plain values; rows of numbers take one line each."""
    write_text(path, dumps(value))


def write_columns(path: Path, head: tuple[str, ...], rows: list[tuple]) -> None:
    """Write rows under a heading, numbers to nine digits, nothing for nan."""
    def cell(value: object) -> str:
        return ("" if np.isnan(value) else f"{value:.9g}") if isinstance(value, (float, np.floating)) else str(value)

    write_text(path, "".join(",".join(map(cell, row)) + "\n" for row in [head, *rows]))
