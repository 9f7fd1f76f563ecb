"""What training remembers from one batch to the next beside the weights: rows of numbers that travel in the checkpoint."""
import torch
from torch import Tensor, nn

from harness import distributed


class Memory(nn.Module):
    """`count` rows of `shape`, zeros at first, read as memory[rows] and written as memory[rows] = values.

    Its state_dict goes into the checkpoint. Under torchrun every process writes rows of its own, which the others see after `share`.
    """

    def __init__(self, count: int, shape: tuple[int, ...], device: torch.device):
        super().__init__()
        self.register_buffer("values", torch.zeros(count, *shape, device=device))
        self.register_buffer("written", torch.zeros(count, device=device), persistent=False)  # since the last share, 1 or 0

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.values[rows]

    def __setitem__(self, rows: Tensor, values: Tensor) -> None:
        self.values[rows] = values.detach()
        self.written[rows] = 1.0

    def share(self) -> None:
        """Give every process the rows that each has written since the last time, each row by one process at most."""
        written = self.written.view(-1, *[1] * (self.values.ndim - 1))
        received = distributed.total(self.values * written)  # exact: the other processes add zeros
        self.values.copy_(torch.where(distributed.total(written.clone()) > 0, received, self.values))
        self.written.zero_()
