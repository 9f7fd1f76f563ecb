"""torch.compile behind `--compile`: the attack's step as one graph, and the network's other passes.

    the attack's step      forward pass, loss, gradient with respect to x alone, move and projection
    the network's pass     the others: the clean prediction, and the training step with its gradients

Each is compiled for the shape of its first batch, and compared there with plain torch; other shapes are
plain. What cannot be compiled, fails later or does something else is done by plain torch from then on, and
one line says so. An exception is the backward pass of a training step, whose failure ends the run.
"""
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from harness.training.options import CompileOptions, RunOptions
from harness.training.undisturbed import random_states

RADIUS = 0.1  # of the comparison: nearer to x, where a KL is flat, bfloat16's gradients are half rounding
WARM_UP = 3   # calls before the comparison: compile, record the CUDA graph, replay it
# How far from plain torch's moves, logits and gradients is still the same function, as a part of these.
# bfloat16 alone was seen to change 16 % of a step's moves and 34 % of ResNet-18's gradients; what has nothing
# to do with the plain form is 100 % away.
FAR = 0.5


def compilation_of(cfg: RunOptions, device: torch.device, say: Callable[[str], None]) -> "Compilation | None":
    """What a run compiles with; None without --compile. CUDA graphs are for a GPU."""
    if not isinstance(cfg, CompileOptions) or not cfg.compile:
        return None
    return Compilation(cfg.graphs and device.type == "cuda", say)


class Compilation:
    """The compiled forms of a run's attack step and network pass; a copy of a model shares them.

    graphs: replay each as one CUDA graph, whose outputs are copied before the next replay writes them again;
    say: prints a line.
    """

    def __init__(self, graphs: bool, say: Callable[[str], None]):
        inductor = {"fallback_random": True}  # dropout as in plain torch
        if graphs:
            inductor["triton.cudagraphs"] = True
        self.compile = partial(torch.compile, dynamic=False, options=inductor)
        self.graphs = graphs
        self.step = Piece("the attack's step", say)
        self.passes = Piece("the network's pass", say)
        self.whole_step: Callable | None = None
        self.network = self.compile(_network_pass)

    def __deepcopy__(self, memo: dict) -> "Compilation":
        return self

    def used(self) -> list[str]:
        """The pieces that are compiled."""
        return [piece.name for piece in (self.step, self.passes) if piece.kind not in (UNSEEN, None)]

    def pgd_step(self, model: nn.Module, steps: Callable, whole_step: Callable, x_adv: Tensor,
                 settings: dict[str, object]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """An attack's steps: whole_step compiled, or else `steps`, in which the network's passes may be."""
        plain = steps(_logits_of(partial(self.run, model)), **settings)
        sizes = {name: settings[name] for name in ("epsilon", "step_size")}
        for name, value in sizes.items():
            sizes[name] = value if isinstance(value, Tensor) else x_adv.new_full((), value)
        shapes = [value.shape for value in sizes.values()]
        kind = (x_adv.shape, x_adv.dtype, settings["norm"], model.training, *shapes)
        if self.whole_step is None:
            self.whole_step = self.compile(whole_step, fullgraph=True)

        def compiled(x_adv: Tensor) -> tuple[Tensor, Tensor]:
            moved, logits_adv = self.whole_step(model, x_adv, **settings | sizes)
            return (moved.clone(), logits_adv.clone()) if self.graphs else (moved, logits_adv)

        away = partial(self._step_distance, model, steps, settings | sizes)
        return lambda x_adv: self.step.run(kind, partial(compiled, x_adv), partial(plain, x_adv), away)

    def run(self, model: nn.Module, x: Tensor) -> Tensor:
        """model.plain(x), compiled for the shape of the first pass with trainable parameters."""
        trainable = (parameter.requires_grad for parameter in model.parameters())
        if self.passes.kind is UNSEEN and not (torch.is_grad_enabled() and any(trainable)):
            return model.plain(x)
        away = partial(self._pass_distance, model, x)
        return self.passes.run(x.shape, partial(self.network, model, x), partial(model.plain, x), away)

    def _step_distance(self, model: nn.Module, steps: Callable, settings: dict[str, object]) -> float | None:
        """How far the compiled step is from the plain one, at a radius of its own; None if no pixel moves."""
        x = settings["x"]
        radius = RADIUS  # of a ball that holds the noise
        if settings["norm"] != "linf":
            radius *= math.sqrt(x[0].numel())
        settings = settings | {"epsilon": torch.full_like(settings["epsilon"], radius),
                               "step_size": torch.full_like(settings["step_size"], radius / 4)}
        generator = torch.Generator(x.device).manual_seed(0)
        noise = torch.rand(x.shape, generator=generator, device=x.device).to(x.dtype)
        noise = RADIUS * (1.98 * noise - 0.99)  # inside the ball
        first = (x + noise).clamp_(0.0, 1.0)
        second = (x - noise).clamp_(0.0, 1.0)
        with untouched(model, x.device) as touched:
            moved, logits = steps(_logits_of(model.plain), **settings)(second.clone())
            if touched():
                raise RuntimeError("it draws random numbers or moves statistics")
            if torch.equal(moved, second):
                return None
            for _ in range(WARM_UP):
                self.whole_step(model, first.clone(), **settings)
            found, found_logits = self.whole_step(model, second.clone(), **settings)
        return max(distance([moved - second], [found - second]), distance([logits], [found_logits]))

    def _pass_distance(self, model: nn.Module, x: Tensor) -> float:
        """How far the compiled pass is from the plain one: logits, and gradients of what wants them."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def differentiate(run: Callable[[Tensor], Tensor], images: Tensor) -> tuple[list[Tensor], ...]:
            """The logits of a pass, and its gradients."""
            batch = images.detach().requires_grad_(x.requires_grad)
            inputs = [batch] * x.requires_grad
            with untouched(model, x.device):
                logits = _logits_of(run)(batch)
                slopes = torch.linspace(-1.0, 1.0, logits.numel(), device=x.device).view_as(logits)
                gradients = torch.autograd.grad(logits, inputs + parameters, slopes, allow_unused=True)
            gradients = [None if gradient is None else gradient.clone() for gradient in gradients]
            of_parameters = [gradient for gradient in gradients[len(inputs):] if gradient is not None]
            return [logits.detach()], gradients[:len(inputs)], of_parameters

        for _ in range(WARM_UP):
            differentiate(partial(self.network, model), x)
        other = x.flip(0)  # than the batch that a CUDA graph was recorded with
        plain = differentiate(model.plain, other)
        compiled = differentiate(partial(self.network, model), other)
        return max(map(distance, plain, compiled))


UNSEEN = object()


class Piece:
    """A piece of the training that may be compiled, for calls of one `kind`; None once it is left out."""

    def __init__(self, name: str, say: Callable[[str], None]):
        self.name = name
        self.say = say
        self.kind: object = UNSEEN

    def run(self, kind: object, compiled: Callable, plain: Callable,
            away: Callable[[], float | None]) -> object:
        """compiled() for calls of the first kind, else plain(), which the first failure leaves for good.

        away() is how far the one is from the other; None if that cannot be told yet: the next call decides.
        """
        if self.kind is UNSEEN or self.kind == kind:
            try:
                if self.kind is UNSEEN:
                    found = away()
                    if found is None:
                        return plain()
                    if not found <= FAR:
                        raise RuntimeError(f"it is {100 * found:.2g} % away from plain torch")
                    self.kind = kind
                    self.say(f"torch.compile: {self.name} is compiled, {100 * found:.2g} % away "
                             "from plain torch")
                return compiled()
            except Exception as error:
                self.kind = None
                reason = next(iter(str(error).strip().splitlines()), "")[:150]
                reason = f"{type(error).__name__}: {reason}"
                self.say(f"torch.compile: {self.name} goes on without it ({reason})")
        return plain()


def _network_pass(model: nn.Module, x: Tensor) -> Tensor:
    return model.plain(x)


def _logits_of(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A pass's logits, as a model gives them: in float32, a copy that no CUDA graph's replay changes."""
    return lambda x: run(x).to(torch.float32, copy=True)


def distance(plain: list[Tensor], other: list[Tensor]) -> float:
    """sum |other - plain| / sum |plain| over all tensors: 0 for equal ones, infinity if not finite."""
    size = sum(float(tensor.float().abs().sum()) for tensor in plain)
    difference = sum(float((a.float() - b.float()).abs().sum()) for a, b in zip(other, plain, strict=True))
    if difference == 0:
        return 0.0
    return difference / size if 0 < size < math.inf and difference < math.inf else math.inf


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[Callable[[], bool]]:
    """Put back torch's random states and the model's buffers on exit; yields a check for a change."""
    before = random_states(device)
    buffers = [(module, name, buffer, buffer.clone())
               for module in model.modules() for name, buffer in module.named_buffers(recurse=False)]

    def touched() -> bool:
        same = all(getattr(module, name) is buffer and torch.equal(buffer, value)
                   for module, name, buffer, value in buffers)
        return not (same and all(map(torch.equal, random_states(device), before)))

    try:
        yield touched
    finally:
        torch.set_rng_state(before[0])
        for state in before[1:]:
            getattr(torch, device.type).set_rng_state(state, device)
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                buffer.copy_(value)
                setattr(module, name, buffer)  # a network may have put another tensor in its place
