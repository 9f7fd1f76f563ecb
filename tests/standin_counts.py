"""How often the host waits for a GPU or copies, in every attack and in a training step of every script.

    python -m tests.standin_counts --out results/speed/standin.json

Counted on a GPU that is not there (tests/standin.py), with the calls that the tests make. What the file holds
of earlier commits, under "before", stays.
"""
import argparse
import json
import tempfile
from concurrent.futures import Executor
from pathlib import Path

from harness.device import choose_device, environment
from harness.evaluation.report import dumps
from harness.folder import write_text
from tests import standin_runs
from tests.evaluation.test_evaluation_on_a_standin import ATTACKS, PAIRS, arguments_in
from tests.training.test_on_a_standin import SCRIPTS, write_images

ABOUT = """\
Waits of the host for a GPU and copies between the two, by "FILE: FUNCTION", on a device that is not there: \
no figure here is of a GPU. attacks: one call on 12 images, of so many rounds, as in \
tests/evaluation/test_evaluation_on_a_standin.py. steps: two training steps of every script of \
tests/training/test_on_a_standin.py; queued: copies from pinned memory, for which nobody waits. casts: \
float32 tensors that each further step of a PGD casts to bfloat16. before: the same at earlier commits, by \
FILE:LINE at the first one, where steps are one step."""
CASTING = ("resnet18", "wrn34_10", "wrn28_10")


def of_attacks(child: Executor) -> dict[str, dict]:
    """Rounds and counts of every attack in each of its norms."""
    counts = {}
    for name, norm in PAIRS:
        attack, _, rounds, _ = ATTACKS[name]
        found = child.submit(standin_runs.attacked, attack, arguments_in(name, norm)).result()
        counts[f"{name}, {norm}"] = {"rounds": rounds, **found.counts()}
    return counts


def of_steps(child: Executor) -> dict[str, dict]:
    """Counts of two training steps of every script."""
    counts = {}
    for name, (script, *words) in SCRIPTS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder))
            counts[name] = child.submit(standin_runs.trained, script, words, folder).result().counts()
    return counts


def main() -> None:
    """Count, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    out = parser.parse_args().out
    with standin_runs.child() as child:
        casts = {f"{name}, {mode}": child.submit(standin_runs.casts_in_a_step, mode, name).result()
                 for name in CASTING for mode in ("eval", "train")}
        found = {"attacks": of_attacks(child), "steps": of_steps(child), "casts": casts}
    before = json.loads(out.read_text())["before"] if out.exists() else {}
    write_text(out, dumps({"about": ABOUT, "command": f"python -m tests.standin_counts --out {out}",
                           "environment": environment(choose_device("cpu")), **found, "before": before}))


if __name__ == "__main__":
    main()
