"""A training run that has collapsed to chance: since when, in which checkpoints, and what to try."""
from pathlib import Path

from harness.evaluation.chance import collapsed_since
from harness.training.options import RunOptions


class CollapseWatch:
    """Counts a run's epochs at chance, and says when the run collapses or recovers."""

    def __init__(self, cfg: RunOptions, num_classes: int):
        self.cfg = cfg
        self.num_classes = num_classes
        self.at_chance_for: list[int] = []  # of every epoch: how many up to it were at chance without a break

    def add(self, at_chance: bool) -> None:
        """Count one more epoch."""
        before = self.at_chance_for[-1] if self.at_chance_for else 0
        self.at_chance_for.append(before + 1 if at_chance else 0)

    def since(self, ended: bool = False) -> int | None:
        """The epoch since which the run has collapsed; None while it has not."""
        return collapsed_since(self.at_chance_for, self.cfg.epochs, self.cfg.lr_warmup_epochs, ended)

    def news(self) -> str | None:
        """What the last epoch changed: the run has collapsed, or is above chance again; None for neither."""
        before = collapsed_since(self.at_chance_for[:-1], self.cfg.epochs, self.cfg.lr_warmup_epochs)
        since = self.since()
        if since and not before:
            return f"COLLAPSED: {self.describe(since)} (--stop_on_collapse ends such a run)"
        if before and not since:
            return f"above chance again after {len(self.at_chance_for) - before} epochs at chance"
        return None

    def describe(self, since: int) -> str:
        """Since when the run is at chance, and what to try."""
        return (f"the network has been at chance since epoch {since} (under attack it classifies its "
                f"training images no better than a guess among {self.num_classes} classes); start anew with "
                f"{shorter_steps(self.cfg)}, a smaller --lr or a longer --epsilon_warmup_epochs")


def shorter_steps(cfg: RunOptions) -> str:
    """The clipping of gradients to try next."""
    clip = cfg.max_grad_norm
    return f"a smaller --max_grad_norm than {clip:g}" if clip else "--max_grad_norm 1"


def checkpoints_at_chance(rows: list[dict], folder: Path) -> str:
    """Which checkpoints of a collapsed run are at chance, in words; rows: those of its log."""
    best = max(rows, key=lambda row: row.get("val_A_rob", row["epoch"])) if rows else {}
    if best.get("epochs_at_chance", 0) > 0:
        return f"last.pt and best.pt in {folder} are at chance"
    return f"last.pt in {folder} is at chance"
