"""What takes processes of its own: torchrun, and the time and memory of a training step."""
import json
import os
import subprocess
import sys

from harness.accept.check import Check, Found, NotChecked, Site
from harness.device import ROOT, num_gpus

MEMORY = 24_000  # MB of a card that WRN-34-10 at batch 128 in bfloat16 is to fit in
DELAY = 15       # seconds that one process comes later than the others
LATE = """
import os, runpy, sys, time
if os.environ["LOCAL_RANK"] == os.environ["LATE"]:
    time.sleep(float(os.environ["DELAY"]))
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def processes(site: Site) -> Found:
    """By torchrun on every GPU, or two processes: a training, and an evaluation in which one is late."""
    if site.device.type != "cpu" and not site.real_gpu:
        raise NotChecked("needs a GPU, or a CPU")
    count = num_gpus() if site.real_gpu else 2
    (site.folder / "late.py").write_text(LATE)
    here = ("--device", site.device.type)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count),
                str(site.folder / "late.py"))
    trained = (str(ROOT / "train_at_mnist.py"), "--recipe", "digits", "--epochs", "2", "--num_steps", "2",
               "--precision", "float32", "--out_dir", "run", *here)
    evaluated = (str(ROOT / "eval_mnist.py"), "--checkpoint", "run/last.pt", "--num_steps", "5",
                 "--num_restarts", "1", "--alphas", "1", *here)
    _run(site, (*torchrun, *trained), 0.0)
    _run(site, (*torchrun, *evaluated, "--out", "many.json"), DELAY, late=count - 1)
    _run(site, (sys.executable, *evaluated, "--out", "one.json"), 0.0)
    many, one = (json.loads((site.folder / f"{name}.json").read_text()) for name in ("many", "one"))
    same = [many[name] == one[name] for name in ("A_nat", "A_rob", "A_sa", "A_tr")]
    text = f"{count} processes, one {DELAY} s late: A_rob {many['A_rob']:g} %, alone {one['A_rob']:g} %"
    return Found(all(same), text, {"processes": count, "A_rob": [many["A_rob"], one["A_rob"]]})


def speed(site: Site) -> Found:
    """A step of TRADES by benchmarks/train_step.py at batch 128: its time and memory."""
    command = (sys.executable, str(ROOT / "benchmarks/train_step.py"), "--model", "resnet18", "wrn34_10",
               "--method", "trades", "--repeats", "3", "--out", "step.json", "--device", site.device.type)
    _run(site, command, 0.0)
    result = json.loads((site.folder / "step.json").read_text())
    shown = [f"{row['model']} {row['images_per_second']:.0f} images/s, {row['ratio']:.2f} times the "
             f"published form, {row['ours_mb']:.0f} MB" for row in result["rows"]]
    most = max(row["ours_mb"] for row in result["rows"])
    return Found(most < MEMORY, "; ".join(shown), {"result": result})


def _run(site: Site, command: tuple[str, ...], delay: float, late: int = 0) -> None:
    """Run a command in the check's folder.  Raises RuntimeError with its last words where it fails."""
    around = {"LATE": str(late), "DELAY": str(delay)}
    done = subprocess.run(command, cwd=site.folder, env=os.environ | around, capture_output=True, text=True,
                          timeout=600, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no word"]
        raise RuntimeError(f"{command[-1]} ended with {done.returncode}: {lines[-1]}")


CHECKS = (Check("torchrun", "processes share a training and an evaluation", processes),
          Check("speed", "a step's time, and WRN-34-10 fits 24 GB", speed, needs_gpu=True))
