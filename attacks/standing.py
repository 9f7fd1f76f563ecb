"""The examples that an attack still works on: those that it has done with leave the batch."""
from dataclasses import dataclass, fields

from torch import Tensor


@dataclass
class Standing:
    """Tensors of one row an example, on which an attack's loop goes on."""
    row: Tensor  # [B] position in the batch

    def keep(self, standing: Tensor, *results: tuple[Tensor, Tensor]) -> bool:
        """Go on with the standing [B] alone; whether there is any.  The one wait for the device.

        results: pairs of a tensor of the whole batch and the values of these rows, written there before any
        row leaves.
        """
        left = standing.nonzero().squeeze(1)
        if len(left) < len(self.row):
            for whole, values in results:
                whole[self.row] = values
            for field in fields(self):
                setattr(self, field.name, getattr(self, field.name)[left])
        return len(left) > 0
