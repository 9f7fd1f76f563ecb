"""What attacks find on the device, against the CPU, and through the files that an evaluation keeps."""
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from attacks.catalogue import Attack
from attacks.fab import fab_targeted
from attacks.fmn import fmn
from attacks.noise import example_keys
from attacks.pgd import pgd
from attacks.square import square
from harness import checkpoint
from harness.accept.check import Check, Found, Site, train
from harness.datasets.batches import first_examples, load_dataset
from harness.evaluation import attacking
from harness.evaluation.attack_record import AttackRecord, broken
from harness.evaluation.predictions import BatchInvariant
from harness.evaluation.recheck import NEAR, recheck

COUNT, EPSILON = 200, 0.1
FEW = 2      # verdicts of so many images in a hundred may hang on rounding
STEPS = {"pgd": {"epsilon": EPSILON, "step_size": EPSILON / 4, "num_steps": 20}, "fmn": {"num_steps": 50},
         "fab": {"epsilon": EPSILON, "num_steps": 20, "num_targets": 3},
         "square": {"epsilon": EPSILON, "num_queries": 300}}


def keyed(attack: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """An attack as a record runs it, from starts that belong to the images."""
    def run(model: nn.Module, x: Tensor, y: Tensor, index: Tensor, restart: int) -> Tensor:
        keys = {} if name == "fmn" else {"keys": example_keys(index, restart)}
        return attack(model, x, y, **STEPS[name], **keys)

    return run


ATTACKS = {name: Attack(keyed(attack, name), minimal=name in ("fmn", "fab"))
           for name, attack in (("pgd", pgd), ("fmn", fmn), ("fab", fab_targeted), ("square", square))}


def verdicts(site: Site) -> Found:
    """LeNet, trained for two epochs on digits: every attack on 200 images, here and on the CPU."""
    words = ("--recipe", "digits", "--epochs", 2, "--epsilon_warmup_epochs", 0, "--num_steps", 3,
             "--val_size", 0, "--precision", "float32")
    train("train_at_mnist", words, torch.device("cpu"), site.folder / "run")
    path = site.folder / "run/last.pt"
    there = fallen_on(site, site.device, path, site.folder / "there")
    exact, wrong = ({name: count for name, (_, count) in recheck(site.folder / "there", path, "data",
                                                                 site.build, near).items()}
                    for near in (0.0, NEAR))
    figures = {"robust": {name: round(100 * float((~found).float().mean()), 1)
                          for name, found in there.items()},
               "not_as_recorded": exact, "not_as_recorded_beyond_rounding": wrong}
    text = ", ".join(f"{name} leaves {value:g} %" for name, value in figures["robust"].items())
    apart = dict.fromkeys(there, 0)
    if site.device.type != "cpu":
        here = fallen_on(site, torch.device("cpu"), path, site.folder / "cpu")
        apart = {name: int((there[name] != here[name]).sum()) for name in there}
        text += f"; {max(apart.values())} verdicts of {COUNT} differ from the CPU's at most"
    text += (f"; {sum(exact.values())} adversaries are not as recorded, {sum(wrong.values())} of them by "
             "more than rounding")
    holds = max(apart.values()) <= COUNT * FEW / 100 and not any(wrong.values())
    return Found(holds, text, figures | {"differ": apart})


def fallen_on(site: Site, device: torch.device, path: Path, folder: Path) -> dict[str, Tensor]:
    """Attack -> which of the images it breaks, [COUNT] bool, by the record that it leaves in `folder`."""
    split = first_examples(load_dataset("digits", "data").test, COUNT).to(device)
    model = checkpoint.load_model(path, build=site.build).to(device)
    about = {"checkpoint": str(path), "arch": None, "dataset": "digits", "num_examples": COUNT,
             "epsilon": EPSILON, "norm": "linf", "save_adversaries": True}
    record = AttackRecord(folder, about, COUNT, keep_images=True)
    task = attacking.Task(BatchInvariant(model), split, EPSILON, "linf", 128)
    attacking.run(record, task, ATTACKS, {name: (name,) for name in ATTACKS})
    y = split.labels.cpu()
    return {name: broken(record.rows[name], y) for name in ATTACKS}


CHECKS = (Check("attacks", "200 images under attack as on the CPU, and as recorded", verdicts, seconds=40),)
