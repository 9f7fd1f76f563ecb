"""The machine: its device and memory; what stands behind a number: hardware, versions, commit and command."""
import ctypes
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
WIDE = 32  # channels of a convolution from which bfloat16 pays without AMX, see choose_dtype


def choose_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the GPU where there is one. Raises UserError for one not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    _keep_freed_memory()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name} is not available here: use auto or cpu") from None
    return device


def _keep_freed_memory() -> None:
    """Let glibc reuse freed memory: without the page faults a SmallCNN step takes 20 % less time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)          # M_MMAP_MAX: no separate mapping for a large block
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep the top of the heap


def choose_dtype(precision: str, device: torch.device, model: nn.Module) -> torch.dtype:
    """The type of training's convolutions and products; `auto` is bfloat16 where it is faster.

    That is on a GPU of compute capability 8.0 or more, on a CPU with AMX, and on one with AVX512-BF16 alone
    where a convolution has WIDE channels or more: with fewer the casts cost more than the products gain.
    """
    if precision == "auto":
        fast, onednn = False, torch.backends.mkldnn
        if device.type == "cuda":
            fast = torch.cuda.get_device_capability(device) >= (8, 0)
        elif device.type == "cpu" and onednn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            channels = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
            fast = _cpu_has("amx_tile") or (_cpu_has("avx512_bf16") and max(channels, default=0) >= WIDE)
        precision = "bf16" if fast else "float32"
    return {"bf16": torch.bfloat16, "float32": torch.float32}[precision]


def _cpu_has(instructions: str) -> bool:
    return getattr(torch.cpu, f"_is_{instructions}_supported", lambda: False)()


def free_memory(device: torch.device) -> int:
    """Bytes free on `device`; if it shares the system's memory, what system and container can still give."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    info, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if info.exists():
        free = 1024 * _number_in(info, "MemAvailable")
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()) != "max":
        cache = _number_in(group / "memory.stat", "inactive_file")
        free = min(free, int(limit) - int((group / "memory.current").read_text()) + cache)
    return max(free, 0)


def _number_in(path: Path, name: str) -> int:
    """The second word of the first line of a file of the kernel that begins with `name`."""
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(name))


def peak_memory(device: torch.device, work: Callable[[], object]) -> int:
    """Bytes that work() takes at most; on a CPU, which keeps no account, those that autograd keeps."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    kept = {}  # storage -> bytes

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        work()
    return sum(kept.values())


def resident(field: str) -> int | None:
    """Bytes of this process resident now, VmRSS, or at most so far, VmHWM; None where there is no /proc."""
    status = Path("/proc/self/status")
    return 1024 * _number_in(status, f"{field}:") if status.exists() else None


def environment(device: torch.device) -> dict[str, object]:
    """Hardware and versions behind a number."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        hardware = next(names, platform.processor())
    return {"device": device.type, "hardware": hardware,
            "instructions": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(), "system": platform.system(),
            "commit": _commit()}


def _commit() -> str | None:
    """The commit that these files are at, `+` behind it if they differ from it; None outside a checkout."""
    try:
        git = ["git", "-C", str(ROOT)]
        parse = [*git, "rev-parse", "--short=12", "HEAD"]
        commit = subprocess.run(parse, capture_output=True, text=True, check=True).stdout.strip()
        differs = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
        return commit + ("+" if differs else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def command_line() -> str:
    """The command that started this process, as a user would type it."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script
    return shlex.join(["python", str(shown), *sys.argv[1:]])
