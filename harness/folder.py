"""The folder of a run, held by one process at a time; files that are always the old one or the new one."""
import json
import os
import secrets
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, cast

from harness.errors import UserError

LOCK = ".lock"  # file of a folder that a process works in


def claim_folder(out: str | None, script: str, config: dict[str, Any], flag: str = "--out_dir") -> Path:
    """A folder of this process's own: `out`, or runs/<script>/<time>, with `config` as its config.json.

    Of processes that want it at the same moment one gets it. Raises UserError for an `out` that already holds
    something, and for a place that cannot be written.
    """
    text = json.dumps(config, indent=2) + "\n"
    stamp = Path("runs") / script / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    names = [Path(out)] if out else (stamp.with_name(stamp.name + end) for end in _endings())
    for folder in names:
        is_new = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not any(folder.iterdir()):
                _create(folder / "config.json", text)
                return folder
        except FileExistsError:  # a file, or another process was faster
            pass
        except OSError as error:
            if is_new and folder.is_dir():
                folder.rmdir()
            raise UserError(f"cannot write to the folder {folder} ({error.strerror}): "
                            f"name another {flag}") from error
    check_free(Path(out or "runs"), flag)
    raise UserError(f"{out} was taken by another process at this moment: name another {flag}")


def forget(folder: Path) -> None:
    """Remove a folder that holds its config.json alone: what it was claimed for was refused."""
    if folder.is_dir() and [path.name for path in folder.iterdir()] == ["config.json"]:
        (folder / "config.json").unlink()
        folder.rmdir()


def check_free(folder: Path, flag: str = "--out_dir") -> None:
    """Raise UserError for a folder that already holds something, and for a file."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already holds something, and a run never overwrites: name another {flag}, "
                        "or --resume it")


def _endings() -> Iterator[str]:
    yield ""
    yield from (f"-{k}" for k in count(2))


def _create(path: Path, text: str) -> None:
    """Write a file that is not there yet. Raises FileExistsError if it is; leaves nothing if it fails."""
    with path.open("x", encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
        except OSError:
            path.unlink()
            raise


@contextmanager
def held(folder: Path, shared: bool = False) -> Iterator[None]:
    """Work in `folder` as the only process, or with `shared` as one of several that all share it.

    The system lets go when the process ends, however it ends. Raises BlockingIOError where another process
    holds the folder. Where the system has no such locks nobody is kept out.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path, kind = folder / LOCK, fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        with path.open("a") as file:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:  # a network drive without locks
                pass
            if not _is_still(path, file.fileno()):
                continue  # the one who held it has removed the file since it was opened
            try:
                yield
            finally:
                if not shared:
                    path.unlink(missing_ok=True)
            return


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether an open file is the one that has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets the name `path`, on the disk, if the block ends well, and is removed otherwise."""
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with unfinished.open("wb") as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file as `whole_file` does."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


def rows_so_far(path: Path, name: str, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that a stopped call has left as `name` in a JSON file, [] where there is no file.

    Raises UserError for a file with other facts, which name their `environment`, or of a checkout with
    changes: a result is never overwritten, and its rows are of one machine and one state of the code. Outside
    a checkout nothing tells one state from another.
    """
    if not path.exists():
        return []
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # something else has this name
        found = {}
    same = name in found and all(found.get(key) == value for key, value in facts.items())
    if not same or str(facts["environment"]["commit"]).endswith("+"):
        raise UserError(f"{path} exists, and a result is never overwritten: it goes on by the same command, "
                        "on the same machine, with the code of one commit; name another --out")
    return found[name]


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows under the columns of all, as `write_text` does; None and missing values stay empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    cells = (["" if value is None else str(value) for value in line] for line in lines)
    write_text(path, "".join(",".join(line) + "\n" for line in cells))


def readable(name: str) -> str:
    """A file's name as text that can be drawn and written: bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


@contextmanager
def resumable(folder: Path, command: str, quiet: bool = False) -> Iterator[None]:
    """When a signal or a full disk ends the work in `folder`, say how to continue: `COMMAND --resume`.

    Nothing is said with `quiet`, and as long as there is no config.json to continue from.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, OSError):
        if not quiet and (folder / "config.json").exists():
            words = f"python {command} --resume {shlex.quote(str(folder))}"
            print(f"\nstopped; go on with: {words}", file=sys.stderr)
        raise
