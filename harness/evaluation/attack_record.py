"""The record of an evaluation on disk: what each attack did to each example, written batch by batch, so that nothing is attacked twice.

    FOLDER/about.json              what was attacked, and how: a record is never continued on another checkpoint or threat model
    FOLDER/ATTACK/POSITION.npz     one batch: the position of each example in the set, and FIELDS; with its images where they are kept

A batch file is whole or not there. Its examples are named by their positions, so processes, shards and machines each add files of
their own, and joining two parts of a record is copying files.
"""
import io
import json
import os
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.datasets.batches import to_unit
from harness.datasets.split import Split
from harness.errors import UserError
from harness.evaluation.predictions import Record, observe
from harness.folder import write_text

POOL = 8       # batches that an attack is given at once which refills its batch: what it does is written down after so many
MULTIPLE = 32  # rows: a matrix product takes other kernels for its last few rows, whose rounding differs
FIELDS = {"prediction": torch.int64, "loss": torch.float64, "margin": torch.float64, "norm": torch.float64, "low": torch.float64,
          "high": torch.float64, "dropped": torch.int64}
UNTOUCHED = -1  # the prediction of an example that an attack has not been run on


class Steady(nn.Module):
    """A network as attacks see it: an example's logits do not depend on how many others are in its batch.

    Batches are padded to a multiple of MULTIPLE rows. An output that has no gradient with respect to the input gets one of zeros, so
    that an attack on a network that hides its gradient goes on and fails, instead of raising.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        spare = -len(x) % MULTIPLE
        logits = self.network(F.pad(x, (0, 0, 0, 0, 0, 0, 0, spare)) if spare else x)[:len(x)]
        if x.requires_grad and not logits.requires_grad:
            logits = logits + 0.0 * x.flatten(1).sum(1, keepdim=True)
        return logits


class Ledger:
    """The record in `folder` about a set of `count` examples; `rows` is what has been read or written of it, attack -> field -> [N]."""

    def __init__(self, folder: Path, about: dict, count: int, keep_images: bool = False):
        self.folder, self.count, self.keep_images = folder, count, keep_images
        self.rows: dict[str, dict[str, Tensor]] = {}
        self.seconds: dict[str, float] = {}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "about.json"
        about = json.loads(json.dumps(about))
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else about
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}): name another --out, or restore it") from None
        if not isinstance(found, dict):
            raise UserError(f"{path} is damaged (it holds a {type(found).__name__}): name another --out, or restore it")
        if found != about:
            changed = next(name for name in {**found, **about} if found.get(name) != about.get(name))
            raise UserError(f"{folder} is the record of another evaluation ({changed} differs): name another --out")
        write_text(path, json.dumps(about, indent=2) + "\n")

    def read(self, name: str) -> dict[str, Tensor]:
        """Field -> [N] of one attack, from every batch file there is; prediction UNTOUCHED and NaN where there is nothing yet."""
        row = {key: torch.full((self.count,), float("nan") if kind.is_floating_point else UNTOUCHED, dtype=kind)
               for key, kind in FIELDS.items()}
        self.rows[name], self.seconds[name] = row, 0.0
        for path in sorted((self.folder / name).glob("*.npz")):
            try:
                with np.load(path) as batch:
                    self._take(name, torch.from_numpy(batch["position"]), {key: torch.from_numpy(batch[key]) for key in FIELDS})
                    self.seconds[name] += float(batch["seconds"])
            except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise UserError(f"{path} is damaged ({error}): delete it, and --resume attacks its images again") from None
        return row

    def _take(self, name: str, position: Tensor, fields: dict[str, Tensor]) -> None:
        for key, values in fields.items():
            self.rows[name][key][position] = values

    def write(self, name: str, position: Tensor, fields: dict[str, Tensor], x_adv: Tensor, seconds: float) -> None:
        """Add a batch: its file appears under its name when it is whole and on the disk."""
        arrays = {"position": position.numpy(), "seconds": np.float64(seconds), **{key: value.numpy() for key, value in fields.items()}}
        buffer, path = io.BytesIO(), self.folder / name / f"{int(position[0]):08d}.npz"
        np.savez(buffer, **arrays, **({"x_adv": x_adv.cpu().numpy()} if self.keep_images else {}))
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with open(partial, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        self._take(name, position, fields)
        self.seconds[name] += seconds

    def images(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Positions [M] and images [M, C, H, W] of one attack, float32, as they were kept."""
        batches = [np.load(path) for path in sorted((self.folder / name).glob("*.npz"))]
        return np.concatenate([batch["position"] for batch in batches]), np.concatenate([batch["x_adv"] for batch in batches])


def broken(row: dict[str, Tensor], y: Tensor) -> Tensor:
    """Whether an attack has made each example misclassified.  y: [N] -> [N] bool."""
    return (row["prediction"] != UNTOUCHED) & (row["prediction"] != y)


def run(ledger: Ledger, model: nn.Module, split: Split, attacks: dict, columns: dict[str, tuple[str, ...]], *, epsilon: float, norm: str,
        batch_size: int, shard: tuple[int, int] = (0, 1), progress: Callable[[str, int, int], None] = lambda *_: None) -> None:
    """Run the attacks, in their order, on the examples of this shard that each one still has to see, and write what they do.

    An attack runs on every example that is correct without it and that no other member of one of its columns has broken; a column of
    one attack therefore sees them all. Batches are filled from what is left over the whole set. shard: (i, n) takes the positions
    congruent to i modulo n.
    """
    y = split.labels.cpu()
    mine = torch.arange(len(split)) % shard[1] == shard[0]
    clean = ledger.read("clean")
    for position in _batches(mine & (clean["prediction"] == UNTOUCHED), batch_size):
        _attack_batch(ledger, "clean", None, model, split, position, epsilon, norm, batch_size)
    correct = clean["prediction"] == y
    for name, attack in attacks.items():
        row = ledger.read(name)
        needed = mine & _needed(ledger, name, attack, columns, correct, y)
        batches = _batches(needed & (row["prediction"] == UNTOUCHED), batch_size * (POOL if attack.refills else 1))
        for number, position in enumerate(batches):
            progress(name, number, len(batches))
            _attack_batch(ledger, name, attack, model, split, position, epsilon, norm, batch_size)


def left(ledger: Ledger, y: Tensor, attacks: dict, columns: dict[str, tuple[str, ...]]) -> int:
    """How many runs of an attack on an example the record, read anew, still lacks in all shards together: 0 for a whole one."""
    ledger.rows.clear()
    clean = ledger.read("clean")["prediction"]
    count = int((clean == UNTOUCHED).sum())
    for name, attack in attacks.items():
        untouched = ledger.read(name)["prediction"] == UNTOUCHED
        count += int((untouched & _needed(ledger, name, attack, columns, clean == y, y)).sum())
    return count


def _batches(chosen: Tensor, batch_size: int) -> list[Tensor]:
    """The positions of the chosen examples in batches, none of them empty."""
    return [position for position in chosen.nonzero().squeeze(1).split(batch_size) if len(position)]


def _needed(ledger: Ledger, name: str, attack: object, columns: dict, correct: Tensor, y: Tensor) -> Tensor:
    """Which examples an attack has to see, from what stands in the record of those before it."""
    if attack.everyone:
        return torch.ones_like(correct)
    needed = torch.zeros_like(correct)
    for members in columns.values():
        if name in members:
            before = [broken(ledger.rows[member], y) for member in members if member != name and member in ledger.rows]
            needed |= ~torch.stack([torch.zeros_like(correct), *before]).any(0)
    within = torch.arange(len(correct)) < (len(correct) if attack.limit is None else attack.limit)
    return needed & correct & within


def _attack_batch(ledger: Ledger, name: str, attack: object | None, model: nn.Module, split: Split, position: Tensor, epsilon: float,
                  norm: str, batch_size: int) -> None:
    part, started = split[position.to(split.images.device)], time.monotonic()
    x, kept, options = to_unit(part.images), None, {"batch_size": batch_size} if attack and attack.refills else {}
    for restart in range(attack.num_restarts if attack else 1):
        x_adv = attack.run(model, x, part.labels, part.index, restart, **options) if attack else x
        looks = [inspect(model, *some, epsilon, norm, minimal=attack is not None and attack.minimal)
                 for some in zip(x.split(batch_size), x_adv.split(batch_size), part.labels.split(batch_size))]
        fields, x_adv = {key: torch.cat([look[0][key] for look in looks]) for key in FIELDS}, torch.cat([look[1] for look in looks])
        if kept is None:
            kept, best = fields, x_adv
        else:
            larger = ~(fields["loss"] < kept["loss"])
            kept = {key: torch.where(larger, fields[key], kept[key]) for key in FIELDS}
            best = torch.where(larger.to(x.device).view(-1, *(1,) * (x.ndim - 1)), x_adv, best)
    if attack and attack.whole:
        for rows in (kept["prediction"] != part.labels.cpu()).nonzero().squeeze(1).split(batch_size):
            _deepen(attack, model, x, part, rows, kept, best, epsilon, norm)
    ledger.write(name, position, kept, best, time.monotonic() - started)


def _deepen(attack: object, model: nn.Module, x: Tensor, part: Split, rows: Tensor, fields: dict[str, Tensor], x_adv: Tensor,
            epsilon: float, norm: str) -> None:
    """Put the attack's last iterate in the place of its first success for those of `rows` where it is misclassified by a larger margin.

    The verdict needs the first success only; how vulnerable an example is, its weight in A_sa at the worst case, needs the last step.
    """
    if not len(rows):
        return
    there = rows.to(x.device)
    some = x[there], part.labels[there]
    found, images = inspect(model, some[0], attack.whole(model, *some, part.index[there], 0), some[1], epsilon, norm)
    deeper = (found["prediction"] != some[1].cpu()) & (found["margin"] < fields["margin"][rows])
    for key in FIELDS:
        fields[key][rows[deeper]] = found[key][deeper]
    x_adv[there[deeper.to(x.device)]] = images[deeper.to(x.device)]


def inspect(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, epsilon: float, norm: str, minimal: bool = False,
            ) -> tuple[dict[str, Tensor], Tensor]:
    """What the model does at x_adv, in a forward pass of its own, and the images that count: FIELDS [B], and [B, C, H, W].

    An adversary outside its ball or box, or not finite, does not count: x takes its place, and `dropped` is 1, unless the attack is one
    that looks for the closest adversary and this one is merely farther than epsilon. `norm` is that of the adversary found.
    """
    size = sizes(x_adv - x, norm)
    sound = torch.isfinite(x_adv).flatten(1).all(1) & ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
    near = size <= epsilon + 1e-6 * max(1.0, epsilon)
    used = torch.where((sound & near).view(-1, *(1,) * (x.ndim - 1)), x_adv, x)
    record: Record = observe(model, used, y)
    dropped = ~sound | (~near if not minimal else False)
    return vars(record) | {"norm": size.double().cpu(), "low": used.flatten(1).amin(1).double().cpu(),
                           "high": used.flatten(1).amax(1).double().cpu(), "dropped": dropped.long().cpu()}, used


def sizes(delta: Tensor, norm: str) -> Tensor:
    """The norm ("linf" or "l2") of each perturbation.  [B, C, H, W] -> [B]."""
    return torch.linalg.vector_norm(delta.flatten(1), ord={"linf": torch.inf, "l2": 2}[norm], dim=1)
