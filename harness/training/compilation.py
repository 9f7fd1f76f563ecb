"""torch.compile on trial: what it makes of a piece of the training is used once it has been seen to do the same, and to be faster.

    the attack's step      forward pass, loss, gradient with respect to x alone, move and projection as one graph; for an attack that draws
                           random numbers or moves statistics, and where torch.func or a single graph fails, the network's passes in it
    the network's pass     the others: the clean prediction, and the training step with its gradients

Each is tried at its first call, on that batch; one line says what came of it. A trial leaves no trace but that line: it consumes no random
number, and weights, gradients, running statistics and modes are as before. Whatever fails, then or later, is done without torch.compile,
but for the backward pass of a training step, whose failure ends the run. What is compiled later for another case of the same shape, such
as a clean prediction, is not tried again.
"""
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

ENOUGH_STEPS = 30_000  # attack steps of a run over which a minute of compiling is 2 ms each, about what a ResNet-18 step can gain
RADIUS = 0.1           # of the step's trial, pixels in [0, 1]: nearer to x, where a KL is flat, bfloat16's gradients are half rounding
WARM_UP = 3            # calls before the first that counts: compile, record the CUDA graph, replay it
ROUNDS, CALLS = 3, 4   # the best of so many rounds of so many calls is the time

# How far a step's moves, and a pass's logits and gradients, may be from the plain ones, as a part of these: so many times as far as float32
# is from them, and a little, for the TF32 that float32 may be on a GPU; but at most half. Float32 was seen to be 5 to 16 % away from
# bfloat16 in a step (CE and KL: other signs for 3 to 8 % of the pixels) and up to 34 % in the gradients of ResNet-18; what has nothing to
# do with the plain form is 100 % away.
ROUNDING, LITTLE, MOST = 2.0, 0.05, 0.5


@dataclass
class Verdict:
    """What is known of one piece: nothing yet (open), the kind of call that its compiled form is used for, or that it never is (None)."""

    open: bool = True
    kind: object = None


class Compilation:
    """The compiled forms of a run's attack step and network pass, and the verdicts on them; a copy of a model shares them.

    always: use what agrees even where it is slower; graphs: replay each form as one CUDA graph, whose outputs are copied before the next
    replay writes them again; say: prints a line; begin: called before the first trial.
    """

    def __init__(self, always: bool, graphs: bool, say: Callable[[str], None], begin: Callable[[], None] = lambda: None):
        self.always, self.graphs, self.say, self.begin = always, graphs, say, begin
        inductor = {"fallback_random": True} | ({"triton.cudagraphs": True} if graphs else {})  # dropout's numbers are those of plain torch
        self.compile = partial(torch.compile, dynamic=False, options=inductor)
        self.network = self.compile(_network_pass)
        self.whole: Callable | None = None  # the compiled step, once it is used
        self.step, self.passes = Verdict(), Verdict()

    def __deepcopy__(self, memo: dict) -> "Compilation":
        return self

    # ---- the attack's step -------------------------------------------------------------------------------------------------------

    def pgd_step(self, model: nn.Module, steps: Callable, whole_step: Callable, x_adv: Tensor, settings: dict[str, object]) -> Callable:
        """The steps of an attack: those of `steps` on the plain or on the compiled network, or whole_step compiled.

        Batches of another shape than the first, as the last of an epoch may be, are left to plain torch.
        """
        plain = partial(steps, _logits_of(model.plain), **settings)
        sizes = {name: settings[name] for name in ("epsilon", "step_size")}
        sizes = {name: value if isinstance(value, Tensor) else x_adv.new_full((), value) for name, value in sizes.items()}
        kind = (x_adv.shape, x_adv.dtype, settings["norm"], model.training, *(value.shape for value in sizes.values()))
        if self.step.open:
            self._begin_once()
            self._try_step(model, steps, whole_step, settings | sizes, kind)
        if self.step.kind != kind:
            return plain()
        fast = self._fast_step(model, steps, settings | sizes)

        def advance(x_adv: Tensor) -> tuple[Tensor, Tensor]:
            """One step by the compiled form, by plain torch once that has failed: the next x_adv, and the logits of this one."""
            if self.step.kind == kind:
                try:
                    return fast(x_adv)
                except Exception as error:
                    self._fail(self.step, "the attack's step", error)
            return plain()(x_adv)

        return advance

    def _fast_step(self, model: nn.Module, steps: Callable, settings: dict[str, object]) -> Callable:
        if self.whole is None:
            return steps(_logits_of(partial(self.network, model)), **settings)
        call = partial(self.whole, model, **settings)
        return (lambda x_adv: tuple(out.clone() for out in call(x_adv))) if self.graphs else call

    def _try_step(self, model: nn.Module, steps: Callable, whole_step: Callable, settings: dict[str, object], kind: object) -> None:
        """Decide on the step, at a radius where gradients are more than rounding; a gradient of zeros leaves that to the next batch."""
        x = settings["x"]
        radius = RADIUS * (1.0 if settings["norm"] == "linf" else math.sqrt(x[0].numel()))  # of a ball that holds all of the noise
        settings = settings | {"epsilon": torch.full_like(settings["epsilon"], radius),
                               "step_size": torch.full_like(settings["step_size"], radius / 4)}
        noise = torch.rand(x.shape, generator=torch.Generator(x.device).manual_seed(0), device=x.device).to(x.dtype)
        points = [(x + RADIUS * sign * (1.98 * noise - 0.99)).clamp_(0.0, 1.0) for sign in (1, -1)]  # inside the ball, so no step: no move

        def move(advance: Callable, k: int) -> list[list[Tensor]]:
            moved, logits_adv = advance(points[k].clone())
            return [[moved - points[k]], [logits_adv]]

        try:
            plain = partial(move, steps(_logits_of(model.plain), **settings))
            with untouched(model, x.device) as touched:
                if not any(bool(plain(k)[0][0].any()) for k in (0, 1)):
                    return
                forms = (None,) if touched() else (self.compile(whole_step, fullgraph=True), None)
        except Exception as error:
            return self._fail(self.step, "the attack's step", error)
        for self.whole in forms:
            name = "the attack's step" if self.whole else "the network's passes in the attack's step"
            fast = partial(move, self._fast_step(model, steps, settings))
            if self._prove(self.step, kind, name, model, plain, fast, x.device):
                return

    # ---- the network's pass ------------------------------------------------------------------------------------------------------

    def run(self, model: nn.Module, x: Tensor) -> Tensor:
        """model.plain(x), compiled if that has been proved for this shape: in the first pass with trainable parameters."""
        if self.passes.open and torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters()):
            self._begin_once()
            self._try_pass(model, x)
        if self.passes.kind == x.shape:
            try:
                return self.network(model, x)
            except Exception as error:
                self._fail(self.passes, "the network's pass", error)
        return model.plain(x)

    def _try_pass(self, model: nn.Module, x: Tensor) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def differentiate(run: Callable, k: int) -> list[list[Tensor]]:
            """The logits of batch k, and the gradients with respect to its images, where they have one, and to the parameters."""
            batch = (x, x.flip(0))[k].detach().requires_grad_(x.requires_grad)
            logits = _logits_of(run)(batch)
            slopes = torch.linspace(-1.0, 1.0, logits.numel(), device=x.device).view_as(logits)
            images = [batch] if x.requires_grad else []
            gradients = torch.autograd.grad(logits, images + parameters, slopes, allow_unused=True)
            of_images, of_parameters = ([gradient.clone() for gradient in part if gradient is not None]
                                        for part in (gradients[:len(images)], gradients[len(images):]))
            return [[logits.detach()], of_images, of_parameters]

        self._prove(self.passes, x.shape, "the network's pass", model, partial(differentiate, model.plain),
                    partial(differentiate, partial(self.network, model)), x.device)

    # ---- a trial -----------------------------------------------------------------------------------------------------------------

    def _prove(self, verdict: Verdict, kind: object, name: str, model: nn.Module, plain: Callable, fast: Callable,
               device: torch.device) -> bool:
        """Close `verdict`, with `kind` where fast(k) gives the tensors of plain(k) for the batches k = 0 and 1, and sooner."""
        try:
            with untouched(model, device):
                for _ in range(WARM_UP):
                    fast(0)
            forms = partial(_in_float32, model, plain), plain, fast
            exact, expected, found = (self._isolated(form, model, device) for form in forms)
            rounding, away = ([distance(*pair) for pair in zip(expected, results)] for results in (exact, found))
            with untouched(model, device):
                gain = speedup(plain, fast, device)
        except Exception as error:
            self._fail(verdict, name, error)
            return False
        agrees = all(d <= min(MOST, LITTLE + ROUNDING * r) for d, r in zip(away, rounding))
        used = agrees and (self.always or gain > 1.0)
        self._close(verdict, kind if used else None)
        self.say(f"torch.compile, {name}: {gain:.2f} times as fast, {100 * max(away):.2g} % away where float32 is "
                 f"{100 * max(rounding):.2g} %: {'used' if used else 'going on without it'}")
        return used

    def _begin_once(self) -> None:
        self.begin()
        self.begin = lambda: None

    def _close(self, verdict: Verdict, kind: object) -> None:
        verdict.open, verdict.kind = False, kind
        if self.step.kind is None and self.passes.kind is None:
            torch.compiler.reset()  # gives back the memory of CUDA graphs that nobody replays

    def _isolated(self, function: Callable, model: nn.Module, device: torch.device) -> list[list[Tensor]]:
        with untouched(model, device):
            return function(1)  # another batch than the one that a CUDA graph was recorded with

    def _fail(self, verdict: Verdict, name: str, error: Exception) -> None:
        self._close(verdict, None)
        reason = next(iter(str(error).strip().splitlines()), "")[:150]
        self.say(f"torch.compile failed on {name} ({type(error).__name__}: {reason}): going on without it")


def _network_pass(model: nn.Module, x: Tensor) -> Tensor:
    return model.plain(x)


def _logits_of(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The logits of a pass as a model gives them: in float32, and a copy that the next replay of a CUDA graph leaves alone."""
    return lambda x: run(x).to(torch.float32, copy=True)


def _in_float32(model: nn.Module, function: Callable, k: int) -> list[list[Tensor]]:
    dtype, model.dtype = model.dtype, torch.float32
    try:
        return function(k)
    finally:
        model.dtype = dtype


def distance(plain: list[Tensor], other: list[Tensor]) -> float:
    """sum |other - plain| over sum |plain|, over all tensors: 0 for equal ones, infinity where a value is not a number."""
    size = sum(float(tensor.double().abs().sum()) for tensor in plain)
    difference = sum(float((a.double() - b.double()).abs().sum()) for a, b in zip(other, plain, strict=True))
    return 0.0 if difference == 0 else difference / size if 0 < size < math.inf and difference < math.inf else math.inf


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[Callable[[], bool]]:
    """Put back torch's random states and the model's buffers on exit; yields a function that says whether one has changed so far."""
    before = _random_states(device)
    buffers = [(module, name, buffer, buffer.clone()) for module in model.modules() for name, buffer in module.named_buffers(recurse=False)]

    def touched() -> bool:
        same = all(getattr(module, name) is buffer and torch.equal(buffer, value) for module, name, buffer, value in buffers)
        return not (same and all(map(torch.equal, _random_states(device), before)))

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


def _random_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([] if device.type == "cpu" else [getattr(torch, device.type).get_rng_state(device)])]


def speedup(plain: Callable[[int], object], fast: Callable[[int], object], device: torch.device) -> float:
    """The time of plain(0) over that of fast(0), taken in turns, on a GPU each with the end of its work."""
    synchronize = partial(getattr(torch, device.type).synchronize, device)
    times = {plain: [], fast: []}
    for _ in range(ROUNDS):
        for function in times:
            synchronize()
            started = time.perf_counter()
            for _ in range(CALLS):
                function(0)
            synchronize()
            times[function].append(time.perf_counter() - started)
    return min(times[plain]) / min(times[fast])
