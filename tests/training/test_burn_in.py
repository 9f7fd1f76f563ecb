"""--burn_in_from: a run from another one's burn-in is the whole run, and another burn-in is refused."""
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

from harness.errors import UserError

sys.path.append(str(ROOT / "tests/scripts"))
from test_scripts import read_log, same_bits, weights

QUICK = (*TINY[:-2], "--model", "lenet", "--crop_padding", 0, "--no-flip", "--batch_size", 32, "--epochs", 4,
         "--burn_in_epochs", 2, "--lr_drop_after", 2, "--lr_scales", 0.1)


@pytest.fixture
def burnt_in(script):
    """A run of AT, by the recipe `at`, and the way to start another one."""
    def start(recipe, *flags):
        script("train_vir", "--recipe", recipe, *QUICK, *flags)

    start("at", "--out_dir", "at", "--ema_decay", 0.9)
    return lambda recipe, *flags: start(recipe, "--ema_decay", 0.9, *flags)


def untimed(rows):
    return [{key: cell for key, cell in row.items() if key not in ("seconds", "images_per_second")}
            for row in rows]


@pytest.mark.parametrize("recipe", ("gairat", "mail-at", "vir-at", "at"))
def test_a_run_from_anothers_burn_in_is_the_whole_run(recipe, burnt_in, capsys):
    burnt_in(recipe, "--out_dir", "whole")
    burnt_in(recipe, "--out_dir", "parts", "--burn_in_from", "at")
    assert "going on after epoch 2, the burn-in of at" in capsys.readouterr().out
    for name in ("last.pt", "last_ema.pt"):
        assert same_bits(weights(f"whole/{name}"), weights(f"parts/{name}"))
    whole, parts = (untimed(read_log(Path(run))) for run in ("whole", "parts"))
    assert whole == parts and [row["epoch"] for row in whole] == ["1", "2", "3", "4"]
    assert Path("whole/weights.csv").read_bytes() == Path("parts/weights.csv").read_bytes()
    changed = not same_bits(weights("whole/last.pt"), weights("at/last.pt"))
    assert changed == (recipe != "at")  # its own weights come after it


def test_it_is_resumed_before_its_first_own_epoch_and_after(burnt_in, script):
    burnt_in("vir-at", "--out_dir", "whole")
    burnt_in("vir-at", "--out_dir", "parts", "--burn_in_from", "at")
    for path in Path("parts").iterdir():  # stopped in its first epoch
        if path.name != "config.json":
            path.unlink()
    script("train_vir", "--resume", "parts")
    assert same_bits(weights("whole/last.pt"), weights("parts/last.pt"))
    burnt_in("vir-at", "--out_dir", "longer", "--burn_in_from", "at")
    script("train_vir", "--resume", "longer", "--epochs", 5)
    assert len(read_log(Path("longer"))) == 5


def test_best_is_the_best_after_the_burn_in(burnt_in):
    burnt_in("vir-at", "--out_dir", "parts", "--burn_in_from", "at")
    best = torch.load("parts/best.pt", weights_only=True)
    assert best["epoch"] == 3 + int(float(read_log(Path("parts"))[3]["val_A_rob"])
                                    > float(read_log(Path("parts"))[2]["val_A_rob"]))


@pytest.mark.parametrize(("recipe", "flags", "message"), [
    ("vir-at", ("--seed", 1), "--burn_in_from at: its burn-in is another one, with --seed 0 instead of 1"),
    ("vir-at", ("--lr", 0.05), "with --lr 0.01 instead of 0.05"),
    ("vir-at", ("--burn_in_epochs", 1), "with --burn_in_epochs 2 instead of 1"),
    ("vir-at", ("--base", "mart"), "with --base at instead of mart"),
    ("vir-trades", (), "its burn-in is another one, with --base at instead of trades"),
    ("mail-at", ("--burn_in_from", "nowhere"), "--burn_in_from nowhere: no burn_in.pt there: name a folder"),
    ("mail-at", ("--epochs", 5), "with --epochs 4 instead of 5"),  # a cosine would have another burn-in
    ("mail-at", ("--max_batches", 3), "with --max_batches 2 instead of 3"),
    ("gairat", ("--kappa", "first"), "with --kappa count instead of first"),
])
def test_another_burn_in_is_refused_and_no_folder_is_left(recipe, flags, message, burnt_in):
    with pytest.raises(UserError, match=message):
        burnt_in(recipe, "--out_dir", "new", "--burn_in_from", "at", *flags)
    assert not Path("new").exists()


def test_other_images_and_other_files_are_refused(burnt_in):
    path = Path("at/config.json")
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"data_sha256": "0"}))
    with pytest.raises(UserError, match="--burn_in_from at: the training images or their labels have"):
        burnt_in("vir-at", "--out_dir", "new", "--burn_in_from", "at")
    torch.save({"format": 1, "model": {}}, "at/burn_in.pt")
    with pytest.raises(UserError, match=r"burn_in\.pt"):
        burnt_in("vir-at", "--out_dir", "new", "--burn_in_from", "at")
    assert not Path("new").exists()


def test_each_of_several_seeds_takes_the_burn_in_of_its_own(script):
    script("train_vir", "--recipe", "at", *QUICK, "--seed", 1, "--out_dir", "several/seed1")
    for folder, flags in (("whole", ()), ("parts", ("--burn_in_from", "several"))):
        script("train_vir", "--recipe", "gairat", *QUICK, "--seed", 1, "--out_dir", folder, *flags)
    assert same_bits(weights("whole/last.pt"), weights("parts/last.pt"))
