"""The host never waits for the device inside a batch: on a GPU a look at a value is an idle gap
in every step."""
import traceback
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from attacks.pgd import pgd
from harness.training.run import Run

# their host needs the values
WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2"}
HARMLESS = {("require", "checks.py"),            # on a GPU an assertion of the device instead
            ("training_batches", "batches.py"),  # of the order, which lives on the host
            ("_update", "steps.py"),             # of the averaged weights' counter, which lives on the host
            ("check_finite", "batch.py")}        # once a second
# the check of a form of the network, once for each of its states
ONCE = ("_make", "attack_view.py")
ROOMS = {ROOT,
         *(path for name in ("attacks", "harness", "losses", "models")
           for path in (ROOT / name, *(ROOT / name).glob("*/")))}
SCRIPTS = [("train_at_mnist", "--alpha", 1), ("train_trades_mnist", "--alpha", 1), ("train_free",),
           ("train_yopo",), ("train_iaat",),
           *(("train_vir", "--base", base, "--weights", kind, "--burn_in_epochs", 0)
             for base, kind in (("at", "vir"), ("at", "gairat"), ("trades", "mail"), ("mart", "margin"),
                                ("trades", "vir")))]


class Waits(TorchDispatchMode):
    """Notes which function of the project made the host look at a value."""

    def __init__(self):
        super().__init__()
        self.places = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = function.overloadpacket.__name__.startswith("index") and any(
            index is not None and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], (list, tuple)) else ()))
        if by_mask or function.overloadpacket.__name__ in WAITING:
            frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).parent in ROOMS]
            own = [(frame.name, Path(frame.filename).name) for frame in frames]
            if ONCE not in own:
                self.places.add(own[-1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("flags", SCRIPTS, ids=lambda flags: "-".join(map(str, flags)))
def test_no_training_loop_looks_at_a_value(flags, script, monkeypatch):
    waits, batches = Waits(), Run.batches

    def watched(run, epoch):
        with waits:
            yield from batches(run, epoch)

    monkeypatch.setattr(Run, "batches", watched)
    sizes = {"train_free": ("--num_replays", 2), "train_yopo": ()}.get(flags[0], ("--num_steps", 2))
    tiny = TINY[:TINY.index("--num_steps")] + TINY[TINY.index("--num_steps") + 2:]
    extra = ("--crop_padding", 2, "--flip") if flags[0] != "train_vir" else ()
    script(*flags, *tiny, *sizes, *extra, "--model", "lenet", "--batch_size", 32, "--ema_decay", 0.9)
    # the net catches
    assert {("training_batches", "batches.py"), ("check_finite", "batch.py")} <= waits.places <= HARMLESS


def test_on_a_gpu_the_checks_of_an_attack_are_the_devices_own():
    with FakeTensorMode():
        try:
            x = torch.rand(2, 1, 4, 4, device="cuda")
            model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3, device="cuda"))
        except (RuntimeError, AssertionError):
            pytest.skip("this build of torch cannot pretend to have a GPU")
        found = pgd(model, x, torch.zeros(2, dtype=torch.int64, device="cuda"),
                    epsilon=torch.full((2,), 0.1, device="cuda"), step_size=0.1, num_steps=0)
    assert found.shape == x.shape and found.device.type == "cuda"
