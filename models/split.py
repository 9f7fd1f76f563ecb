"""A network cut behind its first layer, f(x) = rest(f0(x)): what YOPO (Zhang et al., NeurIPS 2019) attacks without the rest."""
from collections.abc import Callable

from torch import Tensor, nn

from models.normalize import Normalized


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
    first = nn.Sequential(model.normalize, network.first_layer) if isinstance(model, Normalized) else network.first_layer
    return first, lambda features: network.after_first_layer(features.clone())  # a clone: the network may work in place
