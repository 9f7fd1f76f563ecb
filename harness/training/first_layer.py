"""The first layer of a network, f = g(f0(x)), which YOPO (Zhang et al., NeurIPS 2019) attacks alone."""
from collections.abc import Callable

from torch import Tensor, nn

from attacks.frozen import predict
from harness.errors import UserError


class _Reached(Exception):
    """Ends a pass behind the first layer; carries its output."""


class FirstLayer(nn.Module):
    """f0 of a model: images x [B, C, H, W] -> the first layer's output, in float32 or wider, with a graph.

    The first layer is the first module with parameters of its own that has done its work in a pass of the
    model, behind normalisation where there is one. Its output is caught by a hook, in a pass that ends there
    or, by `with_logits`, in one that goes on. Raises UserError for a network without such a module, and for
    one whose output is no tensor.
    """

    def __init__(self, model: nn.Module, x: Tensor):
        super().__init__()
        self.model = model
        self.layer = (_first(model, x),)  # in a tuple: a module here would give its parameters a second name

    def forward(self, x: Tensor) -> Tensor:
        """f0(x) alone: the pass ends behind the first layer."""
        def stop(layer: nn.Module, args: tuple, output: Tensor) -> None:
            raise _Reached(output)

        try:
            self._pass(x, stop)
        except _Reached as reached:
            return _wide(reached.args[0])
        raise RuntimeError("the network does not reach its first layer")

    def with_logits(self, x: Tensor, cut: bool = False) -> tuple[Tensor, Tensor]:
        """f0(x), which keeps its gradient, and logits [B, K]; cut: no gradient goes into the first layer."""
        caught: list[Tensor] = []

        def catch(layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            """A hook that keeps the layer's first output, and cuts it off where that is wanted."""
            if caught:
                return None  # a layer that is called again
            features = _wide(output.detach() if cut else output)
            caught.append(features.requires_grad_() if features.is_leaf else features)
            features.retain_grad()
            return features.to(output.dtype, copy=True)  # a copy: the network may work in place

        logits = self._pass(x, catch)
        return caught[0], logits

    def _pass(self, x: Tensor, hook: Callable) -> Tensor:
        handle = self.layer[0].register_forward_hook(hook)
        try:
            return self.model(x)
        finally:
            handle.remove()


def _first(model: nn.Module, x: Tensor) -> nn.Module:
    """The first module with parameters of its own that gives its output in a pass on x."""
    def stop(module: nn.Module, args: tuple, output: object) -> None:
        raise _Reached(module, output)

    owners = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    handles = [module.register_forward_hook(stop) for module in owners]
    try:
        predict(model, x)
    except _Reached as reached:
        module, output = reached.args
        if isinstance(output, Tensor):
            return module
        kinds = type(module).__name__, type(output).__name__
        raise UserError("the network's first layer, a {}, gives a {}, not a tensor".format(*kinds)) from None
    finally:
        for handle in handles:
            handle.remove()
    raise UserError("the network calls no module with parameters of its own: it has no first layer")


def _wide(features: Tensor) -> Tensor:
    return features if features.itemsize >= 4 else features.float()
