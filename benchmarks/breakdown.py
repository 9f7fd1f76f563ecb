"""Where the time of the attack inside a training step goes: its share by kind of operation, by torch's profiler.

The attack is `pgd` on the cross-entropy as the training scripts run it, on synthetic images, in the training precision. A share is
the operation's own time over that of all operations; what Python does between them is not in it.

    python benchmarks/breakdown.py                        # LeNet, SmallCNN and ResNet-18
    python benchmarks/breakdown.py --model lenet --precision float32 --out results/breakdown.json
"""
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is on the path, the repository's root is not

import torch
from torch.profiler import ProfilerActivity, profile

from attacks.pgd import pgd
from benchmarks.train_step import THREATS, image_shape_of
from harness.config import run_script
from harness.device import choose_device, choose_dtype, command_line, environment
from harness.evaluation.report import output_path
from harness.folder import write_text
from harness.training.precision import TrainingPrecision, to_device
from models import build_model

# kind -> words that the names of its operations contain; the first kind that fits counts
KINDS = {"convolutions": ("convolution", "conv2d"), "max-pooling": ("max_pool", "maximum", "amax", "scatter"),
         "matrix products": ("mm", "linear", "matmul"), "copies and casts": ("copy", "contiguous", "_to_copy", "clone", "pad"),
         "ReLUs, sums and the attack's update": ("relu", "threshold", "add", "clamp", "sign", "mul", "sub", "sum")}


@dataclass(frozen=True)
class Config:
    model: tuple[str, ...] = ("lenet", "small_cnn", "resnet18")  # networks of models/
    batch_size: int | None = None                         # images; none is 128 at 1x28x28, 64 at 3x32x32
    num_steps: int = 10                                   # PGD steps of one attack
    repeats: int = 5                                      # attacks that are profiled, after one that is not
    seed: int = 0                                         # of images, weights and starts
    device: str = "auto"                                  # auto, cpu, or an accelerator by its name in torch
    precision: Literal["auto", "bf16", "float32"] = "auto"  # of the attack; auto is bf16 where it is faster (harness/device.py)
    out: str | None = None                                # JSON file to write, never over another


def breakdown(name: str, cfg: Config, device: torch.device) -> dict:
    """The share in percent of each kind of operation in the attack on the network called `name`, and milliseconds a step."""
    shape = image_shape_of(name)
    batch_size = cfg.batch_size or (128 if shape[0] == 1 else 64)
    torch.manual_seed(cfg.seed)
    network = to_device(build_model(name, 10, shape[0]), device)
    dtype = choose_dtype(cfg.precision, device, network)
    model = TrainingPrecision(network, dtype)
    x, y = torch.rand(batch_size, *shape, device=device), torch.arange(batch_size, device=device) % 10
    attack = {"num_steps": cfg.num_steps, **THREATS[shape]}
    pgd(model, x, y, **attack)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type != "cpu")
    with profile(activities=kinds) as profiler:
        for _ in range(cfg.repeats):
            pgd(model, x, y, **attack)
    clock = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    spent = defaultdict(float)
    for event in profiler.key_averages():
        spent[next((kind for kind, words in KINDS.items() if any(word in event.key for word in words)), "other")] += getattr(event, clock)
    total = sum(spent.values())
    return {"model": name, "batch_size": batch_size, "num_steps": cfg.num_steps, "precision": str(dtype).removeprefix("torch."),
            "milliseconds_per_step": total / 1e3 / cfg.repeats / cfg.num_steps,
            "percent": {kind: 100 * spent[kind] / total for kind in sorted(spent, key=spent.get, reverse=True)}}


def main(cfg: Config) -> None:
    out = output_path(cfg.out, Path(cfg.out), whole_run=False) if cfg.out else None
    device = choose_device(cfg.device)
    rows = []
    for name in cfg.model:
        rows.append(breakdown(name, cfg, device))
        shares = "   ".join(f"{kind} {share:.0f} %" for kind, share in rows[-1]["percent"].items() if share >= 1)
        print(f"{name:<10} {rows[-1]['milliseconds_per_step']:8.2f} ms a step   {shares}", flush=True)
    if out:
        facts = {"command": command_line(), "date": time.strftime("%Y-%m-%d"), "environment": environment(device)}
        write_text(out, json.dumps({"results": rows, **facts}, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main, Config)
