"""What takes processes of its own: torchrun, and the time and memory of a training step."""
import json
import subprocess
import sys

from harness.accept.check import Check, Found, NotChecked, Site
from harness.device import ROOT, num_gpus

MEMORY = 24_000  # MB of a card that WRN-34-10 at batch 128 in bfloat16 is to fit in
DELAY, PATIENCE = 20, 12  # seconds that one process comes late to its attacks, and that a collective waits
LATE = """
import datetime, os, runpy, sys, time
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
from harness import distributed
from harness.evaluation import pipeline

def late(*given):
    time.sleep({delay})
    return attack(*given)

distributed.PATIENCE, attack = datetime.timedelta(seconds={patience}), pipeline.run
pipeline.run = late if os.environ["RANK"] == "0" else attack
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def processes(site: Site) -> Found:
    """By torchrun on every GPU, or two processes: a training, and an evaluation in which one is late.

    A process that waits for the late one during the attacks fails, since it waits for less time.
    """
    count = 2 if site.device.type == "cpu" else num_gpus() if site.real_gpu else 0
    if count < 2:
        raise NotChecked("needs two GPUs, or --device cpu")
    (site.folder / "late.py").write_text(LATE.format(delay=DELAY, patience=PATIENCE))
    here = ("--device", site.device.type)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count))
    trained = (str(ROOT / "train_at_mnist.py"), "--recipe", "digits", "--epochs", "2", "--num_steps", "2",
               "--precision", "float32", "--out_dir", "run", *here)
    evaluated = (str(ROOT / "eval_mnist.py"), "--checkpoint", "run/last.pt", "--num_steps", "5",
                 "--num_restarts", "1", "--alphas", "1", *here)
    _run(site, (*torchrun, *trained))
    _run(site, (*torchrun, "late.py", *evaluated, "--out", "many.json"))
    _run(site, (sys.executable, *evaluated, "--out", "one.json"))
    many, one = (json.loads((site.folder / f"{name}.json").read_text()) for name in ("many", "one"))
    same = [many[name] == one[name] for name in ("A_nat", "A_rob", "A_sa", "A_tr")]
    text = (f"{count} processes, one {DELAY} s late in its attacks: A_rob {many['A_rob']:.2f} %, alone "
            f"{one['A_rob']:.2f} %")
    return Found(all(same), text, {"processes": count, "A_rob": [many["A_rob"], one["A_rob"]]})


def speed(site: Site) -> Found:
    """A step of TRADES by benchmarks/train_step.py at batch 128: its time and memory."""
    command = (sys.executable, str(ROOT / "benchmarks/train_step.py"), "--model", "resnet18", "wrn34_10",
               "--method", "trades", "--repeats", "2", "--out", "step.json", "--device", site.device.type)
    _run(site, command)
    result = json.loads((site.folder / "step.json").read_text())
    shown = [f"{row['model']} {row['images_per_second']:.0f} images/s, {row['ratio']:.2f} times the "
             f"published form, {row['ours_mb']:.0f} MB" for row in result["rows"]]
    most = max(row["ours_mb"] for row in result["rows"])
    return Found(most < MEMORY, "; ".join(shown), {"result": result})


def _run(site: Site, command: tuple[str, ...]) -> None:
    """Run a command in the check's folder.  Raises RuntimeError with its last words where it fails."""
    with subprocess.Popen(command, cwd=site.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        try:
            said, errors = process.communicate()
        except BaseException:
            process.terminate()  # not kill: torchrun ends its own processes first
            raise
    if process.returncode:
        lines = (errors or said).strip().splitlines() or ["no word"]
        raise RuntimeError(f"{command[-1]} ended with {process.returncode}: {lines[-1]}")


CHECKS = (Check("torchrun", "processes share a training and an evaluation", processes, seconds=75),
          Check("speed", "a step's time, and WRN-34-10 fits 24 GB", speed, seconds=125, needs_gpu=True))
