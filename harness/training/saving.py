"""The files of a training run: its folder, its configuration, its log and its checkpoints."""
import dataclasses
import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import torch

from harness import checkpoint
from harness.datasets.batches import Dataset
from harness.device import command_line, environment
from harness.errors import UserError
from harness.folder import claim_folder, write_csv, write_text
from harness.reporting.results import OWN_FIELDS
from harness.resumption import MAY_CHANGE_ON_RESUME
from harness.training.average import Average
from harness.training.options import RunOptions

PART = 1 << 20  # bytes


def read_start(cfg: RunOptions, data: Dataset) -> dict[str, Any]:
    """The checkpoint that a run goes on from: its own last.pt, or another run's burn-in; else empty.

    Raises UserError if it has more epochs than cfg.epochs.
    """
    path = Path(cfg.resume, "last.pt") if cfg.resume else None
    burn_in = getattr(cfg, "burn_in_from", None)
    contents = (checkpoint.read(path) if path and path.exists()
                else read_burn_in(cfg, data, Path(burn_in)) if burn_in else {})
    done = contents.get("epoch")
    if isinstance(done, int) and done > cfg.epochs:
        raise UserError(f"--epochs {cfg.epochs}: {done} epochs of {cfg.resume} are done already")
    return contents


def read_burn_in(cfg: RunOptions, data: Dataset, folder: Path) -> dict[str, Any]:
    """burn_in.pt of the run in `folder`, or in its folder of this seed, as a start for the run of `cfg`.

    Raises UserError if the burn-in of `cfg` would be another: with other settings, data or code.
    """
    several = folder / f"seed{cfg.seed}"
    folder = several if several.is_dir() else folder
    if not (folder / "burn_in.pt").is_file():
        raise UserError(f"--burn_in_from {folder}: no burn_in.pt there: name a folder of train_vir.py whose "
                        "burn-in has ended")
    contents = checkpoint.read(folder / "burn_in.pt")
    theirs, ours = contents.get("config"), dataclasses.asdict(cfg)
    if not isinstance(theirs, dict):
        raise UserError(f"--burn_in_from {folder}: burn_in.pt is not of a run of ours")
    free = {*MAY_CHANGE_ON_RESUME, "out_dir", "seeds", "burn_in_from", "weights"}.union(*OWN_FIELDS.values())
    free -= {"epochs", "max_batches", "kappa"}  # of the schedule, the number of steps, and the log
    for name in ours:
        if name not in free and theirs.get(name) != ours[name]:
            raise UserError(f"--burn_in_from {folder}: its burn-in is another one, with --{name} "
                            f"{theirs.get(name)} instead of {ours[name]}")
    check_same(folder, fingerprints(cfg, data), f"--burn_in_from {folder}")
    return contents | {"best": dict(NONE_YET)}


def make_folder(cfg: RunOptions, script: str, data: Dataset, device: torch.device) -> Path:
    """The run's folder, with its config.json.  Raises UserError if it is in use, or of other data or code."""
    facts = {"script": script, "command": command_line(), "image_shape": data.image_shape,
             "num_classes": data.num_classes, "classes": list(data.classes),
             "training_images": len(data.train), "environment": environment(device)}
    contents = fingerprints(cfg, data)
    if not cfg.resume:
        return claim_folder(cfg.out_dir, script, facts | contents | dataclasses.asdict(cfg))
    folder = Path(cfg.resume)
    check_same(folder, contents, f"--resume {folder}")
    return folder


def check_same(folder: Path, contents: dict[str, str | None], flag: str) -> None:
    """Raise UserError where the images or the code of the run in `folder` are not these (`fingerprints`)."""
    before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name, what in CONTENTS.items():
        if before.get(name, contents[name]) != contents[name]:
            raise UserError(f"{flag}: {what} changed since this run began, so it would be another run")


def update_config(cfg: RunOptions, folder: Path) -> None:
    """Write the settings of a resumed run, such as more epochs, into its config.json."""
    path = folder / "config.json"
    before = json.loads(path.read_text(encoding="utf-8"))
    write_text(path, json.dumps(before | dataclasses.asdict(cfg) | {"resume": None}, indent=2) + "\n")


NONE_YET = {"best": -1.0, "best_ema": -1.0}  # the scores to beat

CONTENTS = {"data_sha256": "the training images or their labels have",
            "extra_data_sha256": "the generated images have", "model_sha256": "the file of the network has"}


def fingerprints(cfg: RunOptions, data: Dataset) -> dict[str, str | None]:
    """What changes when the images, or the code of a network of the user's own, do; of large files a part."""
    extra, (code, is_file, _) = getattr(cfg, "extra_data", None), cfg.model.rpartition(":")
    digest = hashlib.sha256((data.train.fingerprint() + data.val.fingerprint()).encode())
    return {"data_sha256": digest.hexdigest(), "extra_data_sha256": of_file(Path(extra)) if extra else None,
            "model_sha256": of_file(Path(code)) if is_file else None}


def of_file(path: Path) -> str:
    """A checksum of a file's size, beginning and end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(PART)
        file.seek(max(size - PART, 0))
        return hashlib.sha256(b"%d " % size + head + file.read()).hexdigest()


class RunFolder:
    """The log and the checkpoints in the folder of a run.  Every process has one; the first one writes."""

    def __init__(self, path: Path, script: str, cfg: RunOptions, data: Dataset):
        self.path = path
        self.about = {"script": script, "dataset": data.name, "classes": list(data.classes),
                      "data_dir": str(cfg.data_dir), "seed": cfg.seed,
                      "threat_model": {"norm": "linf", "epsilon": cfg.epsilon},
                      "config": {"script": script} | dataclasses.asdict(cfg) | {"resume": None}}
        self.rows: list[dict[str, Any]] = []         # of log.csv, one per epoch
        self.weight_rows: list[dict[str, Any]] = []  # of weights.csv, one per epoch with instance weights
        self.best = dict(NONE_YET)

    @property
    def resume_command(self) -> str:
        """The command that continues this run, and the other seeds where it is one of several."""
        several = (self.path.parent / "config.json").exists()
        folder = self.path.parent if several else self.path
        return f"python {self.about['script']}.py --resume {shlex.quote(str(folder))}"

    def add_rows(self, row: dict[str, Any], weights: dict[str, float | None]) -> None:
        """Take an epoch into the log, and the distribution of its instance weights if there is one."""
        self.rows.append(row)
        if weights:
            self.weight_rows.append({"epoch": row["epoch"], **weights})

    def save(self, architecture: dict[str, Any], state: dict[str, Any], average: Average | None,
             scores: dict[str, float]) -> None:
        """Write the log and last.pt, and best.pt if scores["best"] is the highest so far.

        With an average of the weights also last_ema.pt, and best_ema.pt by scores["best_ema"]. At the end of
        a burn-in also burn_in.pt, for --burn_in_from.
        """
        about = {"format": checkpoint.FORMAT, "architecture": architecture, **self.about}
        about |= {name: self.rows[-1][name] for name in ("epoch", "epochs_at_chance")}
        better = {name: score > self.best[name] for name, score in scores.items()}
        self.best = {name: max(score, self.best[name]) for name, score in scores.items()}
        contents = about | {name: part.state_dict() for name, part in state.items()}
        contents |= {"best": self.best, "log": self.rows, "weight_log": self.weight_rows}
        if average:
            averaged = about | {"model": average.module.state_dict()}
            checkpoint.save(self.path / "last_ema.pt", averaged)
            if better["best_ema"]:
                checkpoint.save(self.path / "best_ema.pt", averaged)
        if better["best"]:
            checkpoint.save(self.path / "best.pt", contents)
        if about["epoch"] == self.about["config"].get("burn_in_epochs"):
            checkpoint.save(self.path / "burn_in.pt", contents)
        checkpoint.save(self.path / "last.pt", contents)  # written last: a resumed run starts from it
        write_csv(self.path / "log.csv", self.rows)
        if self.weight_rows:
            write_csv(self.path / "weights.csv", self.weight_rows)

    def load(self, contents: dict[str, Any], state: dict[str, Any]) -> tuple[int, list[int]]:
        """Restore the log and `state` from a checkpoint.  Raises UserError if the checkpoint does not fit.

        Returns the epochs done, and of each of them how many up to it were at chance without a break.
        """
        try:
            for name, part in state.items():
                part.load_state_dict(contents[name])
            self.best = contents["best"]
            self.rows = contents["log"]
            self.weight_rows = contents["weight_log"]
            return contents["epoch"], [row.get("epochs_at_chance", 0) for row in self.rows]
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0][:150]
            raise UserError(f"{self.path / 'last.pt'} does not continue this run ({reason})") from error


def summary_of(row: dict[str, Any], epochs: int) -> str:
    """A row of the log as the line that ends its epoch."""
    parts = [f"{name} {value:.2f} %" if "A_" in name else f"{name.removeprefix('train_')} {value:.4f}"
             for name, value in row.items() if name.startswith(("train_", "val_"))]
    minutes = row["seconds"] * (epochs - row["epoch"]) / 60
    left = f"  {minutes:.1f} min left" if row["epoch"] < epochs else ""
    return (f"epoch {row['epoch']:>3}/{epochs}  {'  '.join(parts)}  {row['seconds']:.1f} s  "
            f"{row['images_per_second']:,.0f} images/s{left}")
