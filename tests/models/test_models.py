"""Networks: shapes, known parameter counts, names of the published checkpoints, arithmetic, normalisation,
the user's own models."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models import MODELS, build_model
from models.normalize import Normalized
from models.wide_resnet import BasicBlock, WideResNet

every_model = pytest.mark.parametrize("name", MODELS)


def on_meta(name, num_classes=10, in_channels=3):
    """The network without its numbers: shapes and names cost nothing."""
    with torch.device("meta"):
        return build_model(name, num_classes, in_channels)


# Shapes, sizes, names

def test_every_documented_model_is_there():
    assert set(MODELS) >= {"lenet", "small_cnn", "resnet18", "wrn34_10", "wrn28_10"}


@every_model
@pytest.mark.parametrize("in_channels", (1, 3))
@pytest.mark.parametrize("num_classes", (2, 10, 200))
def test_logits_have_one_column_a_class_at_every_image_size(name, num_classes, in_channels):
    model = on_meta(name, num_classes, in_channels)
    for size in (28, 32, 64):
        assert model(torch.empty(2, in_channels, size, size, device="meta")).shape == (2, num_classes)


@pytest.mark.parametrize(("name", "size"),
                         (("lenet", 28), ("lenet", 32), ("small_cnn", 28), ("small_cnn", 32),
                          ("resnet18", 28)))
def test_an_example_has_the_same_finite_logits_alone_and_in_a_batch(name, size):
    torch.manual_seed(0)
    model, x = build_model(name, 10, 1).eval(), torch.rand(3, 1, size, size)
    if name == "small_cnn":
        nn.init.normal_(model.classifier.fc3.weight)  # it starts at zero, which hides everything else
    with torch.no_grad():
        logits = model(x)
        assert logits.isfinite().all()
        assert not torch.allclose(logits[0], logits[1], rtol=1e-4)
        torch.testing.assert_close(model(x[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "in_channels", "count"), (
    ("lenet", 1, 61_706), ("small_cnn", 1, 312_202), ("resnet18", 3, 11_173_962),
    ("resnet18_w16", 3, 701_466), ("wrn34_10", 3, 46_160_474), ("wrn28_10", 3, 36_479_194)))
def test_parameter_counts_are_the_known_ones(name, in_channels, count):
    assert sum(parameter.numel() for parameter in on_meta(name, 10, in_channels).parameters()) == count


@pytest.mark.parametrize(("name", "expected"), (
    ("small_cnn", {"feature_extractor.conv1.weight": (32, 3, 3, 3), "feature_extractor.conv4.bias": (64,),
                   "classifier.fc1.weight": (200, 1024), "classifier.fc2.bias": (200,),
                   "classifier.fc3.bias": (10,)}),
    ("resnet18", {"conv1.weight": (64, 3, 3, 3), "bn1.running_mean": (64,),
                  "layer1.1.conv2.weight": (64, 64, 3, 3), "layer2.0.shortcut.0.weight": (128, 64, 1, 1),
                  "layer2.0.shortcut.1.running_var": (128,), "layer4.1.bn2.bias": (512,),
                  "linear.weight": (10, 512), "linear.bias": (10,)}),
    ("wrn34_10", {"conv1.weight": (16, 3, 3, 3), "block1.layer.0.convShortcut.weight": (160, 16, 1, 1),
                  "block1.layer.4.conv2.weight": (160, 160, 3, 3), "block3.layer.0.bn1.running_mean": (320,),
                  "block3.layer.4.bn2.weight": (640,), "bn1.weight": (640,), "fc.weight": (10, 640),
                  "fc.bias": (10,)}),
))
def test_parameter_names_are_those_of_the_published_checkpoints(name, expected):
    values = on_meta(name).state_dict()
    assert {key: tuple(values[key].shape) for key in expected} == expected


@pytest.mark.parametrize(("name", "blocks"), (("wrn34_10", 5), ("wrn28_10", 4)))
def test_wide_resnets_have_three_stages_of_n_blocks_and_no_sub_block(name, blocks):
    prefixes = {".".join(key.split(".")[:3]) for key in on_meta(name).state_dict() if "block" in key}
    assert prefixes == {f"block{stage}.layer.{block}" for stage in (1, 2, 3) for block in range(blocks)}


# Arithmetic

def test_resnet18_computes_what_torchvisions_does_with_the_cifar_stem():
    torch.manual_seed(0)
    reference = torchvision.models.resnet18(num_classes=10)
    reference.conv1, reference.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    model = build_model("resnet18")
    model.load_state_dict({name.replace("downsample", "shortcut").replace("fc.", "linear."): value
                           for name, value in reference.state_dict().items()})
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        for mode in (True, False):
            torch.testing.assert_close(model.train(mode)(x), reference.train(mode)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("in_planes", "stride"), ((8, 1), (4, 2)))
def test_wide_resnet_block_adds_a_pre_activated_branch_to_its_shortcut(in_planes, stride):
    torch.manual_seed(0)
    block, x = BasicBlock(in_planes, 8, stride).eval(), torch.randn(2, in_planes, 6, 6)
    for norm in (block.bn1, block.bn2):
        norm.running_mean.normal_()
        nn.init.normal_(norm.bias)
    activated = F.relu(block.bn1(x))
    shortcut = x if in_planes == 8 else F.conv2d(activated, block.convShortcut.weight, stride=2)
    branch = F.conv2d(activated, block.conv1.weight, stride=stride, padding=1)
    expected = shortcut + F.conv2d(F.relu(block.bn2(branch)), block.conv2.weight, padding=1)
    before = x.clone()
    torch.testing.assert_close(block(x), expected)
    assert torch.equal(x, before)


def test_wide_resnet_halves_the_image_twice_then_activates_and_averages():
    torch.manual_seed(0)
    model, x = WideResNet(10, 1, num_classes=4).eval(), torch.rand(2, 3, 8, 8)
    model.bn1.running_mean.normal_()
    early = model.block1(model.conv1(x))
    features = model.block3(model.block2(early))
    assert (early.shape, features.shape) == ((2, 16, 8, 8), (2, 64, 2, 2))
    torch.testing.assert_close(model(x), model.fc(F.relu(model.bn1(features)).mean(dim=(2, 3))))


@pytest.mark.parametrize("depth", (4, 33, 35))
def test_wide_resnet_rejects_a_depth_it_cannot_have(depth):
    with pytest.raises(ValueError, match="6n \\+ 4"):
        WideResNet(depth)


def test_small_cnn_starts_with_a_last_layer_of_zero_and_no_other():
    zero = {name for name, parameter in build_model("small_cnn", 10, 1).named_parameters()
            if not parameter.any()}
    assert {name for name in zero if "conv" not in name} == {"classifier.fc3.weight", "classifier.fc3.bias"}


def test_small_cnn_starts_with_convolution_biases_of_zero_as_the_released_code_does():
    for name, parameter in build_model("small_cnn", 10, 1).feature_extractor.named_parameters():
        assert bool(parameter.any()) == name.endswith("weight"), name


def test_small_cnn_drops_out_in_train_mode_alone():
    torch.manual_seed(0)
    model, x = build_model("small_cnn", 10, 1), torch.rand(2, 1, 28, 28)
    nn.init.normal_(model.classifier.fc3.weight)
    with torch.no_grad():
        assert not torch.equal(model.train()(x), model(x))
        assert torch.equal(model.eval()(x), model(x))


# Normalisation

def test_normalized_is_the_network_on_normalised_images():
    torch.manual_seed(0)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]
    model, x = build_model("lenet", 10, 3, mean, std), torch.rand(2, 3, 28, 28)
    by_hand = torch.stack([(x[:, channel] - mean[channel]) / std[channel] for channel in range(3)], dim=1)
    torch.testing.assert_close(model(x), model.network(by_hand))
    assert not torch.allclose(model(x), model.network(x))
    assert type(build_model("lenet", 10, 3)) is type(model.network)


def test_normalisation_travels_in_the_state_dict():
    source, target = (Normalized(nn.Flatten(), mean, std)
                      for mean, std in (([0.5, 0.25], [0.2, 0.4]), ([0.0, 0.0], [1.0, 1.0])))
    assert {name: value.flatten().tolist() for name, value in source.state_dict().items()} == {
        "normalize.mean": [0.5, 0.25], "normalize.std": pytest.approx([0.2, 0.4])}
    assert not list(source.parameters())
    target.load_state_dict(source.state_dict())
    x = torch.rand(3, 2, 4, 4)
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize(("mean", "std"), (([0.5], [0.0]), ([0.5], [-1.0]), ([0.5, 0.5], [0.2])))
def test_normalisation_rejects_a_wrong_mean_and_std(mean, std):
    with pytest.raises(ValueError, match="std"):
        build_model("lenet", 10, 1, mean, std)


# The user's own models

USER_FILE = """
import torch
from neighbour import WIDTH

class Net(torch.nn.Module):
    def __init__(self, num_classes, in_channels=3):
        super().__init__()
        self.shape = (num_classes, in_channels, WIDTH)

def classes_only(num_classes):
    return Net(num_classes)

def no_arguments():
    return Net(7, 7)

def other_arguments(pretrained=False, *, in_channels=1):
    return Net(-1, in_channels)

def not_a_module(num_classes):
    return [num_classes]

def wrong():
    raise RuntimeError("out of luck")

constant = 3
"""


@pytest.fixture
def user_file(tmp_path):
    (tmp_path / "neighbour.py").write_text("WIDTH = 5\n")
    path = tmp_path / "my_models.py"
    path.write_text(USER_FILE)
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    return path


@pytest.mark.parametrize(("attribute", "shape"),
                         (("Net", (200, 1, 5)), ("classes_only", (200, 3, 5)), ("no_arguments", (7, 7, 5)),
                          ("other_arguments", (-1, 1, 5))))
def test_a_users_callable_gets_the_arguments_its_signature_names(user_file, attribute, shape):
    search_path = list(sys.path)
    assert build_model(f"{user_file}:{attribute}", 200, 1).shape == shape
    assert sys.path == search_path


def test_a_users_model_can_stand_behind_normalisation(user_file):
    model = build_model(f"{user_file}:Net", 10, 3, [0.5] * 3, [0.5] * 3)
    assert isinstance(model, Normalized)
    assert model.network.shape == (10, 3, 5)


@pytest.mark.parametrize(("name", "message"), (
    ("my_models.py:missing", "no callable 'missing'"),
    ("my_models.py:constant", "no callable 'constant'"),
    ("my_models.py:not_a_module", "gave a list, not a torch.nn.Module"),
    ("my_models.py:wrong", "RuntimeError: out of luck"),
    ("broken.py:Net", "no_such_module"),
    ("absent.py:Net", "no file .*absent.py"),
))
def test_a_users_model_that_cannot_be_built_is_a_value_error_that_names_it(user_file, name, message):
    search_path = list(sys.path)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        build_model(str(user_file.parent / name))
    assert sys.path == search_path


@pytest.mark.parametrize("name", ("resnet50", "ResNet18", "", "my_models.py"))
def test_an_unknown_name_lists_the_choices(name):
    with pytest.raises(ValueError, match="unknown model") as error:
        build_model(name)
    assert all(choice in str(error.value) for choice in (*MODELS, "file.py:callable"))


# Importing

IMPORT_EVERYTHING = """
import importlib, os, sys, torch
torch.manual_seed(1234)
state = torch.get_rng_state()
files = os.listdir(".")
for name in sys.argv[1:-1]:
    importlib.import_module(name)
assert os.listdir(".") == files, "a file was written"
assert torch.initial_seed() == 1234 and torch.equal(torch.get_rng_state(), state), "the generator moved"
assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled(), "a global setting changed"
assert not torch.are_deterministic_algorithms_enabled(), "a global setting changed"
assert not torch.backends.cudnn.benchmark, "a global setting changed"
"""


@pytest.mark.slow
def test_importing_scripts_models_attacks_and_losses_does_nothing_else():
    root = Path(__file__).parents[2]
    files = [path for package in ("models", "attacks", "losses")
             for path in sorted((root / package).glob("*.py"))]
    names = [".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
             for path in files]
    names += [path.stem for kind in ("train", "eval") for path in sorted(root.glob(f"{kind}_*.py"))]
    assert {"models", "models.wide_resnet", "attacks.pgd", "losses.margin", "train_vir"} <= set(names)
    result = subprocess.run([sys.executable, "-c", IMPORT_EVERYTHING, *names, "--nonsense"], cwd=root,
                            capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
