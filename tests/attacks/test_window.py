"""Passing only what a window changes: logits as of a whole pass, changes kept or taken back, the same attack."""
import pytest
import torch
from torch import nn

from attacks import square as square_module
from attacks.noise import example_keys
from attacks.square import square
from attacks.window import square_places, stem_of, window_pass
from models import build_model
from models.lenet import LeNet
from models.stem import Stem


class Odd(nn.Module):
    """A stem of other numbers: a 4x4 convolution with stride 3 and padding 1, two channels in."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 5, 4, stride=3, padding=1), nn.LazyLinear(4)
        self(torch.zeros(1, 2, 19, 25))

    @property
    def stem(self):
        layers = lambda x: nn.functional.conv2d(x, self.conv.weight, self.conv.bias, stride=3).relu()  # noqa: E731
        return Stem(layers, lambda features: self.out(features.flatten(1)), reach=4, stride=3, padding=1)

    def forward(self, x):
        return self.out(self.conv(x).relu().flatten(1))


def network(name):
    torch.manual_seed(0)
    model = Odd() if name == "odd" else build_model(name, 4, 1).to(memory_format=torch.channels_last)
    for parameter in model.parameters():  # SmallCNN's last layer starts at zero
        nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False), (2, 19, 25) if name == "odd" else (1, 28, 28)


@pytest.mark.parametrize("name", ("lenet", "small_cnn", "odd"))
def test_a_stem_is_the_network(name):
    model, shape = network(name)
    x = torch.rand(3, *shape)
    stem = model.stem
    features = stem.layers(nn.functional.pad(x, [stem.padding] * 4))
    before = features.clone()
    torch.testing.assert_close(stem.rest(features), model(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(features, before)


@pytest.mark.parametrize("name", ("lenet", "small_cnn", "odd"))
@pytest.mark.parametrize("side", (1, 2, 5))
def test_windows_anywhere_give_the_logits_of_a_whole_pass_and_can_be_taken_back(name, side):
    model, (channels, height, width) = network(name)
    x = torch.rand(40, channels, height, width)
    passed, generator = window_pass(model.stem, x, side), torch.Generator().manual_seed(1)
    corner = torch.tensor([[0, 0], [0, width - side], [height - side, 0], [height - side, width - side]])
    for number in range(6):
        top, left = (torch.randint(0, size - side + 1, (40,), generator=generator) for size in (height, width))
        if number == 0:
            top[:4], left[:4] = corner.unbind(1)
        places = square_places(top, left, side, width)[:, None].expand(-1, channels, -1)
        point = x.flatten(2).scatter(2, places, torch.rand(places.shape, generator=generator)).view_as(x)
        torch.testing.assert_close(passed.change(point, top, left, side), model(point), rtol=1e-5, atol=1e-5)
        kept = torch.rand(len(x), generator=generator) < 0.5
        passed.undo(~kept)
        x = torch.where(kept[:, None, None, None], point, x)
        if number == 3:
            rows = torch.arange(0, len(x), 2)
            passed.keep(rows)
            x = x[rows]
            x = torch.cat([x, x])
            passed.keep(torch.arange(len(rows)).repeat(2))
    torch.testing.assert_close(passed.features, window_pass(model.stem, x, side).features, rtol=1e-5, atol=1e-5)


def test_a_whole_pass_is_left_where_it_is_as_good():
    model, shape = network("lenet")
    x = torch.rand(2, *shape)
    assert window_pass(model.stem, x, 9) is not None and window_pass(model.stem, x, 11) is None and window_pass(None, x, 1) is None
    assert stem_of(model, x).reach == 6 and stem_of(build_model("resnet18", 4, 1), x) is None
    assert stem_of(model, x.to("meta")) is None


class Centred(LeNet):
    """A subclass that passes its images another way than the stem it inherits."""

    def forward(self, x):
        return super().forward((x - 0.5) / 0.25)


class OtherStem(nn.Module):
    """A network with a member of that name that is something else."""

    def __init__(self):
        super().__init__()
        self.stem, self.out = nn.Sequential(nn.Conv2d(1, 4, 3, stride=4), nn.ReLU()), nn.Linear(4 * 7 * 7, 4)

    def forward(self, x):
        return self.out(self.stem(x).flatten(1))


@pytest.mark.parametrize("kind", (lambda: Centred(4, 1), OtherStem), ids=("subclass", "another-stem"))
def test_a_stem_that_is_not_the_networks_is_left_alone(kind, monkeypatch):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.rand(6, 1, 28, 28)
    with torch.no_grad():
        y = model(x).argmax(1)
    assert stem_of(model, x) is None
    monkeypatch.setattr(square_module, "window_pass", lambda stem, *_: stem)  # None, or the attack would call it
    assert square(model, x, y, epsilon=0.01, num_queries=300).shape == x.shape


@pytest.mark.parametrize("name", ("lenet", "small_cnn", "odd"))
def test_the_attack_is_the_one_of_whole_passes(name, monkeypatch):
    model, shape = network(name)
    x = torch.rand(12, *shape)
    y, keys = model(x).argmax(1), example_keys(torch.arange(12), 3)
    run = lambda: square(model, x, y, epsilon=0.02, num_queries=700, keys=keys)  # noqa: E731
    passes = []
    monkeypatch.setattr(square_module, "window_pass", lambda *args: passes.append(window_pass(*args)) or passes[-1])
    ours = run()
    assert any(passes)
    monkeypatch.setattr(square_module, "window_pass", lambda *args: None)
    whole = run()
    assert torch.equal(model(ours).argmax(1) != y, model(whole).argmax(1) != y)
    assert (ours == whole).flatten(1).all(1).float().mean() > 0.8  # rounding can turn a tie between two points
