"""A GPU that is not there: tensors that say they are on cuda:0 and carry real numbers on the CPU.

Mixing devices raises, as on a GPU. Waits of the host and copies between host and device are counted by their
place in the project. What it cannot show: speed, memory, the rounding of a GPU's own kernels, and errors of
the order in which a GPU does its work.

    python -m tests.standin train_at_mnist.py --recipe digits --device cuda    # any script; then the counts
    python -m tests.standin -m harness.accept

For C++ the tensors live on PrivateUse1 with a Python backend, for Python on cuda:0. `pretend` changes torch
for good: call it in a process of its own.
"""
import collections
import importlib
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

ROOT = Path(__file__).resolve().parents[1]
CUDA, CPU, NAME = torch.device("cuda", 0), torch.device("cpu"), "standin"
OWN = (f"{ROOT}{os.sep}tests{os.sep}standin.py", f"{ROOT}{os.sep}.venv")  # frames that are no place
WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim",
           "bincount", "allclose"}
INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}
MAY_MIX = {"copy_", "_to_copy", "set_"}
CAST_BY_AUTOCAST = ("conv2d", "linear", "matmul", "mm", "addmm", "bmm")

waits: collections.Counter = collections.Counter()   # place -> times that the host waited there
copies: collections.Counter = collections.Counter()  # ... that it copied, the device or the host waiting
queued: collections.Counter = collections.Counter()  # ... that it queued a copy from pinned memory
casts: collections.Counter = collections.Counter()   # ... that a float32 tensor was cast to bfloat16
_state = {"counting": True, "raising": False, "float64": True, "ready": False}


def missing() -> str | None:
    """Why there can be no stand-in here, None where there can."""
    from torch.utils import backend_registration

    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        return f"torch {torch.__version__} has no devices written in Python"
    if not torch.backends.cuda.is_built():
        return "this build of torch has no CUDA"
    return None


@contextmanager
def counted(counting: bool = True) -> Iterator[None]:
    """Count waits and copies meanwhile, or do not."""
    before, _state["counting"] = _state["counting"], counting
    try:
        yield
    finally:
        _state["counting"] = before


@contextmanager
def without_float64() -> Iterator[None]:
    """A device like Apple's MPS, which raises at float64."""
    _state["float64"] = False
    try:
        yield
    finally:
        _state["float64"] = True


def forget() -> None:
    """Set every count to zero."""
    for counter in (waits, copies, queued, casts):
        counter.clear()


# ---- the tensors -------------------------------------------------------------------------------------------

class Standin(torch.Tensor):
    """A tensor on the GPU that is not there; `elem` holds its numbers."""

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> "Standin":
        return torch.Tensor._make_wrapper_subclass(
            cls, elem.shape, strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
            layout=elem.layout, device=torch.device(NAME, 0), requires_grad=False)

    def __init__(self, elem: torch.Tensor):
        self.elem = elem

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data(self) -> torch.Tensor:
        """As of any tensor: the same memory without a graph."""
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value: "Standin") -> None:
        torch.Tensor.data.__set__(self, value)
        self.elem = value.elem

    def data_ptr(self) -> int:
        """Where the numbers are."""
        return self.elem.data_ptr()

    def __repr__(self, *args: object, **kwargs: object) -> str:
        return f"Standin({self.elem})"

    def numpy(self, *args: object, **kwargs: object) -> None:
        """As on a GPU: an error."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *args: object, **kwargs: object) -> None:
        self.numpy()

    def tolist(self) -> object:
        """The values; the host waits."""
        _note(waits, "tolist")
        return self.elem.tolist()

    def __deepcopy__(self, memo: dict) -> "Standin":
        if id(self) not in memo:
            copy = self.detach().clone()
            if isinstance(self, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, self.requires_grad)
            memo[id(self)] = copy.requires_grad_(self.requires_grad)
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, function: Callable, types: tuple, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        return _dispatch(function, args, kwargs or {})


class StandinMode(TorchDispatchMode):
    """Makes what is created on "cuda" a Standin."""

    def __torch_dispatch__(self, function: Callable, types: tuple, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        return _dispatch(function, args, kwargs or {})


def unwrapped(tree: object) -> object:
    """The tree with the numbers of every Standin in its place."""
    return tree_map(lambda leaf: leaf.elem if type(leaf) is Standin else leaf, tree)


def _wrapped(leaf: object) -> object:
    return Standin(leaf) if isinstance(leaf, torch.Tensor) and type(leaf) is not Standin else leaf


def _on_gpu(device: object) -> bool:
    return device is not None and torch.device(device).type in ("cuda", NAME)


def _dispatch(function: Callable, args: tuple, kwargs: dict) -> object:
    name = function.overloadpacket.__name__
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    mine = [tensor for tensor in tensors if type(tensor) is Standin]
    device = kwargs.get("device")
    if mine:
        _check_devices(function, name, args, tensors)
        _note_waits(function, name, args, kwargs)
    if name in ("_to_copy", "copy_"):
        _note_copy(name, args, kwargs, device)
    if _on_gpu(device):
        kwargs = {**kwargs, "device": CPU}
    with torch._C._DisableAutocast():
        out = function(*unwrapped(args), **unwrapped(kwargs))
    if not (_on_gpu(device) or (mine and device is None)):
        return out
    out = tree_map(_wrapped, out)
    if not _state["float64"] and any(getattr(leaf, "dtype", None) == torch.float64
                                     for leaf in tree_flatten(out)[0]):
        raise TypeError(f"this device has no float64 ({function} at {place()})")
    return return_and_correct_aliasing(function, args, kwargs, out) if mine else out


# ---- what is counted ---------------------------------------------------------------------------------------

def _check_devices(function: Callable, name: str, args: tuple, tensors: list[torch.Tensor]) -> None:
    """Raise for a mixture of devices; a number in a tensor may come from the CPU, an index is copied."""
    cpu = [tensor for tensor in tensors if type(tensor) is not Standin and tensor.ndim]
    if not cpu or name in MAY_MIX:
        return
    if name in INDEXING and not any(tensor is args[0] for tensor in cpu):
        _note(copies, f"index from the CPU in {name}")
        return
    raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, "
                       f"cuda:0 and cpu! ({function} at {place()})")


def _note_waits(function: Callable, name: str, args: tuple, kwargs: dict) -> None:
    by_mask = name in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
    repeats = name == "repeat_interleave" and function._overloadname == "Tensor"
    if name in WAITING or by_mask or (repeats and kwargs.get("output_size") is None):
        _note(waits, f"{name}[mask]" if by_mask else name)


def _note_copy(name: str, args: tuple, kwargs: dict, device: object) -> None:
    source = args[1] if name == "copy_" else args[0]
    there = type(args[0]) is Standin if name == "copy_" else _on_gpu(device)
    if name == "_to_copy" and device is None:
        there = type(source) is Standin
        if there and source.dtype == torch.float32 and kwargs.get("dtype") == torch.bfloat16:
            _note(casts, "x".join(map(str, source.shape)))
    if type(source) is Standin and not there:
        _note(waits, "to the CPU")
    elif type(source) is not Standin and there:
        non_blocking = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        _note(queued if non_blocking and source.is_pinned() else copies, "to the GPU")


def _note(counter: collections.Counter, what: str) -> None:
    if _state["raising"] and (counter is waits or counter is copies):
        raise RuntimeError(f"called a synchronizing CUDA operation ({what} at {place()})")
    if _state["counting"]:
        counter[f"{place()}: {what}"] += 1


def place() -> str:
    """FILE:LINE FUNCTION of the innermost frame in the project; a comprehension's is that around it."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(str(ROOT)) and not file.startswith(OWN):
            line = frame.f_lineno
            while frame.f_code.co_name.startswith("<") and frame.f_back.f_code.co_filename == file:
                frame = frame.f_back
            return f"{os.path.relpath(file, ROOT)}:{line} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


# ---- torch as it is on a machine with a GPU ----------------------------------------------------------------

class _Autocast(torch.autocast):
    def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True,
                 cache_enabled: bool | None = None):
        super().__init__(_inner(device_type), dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)

    def __enter__(self) -> "_Autocast":  # of its own, which a trace of a network takes in its hands
        return super().__enter__()


class _Generator(torch.Generator):
    """One of the CPU's, whatever device it is asked for."""

    def __new__(cls, device: object = "cpu") -> torch.Generator:
        return super().__new__(cls, CPU)


def _inner(kind: str) -> str:
    return NAME if kind == "cuda" else kind


def pretend() -> None:
    """From now on this process has a GPU.  Returns at once if it has one already."""
    if _state["ready"]:
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    _state["ready"] = True
    type(getattr(torch, NAME)).get_amp_supported_dtype = lambda self=None: [torch.bfloat16, torch.float16]
    getattr(torch._C, "_ensureCUDADeviceGuardSet", lambda: None)()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.autograd.set_multithreading_enabled(False)
    _autocast_as_on_a_gpu()
    _pretend_to_have_cuda()
    _pretend_to_pin()
    to, save = torch.Tensor.to, torch.save

    def numbered(device: object) -> object:
        same = isinstance(device, (str, torch.device)) and str(device) == "cuda"
        return CUDA if same else device

    torch.Tensor.to = lambda self, *args, **kwargs: to(
        self, *map(numbered, args), **{name: numbered(value) for name, value in kwargs.items()})
    torch.save = lambda contents, *args, **kwargs: save(unwrapped(contents), *args, **kwargs)
    torch.Generator = _Generator


def _pretend_to_have_cuda() -> None:
    cuda = torch.cuda
    values = {"is_available": True, "device_count": 1, "current_device": 0, "_is_in_bad_fork": False,
              "get_device_capability": (9, 0), "get_device_name": "Stand-in",
              "mem_get_info": (20 << 30, 24 << 30), "memory_reserved": 0, "memory_allocated": 0,
              "max_memory_allocated": 64 << 20}
    for name, value in values.items():
        setattr(cuda, name, lambda *args, value=value: value)
    for name in ("_lazy_init", "reset_peak_memory_stats", "synchronize", "set_rng_state", "manual_seed_all",
                 "set_device", "empty_cache"):
        setattr(cuda, name, lambda *args: None)
    cuda.set_sync_debug_mode = lambda mode: _state.update(raising=mode == "error")
    cuda.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)


def _pretend_to_pin() -> None:
    """Pinned tensors of the CPU are those whose memory is in a list."""
    pinned: set[int] = set()

    def pin(tensor: torch.Tensor, device: object = None) -> torch.Tensor:
        if type(tensor) is Standin:
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        copy = tensor.clone()
        pinned.add(copy.untyped_storage().data_ptr())
        return copy

    torch.Tensor.pin_memory = pin
    torch.Tensor.is_pinned = lambda tensor, device=None: (type(tensor) is not Standin and
                                                          tensor.untyped_storage().data_ptr() in pinned)


def _autocast_as_on_a_gpu() -> None:
    key = "AutocastPrivateUse1"
    others, library = torch.library.Library("_", "IMPL", key), torch.library.Library("aten", "IMPL")
    others.fallback(torch.library.fallthrough_kernel)

    def casting(operation: Callable) -> Callable:
        def run(*args: object, **kwargs: object) -> object:
            excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                dtype = torch.get_autocast_dtype("cuda")
                return operation(*tree_map(
                    lambda leaf: leaf.to(dtype) if isinstance(leaf, torch.Tensor)
                    and leaf.dtype == torch.float32 else leaf, args), **kwargs)
        return run

    for name in CAST_BY_AUTOCAST:
        library.impl(name, casting(getattr(torch.ops.aten, name)), key)
    _state["libraries"] = (others, library)  # they end with their last reference
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    torch.autocast = torch.amp.autocast = _Autocast
    torch.is_autocast_enabled = lambda kind=None: enabled(_inner(kind)) if kind else enabled()
    torch.get_autocast_dtype = lambda kind: dtype(_inner(kind))


# ---- the command -------------------------------------------------------------------------------------------

def report() -> str:
    """The counts, one line a place."""
    lines = []
    for name, counter in (("waits", waits), ("copies", copies), ("queued copies", queued)):
        lines += [f"{name}: {sum(counter.values())}", *(f"  {n:>6}  {at}" for at, n in counter.most_common())]
    return "\n".join(lines)


def main(words: list[str]) -> None:
    """Run a script, or with -m a module, on the stand-in, and print the counts."""
    pretend()
    module = words[0] == "-m"
    name, *sys.argv[1:] = words[module:]
    sys.argv[0] = name
    sys.path.insert(0, str(ROOT))
    importlib.import_module("torch._dynamo")  # imported within the mode it would go through it
    importlib.import_module("harness.training.fused").is_plain = lambda tensor: True  # these are fused too
    try:
        with StandinMode():
            if module:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(name, run_name="__main__")
    finally:
        print(report(), file=sys.stderr)


if __name__ == "__main__":
    from tests import standin  # this file under its own name, so that there is one Standin

    standin.main(sys.argv[1:])
