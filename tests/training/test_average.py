"""The moving average of the weights is torch's, with BatchNorm's statistics estimated anew."""
import json
from itertools import islice
from pathlib import Path

import torch
from conftest import TINY
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from harness.datasets.batches import load_dataset, training_batches
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


def test_the_statistics_are_those_of_the_averaged_weights():
    torch.manual_seed(0)
    average = Average(nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout()).eval(), 0.9)
    batches = [torch.rand(5, 1, 8, 8) + k for k in range(3)]
    weights = [parameter.clone() for parameter in average.parameters()]
    average.estimate_statistics(iter(batches), torch.float32)
    maps = [average.module[0](x).detach().transpose(0, 1).flatten(1) for x in batches]
    norm = average.module[1]
    assert torch.allclose(norm.running_mean, torch.stack([m.mean(1) for m in maps]).mean(0), atol=1e-6)
    assert torch.allclose(norm.running_var, torch.stack([m.var(1) for m in maps]).mean(0), rtol=1e-5)
    assert norm.momentum == 0.1 and not average.module.training
    assert all(map(torch.equal, average.parameters(), weights))


NETWORK = """from torch import nn
def Net(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 5, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.LazyLinear(num_classes))
"""


def test_a_run_estimates_them_on_its_epochs_images(script, tmp_path):
    (tmp_path / "net.py").write_text(NETWORK)
    script("train_at_mnist", *TINY, "--model", "net.py:Net", "--ema_decay", 0.5, "--out_dir", "run")
    cfg = json.loads(Path("run/config.json").read_text())
    network = torch.load("run/last_ema.pt", weights_only=True)["model"]
    train = load_dataset("digits", "data", cfg["val_size"]).train
    batches = training_batches(train, cfg["batch_size"], cfg["seed"], cfg["epochs"])
    maps = [nn.functional.conv2d(x, network["0.weight"], network["0.bias"], 2)
            for x, *_ in islice(batches, cfg["max_batches"])]
    means = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
    assert len(maps) == 2 and torch.allclose(network["1.running_mean"], means, atol=1e-5)
