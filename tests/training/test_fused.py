"""Fused frozen convolutions: the same values and gradients as the modules, in every form,
and never a stale weight."""
import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attacks.frozen import frozen
from attacks.pgd import pgd
from harness.training import fused
from harness.training.attack_view import AttackView
from harness.training.fused import conv_norm_relu
from harness.training.precision import TrainingPrecision
from models import build_model
from models.wide_resnet import WideResNet

pytestmark = pytest.mark.skipif(not fused.ENABLED, reason="this build of torch has no oneDNN")


def layers(channels=8, planes=12, stride=1, bias=False, norm=True, kernel=3):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, planes, kernel, stride=stride, padding=kernel // 2, bias=bias)
    batch_norm = nn.BatchNorm2d(planes).eval() if norm else None
    if norm:
        batch_norm.running_mean.normal_(0, 0.3)
        batch_norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(batch_norm.weight, -1, 2)
        nn.init.normal_(batch_norm.bias)
    return [layer.requires_grad_(False) if layer else layer for layer in (conv, batch_norm)]


def plain(x, conv, norm, add=None, relu=True):
    out = conv(x) if norm is None else norm(conv(x))
    out = out if add is None else out + add
    return F.relu(out) if relu else out


def value_and_gradients(function, x, add):
    inputs = [tensor.clone().requires_grad_() for tensor in (x, add) if tensor is not None]
    out = function(inputs[0], inputs[1] if add is not None else None)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, inputs, slope)


@pytest.mark.parametrize("relu", (True, False))
@pytest.mark.parametrize("added", (True, False))
@pytest.mark.parametrize("shape",
                         ((True, False, 1, 3), (True, True, 2, 3), (False, True, 1, 3), (False, False, 2, 1)))
def test_value_and_gradients_are_those_of_the_modules(shape, added, relu):
    norm, bias, stride, kernel = shape
    conv, batch_norm = layers(stride=stride, bias=bias, norm=norm, kernel=kernel)
    x = torch.randn(5, 8, 10, 10)
    add = torch.randn_like(conv(x)) if added else None
    folded = {}
    ours = value_and_gradients(lambda x, add: conv_norm_relu(x, conv, batch_norm, add, relu, folded=folded),
                               x, add)
    expected = value_and_gradients(lambda x, add: plain(x, conv, batch_norm, add, relu), x, add)
    assert conv in folded
    for mine, theirs in zip(ours, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape",
                         ((1, 5, 2, 28, 28), (3, 3, 1, 32, 32), (6, 5, 0, 14, 14), (4, 3, 0, 10, 8),
                          (2, 5, 4, 7, 12), (1, 5, 2, 8, 4), (9, 3, 1, 8, 8), (8, 3, 1, 8, 6),
                          (1, 3, 1, 9, 10)))
def test_the_input_gradient_of_few_channels_is_the_librarys(shape, dtype, monkeypatch):
    channels, kernel, padding, height, width = shape
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 6, kernel, padding=padding).requires_grad_(False)
    x = torch.randn(3, channels, height, width).to(dtype).contiguous(memory_format=torch.channels_last)
    tiled, convolve = [], F.conv2d
    monkeypatch.setattr(fused.F, "conv2d", lambda *args: tiled.append(1) or convolve(*args))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        _, ours = value_and_gradients(lambda x, _: conv_norm_relu(x, conv, relu=False), x, None)
        _, theirs = value_and_gradients(lambda x, _: convolve(x, conv.weight, conv.bias, padding=padding), x,
                                        None)
    rows, columns = ({1: (4, 4)}.get(channels, (2, 2)) if dtype == torch.float32
                     else (1, 4 if channels < 5 else 2))
    fits = channels < 9 and height % rows == 0 and width % columns == 0 and width > columns
    fused_here = dtype == torch.float32 or fused.BF16  # else the convolution stays a module, as its only call
    assert len(tiled) == (fits if fused_here else 1) and ours.shape == x.shape
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("size", (28, 32))
def test_the_attack_on_small_cnn_is_the_same_bit_for_bit(size, dtype):
    torch.manual_seed(0)
    network = build_model("small_cnn", 10, 1).to(memory_format=torch.channels_last)
    nn.init.normal_(network.classifier.fc3.weight)
    x, y = torch.rand(16, 1, size, size), torch.arange(16) % 10
    found = {}
    for enabled in (True, False):
        model = TrainingPrecision(network, dtype, None, enabled)
        found[enabled] = pgd(model, x, y, epsilon=0.3, step_size=0.05, num_steps=5, start="clean")
    assert torch.equal(found[True], found[False]) and not torch.equal(found[True], x)


@pytest.mark.parametrize("place", ("cpu", "elsewhere"))
@pytest.mark.parametrize("name", ("resnet18", "wide_resnet"))
def test_residual_networks_with_folded_norms_give_the_logits_and_gradients_of_their_modules(
        name, place, monkeypatch):
    torch.manual_seed(0)
    network = build_model("resnet18", 7, 3) if name == "resnet18" else WideResNet(10, 1, 7, 3)
    with torch.no_grad():
        for _ in range(3):
            network.train()(torch.rand(8, 3, 16, 16))  # running statistics of their own
    network.eval().requires_grad_(False)
    x, norms, normalise = torch.rand(4, 3, 16, 16), [], nn.BatchNorm2d.forward
    with monkeypatch.context() as patch:
        patch.setattr(nn.BatchNorm2d, "forward", lambda *args: norms.append(1) or normalise(*args))
        if place == "elsewhere":  # what runs on a GPU
            patch.setattr(fused, "ENABLED", False)
            patch.setattr(fused, "_is_elsewhere", lambda kind: True)
        view = AttackView(network)
        value_and_gradients(lambda x, _: view(x), x, None)  # which also tries the view
        norms.clear()
        ours = value_and_gradients(lambda x, _: view(x), x, None)
    assert len(norms) == (4 if name == "wide_resnet" else 0)  # those that no convolution stands before
    expected = value_and_gradients(lambda x, _: network(x), x, None)
    for mine, theirs in zip(ours, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def change_in_place(conv, norm):
    conv.weight.mul_(2)


def change_a_statistic(conv, norm):
    norm.running_mean.add_(1)


def change_by_loading(conv, norm):
    conv.load_state_dict({"weight": conv.weight * 3})


def change_the_data(conv, norm):
    norm.bias.data = norm.bias.data + 1


def change_by_a_step(conv, norm):
    conv.requires_grad_(True)
    conv.weight.grad = torch.ones_like(conv.weight)
    torch.optim.SGD(conv.parameters(), lr=0.5).step()
    conv.requires_grad_(False)


@pytest.mark.parametrize("change",
                         (change_in_place, change_a_statistic, change_by_loading, change_the_data,
                          change_by_a_step))
def test_a_changed_parameter_is_never_answered_with_the_old_one(change):
    conv, norm = layers()
    x = torch.randn(2, 8, 6, 6)
    folded = {}
    with frozen(conv):
        before = conv_norm_relu(x, conv, norm, folded=folded)
        with torch.no_grad():
            change(conv, norm)
        after = conv_norm_relu(x, conv, norm, folded=folded)
    torch.testing.assert_close(after, plain(x, conv, norm), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, after)


def test_the_weights_are_folded_once_for_many_passes_and_again_in_another_type():
    conv, norm = layers()
    x = torch.randn(2, 8, 6, 6)
    folded = {}
    with frozen(conv):
        conv_norm_relu(x, conv, norm, folded=folded)
        first = folded[conv]
        conv_norm_relu(x, conv, norm, folded=folded)
        assert folded[conv] is first and first.weight.dtype == torch.float32
        if fused.BF16:
            with torch.autocast("cpu", torch.bfloat16):
                assert conv_norm_relu(x, conv, norm, folded=folded).dtype == torch.bfloat16
            assert folded[conv] is not first and folded[conv].weight.dtype == torch.bfloat16
        conv_norm_relu(x.bfloat16().float(), conv, norm, folded=folded)
        assert folded[conv].weight.dtype == torch.float32


def write_to_data(conv, norm):
    conv.weight.data.mul_(2)


def write_to_the_data_of_a_norm(conv, norm):
    norm.weight.data.mul_(2)


@pytest.mark.parametrize("write", (write_to_data, write_to_the_data_of_a_norm))
@pytest.mark.parametrize("attacked", (True, False))
def test_a_write_to_data_is_seen_by_the_next_attack_and_between_attacks_by_the_next_pass(write, attacked):
    conv, norm = layers()
    x, folded, found = torch.randn(2, 8, 6, 6), {}, []
    for _ in range(2):
        with frozen(conv) if attacked else contextlib.nullcontext():
            found.append(conv_norm_relu(x, conv, norm, folded=folded))
        torch.testing.assert_close(found[-1], plain(x, conv, norm), rtol=1e-5, atol=1e-5)
        write(conv, norm)
    assert not torch.allclose(*found)


@pytest.mark.parametrize("layout", (torch.channels_last, torch.contiguous_format))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape", ((3, 6, 8, 8), (2, 5, 7, 9), (1, 3, 2, 3)))
def test_pooling_gives_torchs_numbers_with_gradients_and_without(shape, dtype, layout):
    x = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0)).to(dtype)  # many are equal
    x = x.contiguous(memory_format=layout)
    x[0, 0, 0, 0], x[0, -1, 1, 1] = torch.nan, torch.inf
    expected = F.max_pool2d(x, 2)
    assert expected.isnan().any() and torch.equal(fused.max_pool(x).nan_to_num(), expected.nan_to_num())
    assert torch.equal(fused.max_pool(x[0]).isnan(), expected[0].isnan())
    x.requires_grad_()
    gradients = [torch.autograd.grad(pool(x).nan_to_num(0, 0).square().sum(), x)[0]
                 for pool in (fused.max_pool, lambda x: F.max_pool2d(x, 2))]
    assert torch.equal(*gradients) and gradients[0].count_nonzero()


def test_a_map_too_small_to_pool_is_refused_as_torch_does():
    with pytest.raises(RuntimeError, match="too small"):
        fused.max_pool(torch.zeros(2, 3, 1, 4))


@pytest.mark.parametrize("last", (nn.MaxPool2d(2), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))))
def test_torch_looks_for_the_places_of_maxima_for_a_gradient_alone(last, monkeypatch):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), last).eval().requires_grad_(False)
    view, x, calls, pool = AttackView(network), torch.rand(4, 3, 9, 9), [], F.max_pool2d
    with torch.no_grad():
        view(x)
    view(x.requires_grad_())
    assert view.used
    monkeypatch.setattr(F, "max_pool2d", lambda *given, **named: calls.append(given) or pool(*given, **named))
    with torch.no_grad():
        assert torch.allclose(view(x), network(x), atol=1e-6)
    inside = len(calls)  # of the network itself
    view(x)
    assert (inside, len(calls)) == (1, 2)


def test_what_is_trained_or_in_train_mode_or_told_so_stays_a_module():
    x = torch.randn(4, 8, 6, 6)
    conv, norm = layers()
    norm.train()
    statistics = norm.running_mean.clone()
    folded = {}
    conv_norm_relu(x, conv, norm, folded=folded)
    assert not folded and not torch.equal(norm.running_mean, statistics)
    norm.eval()
    conv.requires_grad_(True)
    conv_norm_relu(x, conv, norm, folded=folded).sum().backward()
    assert not folded and conv.weight.grad.abs().sum() > 0
    conv.requires_grad_(False)
    with fused.as_modules():
        assert torch.equal(conv_norm_relu(x, conv, norm, folded=folded), plain(x, conv, norm))
    assert not folded


def test_a_model_keeps_its_state_dict_its_copies_and_its_trainability():
    torch.manual_seed(0)
    model = build_model("small_cnn", 10, 1)
    names = list(model.state_dict())
    pgd(model, torch.rand(2, 1, 28, 28), torch.tensor([1, 2]), epsilon=0.1, step_size=0.1, num_steps=1)
    with frozen(model):
        twin = copy.deepcopy(model)
        assert torch.equal(twin(torch.ones(1, 1, 28, 28)), model(torch.ones(1, 1, 28, 28)))
    assert (list(model.state_dict()) == names
            and all(parameter.requires_grad for parameter in model.parameters()))


def test_the_gradient_may_be_differentiated_again():
    conv, norm = layers()
    x = torch.randn(1, 8, 4, 4)

    def slope(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(conv_norm_relu(x, conv, norm).pow(2).sum(), x, create_graph=True)[0], x

    gradient, x = slope(x)
    ours, = torch.autograd.grad(gradient.sum(), x)
    y = x.detach().clone().requires_grad_()
    once, = torch.autograd.grad(plain(y, conv, norm).pow(2).sum(), y, create_graph=True)
    expected, = torch.autograd.grad(once.sum(), y)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
