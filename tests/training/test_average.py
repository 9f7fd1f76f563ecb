"""The moving average of the weights is torch's."""
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from harness.training.average import Average


def test_the_average_is_torchs_but_for_whole_numbers():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    ours = Average(network, 0.9)
    theirs = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(4):
        network(torch.rand(4, 1, 8, 8))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.update_parameters(network)
        theirs.update_parameters(network)
    mine, others = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == others.keys() and int(mine["n_averaged"]) == 4
    for name, value in mine.items():
        if value.is_floating_point():
            assert torch.equal(value, others[name]), name
    assert int(mine["module.1.num_batches_tracked"]) == 4  # torch averages it, and cuts the fraction off
    ours.load_state_dict(others)  # of a run that torch's has averaged
