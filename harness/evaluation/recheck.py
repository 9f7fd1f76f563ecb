"""Adversaries that an evaluation has kept, checked from its files: no attack is run."""
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from harness.checkpoint import model_from, read
from harness.datasets.batches import first_examples, load_dataset, to_unit
from harness.errors import UserError
from harness.evaluation.attack_record import AttackRecord, read_about
from harness.evaluation.attacking import sizes
from harness.evaluation.predictions import BatchInvariant

BATCH = 256
NEAR = 1e-4  # of two logits: which one is larger may hang on the processor's rounding; FMN and FAB end there


def recheck(folder: Path, checkpoint: Path | None, data_dir: str,
            build: Callable[..., nn.Module], near: float = NEAR) -> dict[str, tuple[int, int]]:
    """Attack -> (adversaries looked at, those that are not as recorded), in float32 on the CPU.

    As recorded means inside ball and box, and of the class that the record says, or of one whose logit is
    less than `near` above that of the record's.
    """
    about = read_about(folder)
    if about is None:
        raise UserError(f"{folder} is no record of one checkpoint (no about.json): name RESULT.record/last "
                        "or the like")
    if not about["save_adversaries"]:
        raise UserError(f"{folder} holds no images: evaluate with --save_adversaries")
    path, data = checkpoint or Path(about["checkpoint"]), load_dataset(about["dataset"], data_dir)
    model = BatchInvariant(model_from(read(path), path, about["arch"], data.num_classes, data.image_shape[0],
                                      build=build))
    farthest = about["epsilon"] + 1e-6 * max(1.0, about["epsilon"])
    clean, found = to_unit(first_examples(data.test, about["num_examples"]).images), {}
    record = AttackRecord(folder, about, len(clean), keep_images=True)
    for name in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        prediction, (position, images) = record.read(name)["prediction"], record.images(name)
        position, images = torch.from_numpy(position), torch.from_numpy(images)
        prediction = prediction[position]
        with torch.no_grad():
            logits = torch.cat([model(batch) for batch in images.split(BATCH)])
        known = prediction.clamp(0, logits.shape[1] - 1)
        behind = logits.amax(1) - logits.gather(1, known[:, None]).squeeze(1)
        excused = (known == prediction) & (behind < near)  # NaN is never near
        other = (logits.argmax(1) != prediction) & ~excused
        far = sizes(images - clean[position], about["norm"]) > farthest
        outside = ~((images >= 0) & (images <= 1)).flatten(1).all(1)  # NaN is outside too
        found[name] = len(position), int((other | far | outside).sum())
    return found
