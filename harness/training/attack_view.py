"""The attack's view of a network: the same function, run faster, and checked before it is used.

torch.fx traces the network, down to the modules of torch.nn. What is recognised in the graph runs by
`harness.training.fused`:

    conv [-> BatchNorm] [-> addition] [-> ReLU]     one step
    [ReLU ->] 2x2 max-pooling                       the pooling first: a quarter of the ReLUs, the same bits
    BatchNorm -> ReLU                               in the memory of the BatchNorm's output
    adaptive average pooling to the map's own size  nothing: a mean of one number is the number

A form belongs to one state of the network: its modules, their modes, what they hold beside tensors, and what
is trainable. It is made at the first pass in that state, and is used only if
  - no module has a hook, a parametrization or a forward of its own instance, then or at any later pass;
  - no tensor operation runs while the network is traced: its result would be a constant of the form; and the
    network turns neither gradients nor autocast off or on, has no gradients of its own, and does without
    checkpointing;
  - the network's own pass writes nothing that was there before, but the buffers of the modules of torch.nn;
  - its logits, and the gradients for the images and the trainable parameters, are the network's own.
Else, and for control flow that depends on values, the network itself is run. All of this is silent, and
leaves no trace on the network, its random numbers or its statistics. What `forward` reads from outside of the
network, such as a global variable, is as it was when the form was made.
"""
import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.training import fused
from harness.training.rewrite import rewrite
from harness.training.undisturbed import HOOKS, NetworkState, random_states, undisturbed

SAMPLE = 4  # images of the first batch that a form is checked on
MOST = 32   # forms: a network that changes its state more often is run itself

# How far a form may be from the network, as a part of the whole tensor's length. With every step as its
# modules it does the same operations in the same order, which only a GPU's atomic additions round
# differently. With fused steps, sums of some thousand products are added in another order, which is 1e-6 of a
# logit; ReLUs that are zero up to this then change sides, and with them single pixels of the gradient: up to
# 4e-3 of it was seen.
SAME, SAME_GRADIENT = 1e-6, 1e-5
ROUNDED, ROUNDED_GRADIENT = 1e-4, 5e-2

REFUSED = [(torch.no_grad, "__enter__"), (torch.enable_grad, "__enter__"),
           (torch.set_grad_enabled, "__init__"), (torch.inference_mode, "__enter__"),
           (torch.autocast, "__enter__"), (torch.autograd.Function, "apply"),
           (torch.autograd.graph.saved_tensors_hooks, "__enter__")]
GLOBAL_HOOKS = [getattr(torch_hooks, f"_global{name}") for name in HOOKS]


class AttackView:
    """`view(x)` gives the logits of `network`, x [B, C, H, W]: by the fast form of its state, else by itself.

    No nn.Module, so that a parameter has one name. A copy of the view, or of what holds it, is a view of the
    copied network.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self.forms: list[_Form] = []
        self.folded: WeakKeyDictionary[nn.Module, fused.Folded] = WeakKeyDictionary()

    def __reduce__(self) -> tuple:
        return AttackView, (self.network,)

    def __call__(self, x: Tensor) -> Tensor:
        """The logits [B, K]."""
        run = self._form(x)
        return self.network(x) if run is None else run(x)

    @property
    def used(self) -> bool:
        """Whether a form has been made that is used."""
        return any(form.run is not None for form in self.forms)

    def _form(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        if not fused.is_plain(x) or x.ndim != 4 or any(GLOBAL_HOOKS) or _is_transformed():
            return None
        surroundings = _surroundings(x)
        for form in self.forms:
            if form.surroundings == surroundings and form.state.is_same():
                return form.run
        if len(self.forms) == MOST:
            return None
        state = NetworkState(self.network)
        run = None if state.hooked or not state.visible else _make(self.network, x, state, self.folded)
        self.forms.append(_Form(state, surroundings, run))
        return run


class _Form:
    """What runs (None: the network itself) in a state of the network and of torch."""

    def __init__(self, state: "NetworkState", surroundings: tuple, run: Callable[[Tensor], Tensor] | None):
        self.state, self.surroundings, self.run = state, surroundings, run


def _is_transformed() -> bool:
    """Whether torch.compile, torch.jit, torch.func or inference mode has hold of this pass."""
    compiled = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return compiled or torch.is_inference_mode_enabled() or torch._C._are_functorch_transforms_active()


def _surroundings(x: Tensor) -> tuple:
    """What a network's forward may ask of torch."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return kind, x.dtype, autocast, torch.is_grad_enabled()


# ---- making a form -----------------------------------------------------------------------------------------


def _make(network: nn.Module, x: Tensor, state: NetworkState,
          folded: WeakKeyDictionary) -> Callable[[Tensor], Tensor] | None:
    """The form for this state of the network, None where it is to be run itself."""
    sample = x.detach()[:SAMPLE].clone(memory_format=torch.preserve_format)
    try:
        with undisturbed(network, x.device) as disturbed, _Writes(network) as writes:
            network(sample)
            if writes.found or disturbed():
                return None
        with undisturbed(network, x.device):
            run = _traced(network, folded)
        with _nothing_hidden(state.parameters):
            return run if _agree(network, run, sample, state.parameters) else None
    except Exception:  # of any kind: the network's own on fewer images, of tracing, of running the form
        return None
    finally:
        folded.clear()  # of the numbers in the place of zeros


def _traced(network: nn.Module, folded: WeakKeyDictionary) -> Callable[[Tensor], Tensor]:
    """The network's graph with what is recognised in it as fused steps, as a function."""
    others = list(inspect.signature(type(network).forward).parameters.values())[2:]
    defaults = {other.name: other.default for other in others if other.default is not inspect.Parameter.empty}
    with _Nothing(), _refused():
        graph = _Tracer().trace(network, concrete_args=defaults)

    def conv_norm_relu(x, conv, norm, add, relu, in_place):
        plus = operator.iadd if in_place else operator.add
        return fused.conv_norm_relu(x, conv, norm, add, relu, plus, folded)

    rewrite(graph, dict(network.named_modules()), conv_norm_relu)
    return fx.GraphModule(network, graph).forward


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True


@contextmanager
def _refused() -> Iterator[None]:
    """Raise at what a trace leaves out: switched gradients or autocast, checkpointing, own gradients."""
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("this does not show in a trace")

    before = [(kind, name, vars(kind)[name]) for kind, name in REFUSED]
    try:
        for kind, name in REFUSED:
            setattr(kind, name, refuse)
        yield
    finally:
        for kind, name, value in before:
            setattr(kind, name, value)


class _Nothing(TorchDispatchMode):
    """Raises at any tensor operation."""

    def __torch_dispatch__(self, function: Callable, types: tuple, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        raise RuntimeError(f"{function} would be a constant of the form")


class _Writes(TorchDispatchMode):
    """Finds writes to what was there before, but to buffers of torch.nn's modules, and undoes them."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.found: list[tuple[Tensor, Tensor]] = []
        tracer = _Tracer()
        leaves = [module for module in network.modules() if tracer.is_leaf_module(module, "")]
        self.allowed = {_storage(buffer) for module in leaves for buffer in module.buffers()}

    def __torch_dispatch__(self, function: Callable, types: tuple, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        arguments = function._schema.arguments
        named = kwargs or {}
        given = list(zip(arguments, args))
        given += [(argument, named[argument.name]) for argument in arguments if argument.name in named]
        for argument, value in given:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(value):
                    if _storage(tensor) not in self.allowed:
                        self.found.append((tensor, tensor.clone()))
        before = {_storage(tensor) for tensor in _tensors((args, named))}
        result = function(*args, **named)
        self.allowed |= {_storage(tensor) for tensor in _tensors(result)} - before
        return result

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        with torch.no_grad():
            for tensor, value in reversed(self.found):
                tensor.copy_(value)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def _nothing_hidden(parameters: list[Tensor]) -> Iterator[None]:
    """Random numbers for parameters of zeros only, as of a last layer at its start: they hide the rest."""
    zeros = [parameter for parameter in parameters if not bool(parameter.any())]
    try:
        for k, parameter in enumerate(zeros):  # by `data`: a graph that is kept does not notice
            parameter.data.normal_(0.0, 0.1, generator=torch.Generator(parameter.device).manual_seed(k))
        yield
    finally:
        for parameter in zeros:
            parameter.data.zero_()


def _agree(network: nn.Module, run: Callable[[Tensor], Tensor], sample: Tensor,
           parameters: list[Tensor]) -> bool:
    """Whether `run` gives what the network gives: logits as in this pass, gradients without autocast."""
    def results(function: Callable, as_modules: bool, gradients: bool) -> list[list[Tensor]]:
        with undisturbed(network, sample.device), fused.as_modules(as_modules):
            return _results(function, network, sample, parameters, gradients)

    kind, gradients = sample.device.type, torch.is_grad_enabled()
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, dtype, cache_enabled=False):  # a cast that is kept would have no graph
            if not _near(results(run, True, False), results(network, True, False), SAME, SAME_GRADIENT):
                return False
    with torch.autocast(kind, enabled=False):
        expected = results(network, True, gradients)
        if not _near(results(run, True, gradients), expected, SAME, SAME_GRADIENT):
            return False
        fuses = not all(parameter.requires_grad for parameter in parameters)
        return not fuses or _near(results(run, False, gradients), expected, ROUNDED, ROUNDED_GRADIENT)


def _results(function: Callable[[Tensor], Tensor], network: nn.Module, sample: Tensor,
             parameters: list[Tensor], gradients: bool) -> tuple[list[Tensor], list[Tensor]]:
    """What a pass gives and leaves behind, and its gradients for the images and the trainable parameters."""
    x = sample.clone(memory_format=torch.preserve_format).requires_grad_(gradients)
    sources = [x, *(parameter for parameter in parameters if parameter.requires_grad)]
    logits = function(x)
    found = []
    if gradients and logits.requires_grad:
        slopes = torch.linspace(-1.0, 1.0, logits.numel(), dtype=logits.dtype, device=logits.device)
        slopes = slopes.view_as(logits)
        found = torch.autograd.grad(logits, sources, slopes, allow_unused=True)
        found = [sample.new_zeros(()) if gradient is None else gradient for gradient in found]
    left = [buffer.clone() for buffer in network.buffers()] + random_states(sample.device)
    return [logits.detach(), *left], found


def _near(found: tuple[list, list], expected: tuple[list, list], values: float, gradients: float) -> bool:
    return all(len(some) == len(others) and all(_is_near(a, b, tolerance) for a, b in zip(some, others))
               for some, others, tolerance in zip(found, expected, (values, gradients)))


def _is_near(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """|found - expected| <= tolerance |expected| in l_2; never for tensors that are not finite.

    By their largest entry, so that no square leaves float32, which is all that some accelerators have.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not found.is_floating_point() or not found.numel():
        return torch.equal(found, expected)
    largest = expected.abs().amax().clamp_min(torch.finfo(expected.dtype).tiny)
    apart = ((found - expected) / largest).float().norm()
    return bool(apart <= tolerance * (expected / largest).float().norm())
