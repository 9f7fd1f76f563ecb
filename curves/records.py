"""What evaluations have found before, as candidates of a curve (`eval_*.py --save_adversaries`)."""
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from harness.datasets.split import Split
from harness.errors import UserError
from harness.evaluation.attack_record import AttackRecord, broken, read_about


@dataclass(frozen=True)
class Found:
    """The adversaries of one attack: images [M, ...], and the row of each place of the data set, -1: none."""

    images: Tensor
    row: Tensor

    def at(self, x: Tensor, index: Tensor) -> Tensor:
        """Its adversaries of the points at `index` [b], x [b, ...] where it has none."""
        index = index.cpu()
        row = torch.where(index < len(self.row), self.row[index.clamp(max=len(self.row) - 1)], -1)
        result, there = x.clone(), (row >= 0).to(x.device)
        result[there] = self.images[row[row >= 0]].to(x)
        return result


def read_records(folders: tuple[str, ...], subjects: dict[str, Split]) -> dict[str, dict[str, Found]]:
    """Checkpoint's sha256 -> attack -> what it found, of the records of evaluations in `folders`.

    subjects: sha256 -> the images of that network. Raises UserError in one line for a folder that is no
    record with images, and for one of another network or of other images.
    """
    found: dict[str, dict[str, Found]] = {sha256: {} for sha256 in subjects}
    for folder in map(Path, folders):
        about = read_about(folder)
        if about is None or not about.get("save_adversaries"):
            raise UserError(f"{folder} is no record with images: evaluate with --save_adversaries, and name "
                            "RESULT.record/last or the like")
        sha256 = about["checkpoint_sha256"]
        if sha256 not in subjects:
            raise UserError(f"{folder} is of {about['checkpoint']}, which is none of these models")
        split = subjects[sha256][slice(0, about["num_examples"])]
        if split.fingerprint() != about["images_sha256"]:
            raise UserError(f"{folder} is of other images than the first {about['num_examples']:,} of this "
                            "data set")
        record = AttackRecord(folder, about, len(split), keep_images=True)
        for name in sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != "clean"):
            found[sha256][f"{folder.parent.stem}: {name}"] = _adversaries(record, name, split)
    return found


def _adversaries(record: AttackRecord, name: str, split: Split) -> Found:
    """The images of those that an attack has broken."""
    fallen = broken(record.read(name), split.labels.cpu())
    position, images = map(torch.from_numpy, record.images(name))
    kept = fallen[position]
    place = split.index.cpu()[position[kept]]
    row = torch.full((int(split.index.max()) + 1,), -1)
    row[place] = torch.arange(len(place))
    return Found(images[kept], row)
