"""The result of an evaluation on the screen and on disk."""
import json
import re
import secrets
import time
from collections.abc import Callable
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness.datasets.batches import image_order
from harness.device import command_line, environment
from harness.errors import UserError
from harness.evaluation.options import EvalConfig
from harness.evaluation.subject import CHECKPOINTS, Ball, Subject
from harness.folder import write_csv, write_text
from harness.reporting import figures as plots

NORMS = {"linf": "l_inf", "l2": "l_2"}  # as they are printed


def output_path(out: str | None, first: Path, whole_run: bool,
                is_free: Callable[[Path], bool] = lambda path: True) -> Path:
    """Where the JSON goes: `out`, which must not exist yet, or the next eval*.json beside the file `first`.

    The next one is the first that does not exist, without per-example results in its way, and that `is_free`.
    """
    stem = "eval" if whole_run else f"eval_{first.stem}"
    beside = ("", *(f"_{name}" for name in CHECKPOINTS[1:])) if whole_run else ("",)

    def in_the_way(path: Path) -> Path | None:
        written = (path, *(path.with_name(f"{path.stem}{suffix}.npz") for suffix in beside))
        return next((name for name in written if name.exists()), None)

    names = (first.parent / f"{stem}{suffix}.json" for suffix in chain([""], (f"-{k}" for k in count(2))))
    path = Path(out) if out else next(name for name in names if not in_the_way(name) and is_free(name))
    if found := in_the_way(path):
        raise UserError(f"{found} exists, and a result is never overwritten: name another --out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        probe.touch()
        probe.unlink()
        if out and not is_free(path):
            raise UserError(f"{path} exists, and a result is never overwritten: name another --out")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): name another place with --out") from error
    return path


def describe(subject: Subject, ball: Ball, cfg: EvalConfig, num_examples: int, device: torch.device,
             seconds: float) -> dict[str, object]:
    """Everything that a reader of the result needs in order to repeat it."""
    own = subject.own
    threat_model = {
        "norm": ball.norm, "epsilon": ball.epsilon, "step_size": ball.step_size, "num_steps": cfg.num_steps,
        "num_restarts": cfg.num_restarts, "start": cfg.start, "restart_kept": "largest cross-entropy"}
    return {
        "num_examples": num_examples, "dataset": subject.dataset, "image_order": image_order(subject.dataset),
        "classes": list(subject.classes),
        "alphas": list(cfg.alphas), "kl_budgets": list(cfg.kl_budgets), "threat_model": threat_model,
        "checkpoint": str(subject.path), "checkpoint_sha256": subject.sha256,
        "epoch": subject.contents["epoch"] if own else None,
        "architecture": subject.arch or (own["name"] if own else subject.path.suffix),
        "seed": cfg.seed, "batch_size": cfg.batch_size,
        "training": subject.contents.get("config") if own else None, "command": command_line(),
        "date": time.strftime("%Y-%m-%d"), "seconds": round(seconds, 1), "environment": environment(device)}


def dumps(value: object) -> str:
    """`value` as indented JSON in which a list of plain values, such as a row of a matrix, takes one line."""
    # strings hold no bare newline, so this is never inside one
    flat = r'\[\n\s*((?:[^][{}"]|"(?:[^"\\]|\\.)*")*?)\n\s*\]'
    text = json.dumps(value, indent=2)
    return re.sub(flat, lambda found: "[" + re.sub(r"\n\s*", " ", found[1]) + "]", text) + "\n"


def write(path: Path, results: dict[str, dict], examples: dict[str, dict[str, Tensor]]) -> None:
    """Write the results as JSON, the first at its top, the per-example ones as .npz, the figures as .png."""
    first, *others = results
    for name, result in results.items():
        file = path.with_name(f"{path.stem}.npz" if name == first else f"{path.stem}_{name}.npz")
        np.savez_compressed(file, **{key: value.numpy() for key, value in examples[name].items()})
        if "attacks" in result:
            write_csv(file.with_name(f"{file.stem}_attacks.csv"), [
                {"attack": attack, "accuracy": facts["accuracy"], "low": facts["ci95"][0],
                 "high": facts["ci95"][1], "num_examples": facts["num_examples"],
                 "seconds": facts.get("seconds")} for attack, facts in _attacks_of(result)])
    write_text(path, dumps(results[first] | {name: results[name] for name in others}))  # where it is, all is
    plots.redraw_result(path)
    print(f"written: {path}, with .npz (one entry an example) and .png (figures) beside it")


def print_table(results: dict[str, dict]) -> None:
    """The accuracies with 95 % intervals, two checkpoints side by side; certificates, attacks, verdicts."""
    one = next(iter(results.values()))
    threat = one["threat_model"]
    print(f"\n{one['dataset']}, {one['num_examples']:,} test images; {NORMS[threat['norm']]}, epsilon "
          f"{threat['epsilon']:.6g}; PGD, {threat['num_steps']} steps of {threat['step_size']:.6g}, "
          f"{threat['start']} start, restarts: {threat['num_restarts']}")
    for first in range(0, len(results), 2):
        pair = list(results)[first:first + 2]
        print("\n" * bool(first), end="")
        _print_pair({name: results[name] for name in pair})
    for name, result in results.items():
        c = result["certificate"]
        print(f"certificate {name}: largest |x' - x| {c['max_perturbation']:.6f}, pixels in "
              f"[{c['min_pixel']:.4g}, {c['max_pixel']:.4g}], {c['non_finite']} non-finite: "
              f"{'ok' if c['ok'] else 'BROKEN'}")
    for name, result in results.items():
        print(f"worst mean cross-entropy {name}: {losses_in_words(result)}")
    for name, result in results.items():
        if result["at_chance"]:
            print(f"AT CHANCE {name}: {chance_in_words(result)}")
    for name, result in results.items():
        if "attacks" in result:
            _print_attacks(name, result)
        print(f"verdict {name}: {result['verdict']}")
        for finding in result["evidence"]:
            if not finding["ok"]:
                print(f"  {finding['rule']}: {finding['evidence']}")


def _print_pair(pair: dict[str, dict]) -> None:
    """The accuracies of one or two checkpoints in a column each."""
    one = next(iter(pair.values()))
    weighted = [(metric, strength) for metric in ("A_sa", "A_tr", "A_sa_kl") for strength in one[metric]]
    epochs = [f" (epoch {result['epoch']})" if result["epoch"] else "" for result in pair.values()]
    heads = [name + epoch for name, epoch in zip(pair, epochs)]
    print(" " * 16 + "".join(f"{head:<40}" for head in heads).rstrip())
    for metric, strength in [("A_nat", None), ("A_rob", None), *weighted]:
        kind = "KL" if metric == "A_sa_kl" else "alpha"
        label = metric if strength is None else f"{metric.removesuffix('_kl')}  {kind} {strength}"
        cells = [_cell(result, metric, strength) for result in pair.values()]
        print(f"{label:<16}" + "".join(f"{cell:<40}" for cell in cells).rstrip())


def chance_in_words(result: dict) -> str:
    """What is at chance, and what that may mean."""
    if "A_nat" in result["at_chance"]:
        return "A_nat is no better than a guess: nothing was learned, or the classes differ"
    return "A_rob is no better than a guess: this attack leaves nothing"


def _attacks_of(result: dict) -> list[tuple[str, dict]]:
    """(name, facts) of every strong attack, and of the worst case over all."""
    return [*result["attacks"].items(), ("worst case", result["worst_case"])]


def _print_attacks(name: str, result: dict) -> None:
    """The accuracy under each attack, and at the worst case over all of them per example."""
    clean = {"accuracy": result["A_nat"], "ci95": result["ci95"]["A_nat"],
             "num_examples": result["num_examples"]}
    print(f"\n{name + ' under':<20}{'accuracy, 95 % interval':<29}{'images':>7}{'seconds':>10}")
    for attack, facts in [("no attack", clean), *_attacks_of(result)]:
        low, high = facts["ci95"]
        figures = f"{attack:<20}{facts['accuracy']:6.2f} %  [{low:.2f}, {high:.2f}]"
        seconds = f"{facts['seconds']:>10.1f}" if "seconds" in facts else ""
        print(f"{figures:<49}{facts['num_examples']:>7,}{seconds}")
    worst = result["worst_case"]
    for kind, metric in (("alpha", "A_sa"), ("KL", "A_sa_kl")):
        for strength, value in worst[metric].items():
            print(f"A_sa, A_tr at the worst case, {kind} {strength}: {value:.2f} %")
    print(f"worst mean cross-entropy there: {losses_in_words(worst)}")


def _cell(result: dict, metric: str, strength: str | None) -> str:
    value, ci95 = result[metric], result["ci95"][metric]
    if strength is None:
        return f"{value:6.2f} %  [{ci95[0]:.2f}, {ci95[1]:.2f}]"
    low, high = ci95[strength]
    shown = f"n_eff {result['effective_size'][metric][strength]:,.0f}"
    if metric == "A_sa_kl":
        alpha = result["alpha_of_kl"][strength]
        shown = f"alpha {'inf' if alpha is None else format(alpha, '.3g')}"
    return f"{value[strength]:6.2f} %  [{low:.2f}, {high:.2f}], {shown}"


def losses_in_words(result: dict) -> str:
    """The cross-entropy's worst means, within each KL budget and over each share of the examples."""
    budgets = [f"at KL {budget} {value:.3f}" for budget, value in result["loss_kl"].items()]
    shares = [f"of the worst {100 * float(share):g} % {value:.3f}"
              for share, value in result["loss_cvar"].items()]
    return ", ".join([*budgets, *shares])
