"""The record of an evaluation on disk: what each attack did to each example. Nothing is attacked twice.

    FOLDER/about.json              what was attacked, and how: a record never goes on with another checkpoint
                                   or threat model
    FOLDER/ATTACK/POSITION.npz     one batch: the position of each example in the set, and FIELDS; with its
                                   images where they are kept

A batch file is whole or not there. Its examples are named by their positions, so processes, shards and
machines each add files of their own, and joining two parts of a record is copying files.
"""
import io
import json
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness.errors import UserError
from harness.folder import whole_file, write_text

FIELDS = {"prediction": torch.int64, "loss": torch.float64, "margin": torch.float64, "norm": torch.float64,
          "low": torch.float64, "high": torch.float64, "dropped": torch.int64}
PLACES = ("checkpoint", "arch", "dataset")  # whose contents are compared by their checksums
UNTOUCHED = -1  # the prediction of an example that an attack has not been run on
DAMAGE = (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, zlib.error)


class AttackRecord:
    """The record in `folder` about a set of `count` examples.

    rows: what has been read or written of it, attack -> field -> [N]; seconds: attack -> time that it took.
    """

    def __init__(self, folder: Path, about: dict, count: int, keep_images: bool = False):
        self.folder, self.count, self.keep_images = folder, count, keep_images
        self.rows: dict[str, dict[str, Tensor]] = {}
        self.seconds: dict[str, float] = {}
        folder.mkdir(parents=True, exist_ok=True)
        about = json.loads(json.dumps(about))
        found = read_about(folder)
        if found is not None and not is_same(found, about):
            changed = next(name for name in {**found, **about} if found.get(name) != about.get(name)
                           and name not in PLACES)
            raise UserError(f"{folder} is the record of another evaluation ({changed} differs): name another "
                            "--out")
        write_text(folder / "about.json", json.dumps(about, indent=2) + "\n")

    def read(self, name: str) -> dict[str, Tensor]:
        """Field -> [N] of one attack, from every batch file; UNTOUCHED and NaN where there is none yet."""
        row = {}
        for key, kind in FIELDS.items():
            empty = float("nan") if kind.is_floating_point else UNTOUCHED
            row[key] = torch.full((self.count,), empty, dtype=kind)
        self.rows[name], self.seconds[name] = row, 0.0
        for path in sorted((self.folder / name).glob("*.npz")):
            try:
                with np.load(path) as batch:
                    fields = {key: torch.from_numpy(batch[key]) for key in FIELDS}
                    self._take(name, torch.from_numpy(batch["position"]), fields)
                    self.seconds[name] += float(batch["seconds"])
            except DAMAGE as error:
                raise UserError(f"{path} is damaged ({error}): delete it, and --resume attacks its images "
                                "again") from None
        return row

    def _take(self, name: str, position: Tensor, fields: dict[str, Tensor]) -> None:
        for key, values in fields.items():
            self.rows[name][key][position] = values

    def write(self, name: str, position: Tensor, fields: dict[str, Tensor], x_adv: Tensor,
              seconds: float) -> None:
        """Add a batch: its file appears under its name when it is whole and on the disk."""
        arrays = {key: value.numpy() for key, value in fields.items()}
        arrays |= {"position": position.numpy(), "seconds": np.float64(seconds)}
        if self.keep_images:
            arrays["x_adv"] = x_adv.cpu().numpy()
        buffer, path = io.BytesIO(), self.folder / name / f"{int(position[0]):08d}.npz"
        np.savez(buffer, **arrays)
        path.parent.mkdir(exist_ok=True)
        with whole_file(path) as file:
            file.write(buffer.getbuffer())
        self._take(name, position, fields)
        self.seconds[name] += seconds

    def images(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Positions [M] and images [M, C, H, W] of one attack, float32, as they were kept."""
        batches = [np.load(path) for path in sorted((self.folder / name).glob("*.npz"))]
        positions, images = ([batch[key] for batch in batches] for key in ("position", "x_adv"))
        return np.concatenate(positions), np.concatenate(images)


def is_same(found: dict, about: dict) -> bool:
    """Whether two descriptions are of one evaluation: of the same files, wherever these are."""
    def content(facts: dict) -> dict:
        return {name: value for name, value in facts.items() if name not in PLACES}

    return content(found) == content(json.loads(json.dumps(about)))


def read_about(folder: Path) -> dict | None:
    """What the record in `folder` is about, None where there is none.  Raises UserError for a damaged one."""
    path = folder / "about.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): name another --out, or restore it") from None
    if not isinstance(about, dict):
        raise UserError(f"{path} is damaged (it holds a {type(about).__name__}): name another --out, or "
                        "restore it")
    return about


def broken(row: dict[str, Tensor], y: Tensor) -> Tensor:
    """Whether an attack has made each example misclassified.  y: [N] -> [N] bool."""
    return (row["prediction"] != UNTOUCHED) & (row["prediction"] != y)
