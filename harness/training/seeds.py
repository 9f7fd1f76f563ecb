"""Several runs of one script, one per seed, in one folder."""
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from harness import distributed
from harness.device import command_line
from harness.errors import UserError
from harness.folder import claim_folder
from harness.training.options import RunOptions

R = TypeVar("R", bound=RunOptions)


def one_a_seed(config: R, script: str) -> Iterator[R]:
    """`config` with each of its `seeds` in turn, as a run of its own in <folder>/seed<k>.

    The folder is out_dir, or runs/<script>/<time>. It holds a config.json, so that `--resume <folder>`
    continues the runs begun there and starts those that are missing. A finished run is left as it is.
    `stop_after_minutes` counts for all together. Raises UserError for a folder in use.
    """
    if len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"--seeds {' '.join(map(str, config.seeds))} names a seed twice")
    folder = Path(config.resume or config.out_dir or "runs")
    if distributed.expected()[0] == 0 and not config.resume:  # the first process alone decides on the folder
        facts = {"script": script, "command": command_line()}
        folder = claim_folder(config.out_dir, script, facts | dataclasses.asdict(config))
    started, minutes = time.monotonic(), config.stop_after_minutes
    for k, seed in enumerate(config.seeds, 1):
        left = minutes
        if minutes and k > 1:
            left = distributed.from_first(minutes - (time.monotonic() - started) / 60)
        if minutes and left <= 0:
            print(f"seed {seed} waits for --resume {folder}: --stop_after_minutes is over", flush=True)
            return
        own = folder / f"seed{seed}"
        resume = str(own) if config.resume and (own / "config.json").exists() else None
        print(f"seed {seed}, {k} of {len(config.seeds)}", flush=True)
        yield dataclasses.replace(config, seed=seed, seeds=(), out_dir=str(own), resume=resume,
                                  stop_after_minutes=left)
