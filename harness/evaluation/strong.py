"""A checkpoint under strong attacks: accuracy under each one, the worst case over all of them per example, and whether to believe it.

Everything is made from the record on disk (`harness.evaluation.attack_record`), so an interrupted evaluation goes on where it was, and
several processes share one. A column of the report is one attack or an ensemble, which breaks an example when a member does.
"""
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from harness import distributed
from harness.datasets.batches import to_unit
from harness.datasets.split import Split
from harness.device import command_line
from harness.errors import UserError
from harness.evaluation import attack_record as ledger
from harness.evaluation import report, sanity
from harness.evaluation.attack_record import UNTOUCHED, Ledger, Steady, broken
from harness.evaluation.metrics import weighted_accuracy, wilson_interval
from harness.evaluation.predictions import Certificate, Record, accuracies, class_accuracy, confusion, num_outputs
from harness.folder import resumable, write_text

ENSEMBLES = ("autoattack-reference", "autoattack", "mde")  # columns that PGD is compared with, the first one that there is


@dataclass(frozen=True)
class Job:
    """What this process does of an evaluation, and where its record and its result go."""

    out: Path
    device: torch.device
    folder: Path                                # of the record; unused without strong attacks
    columns: dict[str, tuple[str, ...]]         # column -> its attacks
    attacks: Callable[[float], dict]            # epsilon -> attack by name
    shard: tuple[int, int] = (0, 1)             # (i, n): the positions congruent to i modulo n
    rank: int = 0                               # under torchrun, whose first process waits for the others and reports
    world_size: int = 1

    def whole(self, results: dict[str, dict]) -> bool:
        """Whether every result is there, and this process the one that reports."""
        return all("A_nat" in result for result in results.values())


def begin(cfg: object, files: list[tuple[str, Path]], device: torch.device, members_of: Callable, attacks_of: Callable) -> Job:
    """Find out what is to be done, and write it down in the record's folder as a config.json, so that `--resume` can go on.

    members_of(names) -> column -> attacks; attacks_of(columns, epsilon=...) -> attack by name; both raise ValueError for what they do
    not know. Raises UserError for that, and for flags that do not go together.
    """
    if not cfg.attacks:
        if used := [name for name in ("record", "shard", "save_adversaries") if getattr(cfg, name)] + ["norm"] * (cfg.norm != "linf"):
            raise UserError(f"--{used[0]} belongs to strong attacks: name some, such as --attacks pgd100 autoattack")
        return Job(report.output_path(cfg.out, files[0][1], whole_run=len(files) > 1), device, Path(), {}, attacks_of)
    if cfg.norm != "linf" and cfg.epsilon is None:
        raise UserError(f"--norm {cfg.norm} needs its own --epsilon: the checkpoint's is one of l_inf")
    shard = _shard(cfg.shard)
    try:
        columns = members_of(cfg.attacks)
        attacks_of(columns, epsilon=0.0)
    except ValueError as error:
        raise UserError(str(error)) from None
    rank, world_size, device = distributed.start(device)
    if world_size > 1 and cfg.shard:
        raise UserError("torchrun gives every process its shard: leave --shard out")
    out = distributed.from_first(report.output_path(cfg.out, files[0][1], whole_run=len(files) > 1) if rank == 0 else None)
    folder = Path(cfg.record) if cfg.record else out.with_suffix(".record")
    if rank == 0:
        _write_config(cfg, files, out, folder)
    shard = (rank, world_size) if world_size > 1 else shard
    return Job(out, device, folder, columns, lambda epsilon: attacks_of(columns, epsilon=epsilon), shard, rank, world_size)


def _shard(text: str | None) -> tuple[int, int]:
    """(i, n) of "i/n"."""
    number, slash, count = (text or "0/1").partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"--shard {text}: give i/n with i from 0 to n - 1, such as 0/2 and 1/2")
    return int(number), int(count)


def _write_config(cfg: object, files: list[tuple[str, Path]], out: Path, folder: Path) -> None:
    """The configuration with the names that were chosen for it: what `--resume` reads."""
    chosen = {"checkpoint": cfg.checkpoint or str(files[0][1].parent), "out": str(out), "record": str(folder)}
    chosen |= {"resume": None, "shard": None}
    facts = {"script": Path(command_line().split()[1]).stem, "command": command_line()}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", json.dumps(facts | asdict(cfg) | chosen, indent=2) + "\n")


def measure(job: Job, model: nn.Module, split: Split, subject: object, cfg: object, attacks: dict, attack: Callable, loss_fn: Callable,
            ) -> tuple[dict, dict[str, Tensor], Certificate]:
    """The result of one checkpoint, its per-example results and its certificate; empty where other processes have not done their part.

    attacks: name -> attack, A_rob and A_tr_ALPHA among them; attack and loss_fn: for `sanity.probe`, its keys being the examples'
    indices. The result has what `evaluation.evaluate` gives, and `attacks`, `worst_case`, `verdict`, `evidence`, `probe`.
    """
    num_classes, steady = num_outputs(model, split), Steady(model)
    record = Ledger(job.folder / subject.name, _about(subject, cfg, len(split)), len(split), cfg.save_adversaries)
    ball = {"epsilon": subject.epsilon, "norm": cfg.norm}
    script = Path(command_line().split()[1]).name
    with resumable(job.folder, script, quiet=job.rank > 0), tqdm(bar_format="{desc}", disable=None, leave=False) as bar:
        ledger.run(record, steady, split, attacks, job.columns, **ball, batch_size=cfg.batch_size, shard=job.shard,
                   progress=lambda name, number, total: bar.set_description_str(f"{name}: batch {number + 1} of {total}"))
    if not _complete(job, record, split.labels.cpu(), attacks):
        return {}, {}, Certificate()
    rows, trained = record.rows, {alpha: f"A_tr_{alpha:g}" for alpha in dict.fromkeys(cfg.alphas)}
    result, examples = accuracies(split, num_classes, observed(rows["clean"]), observed(rows["A_rob"]),
                                  {alpha: observed(rows[name]) for alpha, name in trained.items()})
    result["attacks"], standing = columns_of(record, split.labels.cpu(), attacks, job.columns)
    worst = worst_case(rows, split.labels.cpu())
    result["worst_case"] = summary_of(worst, split.labels.cpu(), tuple(trained), num_classes) | {"attacks": list(attacks)}
    examples |= {"prediction_worst": worst.prediction, "margin_worst": worst.margin} | {f"correct_{k}": v for k, v in standing.items()}
    certificate = certify(rows, subject.epsilon)
    probed = _probe(steady, split, rows["clean"], attack, loss_fn, ball)
    findings = judge(probed, rows, split.labels.cpu(), attacks, result, certificate.broken(subject.epsilon))
    return result | {"verdict": sanity.verdict(findings), "evidence": sanity.as_plain(findings), "probe": probed}, examples, certificate


def _about(subject: object, cfg: object, count: int) -> dict:
    """What decides the entries of a record; the list of attacks may grow."""
    names = ("arch", "norm", "num_steps", "num_restarts", "start", "alphas", "num_spsa_examples", "seed", "save_adversaries")
    return {"checkpoint": str(subject.path), "checkpoint_sha256": hashlib.sha256(subject.path.read_bytes()).hexdigest(),
            "dataset": subject.data.name, "num_examples": count, "epsilon": subject.epsilon, "step_size": subject.step_size,
            **{name: getattr(cfg, name) for name in names}}


def _complete(job: Job, record: Ledger, y: Tensor, attacks: dict) -> bool:
    """Whether the record is whole and this process is to report on it; torchrun's first process waits until it is."""
    if job.rank:
        return False
    while (missing := ledger.left(record, y, attacks, job.columns)) and job.world_size > 1:
        time.sleep(1.0)  # no collective: those time out where one process is half an hour behind
    if missing:
        print(f"shard {job.shard[0]}/{job.shard[1]} is done; the record {record.folder} still lacks other shards, the last one reports")
    return not missing


def observed(row: dict[str, Tensor]) -> Record:
    """A row of the record as `harness.evaluation.predictions` has it."""
    return Record(row["prediction"], row["loss"], row["margin"])


def columns_of(record: Ledger, y: Tensor, attacks: dict, columns: dict[str, tuple[str, ...]]) -> tuple[dict[str, dict], dict[str, Tensor]]:
    """Column -> accuracy in percent with interval, count, settings and seconds; and column -> whether each example stands, [N] bool.

    A column whose attack sees the first images only says how many those are, and is about them.
    """
    correct, facts, standing = record.rows["clean"]["prediction"] == y, {}, {}
    for name, members in columns.items():
        standing[name] = correct & ~torch.stack([broken(record.rows[member], y) for member in members]).any(0)
        count = min(attacks[member].limit or len(y) for member in members)
        settings = attacks[name].settings if name in attacks else {"members": list(members)}
        facts[name] = _proportion(standing[name][:count]) | {
            "settings": settings, "seconds": round(sum(record.seconds[member] for member in members), 1)}
    return facts, standing


def _proportion(correct: Tensor) -> dict:
    accuracy = float(correct.double().mean())
    low, high = wilson_interval(accuracy, len(correct))
    return {"accuracy": round(100 * accuracy, 4), "ci95": [round(100 * low, 4), round(100 * high, 4)], "num_examples": len(correct)}


def worst_case(rows: dict[str, dict[str, Tensor]], y: Tensor) -> Record:
    """Of all that was recorded of each example, clean image included, what has the lowest margin, a misclassification before all else.

    A_rob's and A_tr's attacks go on to their last step on every example, PGD's columns on those that these leave. The members of an
    ensemble are done at their first success: where only they succeed the margin is just below 0, an upper bound on the lowest.
    """
    margins = torch.stack([row["margin"].nan_to_num(torch.inf) for row in rows.values()])  # [attacks, N]; NaN: not attacked
    hits = torch.stack([broken(row, y) for row in rows.values()])
    lowest = torch.where(hits.any(0) & ~hits, torch.inf, margins).argmin(0, keepdim=True)
    fields = (torch.stack([row[key] for row in rows.values()]) for key in ("prediction", "loss", "margin"))
    return Record(*(field.gather(0, lowest).squeeze(0) for field in fields))


def summary_of(worst: Record, y: Tensor, alphas: tuple[float, ...], num_classes: int) -> dict:
    """Accuracy, A_sa at each alpha, accuracy per class and confusion at the worst case.

    A_tr is A_sa here: the adversary of lowest margin is the one that maximises the weighted loss as well.
    """
    correct = worst.prediction == y
    weighted = {str(float(alpha)): weighted_accuracy(correct, worst.margin, alpha) for alpha in alphas}
    return _proportion(correct) | {
        "A_sa": {alpha: round(100 * found["accuracy"], 4) for alpha, found in weighted.items()},
        "A_sa_ci95": {alpha: [round(100 * bound, 4) for bound in found["ci95"]] for alpha, found in weighted.items()},
        "effective_size": {alpha: round(found["effective_size"], 1) for alpha, found in weighted.items()},
        "class_accuracy": class_accuracy(worst.prediction, y, num_classes), "confusion": confusion(worst.prediction, y, num_classes)}


def certify(rows: dict[str, dict[str, Tensor]], epsilon: float) -> Certificate:
    """The extremes over every adversary that counts: dropped ones, and minimal ones beyond epsilon, do not."""
    tolerance, certificate = 1e-6 * max(1.0, epsilon), Certificate()
    for row in rows.values():
        used = (row["prediction"] != UNTOUCHED) & (row["dropped"] != 1)
        if used.any():
            near = row["norm"][used & (row["norm"] <= epsilon + tolerance)]
            certificate.max_perturbation = max(certificate.max_perturbation, *near.tolist(), 0.0)
            certificate.min_pixel = min(certificate.min_pixel, float(row["low"][used].min()))
            certificate.max_pixel = max(certificate.max_pixel, float(row["high"][used].max()))
    return certificate


def _probe(model: nn.Module, split: Split, clean: dict[str, Tensor], attack: Callable, loss_fn: Callable, ball: dict) -> dict | None:
    """`sanity.probe` on the first images that are classified correctly, None where there are none."""
    chosen = (clean["prediction"] == split.labels.cpu()).nonzero().squeeze(1)[:sanity.NUM_PROBED].to(split.images.device)
    if not len(chosen):
        return None
    part = split[chosen]
    return sanity.probe(model, to_unit(part.images), part.labels, part.index, attack=attack, loss_fn=loss_fn, **ball)


def judge(probed: dict | None, rows: dict[str, dict[str, Tensor]], y: Tensor, attacks: dict, result: dict, fault: str,
          ) -> list[sanity.Finding]:
    """The findings of every rule that applies to what was run."""
    findings = sanity.inspect_probe(probed) if probed else []
    hits = {name: broken(rows[name], y) for name in attacks}
    none = torch.zeros_like(y, dtype=torch.bool)
    white = torch.stack([none, *(hits[name] for name in attacks if attacks[name].uses_gradients)]).any(0)
    blacks = [name for name in attacks if not attacks[name].uses_gradients]
    if blacks:
        within = {name: torch.arange(len(y)) < (attacks[name].limit or len(y)) for name in blacks}
        seen = torch.stack([(rows[name]["prediction"] != UNTOUCHED) | (white & within[name]) for name in blacks]).any(0)
        seen &= rows["clean"]["prediction"] == y
        findings.append(sanity.black_box_is_weaker(white, torch.stack([hits[name] for name in blacks]).any(0), seen))
    ensemble = next((name for name in ENSEMBLES if name in result["attacks"]), None)
    if ensemble:
        pgd = "pgd100" if "pgd100" in result["attacks"] else "A_rob"
        accuracy = result["attacks"][pgd]["accuracy"] if pgd in result["attacks"] else result["A_rob"]
        findings.append(sanity.pgd_is_nearly_enough(accuracy, result["attacks"][ensemble]["accuracy"], (pgd, ensemble)))
    dropped = {name: int((rows[name]["dropped"] == 1).sum()) for name in attacks}
    return [*findings, sanity.learned_something(result["at_chance"]), sanity.adversaries_sound(dropped, fault)]
