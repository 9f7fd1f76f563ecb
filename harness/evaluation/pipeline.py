"""An evaluation, from its command line to its result.

What the attacks do to each image goes into a record on disk, and the result is made from the record alone.
So a stopped evaluation goes on where it was, and several processes share one.
"""
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from attacks.catalogue import Attack, members_of, strong_attacks, weighted_attacks
from attacks.pgd import cross_entropy, pgd_by_index
from harness import distributed
from harness.datasets.batches import first_examples, image_order
from harness.datasets.split import Split
from harness.device import choose_device, command_line
from harness.errors import RunError, UserError
from harness.evaluation import report
from harness.evaluation.attack_record import AttackRecord, is_same, read_about
from harness.evaluation.attacking import Columns, Task, count_left, run
from harness.evaluation.capacity import fitting_batch_size
from harness.evaluation.options import EvalConfig
from harness.evaluation.predictions import BatchInvariant
from harness.evaluation.result import result_of
from harness.evaluation.subject import (
    Ball,
    Protocol,
    Subject,
    ball_of,
    find_checkpoints,
    open_subject,
    sha256,
)
from harness.folder import held, resumable, write_text
from losses.margin import cw_loss, margin_weights


@dataclass(frozen=True)
class Job:
    """What this process does of an evaluation."""

    device: torch.device
    columns: Columns                 # of strong attacks
    shard: tuple[int, int] = (0, 1)  # (i, n): the positions congruent to i modulo n
    rank: int = 0                    # under torchrun, whose first process waits for the others and reports
    world_size: int = 1

    def is_complete(self, results: dict[str, dict]) -> bool:
        """Whether every result is there, and this process the one that reports."""
        return all("A_nat" in result for result in results.values())


def evaluate(cfg: EvalConfig, protocol: Protocol, build: Callable[..., nn.Module], **elsewhere: Any) -> None:
    """Measure every checkpoint that `cfg` names, print the figures and write them down.

    build: as in `harness.checkpoint.load_model`; elsewhere: `load` and `readers` of `open_subject`, for
    images and networks from elsewhere. Raises UserError for what does not fit, and RunError at the end where
    A_rob's or A_tr's attack has left its ball or box.
    """
    job, files = begin(cfg), find_checkpoints(cfg.checkpoint, protocol.channels)
    with ExitStack() as holding:
        _evaluate(cfg, protocol, partial(open_subject, build=build, **elsewhere), job, files, holding)


def _evaluate(cfg: EvalConfig, protocol: Protocol, open_file: Callable[..., Subject], job: Job,
              files: list[tuple[str, Path]], holding: ExitStack) -> None:
    out, results, examples = None, {}, {}
    for name, path in files:
        started = time.monotonic()
        subject = open_file(name, path, arch=cfg.arch, dataset=cfg.dataset, data_dir=cfg.data_dir,
                            default=protocol.dataset, ignore_extra=cfg.ignore_extra)
        if measured_before(subject, results):
            continue                                    # best.pt is last.pt
        ball = ball_of(subject, protocol, cfg.norm, cfg.epsilon, cfg.step_size)
        test = first_examples(subject.split, cfg.num_examples, cfg.indices).to(job.device)
        model = subject.model.to(job.device)
        settings = replace(cfg, batch_size=cfg.batch_size or fitting_batch_size(model, test))
        about = about_of(subject, ball, cfg, test)
        if out is None:                                 # nothing is written before a network fits its images
            out, folder = claim(job, cfg, files, name, about, holding)
            script = Path(command_line().split()[1]).name
            holding.enter_context(resumable(folder, script, quiet=job.rank > 0))
        if job.rank == 0:
            print(f"evaluating {path} on {len(test):,} test images of {subject.dataset}", flush=True)
        record = AttackRecord(folder / name, about, len(test), cfg.save_adversaries)
        if not results and job.rank == 0:
            write_config(cfg, files[0][1], out, folder)
        task = Task(BatchInvariant(model), test, ball.epsilon, ball.norm, settings.batch_size)
        results[name], examples[name] = measure(job, record, task, attacks_of(cfg, job.columns, ball), cfg)
        seconds = time.monotonic() - started
        results[name] |= report.describe(subject, ball, settings, len(test), job.device, seconds)
    if job.is_complete(results):                        # otherwise another process reports
        finish(out, results, examples)


def finish(out: Path, results: dict[str, dict], examples: dict[str, dict[str, Tensor]]) -> None:
    """Print the results and write them down.  Raises RunError where the certificate of one is broken."""
    report.print_table(results)
    report.write(out, results, examples)
    if broken := [name for name, result in results.items() if not result["certificate"]["ok"]]:
        names = ", ".join(broken)
        raise RunError(f"the attack on {names} left its ball or box: these figures must not be used")


def begin(cfg: EvalConfig) -> Job:
    """What is to be done here.  Raises UserError for an unknown attack and for flags that do not fit."""
    if cfg.out and Path(cfg.out).exists():
        raise UserError(f"{cfg.out} exists, and a result is never overwritten: name another --out")
    if cfg.norm != "linf" and cfg.epsilon is None:
        raise UserError(f"--norm {cfg.norm} needs its own --epsilon: the checkpoint's is one of l_inf")
    try:
        columns = members_of(cfg.attacks)
        attacks_of(cfg, columns, Ball(cfg.norm, 0.0, 0.0))
    except ValueError as error:
        raise UserError(str(error)) from None
    shard = _shard(cfg.shard)
    device = choose_device(cfg.device)
    rank, world_size = distributed.start(device, tensors=False)  # so that each process leaves when it is done
    if world_size > 1 and cfg.shard:
        raise UserError("torchrun gives every process its shard: leave --shard out")
    return Job(device, columns, (rank, world_size) if world_size > 1 else shard, rank, world_size)


def _shard(text: str | None) -> tuple[int, int]:
    """(i, n) of "i/n"."""
    number, slash, count = (text or "0/1").partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"--shard {text}: give i/n with i from 0 to n - 1, such as 0/2 and 1/2")
    return int(number), int(count)


def attacks_of(cfg: EvalConfig, columns: Columns, ball: Ball) -> dict[str, Attack]:
    """The attacks of A_rob, of A_tr at each alpha, and of the columns, by name and in their order.

    Raises ValueError for one that cannot be run in this norm or here.
    """
    pgd = partial(pgd_by_index, seed=cfg.seed, epsilon=ball.epsilon, step_size=ball.step_size,
                  num_steps=cfg.num_steps, start=cfg.start, norm=ball.norm)
    own = weighted_attacks(pgd, cross_entropy, weighted_cross_entropy, cfg.alphas, cfg.num_restarts)
    return own | strong_attacks(columns, epsilon=ball.epsilon, norm=ball.norm, seed=cfg.seed,
                                margin_loss=cw_loss, num_spsa_examples=cfg.num_spsa_examples)


def weighted_cross_entropy(alpha: float) -> Callable[[Tensor, Tensor], Tensor]:
    """What A_tr's attack maximises: exp(-alpha * margin) times the cross-entropy, [B]."""
    return lambda logits, y: margin_weights(logits, y, alpha) * cross_entropy(logits, y)


def measured_before(subject: Subject, results: dict[str, dict]) -> bool:
    """Whether a result is of the same weights: best.pt of the last epoch is last.pt, as is best_ema.pt."""
    epoch, averaged = subject.contents.get("epoch"), subject.name.endswith("_ema")
    return any(epoch is not None and epoch == result["epoch"] and averaged == name.endswith("_ema")
               for name, result in results.items())


def about_of(subject: Subject, ball: Ball, cfg: EvalConfig, test: Split) -> dict:
    """What decides the entries of a record, as plain values; the list of attacks may grow."""
    names = ("arch", "norm", "num_steps", "num_restarts", "start", "alphas", "num_spsa_examples", "seed",
             "save_adversaries")
    about = {"checkpoint": str(subject.path), "checkpoint_sha256": subject.sha256, "dataset": subject.dataset,
             "num_examples": len(test), "images_sha256": test.fingerprint(), "epsilon": ball.epsilon,
             "step_size": ball.step_size}
    if cfg.arch and ".py:" in cfg.arch:
        about["arch_sha256"] = sha256(Path(cfg.arch.rpartition(":")[0]))
    if (order := image_order(subject.dataset)) != "published":
        about["image_order"] = order
    return json.loads(json.dumps(about | {name: getattr(cfg, name) for name in names}))


def claim(job: Job, cfg: EvalConfig, files: list[tuple[str, Path]], name: str, about: dict,
          holding: ExitStack) -> tuple[Path, Path]:
    """Where the result and record go: to be resumed, or OUT.json and OUT.record, held until `holding` ends.

    Without --out it is the next free name; a record of the same evaluation goes on, if it is not finished and
    nobody works in it. Only shards share a record.
    """
    place = None
    if job.rank == 0:
        moved = Path(cfg.resume) if cfg.resume and not cfg.resume.endswith(".json") else None

        def is_mine(out: Path) -> bool:
            """Hold the record beside `out`, where this evaluation may write to it."""
            folder = moved or out.with_suffix(".record")
            before = read_about(folder / name)
            if before is not None and not cfg.out and not is_same(before, about):
                return False
            folder.mkdir(parents=True, exist_ok=True)
            try:
                holding.enter_context(held(folder, shared=job.shard[1] > 1))
            except BlockingIOError:
                if cfg.out:
                    raise UserError(f"another evaluation works in {folder} at this moment") from None
                return False
            return not out.exists()  # it may have come while another process held the folder

        out = report.output_path(cfg.out, files[0][1], len(files) > 1, is_mine)
        place = out, moved or out.with_suffix(".record")
    return distributed.from_first(place)


def write_config(cfg: EvalConfig, first: Path, out: Path, folder: Path) -> None:
    """Write what --resume begins from into the record, which has been compared with this evaluation."""
    checkpoint = cfg.checkpoint or str(first.parent)
    chosen = {"checkpoint": checkpoint, "out": str(out), "resume": None, "shard": None}
    facts = {"script": Path(command_line().split()[1]).stem, "command": command_line()}
    write_text(folder / "config.json", json.dumps(facts | asdict(cfg) | chosen, indent=2) + "\n")


def measure(job: Job, record: AttackRecord, task: Task, attacks: dict[str, Attack], cfg: EvalConfig,
            ) -> tuple[dict, dict[str, Tensor]]:
    """The result of one network and its per-example results; empty where other processes are not done."""
    with tqdm(unit="attack", unit_scale=True, disable=True if job.rank else None, leave=False) as bar:
        run(record, task, attacks, job.columns, job.shard, bar)
    if not _is_whole(job, record, task.split.labels.cpu(), attacks):
        return {}, {}
    return result_of(record, task, attacks, job.columns, cfg.alphas, cfg.kl_budgets, cfg.seed)


def _is_whole(job: Job, record: AttackRecord, y: Tensor, attacks: dict[str, Attack]) -> bool:
    """Whether the record is whole and this process reports; torchrun's first process waits until it is."""
    if job.rank:
        return False
    while (missing := count_left(record, y, attacks, job.columns)) and job.world_size > 1:
        time.sleep(1.0)  # no collective: those time out where one process is half an hour behind
    if missing:
        print(f"shard {job.shard[0]}/{job.shard[1]} is done; the record {record.folder} still lacks other "
              "shards, the last one reports")
    return not missing
