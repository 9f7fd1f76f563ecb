"""Check the adversaries that an evaluation has kept (`--save_adversaries`), from its files: no attack is run.

    python -m harness.evaluation.recheck RECORD --checkpoint FILE

RECORD is OUT.record/last or the like; FILE, by default, the checkpoint that it names.

Every image must lie in its ball and box, and the network must see in it the class that the record says.
"""
import argparse
import sys
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


def recheck(folder: Path, checkpoint: Path | None, data_dir: str,
            build: Callable[..., nn.Module]) -> dict[str, tuple[int, int]]:
    """Attack -> (adversaries looked at, those that are not as recorded), in float32 on the CPU.

    As recorded means inside ball and box, and of the class that the record says.
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
        with torch.no_grad():
            seen = torch.cat([model(batch).argmax(1) for batch in images.split(BATCH)])
        far = sizes(images - clean[position], about["norm"]) > farthest
        outside = ~((images >= 0) & (images <= 1)).flatten(1).all(1)  # NaN is outside too
        found[name] = len(position), int(((seen != prediction[position]) | far | outside).sum())
    return found


def main() -> None:
    """Check the record on the command line.

    Exit code 1 where an adversary is not what the record says, 2 where nothing can be read.
    """
    parser = argparse.ArgumentParser("python -m harness.evaluation.recheck", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    parser.add_argument("record", type=Path, help="folder of one checkpoint in a record")
    parser.add_argument("--checkpoint", type=Path, help="file of the weights; default: the record's own")
    parser.add_argument("--data_dir", default="data", help="folder of the data sets (default: data)")
    flags = parser.parse_args()
    try:
        from models import build_model  # here alone: the function takes any
        found = recheck(flags.record, flags.checkpoint, flags.data_dir, build_model)
    except (UserError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    for name, (count, wrong) in found.items():
        said = f"{wrong:,} are not as recorded" if wrong else "all as recorded"
        print(f"{name:<20}{count:>7,} images: {said}")
    sys.exit(1 if any(wrong for _, wrong in found.values()) else 0)


if __name__ == "__main__":
    main()
