"""The networks by name: `build_model("resnet18", num_classes=10, in_channels=3)`.

Every network maps images [B, C, H, W] in [0, 1] to logits [B, K].
"""
import inspect
from pathlib import Path

from torch import nn

from models import user_code
from models.lenet import LeNet
from models.normalize import Normalized
from models.resnet import ResNet
from models.small_cnn import SmallCNN
from models.wide_resnet import WideResNet

MODELS = {
    "lenet": lambda num_classes, in_channels: LeNet(num_classes, in_channels),
    "small_cnn": lambda num_classes, in_channels: SmallCNN(num_classes, in_channels),
    "resnet18": lambda num_classes, in_channels: ResNet((2, 2, 2, 2), num_classes, in_channels),
    "resnet18_w16": lambda num_classes, in_channels: ResNet((2, 2, 2, 2), num_classes, in_channels, width=16),
    "wrn34_10": lambda num_classes, in_channels: WideResNet(34, 10, num_classes, in_channels),
    "wrn28_10": lambda num_classes, in_channels: WideResNet(28, 10, num_classes, in_channels),
}


def build_model(name: str, num_classes: int = 10, in_channels: int = 3,
                mean: list[float] | None = None, std: list[float] | None = None) -> nn.Module:
    """Build the network called `name`: a key of MODELS, or `file.py:callable` for one of the user's own.

    With `mean` and `std` (one value per channel) the network stands behind a normalisation layer. A user's
    callable receives those of `num_classes` and `in_channels` that its signature names. Raises ValueError for
    an unknown name or a callable that does not give an nn.Module, and, naming it, for whatever the user's
    file raises.
    """
    if ".py:" in name:
        network = _user_model(name, num_classes, in_channels)
    elif name in MODELS:
        network = MODELS[name](num_classes, in_channels)
    else:
        raise ValueError(f"unknown model '{name}': choose one of {', '.join(MODELS)}, or file.py:callable")
    return network if mean is None else Normalized(network, mean, std)


def _user_model(name: str, num_classes: int, in_channels: int) -> nn.Module:
    file, _, attribute = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"model '{name}': there is no file {file}")
    try:
        if not callable(factory := getattr(user_code.load(path), attribute, None)):
            raise ValueError(f"{file} defines no callable '{attribute}'")
        offered = {"num_classes": num_classes, "in_channels": in_channels}
        accepted = inspect.signature(factory).parameters
        network = factory(**{key: value for key, value in offered.items() if key in accepted})
    except SystemExit:
        raise ValueError(f"model '{name}': {attribute}() ends the program") from None
    except Exception as error:
        raise ValueError(f"model '{name}': {user_code.plain(error)}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"model '{name}': {attribute}() gave a {type(network).__name__}, not a "
                         "torch.nn.Module")
    return network
