"""The folder of a run: its name, and files that are at every moment the old one or the whole new one."""
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Protocol

from harness.errors import UserError


class FolderOptions(Protocol):
    """The fields of a Config that name the folder of a run."""

    @property
    def out_dir(self) -> str | None: ...

    @property
    def resume(self) -> str | None: ...


def claim_folder(cfg: FolderOptions, script: str) -> Path:
    """The folder of a run: the one to be resumed, out_dir, or runs/<script>/<time>.

    Raises UserError for a folder already in use.
    """
    if cfg.resume:
        return Path(cfg.resume)
    folder = Path(cfg.out_dir) if cfg.out_dir else _new_folder(Path("runs") / script)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already holds something, and a run never overwrites: "
                        "name another --out_dir, or --resume it")
    return folder


def _new_folder(parent: Path) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    suffixes = ("", *(f"-{k}" for k in range(2, 1000)))
    return next(path for path in (parent / f"{stamp}{suffix}" for suffix in suffixes) if not path.exists())


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows under the columns of all of them, as `write_text` does; None and missing values stay empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    cells = (["" if value is None else str(value) for value in line] for line in lines)
    write_text(path, "".join(",".join(line) + "\n" for line in cells))


def write_text(path: Path, text: str) -> None:
    """Write a text file so that `path` is at every moment the old one or the whole new one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextmanager
def resumable(folder: Path, command: str, quiet: bool = False) -> Iterator[None]:
    """When a signal ends the work in `folder`, say (unless `quiet`) how to continue: `COMMAND --resume`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if not quiet:
            words = f"python {command} --resume {shlex.quote(str(folder))}"
            print(f"\nstopped; go on with: {words}", file=sys.stderr)
        raise
