"""A trial pass: one real batch through a network, before anything is written or attacked."""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from attacks.memory import out_of_memory
from harness.datasets.batches import to_unit
from harness.errors import UserError
from harness.training.undisturbed import undisturbed

TRIED = 4    # images
SAME = 1e-2  # how far the logits in another memory format may be, as a part of their length


@dataclass(frozen=True)
class Trial:
    """What a network has shown: the number of its outputs, and the parameters that its pass does not use."""

    num_outputs: int
    unused: tuple[str, ...]


def trial_pass(network: nn.Module, images: Tensor, num_classes: int, *, dtype: torch.dtype = torch.float32,
               report: Callable[[str], None] = print) -> Trial:
    """Pass a few images through the network as what follows does, and leave no trace but its memory format.

    network: on the device of `images` [N, C, H, W] uint8, in the mode of what follows; dtype: of autocast.
    The network is put into channels last, which is faster; where it fails so, as `.view` on a feature map
    does, it stays contiguous, and `report` gets a line that says so. Raises UserError in one line where the
    network fails, gives anything but finite logits [B, K] with K >= num_classes, changes its input in place,
    or where no gradient reaches the images.
    """
    x = to_unit(images[:TRIED])
    _give_shapes(network, x)
    network.to(memory_format=torch.contiguous_format)
    found = _tried(network, x, num_classes, dtype)
    expected = _logits(network, x)
    try:
        network.to(memory_format=torch.channels_last)
        _tried(network, x.contiguous(memory_format=torch.channels_last), num_classes, dtype)
        given = _logits(network, x.contiguous(memory_format=torch.channels_last))
        same = (given - expected).norm() <= SAME * expected.norm()
        reason = None if same else "channels last changes its outputs"
    except (UserError, RuntimeError) as error:
        reason = f"channels last fails: {str(error).splitlines()[0]}"
    if reason:
        network.to(memory_format=torch.contiguous_format)
        report(f"note: the network stays contiguous, which is slower, since {reason}")
    return found


def _give_shapes(network: nn.Module, x: Tensor) -> None:
    """Show images to torch's lazy modules (nn.LazyLinear), which take their weights' shapes from them."""
    if any(isinstance(module, LazyModuleMixin) for module in network.modules()):
        training = network.training
        with torch.no_grad():
            _passed(network.eval(), x)
        network.train(training)


def _logits(network: nn.Module, x: Tensor) -> Tensor:
    """The float32 logits in eval mode: dropout depends on the memory format."""
    with undisturbed(network, x.device), torch.no_grad():
        return network.eval()(x.clone(memory_format=torch.preserve_format)).float()


def _tried(network: nn.Module, x: Tensor, num_classes: int, dtype: torch.dtype) -> Trial:
    parameters = {name: value for name, value in network.named_parameters() if value.requires_grad}
    with undisturbed(network, x.device), torch.autocast(x.device.type, dtype, dtype != torch.float32):
        with torch.no_grad():
            _check_outputs(_passed(network, x), x, num_classes)
        point = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with torch.enable_grad():
            logits = _passed(network, point)
            gradients = _gradients(logits, [point, *parameters.values()])
    if gradients[0] is None:
        raise UserError("no gradient of the network's outputs reaches the images, and every attack here "
                        "follows one: a detach(), no_grad(), rounding or numpy stands in its forward pass")
    if network.training and not gradients[0].any() and (logits != logits[:1]).any():
        raise UserError("the gradient of the network's outputs is zero at every image, so adversarial "
                        "training would learn nothing: rounding stands in its forward pass")
    unused = [name for name, gradient in zip(parameters, gradients[1:]) if gradient is None]
    return Trial(logits.shape[1], tuple(unused))


def _passed(network: nn.Module, x: Tensor) -> Tensor:
    """network(x), of which x is left as it is.  Raises UserError where it fails or changes x."""
    given = x if x.requires_grad else x.clone(memory_format=torch.preserve_format)
    try:
        outputs = network(given)
    except Exception as error:  # of any kind: it is the user's own code
        if out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        wanted = ", with a gradient for them" if x.requires_grad else ""
        raise UserError(f"the network does not take images of {'x'.join(map(str, x.shape[1:]))}{wanted} "
                        f"({type(error).__name__}: {reason})") from error
    if not torch.equal(given, x):
        raise UserError("the network changes its input in place, so an attack would lose its images: let it "
                        "work on a copy (x = x.clone())")
    return outputs


def _check_outputs(outputs: object, x: Tensor, num_classes: int) -> None:
    if not isinstance(outputs, Tensor):
        parts = f" with {', '.join(map(str, outputs))}" if isinstance(outputs, dict) else ""
        raise UserError(f"the network gives a {type(outputs).__name__}{parts}, not a tensor of logits "
                        "[B, K]: let its forward return the logits alone")
    shape = tuple(outputs.shape)
    if len(shape) != 2 or shape[0] != len(x) or not outputs.is_floating_point():
        raise UserError(f"the network gives outputs of shape {shape} and type {outputs.dtype} for {len(x)} "
                        "images, not floating-point logits [B, K]")
    if shape[1] < num_classes:
        raise UserError(f"the network gives {shape[1]} outputs where the data set has {num_classes} classes")
    if not bool(torch.isfinite(outputs).all()):
        raise UserError("the network's outputs are not finite")


def _gradients(logits: Tensor, sources: list[Tensor]) -> list[Tensor | None]:
    if not logits.requires_grad:
        return [None] * len(sources)
    try:
        return list(torch.autograd.grad(logits.float().square().sum(), sources, allow_unused=True))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(f"the gradient of the network's outputs cannot be computed ({reason})") from error
