"""The machine: its device and memory; what stands behind a number: hardware, versions, commit and command."""
import ctypes
import os
import platform
import shlex
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attacks.noise import example_keys, keyed_uniform
from harness.distributed import expected, local_rank
from harness.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
WIDE = 32  # channels of a convolution from which bfloat16 pays without AMX, see choose_dtype


def choose_device(name: str, wide: bool = False) -> torch.device:
    """The device called `name`; `auto` is the GPU where there is one.

    Under torchrun it is this process's own GPU, and no other one is touched. Float32 is float32 from here on.
    wide: float64 is needed there. Raises UserError for a device that is not there, and for one that cannot do
    what is needed.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    _keep_freed_memory()
    forbid_tf32()
    try:
        device = _own(torch.device(name))
        torch.empty(1, device=device)
        if device.type not in ("cpu", "cuda"):
            _try_arithmetic(device)
        if wide:
            torch.empty(1, dtype=torch.float64, device=device)
    except UserError:
        raise
    except Exception as error:  # of any kind: each accelerator has its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        reason = textwrap.shorten(reason, 160, placeholder=" ...")
        raise UserError(f"--device {name} is not available here ({reason}): use auto or cpu") from None
    return device


def _own(device: torch.device) -> torch.device:
    """The GPU that is meant, which becomes the current one: under torchrun that of this process's number."""
    together = expected()[1] > 1
    if device.type != "cuda" or not (together or device.index is not None):
        return device
    number, count = local_rank() if together else device.index, torch.cuda.device_count()
    if together and number >= count:
        raise UserError(f"torchrun has started {number + 1} processes or more here, and there are {count} "
                        f"GPUs: --nproc_per_node {max(count, 1)}, or --device cpu")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def _try_arithmetic(device: torch.device) -> None:
    """Raise where an accelerator lacks keyed noise, a convolution's gradient or a random state."""
    keys = torch.arange(4)
    noise = keyed_uniform(example_keys(keys.to(device), 1), (3, 8, 8))
    if not torch.equal(noise.cpu(), keyed_uniform(example_keys(keys, 1), (3, 8, 8))):
        raise RuntimeError("its 64-bit integers are not the CPU's")
    layer = nn.Conv2d(3, 2, 3).to(device)
    layer(noise.requires_grad_()).square().sum().backward()
    if not bool(torch.isfinite(noise.grad).all()):
        raise RuntimeError("a convolution's gradient is not finite")
    getattr(torch, device.type).get_rng_state(device)


def forbid_tf32() -> None:
    """No device may round the factors of float32 convolutions and products to fewer bits.

    Torch's older switches are set too: it refuses to read them where the newer ones say something else.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9's, that there are newer ones
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    for switch in _switches():
        switch.fp32_precision = "ieee"


def allows_tf32() -> bool:
    """Whether some device may round them so."""
    if switches := _switches():
        return any(switch.fp32_precision not in ("ieee", "none") for switch in switches)
    return torch.backends.cudnn.allow_tf32 or torch.get_float32_matmul_precision() != "highest"


def _switches() -> list[Any]:
    """Torch's newer switches of float32, those for everything and those for one kind; none before 2.9."""
    cudnn, onednn = torch.backends.cudnn, torch.backends.mkldnn
    if not hasattr(cudnn, "conv"):
        return []
    return [torch.backends, cudnn, torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn,
            onednn.matmul, onednn.conv, onednn.rnn]


@contextmanager
def torchs_own_settings() -> Iterator[None]:
    """As torch comes: TF32 in convolutions, and cuDNN's first choice of algorithms."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    try:
        cudnn.allow_tf32, cudnn.benchmark = True, False
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark = before


@contextmanager
def fastest_convolutions() -> Iterator[None]:
    """cuDNN tries its algorithms on each new shape, and keeps the fastest: for many steps of one shape."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def is_real_gpu(device: torch.device) -> bool:
    """Whether the device is a GPU whose tensors are torch's own, and not one that only says so."""
    return device.type == "cuda" and type(torch.empty(1, device=device)) is Tensor


def num_gpus() -> int:
    """GPUs of this machine."""
    return torch.cuda.device_count()


def raise_at_waits(whether: bool) -> None:
    """Whether torch raises from here on where the host waits for a GPU."""
    torch.cuda.set_sync_debug_mode("error" if whether else "default")


def reads_by_itself(device: torch.device) -> bool:
    """Whether the device copies from pinned memory of the host without the host."""
    return device.type == "cuda"


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
    module = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(module, "mem_get_info"):
        cached = module.memory_reserved(device) - module.memory_allocated(device)
        return module.mem_get_info(device)[0] + cached
    info, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if info.exists():
        free = 1024 * _number_in(info, "MemAvailable")
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()) != "max":
        cache = _number_in(group / "memory.stat", "inactive_file")
        free = min(free, int(limit) - int((group / "memory.current").read_text()) + cache)
    return max(free, 0)


def release_memory(device: torch.device) -> None:
    """Give back what an accelerator's allocator keeps for later."""
    if hasattr(module := getattr(torch, device.type, None), "empty_cache"):
        module.empty_cache()


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
    if name_of := getattr(getattr(torch, device.type, None), "get_device_name", None):
        hardware = name_of(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        shared = {"cpu": "", "mps": "Apple MPS, "}.get(device.type, f"{device.type}, ")  # with the processor
        hardware = shared + next(names, platform.processor())
    return {"device": device.type, "hardware": hardware, **_gpu(device),
            "instructions": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(), "system": platform.system(),
            "commit": _commit(), "tf32": allows_tf32()}


def _gpu(device: torch.device) -> dict[str, object]:
    """What stands behind a GPU's numbers beside its name."""
    if device.type != "cuda":
        return {}
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return {"capability": capability, "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version()}


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
