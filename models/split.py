"""A network cut behind its first layer, f(x) = rest(f0(x)): what YOPO (Zhang et al., NeurIPS 2019) attacks without the rest."""
from collections.abc import Callable

from torch import Tensor, nn

from models.fused import conv_norm_relu
from models.normalize import Normalized


class _Convolution(nn.Module):
    """A first layer that is a convolution, as the network itself runs it."""

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm_relu(x, self.layer, relu=False)


def split_first_layer(model: nn.Module) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """(f0, rest) with rest(f0(x)) = model(x): f0 the first layer, behind the normalisation where there is one.

    Both work with the parameters of `model` itself, and rest leaves its argument as it is. A network offers the cut by two members, as all
    of ours do: `first_layer`, the module that receives the images (a property, so that no parameter has a second name), and
    `after_first_layer(features)` -> logits [B, K]. Raises ValueError for a network without them.
    """
    network = model.network if isinstance(model, Normalized) else model
    if not isinstance(getattr(network, "first_layer", None), nn.Module) or not callable(getattr(network, "after_first_layer", None)):
        raise ValueError(f"the network {type(network).__name__} cannot be split behind its first layer: give it a property first_layer "
                         "(the module that receives the images) and a method after_first_layer(features) that goes on to the logits")
    first = _Convolution(network.first_layer) if isinstance(network.first_layer, nn.Conv2d) else network.first_layer
    first = nn.Sequential(model.normalize, first) if isinstance(model, Normalized) else first
    return first, lambda features: network.after_first_layer(features.clone())  # a clone: the network may work in place
