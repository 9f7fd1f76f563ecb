"""Attacks on a set of images, into the record: who is attacked, what is an adversary, which one counts."""
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from attacks.catalogue import Attack
from harness.datasets.batches import to_unit
from harness.datasets.split import Split
from harness.evaluation.attack_record import FIELDS, UNTOUCHED, AttackRecord, broken
from harness.evaluation.predictions import observe

POOL = 8  # batches given at once to an attack that refills its batch; the record is written after so many
CLEAN = Attack(lambda model, x, y, index, restart: x, everyone=True)
Columns = dict[str, tuple[str, ...]]  # column of a report -> its attacks
Fields = dict[str, Tensor]            # FIELDS of a batch, [B] each, on the CPU


@dataclass(frozen=True)
class Task:
    """What is attacked, and how far; the model is a `BatchInvariant` one, on the device of the images."""

    model: nn.Module
    split: Split
    epsilon: float
    norm: str
    batch_size: int


def run(record: AttackRecord, task: Task, attacks: dict[str, Attack], columns: Columns,
        shard: tuple[int, int] = (0, 1), bar: tqdm | None = None) -> None:
    """Run the attacks, in their order, on the examples of this shard that they have yet to see.

    An attack runs on every example that is correct without it and that no earlier member of one of its
    columns has broken; a column of one attack therefore sees them all. Batches are filled from what is left
    over the whole set. shard: (i, n) takes the positions congruent to i modulo n. `bar` counts the runs of
    an attack on an image, restarts included; its total falls as images do.
    """
    bar = tqdm(disable=True) if bar is None else bar
    attacks = {"clean": CLEAN, **attacks}
    y, mine = task.split.labels.cpu(), torch.arange(len(task.split)) % shard[1] == shard[0]

    def waiting(number: int, done: int) -> Tensor:
        return mine & _waiting(record, attacks, number, done, columns, y)

    for name in attacks:
        record.read(name)
    for number, (name, attack) in enumerate(attacks.items()):
        left = sum(one.num_restarts * int(waiting(later, number).sum())
                   for later, one in enumerate(attacks.values()) if later >= number)
        bar.total = bar.n + left
        bar.set_description_str(name)
        for position in _batches(waiting(number, number), task.batch_size * (POOL if attack.refills else 1)):
            _attack_batch(record, name, attack, task, position, bar)


def count_left(record: AttackRecord, y: Tensor, attacks: dict[str, Attack], columns: Columns) -> int:
    """How many runs of an attack on an example the record, read anew, lacks in all shards together."""
    attacks = {"clean": CLEAN, **attacks}
    for name in attacks:
        record.read(name)
    return sum(int(_waiting(record, attacks, k, k, columns, y).sum()) for k in range(len(attacks)))


def _waiting(record: AttackRecord, attacks: dict[str, Attack], number: int, done: int, columns: Columns,
             y: Tensor) -> Tensor:
    """Which examples the attack of this number has yet to see, [N] bool, as the first `done` attacks tell."""
    name, attack = list(attacks.items())[number]
    untouched = record.rows[name]["prediction"] == UNTOUCHED
    if attack.everyone:
        return untouched
    earlier, needed = list(attacks)[:done], torch.zeros_like(untouched)
    for members in columns.values():
        if name in members:
            before = [member for member in members if member != name and member in earlier]
            fallen = [broken(record.rows[member], y) for member in before]
            needed |= ~torch.stack([torch.zeros_like(untouched), *fallen]).any(0)
    clean = record.rows["clean"]["prediction"]
    within = torch.arange(len(y)) < (len(y) if attack.limit is None else attack.limit)
    return untouched & needed & within & ((clean == y) | (clean == UNTOUCHED))


def _batches(chosen: Tensor, batch_size: int) -> list[Tensor]:
    """The positions of the chosen examples in batches, none of them empty."""
    return [position for position in chosen.nonzero().squeeze(1).split(batch_size) if len(position)]


def _attack_batch(record: AttackRecord, name: str, attack: Attack, task: Task, position: Tensor,
                  bar: tqdm) -> None:
    """Run one attack on the images at `position`, all its restarts, and write down what it does."""
    part, started = task.split[position.to(task.split.images.device)], time.monotonic()
    x, y = to_unit(part.images), part.labels
    options = {"batch_size": task.batch_size} if attack.refills else {}
    kept, best = {}, x
    for restart in range(attack.num_restarts):
        x_adv = attack.run(task.model, x, y, part.index, restart, **options)
        fields, x_adv = _inspect_all(task, x, x_adv, y, attack.minimal)
        kept, best = _worst(kept, best, fields, x_adv) if restart else (fields, x_adv)
        bar.update(len(position))
    if attack.whole:
        for rows in (kept["prediction"] != y.cpu()).nonzero().squeeze(1).split(task.batch_size):
            _deepen(attack, task, x, part, rows, kept, best)
    record.write(name, position, kept, best, time.monotonic() - started)


def _worst(kept: Fields, best: Tensor, fields: Fields, x_adv: Tensor) -> tuple[Fields, Tensor]:
    """Of two restarts the one of largest cross-entropy, by example; norm, pixels and drops of both."""
    larger = ~(fields["loss"] < kept["loss"])
    chosen = {key: torch.where(larger, fields[key], kept[key]) for key in FIELDS}
    for key in ("norm", "high", "dropped"):
        chosen[key] = torch.maximum(fields[key], kept[key])
    chosen["low"] = torch.minimum(fields["low"], kept["low"])
    return chosen, torch.where(_per_image(larger, x_adv), x_adv, best)


def _deepen(attack: Attack, task: Task, x: Tensor, part: Split, rows: Tensor, fields: Fields,
            x_adv: Tensor) -> None:
    """Put an attack's last iterate in the place of its first success where it is wrong by a larger margin.

    The verdict on one of `rows` needs the first success only; how vulnerable the example is, its weight in
    A_sa at the worst case, needs the last step.
    """
    if not len(rows):
        return
    there = rows.to(x.device)
    some_x, some_y = x[there], part.labels[there]
    last = attack.whole(task.model, some_x, some_y, part.index[there], 0)
    found, images = inspect(task, some_x, last, some_y)
    deeper = (found["prediction"] != some_y.cpu()) & (found["margin"] < fields["margin"][rows])
    for key in FIELDS:
        fields[key][rows[deeper]] = found[key][deeper]
    x_adv[there[deeper.to(x.device)]] = images[deeper.to(x.device)]


def _inspect_all(task: Task, x: Tensor, x_adv: Tensor, y: Tensor, minimal: bool) -> tuple[Fields, Tensor]:
    """`inspect`, task.batch_size images at a time."""
    parts = zip(x.split(task.batch_size), x_adv.split(task.batch_size), y.split(task.batch_size))
    looks = [inspect(task, *part, minimal) for part in parts]
    fields = {key: torch.cat([found[key] for found, _ in looks]) for key in FIELDS}
    return fields, torch.cat([images for _, images in looks])


def inspect(task: Task, x: Tensor, x_adv: Tensor, y: Tensor, minimal: bool = False) -> tuple[Fields, Tensor]:
    """FIELDS of the model at x_adv, in a forward pass of its own, and the images that count, [B, C, H, W].

    An adversary outside its ball or box, or not finite, does not count: x takes its place, and `dropped` is
    1. An attack that looks for the closest adversary (minimal) may find it farther than epsilon; that one
    does not count either, and is not dropped. `norm` is that of the adversary found; `low` and `high` are
    the extreme pixels of what counts, or of what was dropped.
    """
    size = sizes(x_adv - x, task.norm)
    sound = torch.isfinite(x_adv).flatten(1).all(1) & ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
    near = size <= task.epsilon + 1e-6 * max(1.0, task.epsilon)
    dropped = ~sound if minimal else ~(sound & near)
    used = torch.where(_per_image(sound & near, x), x_adv, x)
    shown = torch.where(_per_image(dropped, x), x_adv, used).flatten(1)
    seen = observe(task.model, used, y)
    return {"prediction": seen.prediction, "loss": seen.loss, "margin": seen.margin,
            "norm": size.cpu().double(), "low": shown.amin(1).cpu().double(),
            "high": shown.amax(1).cpu().double(), "dropped": dropped.cpu().long()}, used


def _per_image(values: Tensor, x: Tensor) -> Tensor:
    """One value an image, [B], on the device of x and in a shape that broadcasts over x."""
    return values.to(x.device).view(-1, *(1,) * (x.ndim - 1))


def sizes(delta: Tensor, norm: str) -> Tensor:
    """The norm ("linf" or "l2") of each perturbation.  [B, C, H, W] -> [B]."""
    return torch.linalg.vector_norm(delta.flatten(1), ord={"linf": torch.inf, "l2": 2}[norm], dim=1)
