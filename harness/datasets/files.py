"""Files of a data set: kept as one array, written whole or not at all, copied behind a progress bar."""
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from harness.folder import whole_file


def listing(files: dict[str, Path]) -> str:
    """What changes when one of the named files changes: names, sizes and times of change."""
    return "\n".join(f"{name} {(s := path.stat()).st_size} {s.st_mtime_ns}" for name, path in files.items())


def cached(prefix: Path, listing: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of <prefix>-<fingerprint of listing>.npz, or those of `make`, kept there for next time."""
    fingerprint = hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()[:16]
    cache = prefix.with_name(f"{prefix.name}-{fingerprint}.npz")
    arrays = _read_cache(cache)
    if arrays is None:
        arrays = make()
        _write_cache(cache, arrays)
    return arrays


def _read_cache(cache: Path) -> dict | None:
    try:
        with open(cache, "rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, KeyError, EOFError):
        return None
    except Exception as error:  # zipfile.BadZipFile and zlib.error: a cache that was cut off is decoded again
        print(f"{cache} cannot be read ({error}): decoding the images again", flush=True)
        return None


def _write_cache(cache: Path, arrays: dict) -> None:
    try:
        with whole_file(cache) as file:
            np.savez(file, **arrays)
    except OSError:  # a read-only data folder: decode every time
        pass


def copy_stream(source: BinaryIO, target: BinaryIO | None, size: int | None, title: str) -> str:
    """Copy `source`, of `size` bytes if known, to `target` if given, behind a progress bar; its MD5."""
    digest = hashlib.md5()
    with tqdm(total=size, desc=title, unit="B", unit_scale=True, disable=None) as bar:
        while block := source.read(1 << 20):
            if target:
                target.write(block)
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def reason(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).split("\n")[0].rstrip(":")
