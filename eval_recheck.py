"""Check the adversaries that an evaluation has kept (`--save_adversaries`), from its files: no attack is run.

Every image must lie in its ball and box, and the network must see in it the class that the record says, or
one whose logit is within 1e-4 of it: which is the larger may hang on the processor.

    python eval_recheck.py --record OUT.record/last                     # the checkpoint that the record names
    python eval_recheck.py --record OUT.record/last --checkpoint FILE   # that checkpoint at another place
"""
from dataclasses import dataclass
from pathlib import Path

from harness.config import run_script
from harness.errors import RunError, UserError
from harness.evaluation.recheck import recheck
from models import build_model


@dataclass(frozen=True)
class Config:
    record: str | None = None      # folder of one checkpoint in a record: OUT.record/last or the like
    checkpoint: str | None = None  # file of the weights; default: the one that the record names
    data_dir: str = "data"         # folder of the data sets


def main(cfg: Config) -> None:
    if not cfg.record:
        raise UserError("name the record to check: --record OUT.record/last")
    checkpoint = Path(cfg.checkpoint) if cfg.checkpoint else None
    found = recheck(Path(cfg.record), checkpoint, cfg.data_dir, build_model)
    for attack, (count, wrong) in found.items():
        said = f"{wrong:,} are not as recorded" if wrong else "all as recorded"
        print(f"{attack:<20}{count:>7,} images: {said}")
    if any(wrong for _, wrong in found.values()):
        raise RunError(f"{cfg.record} holds images that are not as recorded")


if __name__ == "__main__":
    run_script(main, Config)
