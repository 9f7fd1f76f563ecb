"""Does this project compute on your device what it computes on a CPU?  One line a check: PASS or FAIL.

    python -m harness.accept                       # the GPU if there is one; under ten minutes
    python -m harness.accept --device cpu          # what can be checked without one
    python -m harness.accept --only float32 noise  # some of the checks

The exit code is 1 if a check fails. The JSON file holds every figure: send it with a report. Stopped, the
same command goes on with the checks that the file lacks.
"""
import contextlib
import gc
import io
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.accept import arithmetic, attacks, machine, training
from harness.accept.check import Check, NotChecked, Site, networks
from harness.config import run_script
from harness.device import choose_device, environment, is_real_gpu, release_memory
from harness.errors import RunError, UserError
from harness.evaluation.report import dumps
from harness.folder import rows_so_far, write_text
from harness.signals import is_dealt_with

CHECKS: tuple[Check, ...] = (*arithmetic.CHECKS, *training.CHECKS, *attacks.CHECKS, *machine.CHECKS)


@dataclass(frozen=True)
class Config:
    device: str = "auto"             # auto, cpu, or an accelerator by its name in torch
    only: tuple[str, ...] = ()       # the checks to run; default: all
    out: str = "accept.json"         # JSON file to write, or to go on with


def main(cfg: Config) -> None:
    """Make the checks one after the other.  Raises RunError at the end if one failed."""
    names = [check.name for check in CHECKS]
    if unknown := [name for name in cfg.only if name not in names]:
        raise UserError(f"unknown check '{unknown[0]}': choose among {', '.join(names)}")
    device = choose_device(cfg.device)
    command = shlex.join(["python", "-m", "harness.accept", *sys.argv[1:]])
    facts = {"command": command, "date": time.strftime("%Y-%m-%d"), "environment": environment(device)}
    print(", ".join(f"{name} {value}" for name, value in facts["environment"].items()), flush=True)
    found = rows_so_far(Path(cfg.out), "checks", {"environment": facts["environment"]})
    rows = {row["check"]: row for row in found}
    chosen = [check for check in CHECKS if not cfg.only or check.name in cfg.only]
    real_gpu = is_real_gpu(device)
    for check in chosen:
        if check.name not in rows:
            with tempfile.TemporaryDirectory() as folder:
                site = Site(device, real_gpu, Path(folder), networks())
                rows[check.name] = row_of(check, site)
            result = facts | {"checks": [*rows.values()]}
            write_text(Path(cfg.out), dumps(result))  # the next may take minutes
            gc.collect()
            with contextlib.suppress(RuntimeError):  # of a device that the check has broken
                release_memory(device)               # the next may be in a process of its own
        print(line_of(rows[check.name]), flush=True)
    failed = [check.name for check in chosen if rows[check.name]["verdict"] == "FAIL"]
    print(f"written: {cfg.out}")
    if failed:
        raise RunError(f"{len(failed)} of {len(chosen)} checks failed: {', '.join(failed)}")


class TookLonger(BaseException):
    """A check has had its time. No `except Exception` of what is checked holds it."""


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise TookLonger in the block after so many seconds, until it is dealt with; not on Windows."""
    error = TookLonger(f"took longer than {seconds} s")

    def end(number: int, _: object) -> None:
        """Raise the one error."""
        if not is_dealt_with(error):
            raise error

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def row_of(check: Check, site: Site) -> dict[str, Any]:
    """The verdict of one check, in words and figures, and how long it took."""
    started, said = time.monotonic(), io.StringIO()
    row: dict[str, Any] = {"check": check.name, "asks": check.asks, "verdict": "not checked"}
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            if check.needs_gpu and not site.real_gpu:
                raise NotChecked("needs a GPU")
            with within(check.seconds):
                found = check.run(site)
        row |= {"verdict": "PASS" if found.holds else "FAIL", "found": found.text, "figures": found.figures}
    except NotChecked as reason:
        row["found"] = str(reason)
    except (Exception, TookLonger) as error:  # of any kind: it is what the check is for
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        row |= {"verdict": "FAIL", "found": f"{type(error).__name__}: {reason}",
                "said": said.getvalue()[-4000:], "trace": traceback.format_exc()[-4000:]}
    return row | {"seconds": round(time.monotonic() - started, 1)}


def line_of(row: dict[str, Any]) -> str:
    """The line of a check on the screen."""
    return f"{row['verdict']:<12}{row['check']:<10}{row['asks']}: {row['found']}  {row['seconds']:.0f} s"


if __name__ == "__main__":
    sys.argv[0] = str(Path(__file__).resolve())
    run_script(main, Config)
