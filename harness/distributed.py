"""Many processes started by torchrun: one command, one run folder, the arithmetic of one process."""
import atexit
import inspect
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def start(device: torch.device) -> tuple[int, int, torch.device]:
    """Join torchrun's process group if there is one.  Returns (rank, world_size, this process's device)."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():  # a second run in this process, as with --seeds, shares the group of the first
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), world_size, device


def wait() -> None:
    """Go on once every process has come here: one that leaves while another still talks to it can be aborted."""
    if dist.is_initialized():
        dist.barrier()


def parallel(model: nn.Module) -> nn.Module:
    """The model with its gradients averaged over all processes.

    Buffers are not broadcast: each process keeps the BatchNorm statistics of its own share, and the first one's are saved.
    """
    if not dist.is_initialized():
        return model
    ids = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
    newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    return DistributedDataParallel(model, device_ids=ids, **{"forward_sync_buffers" if newer else "broadcast_buffers": False})


def average_gradients(model: nn.Module) -> None:
    """The mean over all processes of every gradient, in every process: for backward passes that did not go through `parallel`'s model."""
    if dist.is_initialized():
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad.div_(dist.get_world_size()))


def gather(values: torch.Tensor, count: int) -> tuple[torch.Tensor, slice]:
    """The rows of all processes, rank by rank, [count, ...], and which of them are this process's: those keep their graph.

    Process r of W holds rows r, r + W, ... of the `count`, so that none has to ask another how many it has.
    """
    if not dist.is_initialized():
        return values, slice(None)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sizes = [len(range(r, count, world_size)) for r in range(world_size)]
    padded = values.new_zeros(sizes[0], *values.shape[1:])  # processes may hold one example less than the first
    padded[:len(values)] = values.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    rows = [values if r == rank else part[:size] for r, (part, size) in enumerate(zip(parts, sizes))]
    return torch.cat(rows), slice(sum(sizes[:rank]), sum(sizes[:rank + 1]))


def from_first(value: object) -> object:
    """The first process's value, in every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all processes, in every process."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
