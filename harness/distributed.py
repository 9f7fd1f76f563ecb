"""Many processes started by torchrun: one command, one run folder, the arithmetic of one process."""
import atexit
import inspect
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from harness.errors import UserError

T = TypeVar("T")
NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # beside WORLD_SIZE
PATIENCE = timedelta(hours=1)  # of a collective: the first process may be saving to a slow drive


def expected() -> tuple[int, int]:
    """(rank, world_size) as torchrun gives them in the environment; (0, 1) without it.

    Raises UserError where a cluster or a notebook has set only some of them, or no numbers.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size.strip() == "1":
        return 0, 1
    missing = [name for name in NEEDED if name not in os.environ]
    rank, local_rank, port = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"))
    numbers = all(value.strip().isdecimal() for value in (world_size, rank, local_rank, port))
    if missing or not numbers or int(rank) >= int(world_size):
        told = f"RANK is {rank}, LOCAL_RANK {local_rank}, MASTER_PORT {port}"
        if missing:
            told = f"{', '.join(missing)} missing"
        raise UserError(f"the environment has WORLD_SIZE={world_size}, but {told}: start several processes "
                        "with torchrun, or unset WORLD_SIZE")
    return int(rank), int(world_size)


def local_rank() -> int:
    """This process's number on its machine, 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def start(device: torch.device, tensors: bool = True) -> tuple[int, int]:
    """Join torchrun's process group if there is one; device: this process's own.  Returns (rank, world_size).

    tensors: the processes will exchange tensors of `device`, not objects alone, for which they need no GPU.
    Raises UserError for an accelerator that several processes cannot train on together.
    """
    _, world_size = expected()
    if world_size == 1:
        return 0, 1
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"torchrun does not work with --device {device.type}: one process, or --device cpu")
    if not dist.is_initialized():  # with --seeds the runs of a process share its group
        options: dict[str, Any] = {"backend": "gloo"}
        if device.type == "cuda" and tensors:
            options = {"backend": "nccl", "device_id": device}
        dist.init_process_group(**options, timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), world_size


def wait() -> None:
    """Wait until every process has come here: leaving while another still talks to it can abort a process."""
    if dist.is_initialized():
        dist.barrier()


def parallel(model: nn.Module, find_unused: bool = False) -> nn.Module:
    """The model with its gradients averaged over all processes.

    Buffers are not broadcast: in an epoch each process keeps the BatchNorm statistics of its own examples.
    find_unused: some parameters get no gradient, and the processes look which.
    """
    if not dist.is_initialized():
        return model
    ids = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
    newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=find_unused, **options)


def average_gradients(model: nn.Module) -> None:
    """Average every gradient over all processes, after backward passes outside of `parallel`'s model."""
    if dist.is_initialized():
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad.div_(dist.get_world_size()))


def gather(values: torch.Tensor, count: int) -> tuple[torch.Tensor, slice]:
    """The rows of all processes, rank by rank, [count, ...], and which of them are this process's.

    This process's rows keep their graph. Process r of W holds rows r, r + W, ... of the `count`, so that no
    process has to ask another how many it has.
    """
    if not dist.is_initialized():
        return values, slice(None)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sizes = [len(range(r, count, world_size)) for r in range(world_size)]
    padded = values.new_zeros(sizes[0], *values.shape[1:])  # a process may hold one row less than the first
    padded[:len(values)] = values.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    rows = [values if r == rank else part[:size] for r, (part, size) in enumerate(zip(parts, sizes))]
    return torch.cat(rows), slice(sum(sizes[:rank]), sum(sizes[:rank + 1]))


def on_all_rows(function: Callable[..., torch.Tensor], count: int, *arguments: Any) -> torch.Tensor:
    """This process's rows of function(*arguments) where the function sees the `count` rows of all processes.

    Tensors among the arguments are gathered, everything else is handed on.
    """
    whole = [gather(value, count) if isinstance(value, torch.Tensor) else (value, None)
             for value in arguments]
    own = next(rows for _, rows in whole if rows is not None)
    return function(*(value for value, _ in whole))[own]


def share_buffers(network: nn.Module) -> None:
    """Give every process the first one's buffers."""
    if dist.is_initialized():
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)


def percent_of_all(percent: dict[str, float], count: int, device: torch.device) -> dict[str, float]:
    """Shares in percent of this process's `count` rows as those of the rows of all processes."""
    if not dist.is_initialized():
        return percent
    hits = [round(value * count / 100) for value in percent.values()]
    *hits, count = total(torch.tensor([*hits, count], device=device)).tolist()
    return {name: 100 * (hit / count) for name, hit in zip(percent, hits)}


def from_first(value: T | None) -> T:
    """The first process's value, in every process."""
    if not dist.is_initialized():
        return cast(T, value)
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all processes, in every process."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
