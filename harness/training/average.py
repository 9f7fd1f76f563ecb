"""A moving average of a network's weights, kept without a wait for the device."""
from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from harness.training.precision import TrainingPrecision


class Average(AveragedModel):
    """`module` holds the exponential moving average of a network's parameters and floating-point buffers.

        average <- average + (1 - decay) (weights - average),    at first a copy

    Differs from torch's: the count of updates stays on the host, which torch copies to the device in every
    step; other buffers are those of the network. The state_dict is torch's.
    """

    def __init__(self, network: nn.Module, decay: float):
        super().__init__(network, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the weights of `model` in."""
        pairs = list(zip(chain(self.module.parameters(), self.module.buffers()),
                         chain(model.parameters(), model.buffers())))
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        first = int(self.n_averaged) == 0
        if first:
            torch._foreach_copy_(*map(list, zip(*averaged)))
        else:
            torch._foreach_lerp_(*map(list, zip(*averaged)), 1 - self.decay)
        for mine, theirs in pairs:
            if not mine.is_floating_point():
                mine.copy_(theirs)
        self.n_averaged += 1

    def estimate_statistics(self, batches: Iterable[Tensor], dtype: torch.dtype) -> None:
        """BatchNorm's running statistics anew, as means over these batches [B, C, H, W], passed in `dtype`.

        Averaged statistics are not those of the averaged weights (Izmailov et al., UAI 2018).
        """
        model = TrainingPrecision(self.module, dtype, None, attack_view=False)
        update_bn(batches, model.train(self.module.training))
