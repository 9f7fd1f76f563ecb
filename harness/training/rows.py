"""Numbers of examples, or of positions in a batch, that training keeps from batch to batch."""
import torch
from torch import Tensor, nn

from harness import distributed


class PersistentRows(nn.Module):
    """`count` rows of `shape`, zeros at first, read as rows[index] and written as rows[index] = values.

    Its state_dict goes into the checkpoint. Under torchrun every process writes rows of its own; the others
    see them after `synchronize`.
    """

    values: Tensor   # [count, *shape]
    written: Tensor  # [count], 1 for a row that this process has written since the last synchronize, else 0

    def __init__(self, count: int, shape: tuple[int, ...], device: torch.device):
        super().__init__()
        self.register_buffer("values", torch.zeros(count, *shape, device=device))
        self.register_buffer("written", torch.zeros(count, device=device), persistent=False)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.values[index]

    def __setitem__(self, index: Tensor, values: Tensor) -> None:
        self.values[index] = values.detach()
        self.written[index] = 1.0

    def synchronize(self) -> None:
        """Give every process the rows that the others have written since the last time.

        At most one process may have written a row.
        """
        written = self.written.view(-1, *[1] * (self.values.ndim - 1))
        received = distributed.total(self.values * written)  # exact: the other processes add zeros
        is_new = distributed.total(written.clone()) > 0
        self.values.copy_(torch.where(is_new, received, self.values))
        self.written.zero_()
