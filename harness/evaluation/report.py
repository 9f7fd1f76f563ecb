"""From a command line to a result on the screen and on disk: which checkpoint, on what data, under which threat model."""
import hashlib
import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness.checkpoint import own_architecture, read
from harness.datasets.batches import Dataset, load_dataset
from harness.device import command_line, environment
from harness.errors import UserError
from harness.evaluation.predictions import Certificate
from harness.folder import write_csv, write_text
from harness.reporting import figures as plots

NORMS = {"linf": "l_inf", "l2": "l_2"}  # as they are printed
CHECKPOINTS = ("last", "best", "last_ema", "best_ema")  # what a run folder may hold, in the order of the result's columns


@dataclass(frozen=True)
class Protocol:
    """What an evaluation script assumes of a checkpoint that does not say: the setting of the paper's tables."""

    dataset: str       # data set
    channels: int      # image channels of the runs that the script looks for
    epsilon: float     # l_inf radius, pixels in [0, 1]
    step_ratio: float  # epsilon over PGD step


@dataclass(frozen=True)
class Subject:
    """One checkpoint to evaluate: its contents, its data, and the threat model after flags and file have spoken."""

    name: str
    path: Path
    contents: dict
    data: Dataset
    epsilon: float
    step_size: float


def find_checkpoints(given: str | None, channels: int) -> list[tuple[str, Path]]:
    """(name, file) of what is to be evaluated: the file given, or the CHECKPOINTS in the run given, or in the newest run in runs/.

    The newest run is the one whose last.pt was written last among those on images with `channels` channels. Raises UserError when
    there is none.
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
            return json.loads((folder / "config.json").read_text(encoding="utf-8"))["image_shape"][0] == channels
        except (OSError, ValueError, KeyError, TypeError):
            return False

    runs = sorted(Path("runs").rglob("last.pt"), key=lambda path: path.stat().st_mtime)
    newest = next((path.parent for path in reversed(runs) if fits(path.parent)), None)
    if newest is None:
        raise UserError(f"there is no finished epoch of a run on {channels}-channel images in {Path('runs').resolve()}: "
                        "train one first (python train_at_mnist.py --recipe digits takes a minute) or name a --checkpoint")
    return newest


def open_subject(name: str, path: Path, cfg: object, protocol: Protocol) -> Subject:
    """Read a checkpoint and its data set; a flag wins over the checkpoint, the checkpoint over the protocol."""
    contents = read(path)
    own = own_architecture(contents)
    data_dir = cfg.data_dir or (contents["data_dir"] if own and Path(contents["data_dir"]).is_dir() else "data")
    data = load_dataset(cfg.dataset or (contents["dataset"] if own else protocol.dataset), data_dir)
    channels = data.image_shape[0]
    if own and (own["in_channels"], own["num_classes"]) != (channels, data.num_classes):
        raise UserError(f"{path} takes {own['in_channels']}-channel images of {own['num_classes']} classes, but {data.name} has "
                        f"{channels}-channel images of {data.num_classes} classes: name a --dataset that fits")
    trained = contents["threat_model"]["epsilon"] if own else None
    epsilon = next(value for value in (cfg.epsilon, trained, protocol.epsilon) if value is not None)
    if trained is not None and epsilon != trained:
        print(f"note: evaluated at epsilon {epsilon:g}, trained at {trained:g}")
    if channels != protocol.channels and cfg.step_size is None:
        print(f"note: steps of epsilon / {protocol.step_ratio:g}, as for {protocol.dataset}, on {channels}-channel images: another "
              "--step_size, or the other eval script, may be meant")
    return Subject(name, path, contents, data, epsilon, epsilon / protocol.step_ratio if cfg.step_size is None else cfg.step_size)


def measured_before(subject: Subject, results: dict[str, dict]) -> bool:
    """Whether a result is of the same weights: where the last epoch is the best, best.pt is last.pt, and best_ema.pt is last_ema.pt."""
    epoch, averaged = subject.contents.get("epoch"), subject.name.endswith("_ema")
    return any(epoch is not None and epoch == result["epoch"] and averaged == name.endswith("_ema") for name, result in results.items())


def output_path(out: str | None, first: Path, whole_run: bool) -> Path:
    """Where the JSON goes: `out`, which must not exist yet, or the next free eval*.json beside the checkpoint."""
    stem = "eval" if whole_run else f"eval_{first.stem}"
    names = [Path(out)] if out else [first.parent / f"{stem}{suffix}.json" for suffix in ("", *(f"-{k}" for k in range(2, 1000)))]
    beside = ("", *(f"_{name}" for name in CHECKPOINTS[1:])) if whole_run else ("",)

    def in_the_way(path: Path) -> Path | None:
        written = (path, *(path.with_name(f"{path.stem}{suffix}.npz") for suffix in beside))
        return next((name for name in written if name.exists()), None)

    path = next((name for name in names if not in_the_way(name)), None)
    if path is None:
        raise UserError(f"{in_the_way(names[0])} exists, and a result is never overwritten: name another --out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): name another place with --out") from error
    return path


def describe(subject: Subject, cfg: object, num_examples: int, device: torch.device, seconds: float) -> dict[str, object]:
    """Everything that a reader of the result needs in order to repeat it."""
    own = own_architecture(subject.contents)
    return {"num_examples": num_examples, "dataset": subject.data.name, "classes": list(subject.data.classes), "alphas": list(cfg.alphas),
            "threat_model": {"norm": cfg.norm, "epsilon": subject.epsilon, "step_size": subject.step_size, "num_steps": cfg.num_steps,
                             "num_restarts": cfg.num_restarts, "start": cfg.start, "restart_kept": "largest cross-entropy"},
            "checkpoint": str(subject.path), "checkpoint_sha256": hashlib.sha256(subject.path.read_bytes()).hexdigest(),
            "epoch": subject.contents["epoch"] if own else None, "architecture": cfg.arch or own["name"], "seed": cfg.seed,
            "batch_size": cfg.batch_size, "training": subject.contents.get("config") if own else None, "command": command_line(),
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(seconds, 1), "environment": environment(device)}


def dumps(value: object) -> str:
    """`value` as indented JSON in which a list of plain values, such as a row of a matrix, takes one line."""
    flat = r'\[\n\s*((?:[^][{}"]|"(?:[^"\\]|\\.)*")*?)\n\s*\]'  # strings hold no bare newline: this is never inside one
    return re.sub(flat, lambda found: "[" + re.sub(r"\n\s*", " ", found[1]) + "]", json.dumps(value, indent=2)) + "\n"


def write(path: Path, results: dict[str, dict], examples: dict[str, dict[str, Tensor]]) -> None:
    """Write the first result with the others under their names as JSON, the per-example results as .npz, the figures as .png."""
    first, *others = results
    write_text(path, dumps(results[first] | {name: results[name] for name in others}))
    for name in results:
        file = path.with_name(f"{path.stem}.npz" if name == first else f"{path.stem}_{name}.npz")
        np.savez_compressed(file, **{key: value.numpy() for key, value in examples[name].items()})
        if "attacks" in results[name]:
            write_csv(file.with_name(f"{file.stem}_attacks.csv"), [
                {"attack": attack, "accuracy": facts["accuracy"], "low": facts["ci95"][0], "high": facts["ci95"][1],
                 "num_examples": facts["num_examples"], "seconds": facts.get("seconds")} for attack, facts in accuracies(results[name])])
    plots.redraw_result(path)
    print(f"written: {path}, with .npz (one entry an example) and .png (figures) beside it")


def certified(certificate: Certificate, epsilon: float) -> dict[str, object]:
    """The certificate as plain values; `ok` is whether every adversarial example lies in its ball and box."""
    return asdict(certificate) | {"ok": not certificate.broken(epsilon)}


def print_table(results: dict[str, dict]) -> None:
    """The accuracies with their 95 % intervals, one column a checkpoint, two columns side by side."""
    one = next(iter(results.values()))
    threat = one["threat_model"]
    print(f"\n{one['dataset']}, {one['num_examples']:,} test images; {NORMS[threat['norm']]}, epsilon {threat['epsilon']:.6g}; "
          f"PGD, {threat['num_steps']} steps of {threat['step_size']:.6g}, {threat['start']} start, restarts: {threat['num_restarts']}")
    rows = [("A_nat", None), ("A_rob", None), *((metric, alpha) for metric in ("A_sa", "A_tr") for alpha in one[metric])]
    for first in range(0, len(results), 2):
        pair = list(results)[first:first + 2]
        heads = [name + (f" (epoch {results[name]['epoch']})" if results[name]["epoch"] else "") for name in pair]
        print(("\n" if first else "") + " " * 16 + "".join(f"{head:<40}" for head in heads).rstrip())
        for metric, alpha in rows:
            label = metric if alpha is None else f"{metric}  alpha {alpha}"
            print(f"{label:<16}" + "".join(f"{_cell(results[name], metric, alpha):<40}" for name in pair).rstrip())
    for name, result in results.items():
        c = result["certificate"]
        print(f"certificate {name}: largest |x' - x| {c['max_perturbation']:.6f}, pixels in [{c['min_pixel']:.4g}, {c['max_pixel']:.4g}], "
              f"{c['non_finite']} non-finite: {'ok' if c['ok'] else 'BROKEN'}")
    for name, result in results.items():
        if result["at_chance"]:
            print(f"AT CHANCE {name}: {chance_in_words(result)}")
    for name, result in results.items():
        if "attacks" in result:
            _print_attacks(name, result)


def chance_in_words(result: dict) -> str:
    """What is at chance, and what that may mean."""
    if "A_nat" in result["at_chance"]:
        return "A_nat is no better than a guess: nothing was learned, or the classes differ"
    return "A_rob is no better than a guess: this attack leaves nothing"


def accuracies(result: dict) -> list[tuple[str, dict]]:
    """(name, facts) of every attack, and of the worst case over them."""
    return [*result["attacks"].items(), ("worst case", result["worst_case"])]


def _print_attacks(name: str, result: dict) -> None:
    """The accuracy under each attack and the worst case over all per example, and the verdict with what speaks against the figures."""
    print(f"\n{name + ' under':<20}{'accuracy, 95 % interval':<29}{'images':>7}{'seconds':>10}")
    for attack, facts in [("no attack", {"accuracy": result["A_nat"], "ci95": result["ci95"]["A_nat"]}), *accuracies(result)]:
        low, high = facts["ci95"]
        seconds = f"{facts['seconds']:>10.1f}" if "seconds" in facts else ""
        print(f"{attack:<20}{facts['accuracy']:6.2f} %  [{low:.2f}, {high:.2f}]".ljust(49)
              + f"{facts.get('num_examples', result['num_examples']):>7,}{seconds}")
    for alpha, value in result["worst_case"]["A_sa"].items():
        print(f"A_sa, A_tr at the worst case, alpha {alpha}: {value:.2f} %")
    print(f"verdict {name}: {result['verdict']}")
    for finding in result["evidence"]:
        if not finding["ok"]:
            print(f"  {finding['rule']}: {finding['evidence']}")


def _cell(result: dict, metric: str, alpha: str | None) -> str:
    value, (low, high) = (part[metric] if alpha is None else part[metric][alpha] for part in (result, result["ci95"]))
    size = "" if alpha is None else f", n_eff {result['effective_size'][metric][alpha]:,.0f}"
    return f"{value:6.2f} %  [{low:.2f}, {high:.2f}]{size}"
